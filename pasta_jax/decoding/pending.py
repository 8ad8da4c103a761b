"""A request and its answer, as far as it is decoded: for those who wait for it, and for those who follow it.

Nothing here decodes. A consumer keeps what it has seen of the answer and reads the newest trace when it likes, so a
slow one gets more at once, and holds up neither the decoder nor other consumers.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import logging
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from typing import Any, Protocol

from pasta_jax.decoding.request import SamplingParams
from pasta_jax.decoding.results import DecodeResult, result
from pasta_jax.decoding.state import Request, Stop
from pasta_jax.decoding.streaming import Consumed, Draft, Event, new_events
from pasta_jax.decoding.trace import Trace
from pasta_jax.tokens.tokenizer import Tokenizer, Vocabulary

LOG = logging.getLogger("pasta_jax")


class Work(Protocol):
    """Where requests are answered: a `Session`."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def served(self) -> bool:
        """Whether another thread decodes, so that whoever waits only waits."""

    def turn(self, wanted: PendingAnswer) -> None:
        """A chunk of work on all requests, unless this one is done."""

    def tidy(self) -> None:
        """Ends what was cancelled."""

    def wait(self, ready: Callable[[], bool], wanted: PendingAnswer, timeout: float | None = None) -> None:
        """Until something of this answer is so: waits if it is served, else works. Raises TimeoutError."""


class PendingAnswer:
    """A request, and its answer as far as it is decoded.

    It can be waited for (`result`, `await`) and followed (`events`, `on_event`, `async for`), by any number of
    consumers, each from the start, also when it is done. A consumer that leaves early cancels nothing.

    Attributes:
      prompt: its ids.
      sampling: as submitted.
      request: the sampling as arrays.
      tokens: whether its events tell of single tokens too.
      trace: what was decoded so far; final when `done`. None before the request has a row. Only answers that are
        watched, or have stop strings, get one before the end.
      error: what ended it, if that was an error: then there is no result.
      watched: whether `trace` follows the decode, a few steps at a time, also if nobody follows it here.
      cancelled: whether it is to end as soon as possible.
      failures: errors that it was decoded in; after one it is tried once more, by itself.
      reused: tokens of the prompt that were not fed, because an earlier prompt began alike.
      admitted: when it took a row, by `time.perf_counter`.
      wall_s, compile_s: seconds of work while it had a row, compiling apart, and seconds of compiling.
    """

    def __init__(
        self,
        work: Work,
        prompt: Sequence[int],
        sampling: SamplingParams,
        request: Request,
        *,
        tokens: bool = False,
    ):
        self.prompt, self.sampling, self.request, self.tokens = prompt, sampling, request, tokens
        self.trace: Trace | None = None
        self.error: Exception | None = None
        self.watched = False
        self.cancelled = False
        self.failures = self.reused = 0
        self.admitted = 0.0
        self.wall_s = self.compile_s = 0.0
        self._work = work
        self._result: DecodeResult | None = None
        self._followers: list[tuple[Callable[[], None], bool]] = []
        self.start(0.0, 0.0)

    # ------------------------------------------------------------------------------------------- to wait for it

    @property
    def done(self) -> bool:
        """Whether nothing more will come: `trace` is final, or there was an `error`."""
        return self.error is not None or (self.trace is not None and self.trace.stop != Stop.RUNNING)

    def wait(self, timeout: float | None = None) -> Trace:
        """The final trace. Unless its decoder is serving, this works on the decoder's requests until it is there.

        Raises:
          TimeoutError: it is not there after so many seconds; the request goes on.
          Exception: the error that ended the request.
        """
        self._work.wait(lambda: self.done, self, timeout)
        if self.error is not None:
            raise self.error
        assert self.trace is not None
        return self.trace

    def result(self, timeout: float | None = None) -> DecodeResult:
        """The final answer; waits for it as `wait` does. Its wall_s counts the work done while it had a row."""
        trace = self.wait(timeout)
        if self._result is None:
            tokenizer = self._work.tokenizer
            answer = result(tokenizer, trace, self.wall_s, self.compile_s, self.sampling.stop)
            stats = dataclasses.replace(answer.stats, reused_tokens=self.reused)
            self._result = dataclasses.replace(answer, stats=stats)
        return self._result

    def __await__(self) -> Generator[Any, None, DecodeResult]:
        return self._awaited().__await__()

    async def _awaited(self) -> DecodeResult:
        news, tell = _flag()
        with self._followed(tell, watch=False):
            while self._work.served and not self.done:
                await news.wait()
                news.clear()
        return await asyncio.to_thread(self.result)

    def step(self) -> None:
        """A chunk of work on the requests of its decoder, unless this one is done."""
        self._work.turn(self)

    def cancel(self) -> None:
        """Ends it with the tokens it has, as soon as no chunk is being decoded. Does nothing if it is done."""
        self.cancelled = True
        self._work.tidy()

    # ------------------------------------------------------------------------------------------- to follow it

    def events(self) -> Iterator[Event]:
        """Its events, as they come. Raises the error that ended the request, if one did."""
        for events in self.looks():
            yield from events

    def looks(self) -> Iterator[list[Event]]:
        """As `events`; those that come together are one list, for a consumer that draws them."""
        reader = _Reader(self)
        with self._followed(lambda: None):
            while not reader.ended:
                trace, events = reader.read()
                yield events
                if not reader.ended:
                    self._work.wait(lambda: self.trace is not trace or self.done, self)  # noqa: B023
        yield [self._done_event()]

    async def __aiter__(self) -> AsyncIterator[Event]:
        """As `events`; it never blocks the event loop, whether the decoder is serving or not."""
        reader = _Reader(self)
        news, tell = _flag()
        with self._followed(tell):
            while not reader.ended:
                news.clear()
                for event in reader.read()[1]:
                    yield event
                if reader.ended:
                    break
                await (news.wait() if self._work.served else asyncio.to_thread(self.step))
        await asyncio.to_thread(self.result)  # it takes a while to read a long answer
        yield self._done_event()

    def on_event(self, callback: Callable[[Event], object]) -> None:
        """Calls a function with each event, past ones included: one call at a time, in the order of the events.

        The calls for past events, and for those that come meanwhile, are made here; the others by the thread that
        decodes, so that the function should be quick. An error of the function is logged, and stops nothing. If the
        request ends with an error, the last event, "done", has no result, and `error` tells.
        """
        reader, lock, events = _Reader(self), threading.Lock(), collections.deque[Event]()
        calling = False

        def call() -> None:
            nonlocal calling
            with lock:
                if not reader.ended:
                    events.extend(reader.read()[1])
                    if reader.ended:
                        events.append(Event("done") if self.error else self._done_event())
                if calling:  # the function may wait for other answers, and nobody waits for it
                    return
                calling = True
            while True:
                with lock:
                    if not events:
                        calling = False
                        return
                    event = events.popleft()
                try:
                    callback(event)
                except Exception:
                    LOG.exception("A function that follows an answer failed.")
                except BaseException:
                    calling = False
                    raise

        self._followers.append((call, True))
        call()

    def _done_event(self) -> Event:
        return Event("done", result=self.result(), stop=self.sampling.stop)

    @contextlib.contextmanager
    def _followed(self, tell: Callable[[], None], *, watch: bool = True) -> Iterator[None]:
        """Calls a function whenever there is news; with `watch`, also while the answer is being decoded."""
        follower = tell, watch
        self._followers.append(follower)
        try:
            yield
        finally:
            self._followers.remove(follower)

    # ------------------------------------------------------------------------------------------- for the session

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
        followed = any(watch for _, watch in self._followers.copy())
        return self.watched or followed or bool(self.sampling.stop)

    def look(self, trace: Trace, vocabulary: Vocabulary) -> bool:
        """Takes what was decoded so far. Whether a stop string is complete in it."""
        self.trace = max(self.trace or trace, trace, key=lambda each: len(each.tokens))
        if self.sampling.stop:
            self._seen, events = new_events(self._seen, trace, vocabulary, stop=self.sampling.stop)
            for event in events:
                self._draft.add(event)
        return self._draft.stopped

    def tell(self) -> None:
        """Tells those who follow it that there is news."""
        for call, _ in self._followers.copy():
            call()


class _Reader:
    """What one consumer has seen of an answer.

    Attributes:
      ended: whether it has seen all of it, but for "done".
    """

    def __init__(self, answer: PendingAnswer):
        self._answer, self._seen, self.ended = answer, Consumed(), False

    def read(self) -> tuple[Trace | None, list[Event]]:
        """The newest trace, and the events that it adds to what was seen."""
        answer = self._answer
        self.ended = answer.done  # asked first: what is read after it is final
        trace, events = answer.trace, list[Event]()
        if trace is not None:
            vocabulary, stop = answer._work.tokenizer.vocabulary, answer.sampling.stop
            self._seen, events = new_events(self._seen, trace, vocabulary, stop=stop, raw=answer.tokens)
        return trace, events


def _flag() -> tuple[asyncio.Event, Callable[[], None]]:
    """A flag of the running event loop, and a function that sets it from any thread."""
    flag, loop = asyncio.Event(), asyncio.get_running_loop()

    def tell() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(flag.set)

    return flag, tell
