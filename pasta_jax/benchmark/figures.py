"""A figure for each part of a benchmark, from the points in results.json. Marks are medians, bars quartiles."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from pasta_jax.benchmark.startup import PACKAGE
from pasta_jax.figures import INK, PALE, SERIES, Look, dress, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points: TypeAlias = Sequence[Mapping[str, Any]]


def draw(part: str, points: Points, path: str | os.PathLike[str], subtitle: str = "") -> None:
    """Writes the figure of a part as a PNG.

    Args:
      part: one of FIGURES.
      points: the part's points as JSON holds them.
      path: of the file.
      subtitle: names the model and the machine.
    """
    figure = FIGURES[part](points)
    figure.suptitle(subtitle, fontsize=10, color=PALE)
    save(figure, path)


def draw_width(points: Points) -> Figure:
    """Step time against the width."""
    return _one_line(points, "width", "Width: lanes used in a step", doubling=True)


def draw_pool(points: Points) -> Figure:
    """Step time against pool entries used."""
    return _one_line(points, "pool used", f"Pool entries used, of {points[0]['pool']}")


def _one_line(points: Points, x: str, x_label: str, doubling: bool = False) -> Figure:
    figure = new_figure(6.5, 4.2)
    axes = figure.subplots()
    _line(axes, [p[x] for p in points], [p["step, ms"] for p in points], SERIES[0])
    dress(axes, x_label, "Milliseconds of a decode step")
    axes.set_ylim(bottom=0)
    if doubling:
        _double(axes, [p[x] for p in points])
    return figure


def draw_batch(points: Points) -> Figure:
    """Tokens fed per second against rows, a line for each kind of answers."""
    figure = new_figure(6.5, 4.2)
    axes = figure.subplots()
    for look, kind in zip(SERIES, dict.fromkeys(p["answers"] for p in points)):
        group = [p for p in points if p["answers"] == kind]
        _line(axes, [p["rows"] for p in group], [p["tokens/s"] for p in group], look, kind)
    dress(axes, "Concurrent requests", "Tokens fed per second")
    axes.set_ylim(bottom=0)
    _double(axes, sorted({p["rows"] for p in points}))
    axes.legend(frameon=False)
    return figure


def draw_replay(points: Points) -> Figure:
    """Theoretical and realized speedup of each kind of tree, and their ratio."""
    figure = new_figure(10, 1.6 + 0.34 * len(points))
    speeds, efficiency = figure.subplots(1, 2, sharey=True)
    rows = range(len(points))
    for look, name in zip(SERIES, ("theoretical, x", "realized, x")):
        values = [p[name] for p in points]
        speeds.plot(values, rows, look.marker, color=look.color, markersize=7, label=name.partition(",")[0])
    dress(speeds, "Speedup (x)", "")
    speeds.legend(frameon=False)
    middle, errors = _errors([p["efficiency"] for p in points])
    bars = efficiency.barh(rows, middle, 0.6, color=SERIES[0].color, zorder=2)
    efficiency.bar_label(bars, fmt="%.2f", label_type="center", color="white", fontsize=9)
    efficiency.errorbar(middle, rows, xerr=errors, fmt="none", ecolor=INK, elinewidth=1, capsize=2, zorder=3)
    dress(efficiency, "Efficiency: realized / theoretical", "")
    speeds.set_yticks(rows, [p["kind"] for p in points])
    speeds.invert_yaxis()
    return figure


def draw_peers(points: Points) -> Figure:
    """Time of prefill and of a decode step for each batch, one bar for each peer."""
    figure = new_figure(10, 4.2)
    batches = [*dict.fromkeys(p["batch"] for p in points)]
    peers = [*dict.fromkeys(p["who"] for p in points)]
    for axes, measure, label in zip(
        figure.subplots(1, 2),
        ("prefill, s", "step, ms"),
        ("Seconds to prefill", "Milliseconds of a decode step"),
    ):
        for i, (look, who) in enumerate(zip(SERIES, peers)):
            group = [p for p in points if p["who"] == who]
            width = 0.8 / len(peers)
            x = [batches.index(p["batch"]) + (i - (len(peers) - 1) / 2) * width for p in group]
            middle, errors = _errors([p[measure] for p in group])
            axes.bar(x, middle, width * 0.92, yerr=errors, capsize=2, color=look.color, label=who, zorder=2)
        dress(axes, "Concurrent prompts", label)
        axes.set_xticks(range(len(batches)), [str(batch) for batch in batches])
    axes.legend(frameon=False, fontsize=9)
    return figure


def draw_train(points: Points) -> Figure:
    """Tokens per second of an update, a bar for each system."""
    return _bars(points, "who", "tokens/s", "Tokens trained per second")


def _bars(points: Points, y: str, x: str, x_label: str) -> Figure:
    figure = new_figure(7, 1.4 + 0.4 * len(points))
    axes = figure.subplots()
    middle, errors = _errors([p[x] for p in points])
    axes.barh(range(len(points)), middle, 0.6, xerr=errors, capsize=2, color=SERIES[0].color, zorder=2)
    dress(axes, x_label, "")
    axes.set_yticks(range(len(points)), [p[y] for p in points])
    axes.invert_yaxis()
    return figure


def draw_startup(points: Points) -> Figure:
    """Seconds from the start of Python to the first token, phase by phase."""
    figure = new_figure(8, 2.6)
    axes = figure.subplots()
    phases = [name for name in points[0] if name not in ("cache", "all, s", PACKAGE)]
    done = [0.0] * len(points)
    for look, phase in zip(SERIES, phases):
        seconds = [p[phase]["median"] for p in points]
        axes.barh(
            range(len(points)), seconds, 0.6, left=done, color=look.color, label=phase.partition(",")[0]
        )
        done = [before + more for before, more in zip(done, seconds)]
    dress(axes, "Seconds", "")
    axes.set_yticks(range(len(points)), [f"cache {p['cache']}" for p in points])
    axes.invert_yaxis()
    axes.legend(frameon=False, ncols=len(phases), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def draw_prefix(points: Points) -> Figure:
    """Seconds to the first token, a bar for each way in which the system prompt gets into the pool."""
    return _bars(points, "system prompt", "first token, s", "Seconds to the first token")


def draw_admission(points: Points) -> Figure:
    """Goodput against concurrent requests, a line for each policy."""
    figure = new_figure(6.5, 4.2)
    axes = figure.subplots()
    for look, policy in zip(SERIES, dict.fromkeys(p["admission"] for p in points)):
        group = [p for p in points if p["admission"] == policy]
        x, y = ([p[name] for p in group] for name in ("requests", "goodput, tokens/s"))
        axes.plot(x, y, look.marker, linestyle=look.line, color=look.color, label=policy)
    dress(axes, "Concurrent requests", "Tokens of text per second, in time")
    axes.set_ylim(bottom=0)
    _double(axes, sorted({p["requests"] for p in points}))
    axes.legend(frameon=False)
    return figure


FIGURES: dict[str, Callable[[Points], Figure]] = {
    "width": draw_width,
    "replay": draw_replay,
    "batch": draw_batch,
    "pool": draw_pool,
    "prefix": draw_prefix,
    "admission": draw_admission,
    "peers": draw_peers,
    "train": draw_train,
    "startup": draw_startup,
}
"""By the names of the parts."""


def _line(axes: Axes, x: Sequence[float], quartiles: Sequence[Any], look: Look, label: str = "") -> None:
    middle, errors = _errors(quartiles)
    axes.errorbar(
        x,
        middle,
        yerr=errors,
        color=look.color,
        marker=look.marker,
        linestyle=look.line,
        capsize=2,
        label=label,
    )


def _errors(quartiles: Sequence[Mapping[str, float]]) -> tuple[list[float], list[list[float]]]:
    """Medians, and the distances of the quartiles below and above them."""
    found = np.array(
        [[s[name] for s in quartiles] for name in ("low", "median", "high")], float
    )  # None is NaN
    below, above = np.diff(found, axis=0).tolist()
    return found[1].tolist(), [below, above]


def _double(axes: Axes, values: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [str(value) for value in values])
    axes.minorticks_off()
