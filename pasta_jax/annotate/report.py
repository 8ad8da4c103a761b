"""What a run made: shares, shapes, speed and reasons, as JSON, Markdown and a figure."""

from __future__ import annotations

import array
import collections
import math
import os
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any, cast

import numpy as np

from pasta_jax.annotate.run import Line, Outcome
from pasta_jax.figures import PALE, SERIES, can_draw, dress, new_figure, save
from pasta_jax.files import replacing, write_json
from pasta_jax.terminal import markdown_table

LISTED = 1000
"""Answers that stayed as they were, named in the report; the journal has all."""


BARS = 5
"""Room for so many reasons in the figure, though there be fewer."""


class Tally:
    """Counts what became of the answers of a run. Of an annotated answer it keeps a number, of the others none."""

    def __init__(self, lines: Iterable[Line]):
        self.records = self.unusable = self.answers = 0
        self.speedups = array.array("d")
        self.branches, self.depth, self.syncs, self.blocks = (collections.Counter[int]() for _ in range(4))
        self.reasons, self.notes, self.faults = (collections.Counter[str]() for _ in range(3))
        self._left: list[tuple[int, int, str]] = []
        for line in lines:
            self.records += 1
            if line.problem is not None:
                self.unusable += 1
                self.faults[line.problem["reason"]] += 1
            for outcome in line.outcomes:
                self._add(line.number, outcome)

    def _add(self, record: int, outcome: Outcome) -> None:
        self.answers += 1
        self.notes.update(outcome.notes)
        if outcome.reason:
            self.reasons[outcome.reason] += 1
            self._left.append((record, outcome.turn, outcome.reason))
            if len(self._left) == 2 * LISTED:
                self._left = sorted(self._left)[:LISTED]
            return
        self.speedups.append(outcome.speedup)
        self.branches[len(outcome.blocks)] += 1
        self.depth[outcome.depth] += 1
        self.syncs[outcome.syncs] += 1
        self.blocks.update(outcome.blocks)

    def figures(self) -> dict[str, Any]:
        """The figures of the run.

        Speedups are geometric means; those of `all` count answers that are not annotated as 1.
        """
        logs = math.fsum(map(math.log, self.speedups))
        return {
            "records": self.records,
            "unusable": self.unusable,
            "answers": self.answers,
            "annotated": len(self.speedups),
            "share": len(self.speedups) / max(1, self.answers),
            "speedup": {
                "annotated": math.exp(logs / max(1, len(self.speedups))),
                "all": math.exp(logs / max(1, self.answers)),
                "least": min(self.speedups, default=1.0),
            },
            "shapes": {
                "branches": _counts(self.branches),
                "depth": _counts(self.depth),
                "syncs": _counts(self.syncs),
                "block_tokens": _quantiles(self.blocks),
            },
            "reasons": dict(self.reasons.most_common(LISTED)),
            "blocks_in_main": dict(self.notes.most_common(LISTED)),
            "unusable_reasons": dict(self.faults.most_common(LISTED)),
            "left": [
                {"record": record, "answer": turn, "reason": reason}
                for record, turn, reason in sorted(self._left)[:LISTED]
            ],
        }


def _counts(counter: collections.Counter[int]) -> dict[str, int]:
    return {str(value): count for value, count in sorted(counter.items())}


def _quantiles(counter: collections.Counter[int]) -> dict[str, float]:
    """Of the values that are counted, as `numpy.quantile` of all of them."""
    if counter.total() < 2:
        return {}
    values = sorted(counter)
    ends = np.cumsum([counter[value] for value in values])

    def at(place: int) -> int:
        return values[int(np.searchsorted(ends, place, side="right"))]

    found = {}
    for percent in (5, 25, 50, 75, 95):
        place, rest = divmod(percent * (counter.total() - 1), 100)
        low = at(place)
        found[f"{percent} %"] = low + rest / 100 * (at(place + 1) - low) if rest else float(low)
    return found


def one_line(figures: Mapping[str, Any]) -> str:
    """The result of a run in a line, for the terminal."""
    speedup = figures["speedup"]
    unusable = f", {figures['unusable']:,} unusable records" if figures["unusable"] else ""
    share = (
        f"{figures['annotated']:,} of {figures['answers']:,} answers are annotated ({figures['share']:.1%})"
        f"{unusable}."
    )
    if not figures["annotated"]:
        reason, number = next(iter(figures["reasons"].items()), ("no answer", 0))
        return f"{share} The most frequent reason: {reason} ({number:,})."
    return (
        f"{share} Theoretical speedup {speedup['annotated']:.2f}x where annotated, at least "
        f"{speedup['least']:.2f}x; {speedup['all']:.2f}x over all."
    )


def write_report(output: str, lines: Iterable[Line], about: Mapping[str, Any]) -> dict[str, Any]:
    """Writes OUTPUT.report.json, .md and, with matplotlib, .png; returns the figures."""
    tally = Tally(lines)
    figures = tally.figures()
    write_json(f"{output}.report.json", {"about": dict(about), **figures})
    picture = f"{output}.report.png"
    has_picture = bool(figures["annotated"]) and can_draw("The report's figure")
    with replacing(f"{output}.report.md") as file:
        file.write(_markdown(figures, about, os.path.basename(picture) if has_picture else ""))
    if has_picture:
        _draw(picture, tally, figures)
    return figures


def _markdown(figures: Mapping[str, Any], about: Mapping[str, Any], picture: str) -> str:
    shapes = figures["shapes"]
    shares = [
        ["records", f"{figures['records']:,}"],
        ["unusable records", f"{figures['unusable']:,}"],
        ["answers", f"{figures['answers']:,}"],
        ["annotated answers", f"{figures['annotated']:,} ({figures['share']:.1%})"],
        ["theoretical speedup where annotated", f"{figures['speedup']['annotated']:.3f}"],
        ["the least of these", f"{figures['speedup']['least']:.3f}"],
        ["theoretical speedup of all answers", f"{figures['speedup']['all']:.3f}"],
    ]
    parts = [
        f"# Annotation of {about['input']} by {about['annotator']}",
        markdown_table(["", "value"], shares),
        "Speedups are geometric means of the plain answer's tokens by the annotated one's critical path.",
        f"![Speedups, branches, lengths of blocks, reasons]({picture})" if picture else "",
    ]
    for title, key, counts in (
        ("Shapes", "branches", shapes["branches"]),
        ("", "depth", shapes["depth"]),
        ("", "syncs", shapes["syncs"]),
        ("", "tokens of a block", {name: f"{value:.0f}" for name, value in shapes["block_tokens"].items()}),
        ("Why answers stayed as they were", "reason", figures["reasons"]),
        ("Why blocks stayed in main", "reason", figures["blocks_in_main"]),
        ("Why records are unusable", "reason", figures["unusable_reasons"]),
    ):
        if counts:
            rows = [[name, str(count)] for name, count in counts.items()]
            unit = {
                "branches": "answers",
                "depth": "answers",
                "syncs": "answers",
                "tokens of a block": "tokens",
            }
            parts += [f"## {title}"] if title else []
            parts.append(markdown_table([key, unit.get(key, "number")], rows))
    return "\n\n".join(filter(None, parts)) + "\n"


def _draw(path: str, tally: Tally, figures: Mapping[str, Any]) -> None:
    """Speedups, branches, lengths of blocks, and reasons."""
    figure = new_figure(11, 6.4)
    above, below = cast("Any", figure.subfigures(2, 1))
    speeds, branches, lengths = above.subplots(1, 3)
    reasons = below.subplots()
    color = SERIES[0].color

    speeds.hist(tally.speedups, bins=30, color=color)
    mean = figures["speedup"]["annotated"]
    speeds.axvline(mean, color=SERIES[1].color, linestyle="--")
    dress(speeds, f"Theoretical speedup (x), geometric mean {mean:.2f}", "Annotated answers")

    counts = {int(number): count for number, count in figures["shapes"]["branches"].items()}
    branches.bar(list(counts), list(counts.values()), color=color)
    dress(branches, "Branches of an answer", "Annotated answers")
    branches.set_xticks(range(0, max(counts) + 1, max(1, max(counts) // 5)))

    tokens = sorted(tally.blocks)
    top, low = tokens[-1] + 1, max(1, tokens[0])
    edges = [low * (top / low) ** (i / 30) for i in range(31)]
    lengths.hist(tokens, bins=edges, weights=[tally.blocks[each] for each in tokens], color=color)
    lengths.set_xscale("log")
    dress(lengths, "Tokens of a block", "Blocks")
    ticks = [tick * 10**power for power in range(5) for tick in (1, 2, 5)]
    round_ones = [tick for tick in ticks if low <= tick <= top]
    lengths.set_xticks(round_ones if len(round_ones) > 1 else sorted({low, tokens[-1]}))
    lengths.minorticks_off()
    lengths.xaxis.set_major_formatter("{x:g}")

    kept = [*figures["blocks_in_main"].items()][:8] or [*figures["reasons"].items()][:8]
    reasons.barh(range(len(kept)), [count for _, count in kept], color=PALE)
    dress(
        reasons,
        "Blocks that stayed in main" if figures["blocks_in_main"] else "Answers that stayed plain",
        "",
    )
    reasons.set_yticks(
        range(len(kept)), [textwrap.shorten(reason, 60, placeholder="…") for reason, _ in kept]
    )
    reasons.set_ylim(max(len(kept), BARS) - 0.4, -0.6)  # the first above; a single bar stays a bar
    save(figure, path)
