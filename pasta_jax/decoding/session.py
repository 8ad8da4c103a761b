"""Continuous batching: requests wait in a queue, take a row when one is free, and leave it when they are done.

Whoever waits for one answer works on all of them, a chunk of decode steps at a time, under a lock; as long as
nobody waits nothing is done. Or a thread of the session's own serves: it decodes whatever is queued, and waiting
only waits. Either way a slow consumer holds up nobody.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from pasta_jax import sharding
from pasta_jax.decoding.admission import Admission
from pasta_jax.decoding.compiled import Compiled
from pasta_jax.decoding.fits import check_prompt
from pasta_jax.decoding.loop import Batch
from pasta_jax.decoding.model import Model
from pasta_jax.decoding.pending import PendingAnswer
from pasta_jax.decoding.prefixes import Prefixes
from pasta_jax.decoding.request import SamplingParams
from pasta_jax.decoding.script import NOTHING
from pasta_jax.decoding.state import Phase, Stop
from pasta_jax.decoding.trace import trace_of_row, trace_of_unstarted
from pasta_jax.tokens.tokenizer import Tokenizer

LOG = logging.getLogger("pasta_jax")

WATCHED_STEPS = 8
"""The most decode steps between two looks at an answer that somebody watches, or that has to come in time."""


TRIES = 2
"""Of a request while a thread serves: an error ends it the second time."""


class QueueFull(RuntimeError):
    """As many requests wait as may."""


class Closed(RuntimeError):
    """The decoder takes no more requests."""


@dataclasses.dataclass(frozen=True)
class Load:
    """What a decoder has to do, at one moment.

    Attributes:
      rows: requests that it answers at once.
      queue: the most requests that may wait for a row; None is no bound.
      running, waiting: requests that have a row, and that wait for one.
      submitted: requests that it has taken so far.
      failed: those of them that an error ended.
      serving: whether a thread of its own decodes.
      worked_s: seconds of work until the last chunk of steps, compiling included.
      reused: tokens of prompts that were not fed, because an earlier prompt began alike.
      kept_bytes: memory that the kept beginnings of prompts take.
    """

    rows: int
    queue: int | None
    running: int
    waiting: int
    submitted: int
    failed: int
    serving: bool
    worked_s: float
    reused: int
    kept_bytes: int


class Session:
    """Requests that wait or have a row, and the batch that they are decoded in.

    Args:
      model: what to decode with.
      compiled: programs that fit it.
      chunk: the most decode steps of a turn.
      script_size: (R, C), the largest script that a request may have.
      bound: the most requests that `submit` lets wait for a row; None is no bound.
      prefixes: the beginnings of prompts that are kept, if any.
      admission: which threads wait; by default none of those that are ready.
    """

    def __init__(
        self,
        model: Model,
        compiled: Compiled,
        chunk: int,
        script_size: tuple[int, int] = NOTHING,
        bound: int | None = None,
        prefixes: Prefixes | None = None,
        admission: Admission | None = None,
    ):
        self.model, self.compiled, self.chunk, self.script_size = model, compiled, chunk, script_size
        self.bound, self.prefixes = bound, prefixes
        self.admission = admission or Admission(compiled)
        self._lock = threading.Lock()  # whoever has it works
        self._changed = (
            threading.Condition()
        )  # somebody waits, an answer has grown, or how it is served changes
        self._worker: threading.Thread | None = None
        self._closed = False
        self._news: collections.deque[PendingAnswer] = collections.deque()  # whose followers are to be told
        self._submitted = self._failed = self._reused = 0
        self._waiting: collections.deque[PendingAnswer] = collections.deque()
        self._rows: list[PendingAnswer | None] = [None] * compiled.rows
        self._cursors = np.zeros(compiled.rows, np.int64)
        self._ready = np.ones(compiled.rows, np.int64)  # threads
        self._batch: Batch | None = None
        self._worked = self._compiling = 0.0  # seconds before this turn: of both, and of compiling alone
        self._turn_start = 0.0, 0.0  # when this turn began, and how long compiling had taken by then

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's."""
        return self.model.tokenizer

    def prepare(
        self, prompt: Sequence[int], sampling: SamplingParams, *, tokens: bool = False
    ) -> PendingAnswer:
        """A request to be queued.

        Raises:
          ValueError: a prompt or a script that does not fit (`fits.DoesNotFit`), or no prompt.
        """
        ids = check_prompt(prompt, self.compiled, has_pool=self._batch is not None)
        return PendingAnswer(self, ids, sampling, sampling.request(self.script_size), tokens=tokens)

    def queue(self, answer: PendingAnswer) -> None:
        """Puts a request at the end of the queue, whatever the bound."""
        with self._changed:
            self._waiting.append(answer)
            self._submitted += 1
            self._changed.notify_all()

    def submit(self, answer: PendingAnswer, *, wait: bool) -> None:
        """Queues a request if there is room, or, with `wait`, as soon as there is. Raises QueueFull, Closed."""
        while True:
            with self._changed:
                if self._closed:
                    raise Closed("This decoder is closed: it takes requests again while it is serving.")
                if self._has_room():
                    return self.queue(answer)
                if not wait:
                    raise QueueFull(
                        f"{self.bound} requests wait already. Try again later, or raise queue={self.bound}."
                    )
                if self.served:
                    self._changed.wait()
                    continue
            self.turn()

    def _has_room(self) -> bool:
        return self.bound is None or len(self._waiting) + self._running < len(self._rows) + self.bound

    @property
    def _running(self) -> int:
        return sum(answer is not None for answer in self._rows)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._waiting and not any(self._rows)

    @property
    def load(self) -> Load:
        """What there is to do now."""
        counts = self._running, len(self._waiting), self._submitted, self._failed
        kept = 0 if self.prefixes is None else self.prefixes.nbytes
        serving = self._worker is not None
        return Load(len(self._rows), self.bound, *counts, serving, self._worked, self._reused, kept)

    # ------------------------------------------------------------------------------------------------- serving

    def serve(self) -> None:
        """Starts a thread that decodes what is queued, until `close`. Raises RuntimeError if there is one."""
        with self._changed:
            if self._worker is not None:
                raise RuntimeError("This decoder is serving already.")
            self._closed = False
            self._worker = threading.Thread(target=self._serve, name="pasta_jax decoder", daemon=True)
            self._worker.start()

    def close(self, *, cancel: bool = False) -> None:
        """Takes no more requests, and returns when all are done: answered, or with `cancel` as far as they are."""
        with self._changed:
            self._closed = True
            worker = self._worker
            self._changed.notify_all()
        if cancel:
            self._cancel_all()
            with self._lock:  # and those that were on their way from the queue to a row, or back
                self._cancel_all()
            self.tidy()
        if worker is threading.current_thread():  # a follower's function closes
            return
        if worker is not None:
            worker.join()
        while not self.idle:
            self.turn()

    @property
    def served(self) -> bool:
        """Whether another thread decodes. For functions that the serving thread calls it is not so."""
        return self._worker not in (None, threading.current_thread())

    def wait(self, ready: Callable[[], bool], wanted: PendingAnswer, timeout: float | None = None) -> None:
        """Until something of an answer is so: waits if another thread serves, else works.

        Raises:
          TimeoutError: it is not so after so many seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not ready():
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError(f"The answer is not there after {timeout:g} s; its request goes on.")
            if self.served:
                with self._changed:
                    self._changed.wait_for(lambda: ready() or not self.served, left)
            else:
                self.turn(wanted)

    def _serve(self) -> None:
        """The serving thread. It ends when the session is closed and has nothing to do."""
        try:
            while self._has_work():
                try:
                    self.turn()
                except Exception as error:
                    LOG.exception("The decoder goes on; what it was answering is tried once more.")
                    self._give_up(error)
        finally:  # whatever ends it, those who wait then work themselves
            with self._changed:
                if self._worker is threading.current_thread():  # closed, and serving anew, it is another
                    self._worker = None
            self._news.extend(self._all())
            while self._news:
                with contextlib.suppress(BaseException):  # a follower's function may be what ended it
                    self._tell()

    def _has_work(self) -> bool:
        """Waits until there is work; False if there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self.idle)
            if self.idle:
                self._worker = None
            return not self.idle

    def _give_up(self, error: Exception) -> None:
        """Ends the requests that have had their tries."""
        with self._lock:  # who cancels one removes it too
            for answer in [answer for answer in self._waiting.copy() if answer.failures >= TRIES]:
                self._waiting.remove(answer)
                self._failed += 1
                answer.error = error
                self._news.append(answer)
        self._tell()

    def _tell(self) -> None:
        """Wakes who waits, and tells those who follow an answer with news. Not under the lock: they may submit."""
        with self._changed:
            self._changed.notify_all()
        while True:
            try:
                answer = self._news.popleft()
            except IndexError:  # another thread may have taken the last one
                return
            answer.tell()

    def _cancel_all(self) -> None:
        for answer in self._all():
            answer.cancelled = True

    def _all(self) -> list[PendingAnswer]:
        """Those that wait and those that have a row."""
        return [answer for answer in (*self._waiting.copy(), *self._rows) if answer]

    # -------------------------------------------------------------------------------------------------- working

    def turn(self, wanted: PendingAnswer | None = None) -> None:
        """Admits prompts to free rows, decodes a chunk and reads it. Does nothing if `wanted` is done.

        After an error (an interrupt, no memory) the requests that had rows wait again, and nothing else is lost:
        decoded anew they give the same text, up to rounding: 1e-5 of a log-probability in float32, hundredths in
        bfloat16, nothing with `batch_invariant`.
        """
        try:
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
        finally:
            self._tell()
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
                self._tell()

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        """Counts the time. After an error, the requests that had rows wait again."""
        self._turn_start = time.perf_counter(), self.compiled.compile_s
        try:
            yield
        except BaseException as error:
            again = [answer for answer in self._rows if answer and not answer.done]
            for answer in again:
                answer.failures += isinstance(error, Exception)  # an interrupt is no fault of theirs
            self._waiting.extendleft(reversed(again))
            self._rows, self._batch = [None] * len(self._rows), None
            if self.prefixes is not None:
                self.prefixes.clear()  # an error may come late, of what was kept before
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
        return any(answer.cancelled for answer in self._all())

    def _free_pool(self) -> None:
        """An idle session holds no pool."""
        if self.idle:
            self._batch = None

    def _end_cancelled(self) -> None:
        for answer in [answer for answer in self._waiting.copy() if answer.cancelled]:
            self._waiting.remove(answer)
            answer.end(trace_of_unstarted(answer.prompt, self.compiled.limits, Stop.CANCELLED))
            self._news.append(answer)
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
        """Gives free rows to those that wait. One that an error broke off is alone: an error is then its own."""
        new: dict[int, PendingAnswer] = {}
        for slot in (i for i, answer in enumerate(self._rows) if answer is None):
            if not self._waiting or any(answer.failures for answer in self._rows if answer):
                break
            new[slot] = self._rows[slot] = answer = self._waiting.popleft()
            self._cursors[slot], self._ready[slot] = len(answer.prompt), 1
            answer.start(*self._clock())
            answer.admitted = time.perf_counter()
        if not new:
            return
        if self._batch is None:
            self._batch = self.compiled.empty_batch(self.script_size)
        if self.prefixes is not None:
            for slot, answer in new.items():
                asked = answer.prompt, answer.request
                self._batch, answer.reused = self.prefixes.admit(self._params, self._batch, slot, *asked)
                self._reused += answer.reused
            return
        requests = {slot: (answer.prompt, answer.request) for slot, answer in new.items()}
        self._batch = self.compiled.admit(self._params, self._batch, requests)

    def _decode(self) -> None:
        if self._batch is None or not any(self._rows):
            return
        watched = any(answer and answer.looked_at for answer in self._rows)
        often = watched or self.admission.is_bounded
        steps = min(WATCHED_STEPS, self.chunk) if often else self.chunk
        cursor = max(c for c, answer in zip(self._cursors, self._rows, strict=True) if answer)
        used, refill = self.compiled.pool_bucket(int(cursor)), bool(self._waiting)
        costs = self.admission.costs(used, steps, self._pace())
        self._batch = self.compiled.decode_chunk(self._params, self._batch, steps, refill, used, costs)

    def _pace(self) -> Iterator[tuple[int, float, int]]:
        """Of each request that has a row: tokens so far, seconds since it took the row, threads that are ready."""
        now = time.perf_counter()
        for answer, cursor, ready in zip(self._rows, self._cursors, self._ready, strict=True):
            if answer:
                yield int(cursor) - len(answer.prompt), now - answer.admitted, max(1, int(ready))

    def _read(self) -> None:
        if self._batch is None:
            return
        rows = self._batch.rows
        stops, cursors, phases = sharding.on_host((rows.stop, rows.cursor, rows.threads.phase))
        self._cursors, self._ready = np.array(cursors), np.sum(phases == Phase.READY, axis=1)
        vocabulary = self.model.tokenizer.vocabulary
        stopped = {}
        for i, answer in enumerate(self._rows):
            if answer is None:
                continue
            if stops[i] != Stop.RUNNING:
                self._leave(i)
            elif answer.looked_at:
                self._news.append(answer)
                if answer.look(trace_of_row(self.compiled.read(self._batch, i)), vocabulary):
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
        self._news.append(answer)
        self._rows[row] = None
