"""How an answer was decoded, drawn: its threads over the decode steps, as a page, a figure and a small chart.

`DecodeResult.timeline()` makes one, and `Timeline.of` of any trace; `terminal.timeline` draws it in letters. The
page (`timeline.html` is its template) is one file that loads nothing else.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import html
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pasta_jax import figures
from pasta_jax.decoding.state import MAIN, UNFED, Stop
from pasta_jax.decoding.stops import characters_before
from pasta_jax.decoding.trace import Trace
from pasta_jax.files import replacing
from pasta_jax.lang.assemble import assemble
from pasta_jax.lang.grammar import Kind
from pasta_jax.tokens.cost import critical_path, critical_tokens
from pasta_jax.tokens.detokenize import Role, read
from pasta_jax.tokens.tokenizer import Vocabulary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#8b9099", "#3f8fd9", "#e06a1b", "#12a074", "#c76ab2", "#b48a00", "#8f83f2")
"""Of main, and of branches in turn. Each has a contrast of 3 to white and of 6 to black; and wherever one is shown,
the thread's number is there too."""

TEMPLATE = Path(__file__).with_name("timeline.html")

SMALL = 0.012
"""The share of a chart below which a run has no room for a number."""

FED, HELD, QUEUED = "fed", "held", "queued"
"""What a thread did in some steps: it was fed; it waited for its branches, or for a free lane."""


class Run(NamedTuple):
    """What a thread did in the steps from `first` to `last`, one of the above."""

    what: str
    first: int
    last: int


@dataclasses.dataclass(frozen=True)
class Line:
    """A thread over time.

    Attributes:
      id, parent: numbers of threads; main is 0, and has the parent -1.
      topic: of the promise; "" for main and for a bare promise.
      fork_step: the step of the promise's end; 0 for main, UNFED if it never was fed.
      runs: what it did, in order of steps.
      text: its own text for the reader, without that of its branches.
      tokens: how many of its tokens were fed.
    """

    id: int
    parent: int
    topic: str
    fork_step: int
    runs: tuple[Run, ...]
    text: str
    tokens: int

    @property
    def name(self) -> str:
        """Number and topic."""
        return "main" if self.id == MAIN else f"{self.id} {self.topic}".strip()

    @property
    def first(self) -> int:
        """The step that fed its first token; 0 if none was."""
        return next((run.first for run in self.runs if run.what == FED), 0)

    @property
    def last(self) -> int:
        """The step that fed its last token; 0 if none was."""
        return max((run.last for run in self.runs if run.what == FED), default=0)


class Token(NamedTuple):
    """A token of the answer: who wrote it, when and where, and what a reader gets of it.

    `lane` counts from 1 and is 0 for a token that was never fed, as its `step` is UNFED; `entry` is its place in
    the pool, from 0. `text` is what it adds to the reader's text; `spelled` is the token itself. `is_text` is false
    for tags, and for what was decoded beyond a stop string.
    """

    thread: int
    step: int
    lane: int
    entry: int
    text: str
    spelled: str
    logprob: float
    critical: bool
    is_text: bool


@dataclasses.dataclass(frozen=True)
class Timeline:
    """How one answer was decoded, for the eye.

    In a notebook it shows itself as a small chart.

    Attributes:
      prompt: the text of the prompt, as the model was given it, without control tokens.
      lines: the threads, main first.
      tokens: of the answer, in document order.
      steps, lanes: decode steps, and the most threads that were fed in one.
      critical_path: the steps that unlimited lanes would take.
      prompt_tokens: entries of the pool that the prompt took, before those of the answer.
      stop_reason: why the answer ended; "running" if it has not.
      wall_s: seconds of the answer; None: not measured.
      measured_speedup: its tokens a second over those of the same prompt answered without promises; None: likewise.
      title: of the page; by default the beginning of the prompt.
    """

    prompt: str
    lines: tuple[Line, ...]
    tokens: tuple[Token, ...]
    steps: int
    lanes: int
    critical_path: int
    prompt_tokens: int
    stop_reason: str
    wall_s: float | None = None
    measured_speedup: float | None = None
    title: str = ""

    @classmethod
    def of(
        cls,
        trace: Trace,
        vocabulary: Vocabulary,
        *,
        stopped: int | None = None,
        wall_s: float | None = None,
        measured_speedup: float | None = None,
    ) -> Timeline:
        """The timeline of a trace, also of a row that still runs.

        Args:
          trace: of one answer.
          vocabulary: of the model's tokenizer, `model.tokenizer.vocabulary`.
          stopped: the characters of the text before a stop string; None: there was none.
          wall_s, measured_speedup: as attributes.
        """
        threads, indices = trace.threads, trace.answer_indices
        topics, whole = read(vocabulary, threads).promises, _text(trace, vocabulary, stopped)
        critical = {int(indices[thread][index]) for thread, index in critical_tokens(threads, vocabulary)}
        lane = _lanes(trace)
        tokens = tuple(
            Token(
                thread=int(trace.tokens.thread[index]),
                step=int(trace.step[index]),
                lane=int(lane[index]),
                entry=index,
                text=text,
                spelled=vocabulary.text([int(trace.tokens.token[index])]),
                logprob=float(trace.logprob[index]),
                critical=index in critical,
                is_text=is_text,
            )
            for index, is_text, text in whole
        )
        lines = tuple(
            Line(
                id=number,
                parent=int(trace.parent[number]),
                topic=topics[number].topic if number in topics else "",
                fork_step=_fork_step(trace, number),
                runs=tuple(_runs(trace, number, vocabulary)),
                text="".join(token.text for token in tokens if token.thread == number),
                tokens=int(np.sum(trace.step[indices[number]] > 0)),
            )
            for number in range(len(trace.parent))
        )
        return cls(
            prompt=vocabulary.text(trace.tokens.token[: trace.prompt_length].tolist()).strip(),
            lines=lines,
            tokens=tokens,
            steps=trace.steps,
            lanes=int(trace.widths.max(initial=0)),
            critical_path=critical_path(threads, vocabulary),
            prompt_tokens=trace.prompt_length,
            stop_reason=trace.stop.reason if stopped is None else Stop.STOP.reason,
            wall_s=wall_s,
            measured_speedup=measured_speedup,
        )

    @functools.cached_property
    def text_tokens(self) -> int:
        """The tokens of the answer's text, which are the steps of writing it one token at a time."""
        return sum(token.is_text for token in self.tokens)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a page (.html), or a figure (.png), which needs matplotlib.

        Raises:
          ValueError: another kind of file.
          ImportError: matplotlib is not installed.
          WriteError: the file could not be written.
        """
        check_path(path)
        if Path(path).suffix == ".html":
            with replacing(path) as file:
                file.write(self.html())
            return
        figure = self.figure()
        with replacing(path, "wb") as file:
            figures.save(figure, file)

    # ------------------------------------------------------------------------------------------------ a page

    def html(self) -> str:
        """The page. It needs no network; without scripts it is the charts and the text."""
        parts = {
            "title": html.escape(_shortened(self.title or self.prompt, 60) or "An answer"),
            "prompt": html.escape(self.prompt),
            "facts": "".join(f"<div><dt>{name}</dt><dd>{fact}</dd></div>" for name, fact in self._facts()),
            "colours": "".join(f".c{i}{{--c:{colour}}}" for i, colour in enumerate(COLOURS)),
            "steps": str(self.steps),
            "lanes_in_use": str(max(self.lanes, 1)),
            "scale": str(self._scale),
            "ruler": self._ruler(),
            "threads": "\n".join(self._thread_rows()),
            "lanes": "\n".join(self._lane_rows()),
            "pool": "".join(self._pool()),
            "answer": "".join(self._answer()),
            "table": "".join(self._table_rows()),
            "data": json.dumps(self._data(), allow_nan=False).replace("<", "\\u003c"),
        }
        template = TEMPLATE.read_text(encoding="utf-8")
        return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)

    @functools.cached_property
    def _scale(self) -> int:
        """The steps that a chart is wide."""
        return max(self.steps, self.text_tokens, 1)

    def _facts(self) -> Iterator[tuple[str, str]]:
        alone = self.text_tokens
        yield "decode steps", f"{self.steps}"
        yield "one token at a time", f"{alone} steps"
        yield "theoretical speedup", f"{alone / max(self.steps, 1):.2f}×"
        yield "critical path", f"{self.critical_path} steps"
        yield "branches", f"{len(self.lines) - 1}"
        yield "lanes in use", f"up to {self.lanes}"
        if self.wall_s:
            yield "seconds", f"{self.wall_s:.3g}"
        if self.measured_speedup:
            yield "measured speedup", f"{self.measured_speedup:.2f}×"
        yield "ended by", html.escape(self.stop_reason)

    def _box(self, first: int, last: int) -> str:
        """Where the steps from `first` to `last` are in a chart."""
        return (
            f"left:{100 * (first - 1) / self._scale:.3f}%;width:{100 * (last - first + 1) / self._scale:.3f}%"
        )

    def _ruler(self) -> str:
        every = next(n for n in _nice() if self._scale / n <= 12)
        marks = range(every, self._scale + 1, every)
        return "".join(
            f'<b style="left:{100 * (step - 0.5) / self._scale:.3f}%">{step}</b>' for step in marks
        )

    def _thread_rows(self) -> Iterator[str]:
        """The sequential answer, and each thread: its runs, its part of the critical path, its fork."""
        if self.text_tokens:
            yield _row(
                "one at a time", "alone", f'<i class="alone" style="{self._box(1, self.text_tokens)}"></i>'
            )
        for line in self.lines:
            parts = [
                f'<i class="{run.what}" style="{self._box(run.first, run.last)}"'
                f' title="{html.escape(self._said(line, run))}"></i>'
                for run in line.runs
            ]
            path = [token.step for token in self.tokens if token.critical and token.thread == line.id]
            parts += [f'<i class="path" style="{self._box(*ends)}"></i>' for ends in _ranges(path)]
            if line.fork_step > 0:
                rows = line.id - line.parent
                left = 100 * (line.fork_step - 0.5) / self._scale
                parts.append(f'<i class="fork" style="left:{left:.3f}%;--rows:{rows}"></i>')
            yield _row(html.escape(line.name), f"c{_colour(line.id)}", "".join(parts), thread=line.id)

    def _said(self, line: Line, run: Run) -> str:
        steps = f"step {run.first}" if run.first == run.last else f"steps {run.first} to {run.last}"
        if run.what != FED:
            return f"{line.name}, {steps}: waits for {'its branches' if run.what == HELD else 'a free lane'}"
        texts = (t.text for t in self.tokens if t.thread == line.id and run.first <= t.step <= run.last)
        return f"{line.name}, {steps}: {_shortened(''.join(texts), 300)}"

    def _lane_rows(self) -> Iterator[str]:
        """Each lane: which thread it fed, in runs of one thread."""
        for lane, runs in enumerate(self._lane_runs(), 1):
            parts = [
                f'<i class="fed c{_colour(thread)}" style="{self._box(first, last)}"'
                f' title="{html.escape(self.lines[thread].name)}">'
                f"{thread if last - first + 1 > SMALL * self._scale else ''}</i>"
                for thread, first, last in runs
            ]
            yield _row(f"lane {lane}", "", "".join(parts), lane=lane)

    def _lane_runs(self) -> list[list[tuple[int, int, int]]]:
        """For each lane: thread, first and last step of each run in which it fed one thread."""
        steps = collections.defaultdict[tuple[int, int], list[int]](list)
        for token in self.tokens:
            steps[token.lane, token.thread].append(token.step)
        runs: list[list[tuple[int, int, int]]] = [[] for _ in range(self.lanes)]
        for (lane, thread), fed in steps.items():
            if lane:
                runs[lane - 1] += ((thread, first, last) for first, last in _ranges(fed))
        return runs

    def _pool(self) -> Iterator[str]:
        """The pool's entries in order."""
        yield f'<i class="prompt">prompt × {self.prompt_tokens}</i>'
        for token in sorted(self.tokens, key=lambda token: token.entry):
            if token.lane:
                yield f'<i class="c{_colour(token.thread)}" data-i="{token.entry}">{token.thread}</i>'

    def _answer(self) -> Iterator[str]:
        """The text in document order, a span for each token, and a number before each branch.

        `data-s` is the step in which it is there, `data-n` that of writing one token at a time.
        """
        before, number = MAIN, 0
        for token in self.tokens:
            step = token.step if token.lane else self.steps
            if token.thread != before and self.lines[token.thread].parent == before:
                yield f'<sup class="c{_colour(token.thread)}" data-s="{step}">{token.thread}</sup>'
            before = token.thread
            number += token.is_text
            if token.text:
                place = f'data-i="{token.entry}" data-s="{step}" data-n="{number}"'
                yield f'<span class="c{_colour(token.thread)}" {place}>{html.escape(token.text)}</span>'

    def _table_rows(self) -> Iterator[str]:
        for line in self.lines:
            held, queued = (
                sum(run.last - run.first + 1 for run in line.runs if run.what == what)
                for what in (HELD, QUEUED)
            )
            cells = [line.parent if line.id else "", line.first, line.last, line.tokens, held, queued]
            name = f'<th scope="row"><i class="c{_colour(line.id)}"></i>{html.escape(line.name)}</th>'
            text = html.escape(_shortened(line.text, 160))
            yield f'<tr>{name}{"".join(f"<td>{cell}</td>" for cell in cells)}<td class="text">{text}</td></tr>'

    def _data(self) -> Mapping[str, Any]:
        """What the script of the page needs: names of threads, and the tokens that were fed."""
        return {
            "names": [line.name for line in self.lines],
            "colours": [_colour(line.id) for line in self.lines],
            "tokens": [
                [t.entry, t.thread, t.step, t.lane, t.spelled, _number(t.logprob), int(t.critical)]
                for t in self.tokens
                if t.lane
            ],
        }

    # -------------------------------------------------------------------------------------- in a notebook

    def _repr_html_(self) -> str:
        """A small chart with styles of its own, on light and on dark paper."""
        rows = []
        for line in self.lines:
            colour = COLOURS[_colour(line.id)]
            styles = {
                FED: f"top:3px;height:10px;background:{colour}",
                HELD: f"top:7px;border-top:2px dotted {colour}",
                QUEUED: f"top:7px;border-top:2px dashed {colour}",
            }
            runs = "".join(
                f'<span title="{html.escape(self._said(line, run))}"'
                f' style="position:absolute;{self._box(run.first, run.last)};{styles[run.what]}"></span>'
                for run in line.runs
            )
            rows.append(
                '<div style="display:flex;height:16px;line-height:16px"><span style="flex:0 0 9em;overflow:hidden;'
                f'text-overflow:ellipsis;white-space:nowrap">{html.escape(line.name)}</span>'
                f'<span style="position:relative;flex:1;overflow:hidden">{runs}</span></div>'
            )
        about = f"{self.steps} decode steps, {self.text_tokens} one token at a time"
        if len(self.lines) > 1:
            about += f" (theoretical speedup {self.text_tokens / max(self.steps, 1):.2f}×)"
        return (
            f'<div role="img" aria-label="Threads over decode steps: {html.escape(about)}" '
            f'style="max-width:60em;margin-top:6px;font:12px sans-serif">{"".join(rows)}'
            f'<div style="margin:4px 0 0 9em">{about}</div></div>'
        )

    # ------------------------------------------------------------------------------------------- a figure

    def figure(self) -> Figure:
        """The threads and the lanes over the steps, beside one token at a time. Raises ImportError."""
        threads, lanes = len(self.lines) + bool(self.text_tokens), max(self.lanes, 1)
        figure = figures.new_figure(10, 1.9 + 0.26 * (threads + lanes))
        ratios = {"height_ratios": [threads + 0.6, lanes + 0.6]}
        above, below = figure.subplots(2, 1, sharex=True, gridspec_kw=ratios)
        names = [line.name if len(line.name) <= 24 else f"{line.name[:23]}…" for line in self.lines]
        names = [name.replace("$", r"\$") for name in names]  # which would begin a formula
        for row, line in enumerate(self.lines):
            colour = COLOURS[_colour(line.id)]
            for run in line.runs:
                box = (run.first - 0.5, run.last - run.first + 1)
                if run.what == FED:
                    above.broken_barh([box], (row - 0.36, 0.72), facecolor=colour)
                else:
                    style = ":" if run.what == HELD else "--"
                    above.plot([box[0], sum(box)], [row, row], style, color=colour, linewidth=1.6)
            path = _ranges([t.step for t in self.tokens if t.critical and t.thread == line.id])
            for first, last in path:
                above.plot([first - 0.5, last + 0.5], [row + 0.36] * 2, color=figures.INK, linewidth=2)
            if line.fork_step > 0:
                above.plot(
                    [line.fork_step] * 2,
                    [line.parent + 0.4, row - 0.38],
                    color=figures.PALE,
                    linewidth=0.8,
                    zorder=0.9,
                )
        if self.text_tokens:
            names.append("one at a time")
            box = (0.5, self.text_tokens)
            above.broken_barh(
                [box], (len(names) - 1.3, 0.6), facecolor="white", edgecolor=figures.PALE, hatch="///"
            )
        for lane, runs in enumerate(self._lane_runs(), 1):
            for thread, first, last in runs:
                box = (first - 0.5, last - first + 1)
                below.broken_barh([box], (lane - 0.36, 0.72), facecolor=COLOURS[_colour(thread)])
        figures.dress(above, "", "thread")
        figures.dress(below, "decode step", "lane")
        above.set_yticks(range(len(names)), names, fontfamily=figures.fonts())
        below.set_yticks(range(1, lanes + 1))
        above.set_ylim(len(names) - 0.4, -0.6)
        below.set_ylim(lanes + 0.6, 0.4)
        above.set_xlim(0.5, self._scale + 0.5)
        about = f"{self.steps} decode steps, {self.text_tokens} one token at a time; thick line: the critical path"
        above.set_title(f"{about} ({self.critical_path})", fontsize=10, color=figures.INK, loc="left")
        return figure


def check_path(path: str | os.PathLike[str]) -> None:
    """Looks whether a timeline can be a file of this name.

    Raises:
      ValueError: it is neither .html nor .png.
      ImportError: a figure, and matplotlib is not installed.
    """
    suffix = Path(path).suffix
    if suffix not in (".html", ".png"):
        raise ValueError(
            f"{os.fspath(path)}: a timeline is a page or a figure. Give a name that ends in .html or .png."
        )
    if suffix == ".png":
        figures.new_figure(1, 1)


# ----------------------------------------------------------------------------------------- from the trace


def _text(trace: Trace, vocabulary: Vocabulary, stopped: int | None) -> list[tuple[int, bool, str]]:
    """The tokens in document order: index in the trace, `is_text`, and what each adds to the reader's text."""
    whole = assemble(read(vocabulary, trace.threads).program)[:stopped]
    found = [*characters_before(trace, vocabulary)]
    ends = [*(before for _, _, before in found[1:]), len(whole)]
    return [
        (index, role == Role.TEXT and (stopped is None or before < stopped), whole[before:end])
        for (index, role, before), end in zip(found, ends)
    ]


def _lanes(trace: Trace) -> np.ndarray:
    """The lane that fed each token, from 1; 0 for the prompt and for tokens that were never fed: int [n].

    In the pool the tokens of a step stand in the order of their lanes.
    """
    steps = np.where(trace.step > 0, trace.step, 0)
    first = np.searchsorted(steps[steps > 0], np.arange(trace.steps + 2))
    place = np.cumsum(steps > 0) - 1
    return np.where(steps > 0, place - first[np.minimum(steps, trace.steps + 1)] + 1, 0)


def _fork_step(trace: Trace, thread: int) -> int:
    if thread == MAIN:
        return 0
    promised = trace.answer_indices[trace.parent[thread]]
    order = int(trace.fork_order[thread])  # behind the last token, where a limit ended the answer at the fork
    return int(trace.step[promised[order]]) if order < len(promised) else UNFED


def _runs(trace: Trace, thread: int, vocabulary: Vocabulary) -> Iterator[Run]:
    """What a thread did in each step from its promise to its end."""
    waits = {int(Kind.SYNC), int(Kind.END if thread == MAIN else Kind.ASYNC_CLOSE)}
    indices = trace.answer_indices[thread]
    kinds = vocabulary.kinds[trace.tokens.token[indices]]
    at = max(
        _fork_step(trace, thread) - 1, 0
    )  # the step before the one in which it could have been fed first
    start = None  # of a run in which it was fed
    for kind, step in zip(kinds.tolist(), trace.step[indices].tolist()):
        step = step if step > 0 else trace.steps + 1
        if step > at + 1 or step > trace.steps:
            if start is not None:
                yield Run(FED, start, at)
                start = None
            if step > at + 1:
                yield Run(HELD if kind in waits else QUEUED, at + 1, step - 1)
        if step <= trace.steps and start is None:
            start = step
        at = step
    if start is not None:
        yield Run(FED, start, at)


def _ranges(steps: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The runs of consecutive steps among these, first and last of each; those that are none are left out.

    >>> list(_ranges([5, 1, 2, 3, -1]))
    [(1, 3), (5, 5)]
    """
    left = sorted(step for step in steps if step > 0)
    while left:
        length = next((i for i, step in enumerate(left) if step != left[0] + i), len(left))
        yield left[0], left[length - 1]
        left = left[length:]


# ----------------------------------------------------------------------------------------------- for pages


def _colour(thread: int) -> int:
    """The number of a thread's colour."""
    return 0 if thread == MAIN else 1 + (thread - 1) % (len(COLOURS) - 1)


def _row(name: str, kind: str, parts: str, **data: int) -> str:
    about = "".join(f' data-{key}="{value}"' for key, value in data.items())
    cells = f'<span class="name">{name}</span><span class="track">{parts}</span>'
    return f'<div class="row {kind}"{about}>{cells}</div>'


def _number(logprob: float) -> float | None:
    """A log-probability for JSON, which has neither infinity (of a token that was forced) nor NaN."""
    return round(logprob, 2) if math.isfinite(logprob) else None


def _shortened(text: str, characters: int) -> str:
    """On one line, with an ellipsis where it was cut."""
    line = " ".join(text.split())
    return line if len(line) <= characters else f"{line[: characters - 1]}…"


def _nice() -> Iterator[int]:
    """1, 2, 5, 10, 20, 50, ..."""
    scale = 1
    while True:
        yield from (scale, 2 * scale, 5 * scale)
        scale *= 10
