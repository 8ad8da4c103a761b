"""What a run made: shares, shapes, speed and reasons, as JSON, Markdown and a figure."""

from __future__ import annotations

import collections
import importlib.util
import logging
import math
import os
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, cast

from pasta_jax.annotate.run import Line, Outcome
from pasta_jax.extras import advice
from pasta_jax.files import replacing, write_json
from pasta_jax.terminal import markdown_table

LOG = logging.getLogger("pasta_jax")

LISTED = 1000
"""Answers that stayed as they were, named in the report; the journal has all."""


def summary(lines: Sequence[Line]) -> dict[str, Any]:
    """The figures of a run.

    Speedups are geometric means; those of `all` count answers that are not annotated as 1.
    """
    outcomes = [outcome for line in lines for outcome in line.outcomes]
    annotated = [outcome for outcome in outcomes if not outcome.reason]
    blocks = [block for outcome in annotated for block in outcome.blocks]
    notes: collections.Counter[str] = collections.Counter()
    for outcome in outcomes:
        notes.update(outcome.notes)
    left = [
        {"record": line.number, "answer": outcome.turn, "reason": outcome.reason}
        for line in lines
        for outcome in line.outcomes
        if outcome.reason
    ]
    return {
        "records": len(lines),
        "unusable": sum(line.problem is not None for line in lines),
        "answers": len(outcomes),
        "annotated": len(annotated),
        "share": len(annotated) / max(1, len(outcomes)),
        "speedup": {
            "annotated": _geometric(annotated),
            "all": _geometric(outcomes),
            "least": min((outcome.speedup for outcome in annotated), default=1.0),
        },
        "shapes": {
            "branches": _counts(len(outcome.blocks) for outcome in annotated),
            "depth": _counts(outcome.depth for outcome in annotated),
            "syncs": _counts(outcome.syncs for outcome in annotated),
            "block_tokens": _quantiles(blocks),
        },
        "reasons": dict(
            collections.Counter(outcome.reason for outcome in outcomes if outcome.reason).most_common()
        ),
        "blocks_in_main": dict(notes.most_common()),
        "unusable_reasons": dict(
            collections.Counter(
                line.problem["reason"] for line in lines if line.problem is not None
            ).most_common()
        ),
        "left": left[:LISTED],
    }


def _geometric(outcomes: Sequence[Outcome]) -> float:
    return math.exp(statistics.fmean(math.log(outcome.speedup) for outcome in outcomes)) if outcomes else 1.0


def _counts(values: Any) -> dict[str, int]:
    return {str(value): count for value, count in sorted(collections.Counter(values).items())}


def _quantiles(values: Sequence[int]) -> dict[str, float]:
    if len(values) < 2:
        return {}
    cuts = statistics.quantiles(values, n=20, method="inclusive")
    return {"5 %": cuts[0], "25 %": cuts[4], "50 %": cuts[9], "75 %": cuts[14], "95 %": cuts[18]}


def one_line(figures: Mapping[str, Any]) -> str:
    """The result of a run in a line, for the terminal."""
    speedup = figures["speedup"]
    unusable = f", {figures['unusable']:,} unusable records" if figures["unusable"] else ""
    return (
        f"{figures['annotated']:,} of {figures['answers']:,} answers are annotated ({figures['share']:.1%})"
        f"{unusable}. Theoretical speedup {speedup['annotated']:.2f}x where annotated, at least "
        f"{speedup['least']:.2f}x; {speedup['all']:.2f}x over all."
    )


def write_report(output: str, lines: Sequence[Line], about: Mapping[str, Any]) -> dict[str, Any]:
    """Writes OUTPUT.report.json, .md and, with matplotlib, .png; returns the figures."""
    figures = summary(lines)
    write_json(f"{output}.report.json", {"about": dict(about), **figures})
    picture = f"{output}.report.png"
    has_picture = figures["annotated"] and importlib.util.find_spec("matplotlib") is not None
    with replacing(f"{output}.report.md") as file:
        file.write(_markdown(figures, about, os.path.basename(picture) if has_picture else ""))
    if has_picture:
        _draw(picture, lines, figures)
    elif figures["annotated"]:
        LOG.warning("No figure, which needs matplotlib: %s.", advice("matplotlib", "plot"))
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


def _draw(path: str, lines: Sequence[Line], figures: Mapping[str, Any]) -> None:
    """Speedups, branches, lengths of blocks, and reasons."""
    from pasta_jax.figures import PALE, SERIES, dress, new_figure, save

    annotated = [outcome for line in lines for outcome in line.outcomes if not outcome.reason]
    figure = new_figure(11, 6.4)
    above, below = cast("Any", figure.subfigures(2, 1))
    speeds, branches, lengths = above.subplots(1, 3)
    reasons = below.subplots()
    color = SERIES[0].color

    speeds.hist([outcome.speedup for outcome in annotated], bins=30, color=color)
    mean = figures["speedup"]["annotated"]
    speeds.axvline(mean, color=SERIES[1].color, linestyle="--")
    dress(speeds, f"Theoretical speedup (x), geometric mean {mean:.2f}", "Annotated answers")

    counts = {int(number): count for number, count in figures["shapes"]["branches"].items()}
    branches.bar(list(counts), list(counts.values()), color=color)
    dress(branches, "Branches of an answer", "Annotated answers")
    branches.set_xticks(range(0, max(counts) + 1, max(1, max(counts) // 5)))

    tokens = [block for outcome in annotated for block in outcome.blocks]
    top = max(tokens) + 1
    low = max(1, min(tokens))
    edges = [low * (top / low) ** (i / 30) for i in range(31)]
    lengths.hist(tokens, bins=edges, color=color)
    lengths.set_xscale("log")
    dress(lengths, "Tokens of a block", "Blocks")
    ticks = [tick * 10**power for power in range(5) for tick in (1, 2, 5)]
    lengths.set_xticks([tick for tick in ticks if low <= tick <= top])
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
    reasons.invert_yaxis()
    save(figure, path)
