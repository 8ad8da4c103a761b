"""Host-side traces of decoded requests: threads, conversion to a training document.

A trace is of one row and holds NumPy arrays. While a row runs, it has a prefix of its final trace.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from pasta_jax.arrays import ThreadedTokens, Tokens
from pasta_jax.decoding.state import DOC, MAIN, Limits, Phase, RowState, Stop
from pasta_jax.tokens.detokenize import Threads, walk
from pasta_jax.tokens.layout import next_of_thread


@dataclasses.dataclass(frozen=True)
class Trace:
    """The record of how one request was decoded: n tokens, prompt included, in decode order.

    If the answer ended by itself (`stop` is EOS), its last tokens were sampled but never fed to the model: the end
    of the answer, and the `</async>` of each branch that ended together with it. They come last.

    For one pass of the model over all tokens use document order (`as_document`): no token sees a later one there.

    Attributes:
      tokens: prompt and answer, [n] fields.
      step: int32 [n], the decode step that fed the token, from 1; 0 for the prompt, UNFED if it never was.
      logprob: float32 [n], the model's own log-probability of the token, before grammar, bias and temperature; 0
        for the prompt and for tokens that the interpreter inserted.
      stop: why the row stopped; RUNNING if it has not.
      steps: number of decode steps the row ran for.
      parent: int32 [threads], the thread whose promise started a branch; -1 for main.
      fork_order: int32 [threads], the order of that promise's ` />` in the parent; -1 for main.
      force_closed: bool [threads], the interpreter wrote the branch's `</async>`, not the model.
      finished: bool [threads], the token that ends the thread is in `tokens`.
    """

    tokens: ThreadedTokens
    step: np.ndarray
    logprob: np.ndarray
    stop: Stop
    steps: int
    parent: np.ndarray
    fork_order: np.ndarray
    force_closed: np.ndarray
    finished: np.ndarray

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt, which come first in decode order and in document order."""
        return int(np.sum(self.tokens.order < 0))

    @property
    def answer_indices(self) -> list[np.ndarray]:
        """For each thread, the indices of its tokens in the trace, prompt excluded."""
        in_answer, thread_of = self.tokens.in_answer, self.tokens.thread
        return [np.flatnonzero(in_answer & (thread_of == thread)) for thread in range(len(self.parent))]

    @property
    def threads(self) -> Threads:
        """The answer's tokens by thread, and the branches that each thread started."""
        tokens = [self.tokens.token[indices].tolist() for indices in self.answer_indices]
        return Threads(tokens=tokens, branches=self.branches)

    @property
    def branches(self) -> list[dict[int, int]]:
        """For each thread, a map from the order of a promise's ` />` to the branch it started."""
        branches: list[dict[int, int]] = [{} for _ in self.parent]
        for branch in range(1, len(self.parent)):
            branches[int(self.parent[branch])][int(self.fork_order[branch])] = branch
        return branches

    @property
    def widths(self) -> np.ndarray:
        """The number of lanes used in each step: int [steps]."""
        return np.bincount(self.step[self.step > 0], minlength=self.steps + 1)[1:]


def trace_of_row(row: RowState) -> Trace:
    """The trace of one row, from its state on the host (NumPy arrays without the dimension B)."""
    written, threads = int(row.cursor), int(row.used_threads)
    table = row.threads
    # The end of the answer comes last: it waited for the branches.
    candidates = (*range(1, threads), MAIN) if row.stop == Stop.EOS else ()
    unfed = [thread for thread in candidates if table.phase[thread] == Phase.READY]
    entries, following = row.entries.fields(), table.next.fields()
    columns = {name: np.concatenate([entries[name][:written], following[name][unfed]]) for name in entries}
    step, logprob = columns.pop("step"), columns.pop("logprob")
    tokens = Tokens(**columns)
    return Trace(
        tokens=ThreadedTokens(**tokens.fields(), target=next_of_thread(tokens)),
        step=step,
        logprob=logprob,
        stop=Stop(int(row.stop)),
        steps=int(row.step),
        parent=table.parent[:threads],
        fork_order=table.fork_order[:threads],
        force_closed=table.force_closed[:threads],
        finished=(table.phase[:threads] == Phase.DONE) | np.isin(np.arange(threads), unfed),
    )


def trace_of_unstarted(prompt: Sequence[int], limits: Limits, stop: Stop) -> Trace:
    """The trace of a request that ended before it had a row: its prompt alone."""
    n = len(prompt)
    zeros, index = np.zeros(n, np.int32), np.arange(n, dtype=np.int32)
    tokens = Tokens(
        token=np.asarray(prompt, np.int32), position=index, doc=zeros + DOC, segment=zeros, order=index - n,
        sees=np.zeros((n, limits.words), np.uint32), thread=zeros,
    )  # fmt: skip
    return Trace(
        tokens=ThreadedTokens(**tokens.fields(), target=next_of_thread(tokens)),
        step=zeros,
        logprob=np.zeros(n, np.float32),
        stop=stop,
        steps=0,
        parent=np.array([-1], np.int32),
        fork_order=np.array([-1], np.int32),
        force_closed=np.zeros(1, bool),
        finished=np.zeros(1, bool),
    )


def document_order(trace: Trace) -> np.ndarray:
    """The trace's indices in document order, each block right after its promise: int [n]."""
    indices = trace.answer_indices
    spans = walk([len(of_thread) for of_thread in indices], trace.branches)
    prompt = np.arange(trace.prompt_length)
    return np.concatenate([prompt, *(indices[span.thread][span.start : span.stop] for span in spans)])


def as_document(trace: Trace) -> ThreadedTokens:
    """The trace's tokens in document order: [n] fields, equal to the layout of the same answer.

    Only the numbers of threads and segments may differ where promises nest: a trace numbers them in decode order, a
    layout in document order.
    """
    return trace.tokens[document_order(trace)]
