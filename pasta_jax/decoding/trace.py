"""The trace of a decode, read on the host: its threads, its tokens in document order, its critical path.

NumPy only, one row at a time. The trace of a row that is still running is the start of its final one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from pasta_jax.arrays import NO_TARGET, ThreadedTokens
from pasta_jax.decoding.state import Limits, Phase, RowState, Stop
from pasta_jax.lang.grammar import Kind
from pasta_jax.tokens.detokenize import Threads, walk
from pasta_jax.tokens.tokenizer import Vocabulary

UNFED = -1
"""The `step` of tokens that were sampled when the answer ended, so never fed."""


@dataclasses.dataclass(frozen=True)
class Trace:
    """One answered request.

    Attributes:
      tokens: prompt and answer in decode order: [n] fields. Last come the answer's end and the `</async>` of
        branches that ended with it: they were sampled, but not fed. For a pass of the model over all tokens, use
        document order (`as_document`), where no token sees a later one.
      step: int32 [n], the decode step that fed the token, from 1; 0 for the prompt, UNFED for the last ones.
      logprob: float32 [n], log-probability of the token when it was sampled; 0 for prompt and inserted tokens.
      prompt_length: tokens of the prompt.
      stop: why the row stopped; RUNNING if it has not.
      steps: decode steps in which the row was running.
      parent, forked_at: int32 [threads], the thread that promised the branch, and the order of the ` />` in it; -1
        for main.
      forced: bool [threads], whether the interpreter ended the branch.
      finished: bool [threads], whether the thread's last token is in `tokens`.
    """

    tokens: ThreadedTokens
    step: np.ndarray
    logprob: np.ndarray
    prompt_length: int
    stop: Stop
    steps: int
    parent: np.ndarray
    forked_at: np.ndarray
    forced: np.ndarray
    finished: np.ndarray

    @property
    def indices(self) -> list[np.ndarray]:
        """For each thread, the indices of its answer's tokens in the trace."""
        thread = self.tokens.thread[self.prompt_length :]
        return [np.flatnonzero(thread == k) + self.prompt_length for k in range(len(self.parent))]

    @property
    def threads(self) -> Threads:
        """The answer's tokens by thread."""
        return Threads([self.tokens.token[indices].tolist() for indices in self.indices], self.branches)

    @property
    def branches(self) -> list[dict[int, int]]:
        """For each thread, the branch that each ` />` of it started: {index in the thread's answer: branch}."""
        branches: list[dict[int, int]] = [{} for _ in self.parent]
        for branch, (parent, order) in enumerate(
            zip(self.parent.tolist(), self.forked_at.tolist(), strict=True)
        ):
            if branch:
                branches[parent][order - (0 if parent else self.prompt_length)] = branch
        return branches

    @property
    def widths(self) -> np.ndarray:
        """Lanes that each step used: int [steps]."""
        return np.bincount(self.step[self.step > 0], minlength=self.steps + 1)[1:]


def read_trace(row: RowState) -> Trace:
    """The trace of one row, from its state on the host (NumPy leaves without B)."""
    n, count = int(row.cursor), int(row.used_threads)
    e, t = row.entries, row.threads
    last = [k for k in range(count) if row.stop == Stop.EOS and t.phase[k] == Phase.READY]
    last.sort(key=lambda k: (k == 0, k))  # the answer's end after the branches that main waited for

    def column(entries: Any, threads: Any) -> np.ndarray:
        return np.concatenate([entries[:n], threads[last]])

    token = column(e.token, t.token)
    return Trace(
        tokens=ThreadedTokens(
            token=token,
            position=column(e.position, t.position),
            doc=np.ones_like(token),
            segment=column(e.segment, t.segment),
            order=column(e.order, t.order),
            sees=column(e.sees, t.sees),
            thread=column(e.thread, np.arange(len(t.phase), dtype=np.int32)),
            target=_targets(e, t, n, last, int(row.prompt_length)),
        ),
        step=column(e.step, np.full(len(t.phase), UNFED, np.int32)),
        logprob=column(e.logprob, t.logprob),
        prompt_length=int(row.prompt_length),
        stop=Stop(int(row.stop)),
        steps=int(row.step),
        parent=t.parent[:count],
        forked_at=t.forked_at[:count],
        forced=t.forced[:count],
        finished=(t.phase[:count] == Phase.DONE) | np.isin(np.arange(count), last),
    )


def prompt_alone(prompt: Sequence[int], limits: Limits, stop: Stop) -> Trace:
    """The trace of a request that ended before it had a row."""
    n = len(prompt)
    zeros, none = np.zeros(n, np.int32), np.zeros(1, bool)
    place = np.arange(n, dtype=np.int32)
    tokens = ThreadedTokens(
        token=np.asarray(prompt, np.int32), position=place, doc=zeros + 1, segment=zeros, order=place,
        sees=np.zeros((n, limits.words), np.uint32), thread=zeros, target=zeros + NO_TARGET,
    )  # fmt: skip
    root = np.array([-1], np.int32)
    return Trace(tokens, zeros, np.zeros(n, np.float32), n, stop, 0, root, root + 1, none, none)


def _targets(e: Any, t: Any, n: int, last: list[int], prompt_length: int) -> np.ndarray:
    """The next token of each token's own thread, from the last of the prompt on: int32 [n + last]."""
    token = np.concatenate([e.token[:n], t.token[last]])
    thread = np.concatenate([e.thread[:n], np.array(last, np.int32)])
    target = np.full(len(token), NO_TARGET, np.int32)
    by_thread = np.argsort(thread[prompt_length - 1 :], kind="stable") + prompt_length - 1
    here, then = by_thread[:-1], by_thread[1:]
    same = thread[here] == thread[then]
    target[here[same]] = token[then[same]]
    return target


def document_order(trace: Trace) -> np.ndarray:
    """The indices in the trace in the order of a layout, each block right after its promise: int [n]."""
    answer = trace.indices
    spans = walk([*map(len, answer)], trace.branches)
    prompt = np.arange(trace.prompt_length)
    return np.concatenate([prompt, *(answer[span.thread][span.start : span.stop] for span in spans)])


def as_document(trace: Trace) -> ThreadedTokens:
    """The trace's tokens in layout order: [n] fields, equal to the layout of the same answer.

    Except that with nested promises, threads and segments are numbered in decode order, those of a layout in
    document order.
    """
    indices = document_order(trace)
    return ThreadedTokens(**{name: array[indices] for name, array in trace.tokens.fields().items()})


def critical_path(threads: Threads, vocabulary: Vocabulary) -> int:
    """Decode steps that an answer needs with unlimited lanes.

    A token is fed one step after the one before it in its thread; `<async>` together with its promise's ` />`;
    a sync, and every other end of waiting, together with the last `</async>` that it waits for. The end of the
    answer is sampled, not fed. For an answer without promises this is its number of tokens.
    """
    steps = [0] * len(threads.tokens)  # from a thread's first token until it and its branches are done
    for thread in reversed(range(len(steps))):  # a branch before the thread that promised it
        step = open_until = 0
        ends = Kind.ASYNC_CLOSE if thread else Kind.END
        for index, token in enumerate(threads.tokens[thread]):
            step += 1
            if vocabulary.kinds[token] in (Kind.SYNC, ends):
                step, open_until = max(step, open_until), 0
            if branch := threads.branches[thread].get(index):
                open_until = max(open_until, step - 1 + steps[branch])
        steps[thread] = max(step, open_until)
    main = threads.tokens[0]
    return steps[0] - (bool(main) and main[-1] in vocabulary.stops)
