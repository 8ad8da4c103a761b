"""The results of a reproduction: one record for each model, and the comparisons to draw from them.

Win rates and truth are from 0 to 1. Speeds are ratios to Baseline-SFT, geometric means over prompts.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

METHODS = ("Baseline-SFT", "PASTA-SFT", "PASTA-BoN", "APAR", "SoT")
"""In the order of tables."""

POSITIONS = "Pred-10X"
EFFICIENCY = "speedup"
"""The position scheme and the efficiency term of the main comparison; other results belong to an ablation."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval; a plain number has `low == high == mean`."""

    mean: float
    low: float
    high: float

    @classmethod
    def exact(cls, value: float) -> Estimate:
        """A number without an interval."""
        return cls(value, value, value)

    @property
    def has_interval(self) -> bool:
        """False for a plain number, and if the interval is not finite."""
        return self.low < self.high and math.isfinite(self.high - self.low)

    def scaled(self, factor: float) -> Estimate:
        """The same in another unit."""
        return Estimate(self.mean * factor, self.low * factor, self.high * factor)

    def text(self, digits: int) -> str:
        """The mean, and the interval if there is one: `1.52 [1.48, 1.57]`."""
        mean, low, high = (f"{x:.{digits}f}" for x in dataclasses.astuple(self))
        return f"{mean} [{low}, {high}]" if self.has_interval else mean


@dataclasses.dataclass(frozen=True)
class Result:
    """One model, or one model per seed, measured on the evaluation prompts.

    Attributes:
      name: as tables show it.
      method: one of METHODS.
      seeds, prompts: their numbers.
      weight: lambda of PASTA-BoN, infinity for quality alone; None for the others.
      round: of preference optimization, 0 before the first.
      win_rate: against Baseline-SFT, a tie counting half.
      truth: the judge's mean score.
      theoretical: the baseline's tokens / critical path.
      parallelism: tokens without tags / critical path.
      realized: the baseline's seconds / seconds; None if it was not timed.
      families: for each family of prompts, means by the names in FAMILY_MEASURES; any may be missing.
      positions: position scheme, as the paper spells it: `Pred-1X`, `Const-40`, `Oracle`, ...
      efficiency: the efficiency term of preference optimization: `harmonic`, `arithmetic`, `parallelism`, ...
      against: by name of a rival, paired differences on the same prompts: of win_rate and truth, and the ratio of
        realized speedups.
    """

    name: str
    method: str
    seeds: int
    prompts: int
    weight: float | None
    round: int
    win_rate: Estimate
    truth: Estimate
    theoretical: Estimate
    parallelism: Estimate
    realized: Estimate | None
    families: Mapping[str, Mapping[str, float]]
    positions: str = POSITIONS
    efficiency: str = EFFICIENCY
    against: Mapping[str, Mapping[str, Estimate]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"Method {self.method!r} is unknown. Use one of {', '.join(METHODS)}.")
        if (self.weight is None) == (self.method == "PASTA-BoN"):
            raise ValueError(f"{self.name}: PASTA-BoN has a weight, and nothing else has.")


FAMILY_MEASURES: Mapping[str, tuple[str, float]] = {
    "truth": ("Truth (%)", 100),
    "win_rate": ("Win rate against Baseline-SFT (%)", 100),
    "realized": ("Realized speedup (x)", 1),
    "theoretical": ("Theoretical speedup (x)", 1),
    "parallelism": ("Parallelism (x)", 1),
    "promises": ("Promises per answer", 1),
    "promised": ("Answers with a promise (%)", 100),
    "concludes_last": (
        "Answers in which main's last text waits for every branch, or that have none (%)",
        100,
    ),
}
"""Keys of `Result.families`: their titles, and the factors to the units shown."""


def weight_label(weight: float | None) -> str:
    """A short name of a lambda.

    >>> weight_label(0.5), weight_label(8.0), weight_label(math.inf)
    ('λ=0.5', 'λ=8', 'λ=∞')
    """
    return "λ=∞" if weight == math.inf else f"λ={weight:g}"


def headline(results: Sequence[Result]) -> list[Result]:
    """The main comparison, in order: no ablations, and the last round of each lambda."""
    kept: dict[tuple[str, float | None], list[Result]] = {}
    for result in filter(_is_main, results):
        known = kept.setdefault((result.method, result.weight), [])
        if known and known[0].round < result.round:
            known.clear()
        if not known or known[0].round == result.round:
            known.append(result)
    return sorted((r for group in kept.values() for r in group), key=_place)


def by_round(results: Sequence[Result]) -> dict[float, list[Result]]:
    """The rounds of each lambda, with PASTA-SFT first if there is one."""
    start = [r for r in results if _is_main(r) and r.method == "PASTA-SFT"][:1]
    lines: dict[float, list[Result]] = {}
    for result in sorted(filter(_is_main, results), key=lambda r: (r.weight or 0.0, r.round)):
        if result.weight is not None:
            lines.setdefault(result.weight, list(start)).append(result)
    return lines


def by_positions(results: Sequence[Result]) -> list[Result]:
    """PASTA-SFT under each position scheme, as in the paper's Figure 6."""
    return [r for r in results if r.method == "PASTA-SFT"]


def by_efficiency(results: Sequence[Result]) -> dict[str, list[Result]]:
    """PASTA-BoN over lambda for each efficiency term, in the last round that every term reached."""
    lines: dict[str, list[Result]] = {}
    for result in sorted(results, key=_place):
        if result.method == "PASTA-BoN" and result.positions == POSITIONS:
            lines.setdefault(result.efficiency, []).append(result)
    last = min((max(r.round for r in group) for group in lines.values()), default=0)
    return {term: [r for r in group if r.round == last] for term, group in lines.items()}


Point: TypeAlias = tuple[float, float]


def upper_hull(points: Sequence[Point]) -> list[Point]:
    """The corners of the upper convex hull, from left to right.

    >>> upper_hull([(1.0, 0.5), (1.2, 0.4), (1.5, 0.48), (1.6, 0.2)])
    [(1.0, 0.5), (1.5, 0.48), (1.6, 0.2)]
    """
    hull: list[Point] = []
    for x, y in sorted(points):
        while hull and hull[-1][0] == x:  # sorted: the higher one comes last
            hull.pop()
        while len(hull) > 1 and _between(hull[-2], (x, y), hull[-1][0]) >= hull[-1][1]:
            hull.pop()
        hull.append((x, y))
    return hull


def height(line: Sequence[Point], x: float) -> float | None:
    """The height of a line at x; None outside it.

    >>> height([(1.0, 0.5), (2.0, 0.4)], 1.5)
    0.45
    """
    for a, b in itertools.pairwise(line):
        if a[0] <= x <= b[0]:
            return _between(a, b, x)
    return None


def _between(a: Point, b: Point, x: float) -> float:
    return a[1] + (b[1] - a[1]) * (x - a[0]) / (b[0] - a[0])


def chosen(results: Sequence[Result]) -> Result | None:
    """One PASTA-BoN to represent all: the fastest with a win rate of at least a half, else that of the highest."""
    trained = [r for r in headline(results) if r.method == "PASTA-BoN"]
    good = [r for r in trained if r.win_rate.mean >= 0.5]
    if good:
        return max(good, key=lambda r: r.theoretical.mean)
    return max(trained, key=lambda r: r.win_rate.mean, default=None)


def _is_main(result: Result) -> bool:
    return (result.positions, result.efficiency) == (POSITIONS, EFFICIENCY)


def _place(result: Result) -> tuple[int, float]:
    return METHODS.index(result.method), 0.0 if result.weight is None else result.weight
