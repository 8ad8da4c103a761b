r"""An answer while it is being decoded: events for a program, a draft for a reader.

Nothing here waits, queues or knows a device. Between two chunks of steps a running row has a partial trace, and a
consumer gets what is new to it since it last looked (`new_events`). One that is slow gets more at once; one that
goes away leaves nothing behind.

>>> draft = Draft()
>>> for event in (
...     Event("text", text="Two rivers: "),
...     Event("promise", branch=1, parent=0, topic="Nile", promised_tokens=20),
...     Event("text", text=" Both are long."),
...     Event("text", branch=1, text="the Nile"),
... ):
...     draft.add(event)
>>> print(draft)
Two rivers: the Nile[Nile …] Both are long.
>>> draft.settled
'Two rivers: the Nile'
>>> draft.add(Event("closed", branch=1))
>>> print(draft)
Two rivers: the Nile Both are long.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np

from pasta_jax.decoding.state import Stop
from pasta_jax.decoding.stops import find_stop, held_back
from pasta_jax.decoding.trace import Trace
from pasta_jax.tokens.detokenize import Place, Role, promise_of, scan
from pasta_jax.tokens.tokenizer import Vocabulary, whole_characters

if TYPE_CHECKING:
    from pasta_jax.decoding.results import DecodeResult

MAIN = 0


@dataclasses.dataclass(frozen=True)
class Event:
    """Something new in an answer. What a kind does not say is left at its default.

    Kinds:
      "text": `text` was added to the end of thread `branch`. It is the reader's, without tags and in whole
        characters, and never taken back, unless it turns out to stand after a stop string.
      "promise": where the text of thread `parent` ends now, the text of thread `branch` will stand: `topic`,
        `promised_tokens`.
      "closed": the text of thread `branch` is complete. After that of main nothing follows but "done".
      "done": the answer is complete: `result`.
      "token": thread `branch` took the token `token`, spelled `text`, tags and parts of characters included, fed in
        step `step` (trace.UNFED: in none) with `logprob`. Only for those who asked for tokens.

    Attributes:
      kind: what happened.
      request: index of the prompt in the call.
      branch: thread, 0 is main.
      parent: thread that promised the branch; -1 is nobody.
      text, topic, promised_tokens, step, token, logprob, result: see the kinds. promised_tokens is in tokens, ten
        times the tag's number.
      stop: the stop strings of the request, so that a draft knows them.
    """

    kind: Literal["text", "promise", "closed", "done", "token"]
    request: int = 0
    branch: int = MAIN
    parent: int = -1
    text: str = ""
    topic: str = ""
    promised_tokens: int = 0
    step: int = 0
    token: int = -1
    logprob: float = 0.0
    result: DecodeResult | None = None
    stop: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """What it says: Event('text', branch=1, text='The Nile')."""
        names = [
            field.name for field in dataclasses.fields(self) if getattr(self, field.name) != field.default
        ]
        said = [f"{name}={getattr(self, name)!r}" for name in names if name not in ("kind", "result", "stop")]
        return f"Event({', '.join([repr(self.kind), *said])})"


# ---------------------------------------------------------------------------------------- from traces to events


@dataclasses.dataclass(frozen=True)
class _Thread:
    """What a consumer has seen of a thread: how far it was read, bytes that begin a character, open branches."""

    place: Place = Place()
    pending: bytes = b""
    open: tuple[int, ...] = ()
    closed: bool = False


@dataclasses.dataclass(frozen=True)
class Consumed:
    """What a consumer has seen of an answer, thread by thread; a new one has seen nothing."""

    threads: Mapping[int, _Thread] = dataclasses.field(default_factory=lambda: {MAIN: _Thread()})


def new_events(
    seen: Consumed,
    trace: Trace,
    vocabulary: Vocabulary,
    *,
    request: int = 0,
    stop: tuple[str, ...] = (),
    raw: bool = False,
) -> tuple[Consumed, list[Event]]:
    """The events that bring a consumer from what it has seen to the newest trace; it has seen that then.

    However the steps are cut into calls, the same document arises, and with the last trace it is the answer's text.
    The work is that of the new tokens, but for two passes of NumPy over the trace.

    Args:
      seen: of an earlier trace of the same answer.
      trace: of a running row, or of one that has stopped; then all that is left is said.
      vocabulary: of its tokens.
      request, stop: for the events.
      raw: "token" events too, in decode order, before the others.

    Returns:
      What has been seen now, and the events in document order: those of a branch before the text that follows it.
    """
    new, ended = _unseen(seen, trace), trace.stop != Stop.RUNNING
    if seen.threads[MAIN].closed or not (new.size or ended):
        return seen, []
    threads, branches = dict(seen.threads), trace.branches
    event = functools.partial(Event, request=request, stop=stop)
    events = _token_events(trace, new, vocabulary, event) if raw else []
    fresh: dict[int, list[int]] = {}
    for thread, token in zip(
        trace.tokens.thread[new].tolist(), trace.tokens.token[new].tolist(), strict=True
    ):
        fresh.setdefault(thread, []).append(token)

    def follow(thread: int) -> None:
        before = threads.get(thread, _Thread())
        opened = [*before.open]
        for branch in before.open:
            follow(branch)
        tokens = fresh.get(thread, ())
        pieces, place = scan(vocabulary, thread, tokens, branches[thread], before.place, ended=ended)
        text, pending = "", before.pending

        def spell(more: bytes, *, run_ends: bool) -> None:
            nonlocal text, pending
            spelled, pending = whole_characters(pending + more, ended=run_ends)
            text += spelled

        def say() -> None:
            nonlocal text
            if text:
                events.append(event("text", branch=thread, text=text))
            text = ""

        for piece in pieces:
            if piece.role == Role.TEXT:
                spell(vocabulary.spelled(piece.tokens), run_ends=False)
                continue
            spell(b"", run_ends=True)
            if piece.role == Role.PROMISE:
                say()
                topic, number = promise_of(vocabulary, piece.tokens)
                about = event("promise", branch=piece.branch, parent=thread)
                events.append(dataclasses.replace(about, topic=topic, promised_tokens=10 * number))
                opened.append(piece.branch)
                follow(piece.branch)
        closed = place.finished or ended
        if closed:
            spell(b"", run_ends=True)
        say()
        if closed:
            events.append(event("closed", branch=thread))
        still_open = tuple(branch for branch in opened if not threads[branch].closed)
        threads[thread] = _Thread(place, pending, still_open, closed)

    follow(MAIN)
    return Consumed(threads), events


def _unseen(seen: Consumed, trace: Trace) -> np.ndarray:
    """The places in the trace of the answer's tokens that are new, in decode order: int [n]."""
    known = np.array([seen.threads.get(k, _Thread()).place.index for k in range(len(trace.parent))])
    known[MAIN] += trace.prompt_length
    return np.flatnonzero(trace.tokens.order >= known[trace.tokens.thread])


def _token_events(
    trace: Trace, new: np.ndarray, vocabulary: Vocabulary, event: Callable[..., Event]
) -> list[Event]:
    columns = (trace.tokens.thread, trace.tokens.token, trace.step, trace.logprob)
    return [
        event(
            "token", branch=branch, parent=int(trace.parent[branch]), text=vocabulary.text([token]),
            step=step, token=token, logprob=logprob,
        )
        for branch, token, step, logprob in zip(*(column[new].tolist() for column in columns), strict=True)
    ]  # fmt: skip


# ------------------------------------------------------------------------------------- from events to a document


class Draft:
    """The document that the events of one answer make, as far as it is known.

    `str(draft)` is all of it, with a mark like `[rivers …]` where a branch still goes on. Once a stop string is
    found, it ends before that.

    Attributes:
      settled: what will not change any more: the text before the first place where some is still to come, but for
        an end that might be the beginning of a stop string. It may be printed for good.
      stopped: a stop string was found: whatever comes, `settled` is the whole answer.
    """

    def __init__(self) -> None:
        self.settled, self.stopped = "", False
        self._request: int | None = None
        self._stop: tuple[str, ...] = ()
        self._finished = ""  # text before the first place where some is still to come
        self._parts: dict[int, list[str | int]] = {
            MAIN: []
        }  # of each thread: text, and branches in their places
        self._topics: dict[int, str] = {MAIN: ""}
        self._closed: set[int] = set()
        self._at = [(MAIN, 0)]  # that place: a thread and its part, those of its parents before it

    def add(self, event: Event) -> None:
        """Takes the next event. ValueError if it is of another answer."""
        if self._request is None:
            self._request, self._stop = event.request, event.stop
        if event.request != self._request:
            raise ValueError(
                f"This draft is of request {self._request}, and the event of request {event.request}. "
                "Keep a draft for each."
            )
        match event.kind:
            case "text":
                self._parts[event.branch].append(event.text)
            case "promise":
                self._parts[event.parent].append(event.branch)
                self._parts[event.branch], self._topics[event.branch] = [], event.topic
            case "closed":
                self._closed.add(event.branch)
            case _:
                return
        if not self.stopped:
            self._settle()

    def _settle(self) -> None:
        before = len(self._finished)
        while self._at:
            thread, index = self._at.pop()
            if index < len(self._parts[thread]):
                self._at.append((thread, index + 1))
                part = self._parts[thread][index]
                if isinstance(part, str):
                    self._finished += part
                else:
                    self._at.append((part, 0))
            elif thread not in self._closed:
                self._at.append((thread, index))
                break
        cut = find_stop(self._finished, self._stop, before)
        self.stopped = cut is not None
        if cut is None:
            cut = len(self._finished) - (held_back(self._finished, self._stop) if self._at else 0)
        self.settled = self._finished[:cut]

    def __str__(self) -> str:
        if self.stopped:
            return self.settled
        return self._finished + "".join(self._draft(thread, index) for thread, index in reversed(self._at))

    def _draft(self, thread: int, index: int = 0) -> str:
        """A thread's text from one of its parts on."""
        parts = (part if isinstance(part, str) else self._draft(part) for part in self._parts[thread][index:])
        topic = self._topics[thread]
        mark = "" if thread in self._closed or thread == MAIN else f"[{topic} …]" if topic else "[…]"
        return "".join(parts) + mark


def settled_text(events: Iterable[Event]) -> Iterator[str]:
    """The text of one answer in reading order, each piece as soon as it will not change any more.

    >>> events = [
    ...     Event("promise", branch=1, parent=0, topic="Nile"),
    ...     Event("text", text=" is long."),
    ...     Event("text", branch=1, text="The Nile"),
    ...     Event("closed", branch=1),
    ... ]
    >>> list(settled_text(events))
    ['The Nile', ' is long.']
    """
    draft, shown = Draft(), 0
    for event in events:
        draft.add(event)
        if len(draft.settled) > shown:
            yield draft.settled[shown:]
            shown = len(draft.settled)
