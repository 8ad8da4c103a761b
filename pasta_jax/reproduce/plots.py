"""The paper's figures, drawn from our results.

Each function takes all results and selects those it shows (`results.py`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from pasta_jax.figures import INK, PALE, SERIES, Label, Look, dress, new_figure, place
from pasta_jax.reproduce import results as pick
from pasta_jax.reproduce.results import Estimate, Result, weight_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BASELINE = 1.0, 50.0
"""Speed (x) and win rate (%) of Baseline-SFT, by definition."""

WIN_RATE = "Win rate against Baseline-SFT (%)"
THEORETICAL = "Theoretical speedup"
REALIZED = "Realized speedup"


METHODS = {
    "Baseline-SFT": Look("#4d4d4d", "s"),
    "PASTA-SFT": Look("#56b4e9", "v"),
    "PASTA-BoN": Look("#0072b2", "o"),
    "APAR": Look("#d55e00", "^"),
    "SoT": Look("#009e73", "D"),
}


def frontier(results: Sequence[Result]) -> Figure:
    """Figure 4: win rate against realized speedup, theoretical speedup and parallelism."""
    shown = pick.headline(results)
    figure = new_figure(12, 5.2)
    figure.suptitle(_measured_on(shown), fontsize=10, color=PALE)
    speeds: list[tuple[str, Callable[[Result], Estimate | None]]] = [
        (REALIZED, lambda r: r.realized),
        (THEORETICAL, lambda r: r.theoretical),
        ("Parallelism", lambda r: r.parallelism),
    ]
    panels = figure.subplots(1, 3, sharey=True)
    for (title, speed), axes in zip(speeds, panels):
        _dress_scatter(axes, title, WIN_RATE if axes is panels[0] else "")
        _frontier_panel(axes, shown, speed)
    _legend(figure, panels)
    for (_, speed), axes in zip(speeds, panels):
        trained = [(r, x) for r, x in _measured(shown, speed) if r.weight is not None]
        place(axes, [Label(x.mean, 100 * r.win_rate.mean, weight_label(r.weight)) for r, x in trained])
    return figure


def _frontier_panel(axes: Axes, shown: Sequence[Result], speed: Callable[[Result], Estimate | None]) -> None:
    others = [(r, x) for r, x in _measured(shown, speed) if r.method != "Baseline-SFT"]
    if not others:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color=PALE)
        axes.set(xlim=(0, 0.5), xticks=[])
        return
    speed_1, win_50 = map(Estimate.exact, BASELINE)
    _estimate(axes, speed_1, win_50, METHODS["Baseline-SFT"], "Baseline-SFT")
    for result, x in others:
        if result.method == "APAR":
            segment = zip(BASELINE, (x.mean, 100 * result.win_rate.mean))
            axes.plot(*segment, "--", color=PALE, linewidth=1.2, zorder=1, label="Baseline-SFT to APAR")
    trained = [(x.mean, 100 * r.win_rate.mean) for r, x in others if r.method == "PASTA-BoN"]
    hull = pick.upper_hull([BASELINE, *trained])
    color = METHODS["PASTA-BoN"].color
    axes.plot(*zip(*hull), color=color, linewidth=1.5, zorder=2, label="PASTA's frontier")
    for result, x in others:
        _estimate(axes, x, result.win_rate.scaled(100), METHODS[result.method], result.method)
    _limit(axes, [speed_1, *(x for _, x in others)], [win_50, *(r.win_rate.scaled(100) for r in shown)])


def rounds(results: Sequence[Result]) -> Figure:
    """Figure 5: win rate against speedup, from PASTA-SFT through the rounds, a line for each lambda."""
    lines = {
        weight_label(weight): [(r, "SFT" if r.method == "PASTA-SFT" else f"R{r.round}") for r in line]
        for weight, line in pick.by_round(results).items()
    }
    return _draw_lines(lines, "R1, R2, ...: rounds of preference optimization")


def efficiency_terms(results: Sequence[Result]) -> Figure:
    """Figure 8: win rate against speedup over lambda, a line for each efficiency term."""
    lines = {
        term: [(r, weight_label(r.weight)) for r in line]
        for term, line in pick.by_efficiency(results).items()
    }
    return _draw_lines(lines, "Efficiency term of the score")


def _draw_lines(lines: dict[str, list[tuple[Result, str]]], title: str) -> Figure:
    """Win rate against theoretical speedup, results of a line joined in their order and labelled."""
    figure = new_figure(7.5, 5.6)
    axes = figure.subplots()
    shown = [result for line in lines.values() for result, _ in line]
    figure.suptitle(_measured_on(shown), fontsize=10, color=PALE)
    labels: dict[tuple[float, float], Label] = {}
    for look, (name, line) in zip(itertools.cycle(SERIES), lines.items()):
        known = [(r, text) for r, text in line if _is_finite(r.theoretical, r.win_rate)]
        track = [(r.theoretical.mean, 100 * r.win_rate.mean) for r, _ in known]
        style: dict[str, Any] = dict(color=look.color, linestyle=look.line)
        axes.plot(*zip(*track), linewidth=1.5, zorder=2, **style)
        axes.plot([], [], look.marker, markeredgecolor="white", label=name, **style)
        for (result, text), (x, y) in zip(known, track):
            of_all = result.method == "PASTA-SFT"  # the start of every line
            point_look = METHODS["PASTA-SFT"] if of_all else look
            _estimate(axes, result.theoretical, result.win_rate.scaled(100), point_look)
            labels[x, y] = Label(x, y, text, INK if of_all else look.color)
    _limit(axes, [r.theoretical for r in shown], [r.win_rate.scaled(100) for r in shown])
    _dress_scatter(axes, THEORETICAL, WIN_RATE)
    _legend(figure, [axes], title)
    place(axes, list(labels.values()))
    return figure


def positions(results: Sequence[Result]) -> Figure:
    """Figure 6: win rate against speedup of PASTA-SFT under each position scheme."""
    shown = [r for r in pick.by_positions(results) if _is_finite(r.theoretical, r.win_rate)]
    figure = new_figure(7.5, 5.2)
    figure.suptitle(_measured_on(shown), fontsize=10, color=PALE)
    axes = figure.subplots()
    for result in shown:
        look = SERIES[0] if result.positions == pick.POSITIONS else SERIES[1]
        _estimate(axes, result.theoretical, result.win_rate.scaled(100), look)
    _limit(axes, [r.theoretical for r in shown], [r.win_rate.scaled(100) for r in shown])
    _dress_scatter(axes, THEORETICAL, WIN_RATE)
    place(axes, [Label(r.theoretical.mean, 100 * r.win_rate.mean, r.positions) for r in shown], size=10)
    return figure


def families(results: Sequence[Result]) -> Figure:
    """Truth and speedups of every family of prompts; of PASTA-BoN only one model, see `results.chosen`."""
    best = pick.chosen(results)
    shown = [r for r in pick.headline(results) if r.method != "PASTA-BoN" or r is best]
    names = list(dict.fromkeys(name for r in shown for name in r.families))
    known = {measure for r in shown for family in r.families.values() for measure in family}
    measures = [measure for measure in ("truth", "theoretical", "realized") if measure in known]
    figure = new_figure(11, 2 + 2.1 * max(1, len(measures)))
    figure.suptitle(_measured_on(shown, intervals=False), fontsize=10, color=PALE)
    panels = figure.subplots(max(1, len(measures)), 1, sharex=True, squeeze=False)[:, 0]
    width = 0.8 / max(1, len(shown))
    for axes, measure in zip(panels, measures):
        title, factor = pick.FAMILY_MEASURES[measure]
        for i, result in enumerate(shown):
            label = result.method if result.weight is None else f"PASTA-BoN {weight_label(result.weight)}"
            heights = [factor * result.families.get(name, {}).get(measure, math.nan) for name in names]
            x = [j + (i - (len(shown) - 1) / 2) * width for j in range(len(names))]
            axes.bar(x, heights, width * 0.92, color=METHODS[result.method].color, label=label, zorder=2)
        if measure == "truth":
            axes.set_ylim(0, 100)
        else:
            axes.axhline(1, color=INK, linewidth=0.8, linestyle=":", zorder=3)
        dress(axes, "", title)
        axes.grid(visible=False, axis="x")
        axes.set_xticks(range(len(names)), names, fontsize=11)
    _legend(figure, panels)
    return figure


def _measured(
    shown: Iterable[Result], speed: Callable[[Result], Estimate | None]
) -> list[tuple[Result, Estimate]]:
    """The results that have this speed, with it."""
    return [(r, x) for r in shown if (x := speed(r)) is not None and _is_finite(x, r.win_rate)]


def _is_finite(*estimates: Estimate) -> bool:
    return all(math.isfinite(estimate.mean) for estimate in estimates)


def _estimate(axes: Axes, x: Estimate, y: Estimate, look: Look, label: str | None = None) -> None:
    """A point and its 95 % intervals."""

    def bars(e: Estimate) -> list[list[float]] | None:
        return [[max(0.0, e.mean - e.low)], [max(0.0, e.high - e.mean)]] if e.has_interval else None

    style: dict[str, Any] = dict(markersize=8, markeredgecolor="white", markeredgewidth=0.8, zorder=4)
    style |= dict(ecolor=(look.color, 0.7), elinewidth=1, capsize=2)
    axes.errorbar([x.mean], [y.mean], bars(y), bars(x), look.marker, color=look.color, label=label, **style)


def _limit(axes: Axes, x: Sequence[Estimate], y: Sequence[Estimate]) -> None:
    """Makes room for all points, but does not magnify noise between nearly equal ones."""
    axes.set_xlim(_range(x, minimum=0.2))
    axes.set_ylim(_range(y, minimum=6))


def _range(estimates: Sequence[Estimate], minimum: float) -> tuple[float, float]:
    """From the lowest to the highest estimate, with margins; at least `minimum` wide.

    Intervals are included, unless they would leave the means less than a fifth of the range.
    """
    finite = [e for e in estimates if math.isfinite(e.mean)] or [Estimate.exact(1)]
    low, high = min(e.mean for e in finite), max(e.mean for e in finite)
    reach = 2 * max(high - low, minimum / 2)
    known = [e for e in finite if e.has_interval]
    low = max(min([low, *(e.low for e in known)]), low - reach)
    high = min(max([high, *(e.high for e in known)]), high + reach)
    middle, half = (low + high) / 2, max(high - low, minimum * 0.8) / 2 * 1.2
    return middle - half, middle + half


def _dress_scatter(axes: Axes, x_label: str, y_label: str) -> None:
    """Speed along x, win rate along y, and thin lines at those of Baseline-SFT."""
    from matplotlib.ticker import MaxNLocator

    dress(axes, f"{x_label} (x, geometric mean)", y_label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter("{x:.4g}x")
    for line in (axes.axvline(BASELINE[0]), axes.axhline(BASELINE[1])):
        line.set(color=PALE, linewidth=0.8, linestyle=":", zorder=0.9)


def _legend(figure: Figure, panels: Iterable[Axes], title: str | None = None) -> None:
    """One legend for all panels, below them."""
    handles: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    if not handles:
        return
    rank = {method: i for i, method in enumerate(METHODS)}
    order = sorted(handles, key=lambda label: rank.get(label.partition(" λ")[0], 9))
    columns = len(order) if len(order) < 7 else 4
    style: dict[str, Any] = dict(loc="outside lower center", frameon=False, fontsize=10)
    figure.legend([handles[label] for label in order], order, ncols=columns, title=title, **style)


def _measured_on(shown: Sequence[Result], intervals: bool = True) -> str:
    """Seeds and prompts behind the points, for a figure that is shared without its caption."""
    if not shown:
        return "no results"
    parts = [_count([r.seeds for r in shown], "seed"), _count([r.prompts for r in shown], "prompt")]
    drawn = [e for r in shown for e in (r.win_rate, r.theoretical, r.parallelism)]
    if intervals and any(e.has_interval for e in drawn):
        parts.append("bars are 95 % intervals")
    return ", ".join(parts)


def _count(numbers: Sequence[int], noun: str) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low if low == high else f'{low} to {high}'} {noun}{'' if high == 1 else 's'}"
