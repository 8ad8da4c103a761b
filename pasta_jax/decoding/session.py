"""Continuous batching: requests wait in a queue, take a row when one is free, and leave it when they are done.

There is no background thread. Waiting for one answer works on all of them, a chunk of decode steps at a time, under
a lock. So a slow consumer holds up nobody, and as long as nobody waits nothing is done.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pasta_jax import sharding
from pasta_jax.decoding.compiled import Compiled
from pasta_jax.decoding.fits import check_prompt
from pasta_jax.decoding.loop import Batch
from pasta_jax.decoding.model import Model
from pasta_jax.decoding.request import SamplingParams
from pasta_jax.decoding.results import DecodeResult, result
from pasta_jax.decoding.script import NOTHING
from pasta_jax.decoding.state import Request, Stop
from pasta_jax.decoding.streaming import Consumed, Draft, new_events
from pasta_jax.decoding.trace import Trace, trace_of_row, trace_of_unstarted
from pasta_jax.tokens.tokenizer import Vocabulary

WATCHED_STEPS = 8
"""The most decode steps between two looks at an answer that somebody watches."""


class PendingAnswer:
    """A request, and its answer as far as it is decoded.

    Attributes:
      prompt: its ids.
      sampling: as submitted.
      request: the sampling as arrays.
      trace: what was decoded so far; final when `done`. None before the request has a row. Only answers that are
        watched, or have stop strings, get one before the end.
      watched: whether `trace` follows the decode, a few steps at a time.
      cancelled: whether it is to end as soon as possible.
      wall_s, compile_s: seconds of work while it had a row, compiling apart, and seconds of compiling.
    """

    def __init__(self, session: Session, prompt: Sequence[int], sampling: SamplingParams, request: Request):
        self.prompt, self.sampling, self.request = prompt, sampling, request
        self.trace: Trace | None = None
        self.watched = False
        self.cancelled = False
        self.wall_s = self.compile_s = 0.0
        self._session = session
        self.start(0.0, 0.0)

    @property
    def done(self) -> bool:
        """Whether `trace` is final."""
        return self.trace is not None and self.trace.stop != Stop.RUNNING

    def wait(self) -> Trace:
        """The final trace. Works on the requests of its session until this one is done."""
        while not self.done:
            self.step()
        assert self.trace is not None
        return self.trace

    def result(self) -> DecodeResult:
        """The final answer; waits for it. Its wall_s counts the work done while it had a row."""
        tokenizer = self._session.model.tokenizer
        return result(tokenizer, self.wait(), self.wall_s, self.compile_s, self.sampling.stop)

    def step(self) -> None:
        """A chunk of work on the session's requests, unless this one is done."""
        self._session.turn(self)

    def cancel(self) -> None:
        """Ends it with the tokens it has, as soon as no chunk is being decoded. Does nothing if it is done."""
        self.cancelled = True
        self._session.tidy()

    def start(self, worked_s: float, compile_s: float) -> None:
        """It takes a row, at this time of the session's clock. What was seen of an earlier try is forgotten."""
        self.started = worked_s, compile_s
        self._seen, self._draft = Consumed(), Draft()

    def end(self, trace: Trace) -> None:
        """Takes the final trace. One that was cancelled keeps what a consumer saw before it had to begin anew."""
        if trace.stop == Stop.CANCELLED and self.trace and len(self.trace.tokens) > len(trace.tokens):
            trace = dataclasses.replace(self.trace, stop=Stop.CANCELLED)
        self.trace = trace

    @property
    def looked_at(self) -> bool:
        """Whether the host has to read it while it is decoded: for a consumer, or to find stop strings."""
        return self.watched or bool(self.sampling.stop)

    def look(self, trace: Trace, vocabulary: Vocabulary) -> bool:
        """Takes what was decoded so far. Whether a stop string is complete in it."""
        self.trace = max(self.trace or trace, trace, key=lambda each: len(each.tokens))
        if self.sampling.stop:
            self._seen, events = new_events(self._seen, trace, vocabulary, stop=self.sampling.stop)
            for event in events:
                self._draft.add(event)
        return self._draft.stopped


class Session:
    """Requests that wait or have a row, and the batch that they are decoded in.

    Args:
      model: what to decode with.
      compiled: programs that fit it.
      chunk: the most decode steps of a turn.
      script_size: (R, C), the largest script that a request may have.
    """

    def __init__(self, model: Model, compiled: Compiled, chunk: int, script_size: tuple[int, int] = NOTHING):
        self.model, self.compiled, self.chunk, self.script_size = model, compiled, chunk, script_size
        self._lock = threading.Lock()
        self._waiting: collections.deque[PendingAnswer] = collections.deque()
        self._rows: list[PendingAnswer | None] = [None] * compiled.rows
        self._cursors = np.zeros(compiled.rows, np.int64)
        self._batch: Batch | None = None
        self._worked = self._compiling = 0.0  # seconds before this turn: of both, and of compiling alone
        self._turn_start = 0.0, 0.0  # when this turn began, and how long compiling had taken by then

    def prepare(self, prompt: Sequence[int], sampling: SamplingParams) -> PendingAnswer:
        """A request to be queued.

        Raises:
          ValueError: a prompt or a script that does not fit (`fits.DoesNotFit`), or no prompt.
        """
        ids = check_prompt(prompt, self.compiled, has_pool=self._batch is not None)
        return PendingAnswer(self, ids, sampling, sampling.request(self.script_size))

    def queue(self, answer: PendingAnswer) -> None:
        """Puts a request at the end of the queue."""
        self._waiting.append(answer)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._waiting and not any(self._rows)

    def turn(self, wanted: PendingAnswer | None = None) -> None:
        """Admits prompts to free rows, decodes a chunk and reads it. Does nothing if `wanted` is done.

        After an error (an interrupt, no memory) the requests that had rows wait again, and nothing else is lost:
        decoded anew they give the same text, up to rounding: 1e-5 of a log-probability in float32, hundredths in
        bfloat16, nothing with `batch_invariant`.
        """
        with self._lock:
            if wanted is not None and wanted.done:
                return
            with self._working():
                self._end_cancelled()
                self._admit()
                self._decode()
                self._read()
                self._end_cancelled()
                self._free_pool()
        self.tidy()

    def tidy(self) -> None:
        """Ends what was cancelled; if another thread is working, that thread will."""
        while self._has_cancelled() and self._lock.acquire(blocking=False):
            try:
                with self._working():
                    self._end_cancelled()
                    self._free_pool()
            finally:
                self._lock.release()

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        """Counts the time. After an error, the requests that had rows wait again."""
        self._turn_start = time.perf_counter(), self.compiled.compile_s
        try:
            yield
        except BaseException:
            self._waiting.extendleft(answer for answer in reversed(self._rows) if answer and not answer.done)
            self._rows, self._batch = [None] * len(self._rows), None
            raise
        finally:
            self._worked, self._compiling = self._clock()

    def _clock(self) -> tuple[float, float]:
        """Seconds of work, compiling included, and of compiling alone. They stand still between turns."""
        start, compiled_before = self._turn_start
        compiling = self._compiling + self.compiled.compile_s - compiled_before
        return self._worked + time.perf_counter() - start, compiling

    @property
    def _params(self) -> Any:
        return self.model.params_as(self.compiled.form)

    def _has_cancelled(self) -> bool:
        return any(answer.cancelled for answer in (*self._waiting.copy(), *self._rows) if answer)

    def _free_pool(self) -> None:
        """An idle session holds no pool."""
        if self.idle:
            self._batch = None

    def _end_cancelled(self) -> None:
        for answer in [answer for answer in self._waiting.copy() if answer.cancelled]:
            self._waiting.remove(answer)
            answer.end(trace_of_unstarted(answer.prompt, self.compiled.limits, Stop.CANCELLED))
        self._stop({i: Stop.CANCELLED for i, answer in enumerate(self._rows) if answer and answer.cancelled})

    def _stop(self, rows: dict[int, Stop]) -> None:
        """Stops rows from the host."""
        if not rows:
            return
        assert self._batch is not None
        stops = [rows.get(i, Stop.RUNNING) for i in range(len(self._rows))]
        self._batch = self.compiled.release(self._batch, np.array(stops, np.int32))
        for i in rows:
            self._leave(i)

    def _admit(self) -> None:
        new: dict[int, PendingAnswer] = {}
        for slot in (i for i, answer in enumerate(self._rows) if answer is None):
            if not self._waiting:
                break
            new[slot] = self._rows[slot] = answer = self._waiting.popleft()
            self._cursors[slot] = len(answer.prompt)
            answer.start(*self._clock())
        if not new:
            return
        if self._batch is None:
            self._batch = self.compiled.empty_batch(self.script_size)
        requests = {slot: (answer.prompt, answer.request) for slot, answer in new.items()}
        self._batch = self.compiled.admit(self._params, self._batch, requests)

    def _decode(self) -> None:
        if self._batch is None or not any(self._rows):
            return
        watched = any(answer and answer.looked_at for answer in self._rows)
        steps = min(WATCHED_STEPS, self.chunk) if watched else self.chunk
        cursor = max(c for c, answer in zip(self._cursors, self._rows, strict=True) if answer)
        refill = bool(self._waiting)
        self._batch = self.compiled.decode_chunk(self._params, self._batch, steps, refill, int(cursor))

    def _read(self) -> None:
        if self._batch is None:
            return
        rows = self._batch.rows
        stops, cursors = sharding.on_host((rows.stop, rows.cursor))
        self._cursors = np.array(cursors)
        vocabulary = self.model.tokenizer.vocabulary
        stopped = {}
        for i, answer in enumerate(self._rows):
            if answer is None:
                continue
            if stops[i] != Stop.RUNNING:
                self._leave(i)
            elif answer.looked_at and answer.look(
                trace_of_row(self.compiled.read(self._batch, i)), vocabulary
            ):
                stopped[i] = Stop.STOP
        self._stop(stopped)

    def _leave(self, row: int) -> None:
        """Takes the final trace of a request out of its row."""
        answer = self._rows[row]
        assert answer is not None and self._batch is not None
        trace = trace_of_row(self.compiled.read(self._batch, row))
        worked, compiling = (now - then for now, then in zip(self._clock(), answer.started))
        answer.compile_s, answer.wall_s = compiling, worked - compiling
        answer.end(trace)
        self._rows[row] = None
