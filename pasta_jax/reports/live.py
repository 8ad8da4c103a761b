"""An answer in a terminal, as it comes."""

from __future__ import annotations

import re
import shutil
import unicodedata
from collections.abc import Callable
from typing import TextIO

from pasta_jax.decoding.streaming import Draft, Event

ERASE, SAVE, RESTORE, FAINT, PLAIN = "\x1b[K", "\x1b7", "\x1b8", "\x1b[2m", "\x1b[0m"
"""What a terminal does: erases the rest of the line, keeps and finds its place again, writes faintly or not."""


def printer(out: TextIO, *, live: bool) -> Callable[[Event], None]:
    """A callback that writes the text of one answer as it settles.

    Args:
      out: where to.
      live: it is a terminal; what comes after the settled text stands behind it, faint, as far as the line goes.
    """
    draft, shown = Draft(), 0

    def write(event: Event) -> None:
        nonlocal shown
        draft.add(event)
        new, shown = draft.settled[shown:], len(draft.settled)
        out.write(ERASE + new + _rest(draft) if live else new)
        out.write("\n" if event.kind == "done" else "")
        out.flush()

    return write


def _rest(draft: Draft) -> str:
    """What is not settled yet, on the line on which the settled text ends."""
    columns = shutil.get_terminal_size().columns
    used = _width(draft.settled.rpartition("\n")[2])
    room = columns - 1 - used % columns
    rest = re.sub(r"\s", " ", str(draft)[len(draft.settled) :])
    if not rest or (used and not used % columns):  # a full line: the cursor is not on the next one yet
        return ""
    while _width(rest) > room:
        rest = rest[: room - _width(rest)]
    return SAVE + FAINT + rest + PLAIN + RESTORE


def _width(text: str) -> int:
    """Columns of a terminal."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)
