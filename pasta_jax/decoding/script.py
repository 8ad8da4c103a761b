"""Scripts: what the threads of an answer are made to write, token by token, by the real engine.

The model computes as usual; then a token of the script replaces the sampled one. So the speed of any answer can be
measured, with any weights (`benchmark.replay`).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from pasta_jax.decoding.trace import Trace
from pasta_jax.lang.program import Program
from pasta_jax.tokens.cost import threads_of_program
from pasta_jax.tokens.detokenize import Threads
from pasta_jax.tokens.tokenizer import Tokenizer

FREE = -1
"""In a script: the token is the model's choice; no branch starts here, or one with no line."""


@dataclasses.dataclass(frozen=True, eq=False)
class Script:
    """What the threads of an answer write: a line for each, main's first.

    Attributes:
      tokens: int32 [R, C]; main's from the answer's first token on, a branch's from its `<async>`, which the
        interpreter writes in any case. FREE after the last.
      branches: int32 [R, C]; where a promise ends, the line of the branch that it starts; FREE elsewhere.
    """

    tokens: np.ndarray
    branches: np.ndarray

    @property
    def size(self) -> tuple[int, int]:
        """(R, C)."""
        return self.tokens.shape[0], self.tokens.shape[1]

    @property
    def threads(self) -> Threads:
        """The lines, without FREE lines at the end."""
        count = 1 + int(self.branches.max(initial=0))
        return Threads(
            [[int(token) for token in line if token != FREE] for line in self.tokens[:count]],
            [{int(i): int(line[i]) for i in np.flatnonzero(line != FREE)} for line in self.branches[:count]],
        )

    def padded(self, size: tuple[int, int]) -> Script:
        """The same in arrays of another (R, C). Raises ValueError if they are too small."""
        (R, C), (more_R, more_C) = self.size, size
        pad = ((0, more_R - R), (0, more_C - C))
        if min(more_R - R, more_C - C) < 0:
            raise ValueError(
                f"A script of {R} threads and {C} tokens does not fit into {more_R} and {more_C}."
            )
        return Script(*(np.pad(array, pad, constant_values=FREE) for array in (self.tokens, self.branches)))


NOTHING = (1, 0)
"""Size of the script of an ordinary request, for which nothing is compiled."""


def no_script() -> Script:
    """The script of an ordinary request."""
    return Script(np.full(NOTHING, FREE, np.int32), np.full(NOTHING, FREE, np.int32))


def script_of(answer: Program | Trace, tokenizer: Tokenizer) -> Script:
    """The script by which a request gives this answer again.

    Args:
      answer: an annotated answer, or what a decode did.
      tokenizer: of the model that replays it. LayoutError (a ValueError) if it cannot spell the answer.
    """
    threads = threads_in(answer, tokenizer)
    size = len(threads.tokens), max(map(len, threads.tokens))
    script = Script(np.full(size, FREE, np.int32), np.full(size, FREE, np.int32))
    for line, (tokens, branches) in enumerate(zip(threads.tokens, threads.branches)):
        script.tokens[line, : len(tokens)] = tokens
        for index, branch in branches.items():
            script.branches[line, index] = branch
    return script


def threads_in(answer: Program | Trace, tokenizer: Tokenizer) -> Threads:
    """The answer's threads in document order, its end included. Raises LayoutError for what cannot be spelled."""
    if isinstance(answer, Trace):
        return in_document_order(answer.threads)
    return threads_of_program(tokenizer, answer)


def in_document_order(threads: Threads) -> Threads:
    """The same threads, numbered in the order in which a reader meets them, whatever the decoding's."""
    order, stack = [], [0]
    while stack:
        order.append(thread := stack.pop())
        stack += [branch for _, branch in sorted(threads.branches[thread].items(), reverse=True)]
    number = {thread: i for i, thread in enumerate(order)}
    return Threads(
        [list(threads.tokens[thread]) for thread in order],
        [{i: number[branch] for i, branch in sorted(threads.branches[thread].items())} for thread in order],
    )


def depth_of(threads: Threads) -> int:
    """How deep promises nest; 0 without any. A branch comes after the thread that promised it."""
    depths = [0] * len(threads.tokens)
    for thread, branches in enumerate(threads.branches):
        for branch in branches.values():
            depths[branch] = depths[thread] + 1
    return max(depths)
