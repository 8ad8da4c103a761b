"""An answer on a terminal while it is decoded: all its branches grow side by side, each in its place and colour."""

from __future__ import annotations

import itertools
import os
import shutil
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import TextIO

from pasta_jax.decoding.pending import PendingAnswer
from pasta_jax.decoding.results import DecodeResult
from pasta_jax.decoding.state import MAIN
from pasta_jax.decoding.streaming import Draft, Event
from pasta_jax.terminal import ERASE, FAINT, PLAIN, UNSEEN

UP, ERASE_BELOW, HIDE, SHOW = "\x1b[{}F", "\x1b[J", "\x1b[?25l", "\x1b[?25h"
"""Terminal controls: some lines up, erase the rest of the screen, hide and show the cursor."""

COLOURS = ("36", "33", "32", "35", "34", "31")
"""Of branches, in turn; main has the terminal's own."""

GROWING = "▌"
"""Ends the text of a thread that is still being decoded."""


class Document:
    """The text that the events of an answer have built so far, by threads."""

    def __init__(self) -> None:
        self._parts: dict[int, list[str | int]] = {MAIN: []}
        self._closed: set[int] = set()
        self._length: int | None = None  # when it is complete: a stop string may have cut it

    def add(self, event: Event) -> None:
        """Adds the next event."""
        match event.kind:
            case "text":
                self._parts[event.branch].append(event.text)
            case "promise":
                self._parts[event.parent].append(event.branch)
                self._parts[event.branch] = []
            case "closed":
                self._closed.add(event.branch)
            case "done" if event.result:
                self._length = len(event.result.text)

    @property
    def growing(self) -> int:
        """How many threads are not closed."""
        return len(self._parts) - len(self._closed)

    def characters(self) -> Iterator[tuple[int, str]]:
        """Its text in reading order, each character with its thread; a thread that goes on ends in GROWING."""
        characters = ((thread, each) for thread, text in self._spans(MAIN) for each in text)
        return itertools.islice(characters, self._length)

    def _spans(self, thread: int) -> Iterator[tuple[int, str]]:
        for part in self._parts[thread]:
            if isinstance(part, int):
                yield from self._spans(part)
            else:
                yield thread, part
        if thread not in self._closed:
            yield thread, GROWING


Line = list[tuple[int, str]]
"""Characters with their threads, in runs."""


def wrapped(characters: Iterable[tuple[int, str]], columns: int) -> list[Line]:
    """The lines of a document on a terminal, broken at blanks where there are any."""
    lines: list[Line] = [[]]
    used = 0
    for thread, character in characters:
        if character == "\n":
            lines.append([])
            used = 0
            continue
        if unicodedata.category(character) == "Cc":
            character = " " if character.isspace() else UNSEEN
        if used + width(character) > columns:
            blanks = [i for i, (_, earlier) in enumerate(lines[-1], 1) if earlier == " "]
            cut = blanks[-1] if blanks and character != " " else len(lines[-1])
            lines[-1], rest = lines[-1][:cut], lines[-1][cut:]
            lines.append(rest)
            used = sum(width(earlier) for _, earlier in rest)
            if character == " ":
                continue
        lines[-1].append((thread, character))
        used += width(character)
    return [runs(line) for line in lines]


def runs(line: Line) -> Line:
    """Neighbours of one thread together."""
    groups = itertools.groupby(line, key=lambda pair: pair[0])
    return [(thread, "".join(text for _, text in pairs)) for thread, pairs in groups]


def width(character: str) -> int:
    """Its columns."""
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


class Screen:
    """Draws a document over what it drew before.

    A document with more lines than the terminal scrolls as far as its lines are final; what does not fit below is
    shown when there is room.

    Args:
      out: a terminal.
      colours: tell branches apart by them.
    """

    def __init__(self, out: TextIO, *, colours: bool):
        self._out, self._colours = out, colours
        self._document = Document()
        self._left = 0  # lines of the document that scrolled away
        self._drawn = 0  # lines above the cursor that are drawn over

    def update(self, events: Sequence[Event]) -> None:
        """Adds events and draws. After the last one, "done", the whole text is there, and the cursor below it."""
        for event in events:
            self._document.add(event)
        last = any(event.kind == "done" for event in events)
        columns, rows = shutil.get_terminal_size()
        lines = wrapped(self._document.characters(), max(columns - 1, 10))
        room = len(lines) if last else max(rows - 2, 1)
        # The line that grows may yet take a word from the one before.
        growing = (i for i, line in enumerate(lines) if any(text.endswith(GROWING) for _, text in line))
        final = max(next(growing, len(lines)) - 1, 0)
        left = max(self._left, min(final, len(lines) - room))
        shown = [self._styled(line) for line in lines[self._left : left + room]]
        self._drawn, above = min(len(lines) - left, room), self._drawn
        self._left = left
        if not last:
            hidden = len(lines) - left - self._drawn
            below = f", lines below: {hidden}" if hidden else ""
            shown.append(faint(f"threads: {self._document.growing}{below}"[: columns - 1]))
            self._drawn += 1
        up = UP.format(above) if above else ""
        self._out.write(HIDE + up + "".join(line + ERASE + "\n" for line in shown) + ERASE_BELOW + SHOW)
        self._out.flush()

    def _styled(self, line: Line) -> str:
        return "".join(in_colour(text, thread) if self._colours else text for thread, text in line)


class Plain:
    """Writes a document to a file or a pipe, in reading order, as it settles."""

    def __init__(self, out: TextIO):
        self._out = out
        self._draft, self._shown = Draft(), 0

    def update(self, events: Sequence[Event]) -> None:
        """Adds events, and writes what is settled; after the last one, "done", the end of the line."""
        for event in events:
            self._draft.add(event)
        settled = self._draft.settled
        self._out.write(settled[self._shown :] + "\n" * any(event.kind == "done" for event in events))
        self._out.flush()
        self._shown = len(settled)


def show(answer: PendingAnswer, out: TextIO) -> DecodeResult:
    """Decodes an answer and shows it meanwhile; whatever breaks that off cancels it."""
    view = Screen(out, colours=has_colours()) if is_live(out) else Plain(out)
    try:
        for events in answer.looks():
            view.update(events)
    finally:
        answer.cancel()
    return answer.result()


def in_colour(text: str, thread: int) -> str:
    """The text in the colour of its thread."""
    return text if thread == MAIN else f"\x1b[{COLOURS[(thread - 1) % len(COLOURS)]}m{text}\x1b[0m"


def faint(text: str) -> str:
    """The text in faint letters."""
    return FAINT + text + PLAIN


def has_colours() -> bool:
    """Whether the user lets programs colour their output (no-color.org)."""
    return not os.environ.get("NO_COLOR")


def is_live(out: TextIO) -> bool:
    """Whether it is a terminal that can move its cursor."""
    return out.isatty() and os.environ.get("TERM") != "dumb"
