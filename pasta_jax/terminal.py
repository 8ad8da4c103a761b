"""Output for a terminal: streamed answers, timelines and tables."""

from __future__ import annotations

import re
import shutil
import unicodedata
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TextIO

import numpy as np

if TYPE_CHECKING:  # tables need no jax
    from pasta_jax.decoding.results import DecodeResult
    from pasta_jax.decoding.streaming import Draft, Event
from pasta_jax.rounding import ceil_div

ERASE, SAVE, RESTORE, FAINT, PLAIN = "\x1b[K", "\x1b7", "\x1b8", "\x1b[2m", "\x1b[0m"
"""Terminal controls: erase the rest of the line, save and restore the cursor, faint and plain text."""

CUT = {
    "cancelled": "broken off",
    "length": "cut off by --max_new_tokens",
    "cache_full": "cut off by --cache_len",
}
"""Why an answer is not complete, by its stop_reason."""

UNSEEN = "\N{REPLACEMENT CHARACTER}"
"""Stands for controls in a text: they would be the terminal's."""


def harmless(text: str) -> str:
    r"""A text that a model wrote, for a terminal: of its controls only tabs and the ends of lines are left.

    >>> harmless("a\x1b[2Jb\tc\n")
    'a�[2Jb\tc\n'
    """
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", UNSEEN, text)


def printer(out: TextIO, *, live: bool) -> Callable[[Event], None]:
    """A callback for the events of one answer that writes its text as it settles.

    Args:
      out: the file to write to.
      live: it is a terminal: text that is not settled yet follows in faint letters, up to the end of the line.
    """
    from pasta_jax.decoding.streaming import Draft

    draft, shown = Draft(), 0

    def write(event: Event) -> None:
        nonlocal shown
        draft.add(event)
        new, shown = draft.settled[shown:], len(draft.settled)
        out.write(ERASE + harmless(new) + _rest(draft) if live else new)
        out.write("\n" if event.kind == "done" else "")
        out.flush()

    return write


def _rest(draft: Draft) -> str:
    """The text that is not settled yet, as far as it fits on the line."""
    columns = shutil.get_terminal_size().columns
    used = _width(draft.settled.rpartition("\n")[2])
    room = columns - 1 - used % columns
    rest = harmless(re.sub(r"\s", " ", str(draft)[len(draft.settled) :]))
    if not rest or (used and not used % columns):  # a full line: the cursor is not on the next one yet
        return ""
    while _width(rest) > room:
        rest = rest[: room - _width(rest)]
    return SAVE + FAINT + rest + PLAIN + RESTORE


def _width(text: str) -> int:
    """Terminal columns of a text."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


FED, HELD = "█", "·"
_LABEL = 18


def timeline(result: DecodeResult, width: int = 80) -> str:
    """A line per thread, a column per one or several decode steps; `·` is main waiting at a sync.

    Args:
      result: a decoded answer.
      width: characters per line, at least 40.
    """
    trace = result.trace
    steps = max(trace.steps, 1)
    columns = max(width, 40) - _LABEL - 1
    per_column = ceil_div(steps, columns)
    labels = ["main", *(f"{branch.id} {branch.topic}" for branch in result.branches)]
    threads = [0, *(branch.id for branch in result.branches)]
    ruler = _ruler(steps, per_column)
    lines = [f"{'decode step':<{_LABEL}} {ruler}"]
    for label, thread in zip(labels, threads):
        fed = np.zeros(ceil_div(steps, per_column), bool)
        fed_steps = trace.step[(trace.tokens.thread == thread) & (trace.step > 0)]
        fed[(fed_steps - 1) // per_column] = True
        active = range(int(np.argmax(fed)), len(fed) - int(np.argmax(fed[::-1]))) if fed.any() else range(0)
        if thread == 0:
            active = range(len(fed))
        cells = [FED if fed[c] else HELD if c in active else " " for c in range(len(fed))]
        label = label if len(label) <= _LABEL else label[: _LABEL - 1] + "…"
        lines.append(f"{label:<{_LABEL}} {''.join(cells).rstrip()}")
    return "\n".join(lines)


def _ruler(steps: int, per_column: int) -> str:
    """The step number above every tenth column."""
    ruler = ""
    for column in range(0, ceil_div(steps, per_column), 10):
        ruler = ruler.ljust(column) + str(column * per_column + 1)
    return ruler


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns, all but the first to the right.

    >>> print(markdown_table(["family", "truth"], [["list", "99.0 %"]]))
    | family |  truth |
    |:-------|-------:|
    | list   | 99.0 % |
    """
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        aligned = [cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:]))]
        return "| " + " | ".join(aligned) + " |"

    rule = "|:" + "-" * (widths[0] + 1) + "|" + "".join("-" * (w + 1) + ":|" for w in widths[1:])
    return "\n".join([line(header), rule, *map(line, rows)])
