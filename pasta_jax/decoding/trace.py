"""The trace of a decode on the host: its threads, its tokens as a training document, its critical path.

One row at a time, and NumPy arrays only. A running row has a trace too, the beginning of the final one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from pasta_jax.arrays import ThreadedTokens, Tokens
from pasta_jax.decoding.state import DOC, Limits, Phase, RowState, Stop
from pasta_jax.lang.grammar import Kind
from pasta_jax.tokens.detokenize import Threads, walk
from pasta_jax.tokens.layout import next_of_thread
from pasta_jax.tokens.tokenizer import Vocabulary


@dataclasses.dataclass(frozen=True)
class Trace:
    """One answered request.

    Attributes:
      tokens: prompt and answer in decode order: [n] fields. The end of the answer, and the `</async>` of branches
        that ended with it, come last: they were sampled and never fed. For one pass of the model over all tokens
        use document order (`as_document`), in which no token sees a later one.
      step: int32 [n], the decode step that fed the token, from 1; 0 for the prompt, UNFED for the last ones.
      logprob: float32 [n], log-probability of the token when it was sampled; 0 for prompt and inserted tokens.
      stop: why the row stopped, or RUNNING.
      steps: decode steps in which the row was running.
      parent, forked_at: int32 [threads], the thread that promised a branch, and the order of the promise's ` />` in
        it; -1 for main.
      forced: bool [threads], the interpreter ended the branch.
      finished: bool [threads], the thread's last token is in `tokens`.
    """

    tokens: ThreadedTokens
    step: np.ndarray
    logprob: np.ndarray
    stop: Stop
    steps: int
    parent: np.ndarray
    forked_at: np.ndarray
    forced: np.ndarray
    finished: np.ndarray

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt, which come first in decode order and in document order."""
        return int(np.sum(self.tokens.order < 0))

    @property
    def indices(self) -> list[np.ndarray]:
        """For each thread, the indices of its answer's tokens in the trace."""
        answer, thread = self.tokens.in_answer, self.tokens.thread
        return [np.flatnonzero(answer & (thread == k)) for k in range(len(self.parent))]

    @property
    def threads(self) -> Threads:
        """The answer's tokens by thread."""
        return Threads([self.tokens.token[indices].tolist() for indices in self.indices], self.branches)

    @property
    def branches(self) -> list[dict[int, int]]:
        """For each thread, the branch that each ` />` of it started: {index in the thread's answer: branch}."""
        branches: list[dict[int, int]] = [{} for _ in self.parent]
        for branch in range(1, len(self.parent)):
            branches[int(self.parent[branch])][int(self.forked_at[branch])] = branch
        return branches

    @property
    def widths(self) -> np.ndarray:
        """Lanes that each step used: int [steps]."""
        return np.bincount(self.step[self.step > 0], minlength=self.steps + 1)[1:]


def read_trace(row: RowState) -> Trace:
    """The trace of one row, from its state on the host (NumPy leaves without B)."""
    n, count = int(row.cursor), int(row.used_threads)
    t = row.threads
    last = [k for k in range(count) if row.stop == Stop.EOS and t.phase[k] == Phase.READY]
    last.sort(key=lambda k: (k == 0, k))  # the answer's end after the branches that it waited for
    columns = {
        name: np.concatenate([entries[:n], getattr(t.next, name)[last]])
        for name, entries in row.entries.fields().items()
    }
    step, logprob = columns.pop("step"), columns.pop("logprob")
    tokens = Tokens(**columns)
    return Trace(
        tokens=ThreadedTokens(**tokens.fields(), target=next_of_thread(tokens)),
        step=step,
        logprob=logprob,
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
    index, root = np.arange(n, dtype=np.int32), np.array([-1], np.int32)
    tokens = Tokens(
        token=np.asarray(prompt, np.int32), position=index, doc=zeros + DOC, segment=zeros, order=index - n,
        sees=np.zeros((n, limits.words), np.uint32), thread=zeros,
    )  # fmt: skip
    document = ThreadedTokens(**tokens.fields(), target=next_of_thread(tokens))
    return Trace(document, zeros, np.zeros(n, np.float32), stop, 0, root, root, none, none)


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
    return trace.tokens[document_order(trace)]


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
