"""Continuous batching: requests wait in a queue, take a row when one is free, and leave it when they are done.

There is no thread of its own: whoever waits for an answer works on all of them, a chunk of decode steps at a
time, under a lock. So a consumer that is slow holds nobody up, and without anybody who waits nothing is done.
"""

from __future__ import annotations

import collections
import contextlib
import threading
import time
import typing
import weakref
from collections.abc import Iterator, Sequence

import numpy as np

from pasta_jax.decoding.results import DecodeResult, result
from pasta_jax.decoding.state import Stop
from pasta_jax.decoding.streaming import Consumed, Draft, new_events
from pasta_jax.decoding.trace import Trace, prompt_alone, read_trace
from pasta_jax.tokens.tokenizer import Vocabulary

if typing.TYPE_CHECKING:
    from pasta_jax.decoding.engine import Decoder, SamplingParams
    from pasta_jax.decoding.loop import Batch
    from pasta_jax.decoding.state import Request

LOOK_EVERY = 8
"""Decode steps between two looks at an answer that somebody watches."""


class PendingAnswer:
    """A request that was submitted, and what has become of it.

    Attributes:
      prompt, sampling: as submitted.
      request: the sampling as arrays.
      trace: what was decoded so far, or at last; None before it has a row. Only `watched` answers, and those with
        stop strings, have one before the end.
      watched: whether `trace` follows the decode, a few steps at a time.
      cancelled: somebody wants no more of it.
      wall_s, compile_s: seconds of work while it had a row, without those of compiling, and those.
    """

    def __init__(self, session: Session, prompt: Sequence[int], sampling: SamplingParams, request: Request):
        self.prompt, self.sampling, self.request = prompt, sampling, request
        self.trace: Trace | None = None
        self.watched = False
        self.cancelled = False
        self.wall_s = self.compile_s = 0.0
        self._session, self._decoder = session, session.decoder  # which a session does not keep alive
        self.begin(0.0, 0.0)

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
        """The final answer, as `wait`; its wall_s are those of work while it had a row."""
        trace, tokenizer = self.wait(), self._decoder.model.tokenizer
        return result(tokenizer, trace, self.wall_s, self.compile_s, self.sampling.stop)

    def step(self) -> None:
        """A chunk of work on the session's requests, unless this one is done."""
        self._session.turn(self)

    def cancel(self) -> None:
        """Ends it, with what it has, as soon as no chunk is being decoded; nothing if it is done."""
        self.cancelled = True
        self._session.tidy()

    def begin(self, worked_s: float, compile_s: float) -> None:
        """It takes a row, by the session's clock; whatever was seen of an earlier try is forgotten."""
        self.began = worked_s, compile_s
        self._seen, self._draft = Consumed(), Draft()

    @property
    def looked_at(self) -> bool:
        """Whether the host has to see it while it is decoded: for a consumer, or to look for stop strings."""
        return self.watched or bool(self.sampling.stop)

    def look(self, trace: Trace, vocabulary: Vocabulary) -> bool:
        """Takes what was decoded so far; whether a stop string has come."""
        self.trace = trace
        if self.sampling.stop:
            self._seen, events = new_events(self._seen, trace, vocabulary, stop=self.sampling.stop)
            for event in events:
                self._draft.add(event)
        return self._draft.stopped


class Session:
    """The requests of one decoder: those that wait and those that have a row."""

    def __init__(self, decoder: Decoder):
        self._decoder = weakref.ref(decoder)  # for a model nobody uses any more is to go at once
        self._lock = threading.Lock()
        self._waiting: collections.deque[PendingAnswer] = collections.deque()
        self._rows: list[PendingAnswer | None] = [None] * decoder.rows
        self._cursors = np.zeros(decoder.rows, np.int64)
        self._batch: Batch | None = None
        self._worked = self._compiled = 0.0  # seconds before this turn: of both, and of compiling
        self._since = 0.0, 0.0  # when this turn began, and what the decoder had compiled by then

    @property
    def decoder(self) -> Decoder:
        """Whose requests these are."""
        decoder = self._decoder()
        assert decoder is not None, "an answer keeps its decoder"
        return decoder

    def submit(self, prompt: Sequence[int], sampling: SamplingParams) -> PendingAnswer:
        """Queue a request. ValueError for one that the decoder cannot answer."""
        answer = PendingAnswer(self, prompt, sampling, self.decoder.request(prompt, sampling))
        self._waiting.append(answer)
        return answer

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._waiting and not any(self._rows)

    def turn(self, wanted: PendingAnswer | None = None) -> None:
        """Prompts into free rows, a chunk of steps, and what came of it; nothing once `wanted` is done.

        If it is broken off (an interrupt, no memory), the requests that had rows wait again and nothing else is
        lost: decoded anew they give the same text.
        """
        with self._lock:
            if wanted is not None and wanted.done:
                return
            with self._at_work():
                self._end_cancelled()
                self._admit()
                self._decode()
                self._read()
                self._end_cancelled()
                self._let_go()
        self.tidy()

    def tidy(self) -> None:
        """Ends what was cancelled, unless somebody is working, who will."""
        while self._has_cancelled() and self._lock.acquire(blocking=False):
            try:
                with self._at_work():
                    self._end_cancelled()
                    self._let_go()
            finally:
                self._lock.release()

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[None]:
        """Counts the time; and whatever breaks off what is inside, the requests that have rows wait again."""
        self._since = time.perf_counter(), self.decoder.programs.compile_s
        try:
            yield
        except BaseException:
            self._waiting.extendleft(answer for answer in reversed(self._rows) if answer and not answer.done)
            self._rows, self._batch = [None] * len(self._rows), None
            raise
        finally:
            self._worked, self._compiled = self._clock()

    def _clock(self) -> tuple[float, float]:
        """Seconds of work, compiling included, and of compiling. They stand still between turns."""
        clock, compiled = self._since
        compiled = self._compiled + self.decoder.programs.compile_s - compiled
        return self._worked + time.perf_counter() - clock, compiled

    def _has_cancelled(self) -> bool:
        return any(answer.cancelled for answer in (*self._waiting.copy(), *self._rows) if answer)

    def _let_go(self) -> None:
        """With nothing to do there is no pool."""
        if self.idle:
            self._batch = None

    def _end_cancelled(self) -> None:
        for answer in [each for each in self._waiting.copy() if each.cancelled]:
            self._waiting.remove(answer)
            answer.trace = prompt_alone(answer.prompt, self.decoder.limits, Stop.CANCELLED)
        self._stop({i: Stop.CANCELLED for i, answer in enumerate(self._rows) if answer and answer.cancelled})

    def _stop(self, rows: dict[int, Stop]) -> None:
        """Rows that stop because the host says so."""
        if not rows:
            return
        assert self._batch is not None
        stops = [rows.get(i, Stop.RUNNING) for i in range(len(self._rows))]
        self._batch = self.decoder.release(self._batch, np.array(stops, np.int32))
        for i in rows:
            self._leave(i)

    def _admit(self) -> None:
        new: dict[int, PendingAnswer] = {}
        for slot in (i for i, answer in enumerate(self._rows) if answer is None):
            if not self._waiting:
                break
            new[slot] = self._rows[slot] = answer = self._waiting.popleft()
            self._cursors[slot] = len(answer.prompt)
            answer.begin(*self._clock())
        if not new:
            return
        if self._batch is None:
            self._batch = self.decoder.empty_batch()
        prompts, requests = zip(*((answer.prompt, answer.request) for answer in new.values()))
        self._batch = self.decoder.admit(self._batch, [*new], prompts, requests)

    def _decode(self) -> None:
        if self._batch is None or not any(self._rows):
            return
        looks = any(answer and answer.looked_at for answer in self._rows)
        steps = min(LOOK_EVERY, self.decoder.chunk) if looks else self.decoder.chunk
        cursor = max(c for c, answer in zip(self._cursors, self._rows, strict=True) if answer)
        self._batch = self.decoder.decode_chunk(self._batch, steps, bool(self._waiting), int(cursor))

    def _read(self) -> None:
        if self._batch is None:
            return
        stops = np.asarray(self._batch.rows.stop)
        self._cursors = np.array(self._batch.rows.cursor)
        vocabulary = self.decoder.model.tokenizer.vocabulary
        over = {}
        for i, answer in enumerate(self._rows):
            if answer is None:
                continue
            if stops[i] != Stop.RUNNING:
                self._leave(i)
            elif answer.looked_at and answer.look(read_trace(self.decoder.read(self._batch, i)), vocabulary):
                over[i] = Stop.STOP
        self._stop(over)

    def _leave(self, row: int) -> None:
        """The request in the row is done."""
        answer = self._rows[row]
        assert answer is not None and self._batch is not None
        trace = read_trace(self.decoder.read(self._batch, row))
        worked, compiled = (now - then for now, then in zip(self._clock(), answer.began))
        answer.compile_s, answer.wall_s = compiled, worked - compiled
        answer.trace = trace
        self._rows[row] = None
