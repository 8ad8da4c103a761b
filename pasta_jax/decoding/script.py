"""Scripts: what the threads of an answer are made to say, token by token, by the real engine.

The model computes all that it would compute; then a token that the script has takes the place of the one that was
sampled. So the speed of any answer can be measured, with any weights (`replay`).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from pasta_jax.decoding.state import Limits
from pasta_jax.decoding.trace import Trace
from pasta_jax.lang.program import Program
from pasta_jax.tokens.detokenize import Threads, threads_of
from pasta_jax.tokens.layout import layout
from pasta_jax.tokens.positions import Positions
from pasta_jax.tokens.tokenizer import Tokenizer

FREE = -1
"""In a script: the model may say what it likes. As a path: nobody's."""


@dataclasses.dataclass(frozen=True, eq=False)
class Script:
    """What threads say, known by their paths, which depend on how many threads a row can hold (`Limits.threads`).

    Attributes:
      paths: int32 [R].
      tokens: int32 [R, C]; main's from the answer's first token on, a branch's from its `<async>`, which the
        interpreter writes in any case. FREE after the last.
    """

    paths: np.ndarray
    tokens: np.ndarray

    @property
    def size(self) -> tuple[int, int]:
        """(R, C)."""
        return self.tokens.shape[0], self.tokens.shape[1]

    @property
    def lines(self) -> dict[int, list[int]]:
        """What each thread says, by its path."""
        rows = zip(self.paths, self.tokens)
        return {
            int(path): [int(token) for token in line if token != FREE] for path, line in rows if path != FREE
        }

    def padded(self, size: tuple[int, int]) -> Script:
        """The same in arrays of another (R, C). Raises ValueError if they are too small."""
        (R, C), (more_R, more_C) = self.size, size
        add_R, add_C = more_R - R, more_C - C
        if add_R < 0 or add_C < 0:
            raise ValueError(
                f"A script of {R} threads and {C} tokens does not fit into {more_R} and {more_C}."
            )
        return Script(
            np.pad(self.paths, (0, add_R), constant_values=FREE),
            np.pad(self.tokens, ((0, add_R), (0, add_C)), constant_values=FREE),
        )


NOTHING = (1, 0)
"""Size of the script of an ordinary request, for which nothing is compiled."""


def no_script() -> Script:
    """The script of an ordinary request."""
    return Script(np.full(NOTHING[0], FREE, np.int32), np.full(NOTHING, FREE, np.int32))


def script_of(answer: Program | Trace, tokenizer: Tokenizer, limits: Limits) -> Script:
    """The script by which a request gives this answer again.

    Args:
      answer: an annotated answer, or what a decode did.
      tokenizer: of the model that replays it.
      limits: of the decoder that replays it, whatever those of a trace were.

    Raises:
      ValueError: the answer does not fit into the limits, or the tokenizer cannot spell it.
    """
    threads = threads_in(answer, tokenizer)
    if len(threads.tokens) > limits.threads:
        raise ValueError(
            f"The answer has {len(threads.tokens)} threads, the decoder room for {limits.threads}. Raise "
            "Limits.threads."
        )
    if (depth := depth_of(threads)) > limits.max_depth:
        raise ValueError(
            f"The answer's promises nest {depth} deep, the decoder's {limits.max_depth}. Raise Limits.max_depth."
        )
    lines = lines_of(threads, limits.threads)
    tokens = np.full((len(lines), max(map(len, lines.values()))), FREE, np.int32)
    for row, line in zip(tokens, lines.values()):
        row[: len(line)] = line
    return Script(np.array([*lines], np.int32), tokens)


def threads_in(answer: Program | Trace, tokenizer: Tokenizer) -> Threads:
    """The answer's tokens by thread, its end included. Raises LayoutError for what cannot be spelled."""
    if isinstance(answer, Trace):
        return answer.threads
    prompt = [tokenizer.vocabulary.bos]
    count = 1 + sum(1 for _ in answer.promises())
    return threads_of(layout(tokenizer, prompt, answer, Positions(), count), len(prompt))


def lines_of(threads: Threads, max_threads: int) -> dict[int, list[int]]:
    """What each thread says, by the path that it has where a row holds `max_threads` threads."""
    paths = {0: 0}
    for thread, branches in enumerate(threads.branches):  # a branch comes after the thread that promised it
        for child, (_, branch) in enumerate(sorted(branches.items()), 1):
            paths[branch] = paths[thread] * max_threads + child
    return {paths[thread]: [*tokens] for thread, tokens in enumerate(threads.tokens)}


def depth_of(threads: Threads) -> int:
    """How deep promises nest in an answer; 0 without any."""
    depths = [0] * len(threads.tokens)
    for thread, branches in enumerate(threads.branches):
        for branch in branches.values():
            depths[branch] = depths[thread] + 1
    return max(depths)
