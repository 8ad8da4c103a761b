r"""Streaming: an answer while it is being decoded, as events for a program and as a draft for a reader.

These are pure functions: nothing waits, queues or knows a device. Between two chunks of steps a running row has a
partial trace, and a consumer gets the events since its last call (`new_events`). A slow consumer gets more at once;
one that stops asking leaves no state behind.

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

from pasta_jax.decoding.state import MAIN, Stop
from pasta_jax.decoding.stops import find_stop, held_back
from pasta_jax.decoding.trace import Trace
from pasta_jax.tokens.detokenize import Progress, Role, Speller, promise_of, scan, walk
from pasta_jax.tokens.tokenizer import Vocabulary

if TYPE_CHECKING:
    from pasta_jax.decoding.results import DecodeResult


@dataclasses.dataclass(frozen=True)
class Event:
    """Something new in an answer. Attributes that do not apply to its kind have their defaults.

    Kinds:
      "text": `text` was added to the end of thread `branch`: text for the reader, without tags and in whole
        characters. It is never taken back, unless it comes after a stop string.
      "promise": thread `parent` promised thread `branch`, whose text belongs where that of `parent` ends now; with
        `topic` and `promised_tokens`.
      "closed": the text of thread `branch` is complete, and `finished` unless the answer ended first. After main is
        closed, only "done" follows.
      "done": the answer is complete, with `result`.
      "token": thread `branch` sampled the token `token`, spelled `text` (also tags and parts of characters), with
        `logprob`; it was fed in step `step` (state.UNFED: in none). Only on request.

    Attributes:
      kind: what happened.
      request: index of the prompt in the call.
      branch: the thread; 0 is main.
      parent: the thread that promised the branch; -1 for main.
      text, topic, promised_tokens, step, token, logprob, result, finished: see the kinds. promised_tokens is in
        tokens, ten times the tag's number.
      stop: the stop strings of the request, for the draft.
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
    finished: bool = True
    stop: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """Only attributes that differ from their defaults: Event('text', branch=1, text='The Nile')."""
        names = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        hidden = ("kind", "result", "stop")
        shown = [f"{name}={getattr(self, name)!r}" for name in names if name not in hidden]
        return f"Event({', '.join([repr(self.kind), *shown])})"


# ---------------------------------------------------------------------------------------- from traces to events


@dataclasses.dataclass(frozen=True)
class _Thread:
    """What a consumer has seen of a thread: how far it was read, and bytes that begin a character."""

    progress: Progress = Progress()
    pending: bytes = b""
    closed: bool = False


@dataclasses.dataclass(frozen=True)
class Consumed:
    """What a consumer has seen of an answer, thread by thread; a new consumer has seen nothing."""

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
    """The events that bring a consumer from what it has seen to the newest trace.

    However the steps are cut into calls, the same document arises, and with the last trace it is the answer's text.
    The work is proportional to the new tokens, except for a few passes of NumPy over the trace.

    Args:
      seen: what the consumer has seen, of an earlier trace of the same answer.
      trace: of a running row, or of one that has stopped; then the events complete the answer.
      vocabulary: of its tokens.
      request, stop: copied into the events.
      raw: "token" events too, in decode order, before the others.

    Returns:
      What the consumer has seen now, and the events in document order: those of a branch before the text that
      follows it.
    """
    ended = trace.stop != Stop.RUNNING
    indices = trace.answer_indices
    read = [seen.threads.get(k, _Thread()).progress.index for k in range(len(indices))]
    new = np.concatenate([known[index:] for known, index in zip(indices, read, strict=True)])
    if seen.threads[MAIN].closed or not (new.size or ended):
        return seen, []
    threads, branches = dict(seen.threads), trace.branches
    event = functools.partial(Event, request=request, stop=stop)
    events = _token_events(trace, np.sort(new), vocabulary, event) if raw else []
    for number, _, end, branch in walk([*map(len, indices)], branches):
        thread = threads.get(number, _Thread())
        if thread.closed or (branch and end <= read[number]):
            continue
        tokens = trace.tokens.token[indices[number][thread.progress.index : end]].tolist()
        is_last = ended and not branch
        unfinished = Role.UNFINISHED if is_last else None
        pieces, progress = scan(
            vocabulary, number, tokens, branches[number], thread.progress, unfinished=unfinished
        )
        speller, text = Speller(vocabulary, thread.pending), ""
        for piece in pieces:
            text += speller.feed(piece.tokens) if piece.role == Role.TEXT else speller.end_run()
        closed = is_last or (not branch and progress.finished)
        if closed:
            text += speller.end_run()
        if text:
            events.append(event("text", branch=number, text=text))
        if branch:
            topic, tens = promise_of(vocabulary, pieces[-1].tokens)
            events.append(
                event("promise", branch=branch, parent=number, topic=topic, promised_tokens=10 * tens)
            )
        if closed:
            events.append(event("closed", branch=number, finished=progress.finished))
        threads[number] = _Thread(progress, speller.pending, closed)
    return Consumed(threads), events


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
    """The document that the events of one answer have built so far.

    `str(draft)` is all of it, with a mark like `[rivers …]` where a branch is still being decoded. It ends before a
    stop string.

    Attributes:
      settled: the text that will not change any more, and may be printed: up to the first gap, where text is still
        missing, without an end that might start a stop string.
      stopped: there was a stop string: `settled` is the whole answer, whatever follows.
    """

    def __init__(self) -> None:
        self.settled, self.stopped = "", False
        self._request: int | None = None
        self._stop: tuple[str, ...] = ()
        self._finished = ""  # text before the first gap
        # Of each thread: pieces of text, and branches where their text belongs.
        self._parts: dict[int, list[str | int]] = {MAIN: []}
        self._topics: dict[int, str] = {MAIN: ""}
        self._closed: set[int] = set()
        self._gap = [(MAIN, 0)]  # the first gap: thread and index of its part, after those of its parents

    def add(self, event: Event) -> None:
        """Adds the next event. Raises ValueError if it is of another answer."""
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
        while self._gap:
            thread, index = self._gap.pop()
            if index < len(self._parts[thread]):
                self._gap.append((thread, index + 1))
                part = self._parts[thread][index]
                if isinstance(part, str):
                    self._finished += part
                else:
                    self._gap.append((part, 0))
            elif thread not in self._closed:
                self._gap.append((thread, index))
                break
        cut = find_stop(self._finished, self._stop, before)
        self.stopped = cut is not None
        if cut is None:
            cut = len(self._finished) - (held_back(self._finished, self._stop) if self._gap else 0)
        self.settled = self._finished[:cut]

    def __str__(self) -> str:
        if self.stopped:
            return self.settled
        text, todo = [self._finished], [*self._gap]
        while todo:
            thread, index = todo.pop()
            if index < len(self._parts[thread]):
                todo.append((thread, index + 1))
                part = self._parts[thread][index]
                if isinstance(part, str):
                    text.append(part)
                else:
                    todo.append((part, 0))
            elif thread not in self._closed and thread != MAIN:
                topic = self._topics[thread]
                text.append(f"[{topic} …]" if topic else "[…]")
        return "".join(text)


def settled_text(events: Iterable[Event]) -> Iterator[str]:
    """The text of one answer in reading order, every piece as soon as it is settled.

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
