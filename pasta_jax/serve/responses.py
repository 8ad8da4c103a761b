"""The replies of /v1/responses, in which each branch is an output item.

Main's text up to a promise is an item, the branch is the next, main's text after it the one after that. So the
items in order are the document. A branch's item has several parts where it promises branches of its own: its text
up to the promise, the nested branch, its text after it. What nests deeper is written into the part of the nested
branch as it settles.

Deltas come in document order too, since many clients join them as they come. With `include_branches` they come as
they are written, and interleave: `output_index` and `content_index` say where they belong.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import secrets
from collections.abc import Iterator, Sequence
from typing import Any

from pasta_jax.decoding.results import DecodeResult
from pasta_jax.decoding.state import MAIN
from pasta_jax.decoding.streaming import Consumed, Draft, Event, new_events
from pasta_jax.serve import sse
from pasta_jax.serve.asked import Asked
from pasta_jax.serve.errors import ApiError
from pasta_jax.serve.replies import FINISH, Head, account_of, usage_of


@dataclasses.dataclass
class _Part:
    """A part of an item: where it is, and its text so far."""

    item: _Item
    index: int
    text: str = ""
    done: bool = False

    @property
    def body(self) -> dict[str, Any]:
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": []}


@dataclasses.dataclass
class _Item:
    """An output item, of main or of a branch."""

    id: str
    index: int
    promise: Event | None
    parts: list[_Part] = dataclasses.field(default_factory=list)
    status: str = "in_progress"


class _Nested:
    """A branch of a branch: all that it and its own branches write goes into one part, as it settles."""

    def __init__(self, thread: int, part: _Part):
        self.thread, self.part, self.draft = thread, part, Draft()

    def add(self, event: Event) -> str:
        """The text that settles with an event of this branch or one below it."""
        before = len(self.draft.settled)
        branch, parent = (MAIN if n == self.thread else n for n in (event.branch, event.parent))
        self.draft.add(dataclasses.replace(event, branch=branch, parent=parent))
        return self.draft.settled[before:]


class InOrder:
    """Events of one answer, brought into document order: each waits for what stands before it."""

    def __init__(self) -> None:
        self._events: dict[int, collections.deque[Event]] = {MAIN: collections.deque()}
        self._open = [MAIN]  # the thread whose text comes next, after those that wait for it

    def add(self, event: Event) -> Iterator[Event]:
        """The events that an event completes the way to."""
        thread = event.parent if event.kind == "promise" else event.branch
        self._events[thread].append(event)
        if event.kind == "promise":
            self._events[event.branch] = collections.deque()
        while self._open and (waiting := self._events[self._open[-1]]):
            yield (first := waiting.popleft())
            if first.kind == "promise":
                self._open.append(first.branch)
            elif first.kind == "closed":
                self._open.pop()


class Items:
    """The output items of one answer, made of its events; and the events of a stream that tell of them."""

    def __init__(self, name: str, *, branches: bool):
        self.name, self.branches = name, branches
        self.items: list[_Item] = []
        self._item_of: dict[int, _Item] = {}  # of main: the item that its text goes to, if there is one
        self._part_of: dict[int, _Part] = {}  # of main and of branches of main
        self._nested: dict[int, _Nested] = {}

    def add(self, event: Event) -> Iterator[dict[str, Any]]:
        """What an event adds."""
        match event.kind:
            case "promise" if event.parent == MAIN:
                yield from self._close_item(MAIN)
                yield from self._open_item(event.branch, event)
            case "promise" if event.parent in self._nested:
                self._nested[event.branch] = self._nested[event.parent]
                yield from self._nest(event, event.parent)
            case "promise":
                yield from self._close_part(event.parent)
                part = self._new_part(self._item_of[event.parent])
                yield self._part_event("content_part.added", part, part=part.body)
                self._nested[event.branch] = _Nested(event.branch, part)
            case "text" if event.branch in self._nested:
                yield from self._nest(event, event.branch)
            case "text":
                yield from self._write(event)
            case "closed" if event.branch in self._nested:
                yield from self._nest(event, event.branch)
                nested = self._nested[event.branch]
                if nested.thread == event.branch:
                    yield from self._end_part(nested.part)
            case "closed" if event.branch != MAIN:
                yield from self._close_item(event.branch, "completed" if event.finished else "incomplete")

    def end(self, status: str) -> Iterator[dict[str, Any]]:
        """What the end of the answer adds: an item that is open is closed with the status of the answer."""
        if not self.items:  # the answer is empty
            yield from self._open_item(MAIN, None)
        yield from self._close_item(MAIN, status)

    def _write(self, event: Event) -> Iterator[dict[str, Any]]:
        thread = event.branch
        if thread not in self._item_of:
            yield from self._open_item(thread, None)
        if thread not in self._part_of:
            part = self._part_of[thread] = self._new_part(self._item_of[thread])
            yield self._part_event("content_part.added", part, part=part.body)
        yield from self._delta(self._part_of[thread], event.text)

    def _nest(self, event: Event, thread: int) -> Iterator[dict[str, Any]]:
        nested = self._nested[thread]
        if text := nested.add(event):
            yield from self._delta(nested.part, text)

    def _delta(self, part: _Part, text: str) -> Iterator[dict[str, Any]]:
        part.text += text
        yield self._part_event("output_text.delta", part, delta=text, logprobs=[])

    def _open_item(self, thread: int, promise: Event | None) -> Iterator[dict[str, Any]]:
        item = _Item(f"msg_{self.name}_{len(self.items)}", len(self.items), promise)
        self.items.append(item)
        self._item_of[thread] = item
        yield self._item_event("output_item.added", item)

    def _new_part(self, item: _Item) -> _Part:
        item.parts.append(_Part(item, len(item.parts)))
        return item.parts[-1]

    def _close_part(self, thread: int) -> Iterator[dict[str, Any]]:
        if thread in self._part_of:
            yield from self._end_part(self._part_of.pop(thread))

    def _end_part(self, part: _Part) -> Iterator[dict[str, Any]]:
        if not part.done:
            part.done = True
            yield self._part_event("output_text.done", part, text=part.text, logprobs=[])
            yield self._part_event("content_part.done", part, part=part.body)

    def _close_item(self, thread: int, status: str = "completed") -> Iterator[dict[str, Any]]:
        item = self._item_of.pop(thread, None)
        if item is None:
            return
        if not item.parts:
            part = self._new_part(item)
            yield self._part_event("content_part.added", part, part=part.body)
        self._part_of.pop(thread, None)
        for part in item.parts:
            yield from self._end_part(part)
        item.status = status
        yield self._item_event("output_item.done", item)

    # ---------------------------------------------------------------------------------------- how it is written

    @property
    def output(self) -> list[dict[str, Any]]:
        """All items."""
        return [self._body(item) for item in self.items]

    def _body(self, item: _Item) -> dict[str, Any]:
        body: dict[str, Any] = {
            "id": item.id,
            "type": "message",
            "role": "assistant",
            "status": item.status,
            "content": [part.body for part in item.parts],
        }
        if self.branches and (promise := item.promise) is not None:
            body["pasta"] = {
                "branch": promise.branch,
                "topic": promise.topic,
                "tokens": promise.promised_tokens,
            }
        return body

    def _item_event(self, kind: str, item: _Item) -> dict[str, Any]:
        return {"type": f"response.{kind}", "output_index": item.index, "item": self._body(item)}

    def _part_event(self, kind: str, at: _Part, **more: Any) -> dict[str, Any]:
        place = {"item_id": at.item.id, "output_index": at.item.index, "content_index": at.index}
        return {"type": f"response.{kind}", **place, **more}


class Responses:
    """A reply of /v1/responses."""

    def __init__(self, head: Head, asked: Asked):
        self.head, self.asked = head, asked
        self._items = Items(secrets.token_hex(8), branches=asked.branches)
        self._order, self._number = InOrder(), 0
        self._result: DecodeResult | None = None

    def whole(self, results: Sequence[DecodeResult]) -> dict[str, Any]:
        result, status = results[0], _status(results[0])
        _, events = new_events(Consumed(), result.trace, self.head.vocabulary)
        for _ in itertools.chain(*map(self._items.add, events), self._items.end(status)):
            pass  # the items are what is wanted, not the events of a stream
        return self._body(status, result)

    def begin(self) -> Iterator[bytes]:
        for kind in ("created", "in_progress"):
            yield self._data({"type": f"response.{kind}", "response": self._body("in_progress")})

    def add(self, choice: int, event: Event) -> Iterator[bytes]:
        self._result = event.result
        for each in [event] if self.asked.branches else self._order.add(event):
            yield from map(self._data, self._items.add(each))

    def end(self) -> Iterator[bytes]:
        assert self._result is not None
        status = _status(self._result)
        yield from map(self._data, self._items.end(status))
        yield self._data({"type": f"response.{status}", "response": self._body(status, self._result)})

    def failed(self, error: ApiError) -> bytes:
        cause = {"code": error.code, "message": error.message}
        return self._data({"type": "response.failed", "response": self._body("failed") | {"error": cause}})

    def _data(self, tree: dict[str, Any]) -> bytes:
        self._number += 1
        return sse.data({**tree, "sequence_number": self._number - 1}, tree["type"])

    def _body(self, status: str, result: DecodeResult | None = None) -> dict[str, Any]:
        """The response object; with a result it is the last."""
        sampling = self.asked.samplings[0]
        body: dict[str, Any] = {
            "id": self.head.id,
            "object": "response",
            "created_at": self.head.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "max_output_tokens": sampling.max_new_tokens,
            **self.asked.echoed,
            "model": self.head.model,
            "output": self._items.output,
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": sampling.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_p": sampling.top_p,
            "usage": None,
        }
        if result is not None:
            prompt, reused, answer = usage_of(self.asked, [result])
            body["usage"] = {
                "input_tokens": prompt,
                "input_tokens_details": {"cached_tokens": reused, "cache_write_tokens": 0},
                "output_tokens": answer,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": prompt + answer,
            }
            if self.asked.branches:
                body["pasta"] = account_of(result)
        return body


def _status(result: DecodeResult) -> str:
    """Of a response whose answer is this."""
    return "incomplete" if FINISH.get(result.stop_reason) == "length" else "completed"
