"""What is measured of a model's answers, a number for each prompt: so means have intervals, and models are paired.

A measure is two sums over prompts, one divided by the other (`intervals.Values`); of speeds it is their geometric
mean.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np

from pasta_jax.annotate.audited import Audited
from pasta_jax.evaluate.answers import Answered, Batch
from pasta_jax.intervals import Interval, Values
from pasta_jax.lang.form import SHARES, form_of
from pasta_jax.lang.parse import parse
from pasta_jax.lang.tags import Dialect
from pasta_jax.preference.score import parallelism, theoretical_speedup

Unit: TypeAlias = Literal["speed", "share", "percent", "number", "nats"]


@dataclasses.dataclass(frozen=True)
class Measure:
    """A measure of a model's answers to n prompts.

    Attributes:
      title: for people.
      unit: "speed" is a geometric mean, whose values are logarithms; a "share" counts some of what it divides by,
        and is shown in per cent, as is "percent".
      values: of each prompt, [n].
    """

    title: str
    unit: Unit
    values: Values

    @property
    def interval(self) -> Interval:
        """In its own unit, shares from 0 to 1."""
        return _leveled(self.values.share if self.unit == "share" else self.values.interval, self.unit)

    def less(self, other: Measure) -> Interval:
        """The difference from the same measure of another model, prompt by prompt; of speeds the ratio."""
        return _leveled(self.values.less(other.values), self.unit)

    def shown(self, interval: Interval, *, signed: bool = False) -> str:
        """An interval of this measure for people; "" where there is none.

        >>> share = Measure("answers", "share", Values(np.array([1.0]), np.array([1.0])))
        >>> share.shown(Interval(0.5, 0.4, 0.6)), share.shown(Interval(0.5, math.nan, math.nan), signed=True)
        ('50.0 % (40.0 to 60.0)', '+50.0 %')
        """
        if not interval.is_known:
            return ""
        scale, digits, mark = _LOOKS[self.unit]
        sign = "+" if signed and self.unit != "speed" else ""
        mean, low, high = (f"{scale * value:{sign}.{digits}f}" for value in interval)
        few = (
            f"n = {self.values.count}"
            if self.unit == "speed" and not signed and self.values.count < len(self.values.below)
            else ""
        )
        told = "; ".join(filter(None, ["" if math.isnan(interval.low) else f"{low} to {high}", few]))
        return f"{mean}{mark} ({told})" if told else f"{mean}{mark}"

    def as_json(self) -> dict[str, Any]:
        """As JSON can hold it; `measure_of` reads it."""
        sums = (np.round(each, 6).tolist() for each in (self.values.above, self.values.below))
        return {"title": self.title, "unit": self.unit, **dict(zip(("above", "below"), sums))}


_LOOKS = {
    **{"speed": (1, 2, "x"), "share": (100, 1, " %"), "percent": (100, 1, " %")},
    **{"number": (1, 1, ""), "nats": (1, 3, "")},
}
"""Factor, digits and mark of each unit."""

Measures: TypeAlias = Mapping[str, Measure]


def measure_of(tree: Mapping[str, Any]) -> Measure:
    """What `as_json` wrote."""
    above, below = (np.array(tree[name], np.float64) for name in ("above", "below"))
    return Measure(tree["title"], tree["unit"], Values(above, below))


def _leveled(interval: Interval, unit: Unit) -> Interval:
    return Interval(*map(math.exp, interval)) if unit == "speed" else interval


# ---------------------------------------------------------------------------------------------- what is measured


def measures_of(
    answers: Sequence[Answered],
    kinds: Sequence[str],
    plain_kinds: Sequence[str],
    dialect: Dialect,
    tokens_of: Callable[[str], int],
) -> dict[str, Measure]:
    """What is measured of answers alone.

    Args:
      answers: one to each of n prompts.
      kinds: of each prompt, "" if its record names none.
      plain_kinds: those whose answers have no independent parts: a promise there is a false one.
      dialect, tokens_of: of the model's tokenizer.
    """
    found: dict[str, Measure] = {}

    def add(name: str, title: str, unit: Unit, above: Iterable[float], below: Iterable[float]) -> None:
        values = Values(*(np.array([*each], np.float64) for each in (above, below)))
        if values.below.any():
            found[name] = Measure(title, unit, values)

    ones, promising = [1.0] * len(answers), [float(each.promises > 0) for each in answers]
    add("promising", "answers with promises", "share", promising, ones)
    groups = {kind: [float(each == kind) for each in kinds] for kind in dict.fromkeys(kinds) if kind}
    for kind, chosen in groups.items():
        title = f"answers with promises, kind {kind}"
        add(f"promising {kind}", title, "share", np.multiply(promising, chosen), chosen)
    plain = [float(kind in plain_kinds) for kind in kinds]
    told = f"false promises, kind {' or '.join(kind for kind in plain_kinds if kind in groups)}"
    add("false promises", told, "share", np.multiply(promising, plain), plain)
    add("branches", "branches, where any", "number", [each.promises for each in answers], promising)
    add("tokens", "tokens without tags", "number", [each.text_tokens for each in answers], ones)
    for name, title in (("is_cut", "cut off"), ("is_malformed", "malformed"), ("error", "failed")):
        add(name, title, "share", [float(bool(getattr(each, name))) for each in answers], ones)
    # The last block of an answer that was cut off is shorter than it was promised.
    forms = [
        form_of(parse(each.annotated, dialect=dialect), None if each.is_cut else tokens_of)
        for each in answers
    ]
    for name, share in SHARES.items():
        found[name] = Measure(
            share.title,
            "share" if share.is_part else "percent",
            Values.counted(forms, share.above, share.below),
        )
    return {name: measure for name, measure in found.items() if measure.values.below.any()}


def speeds_of(
    baseline: Sequence[Answered],
    test: Sequence[Answered],
    batches: Sequence[tuple[Batch, Batch]] = (),
    rows: int = 1,
) -> dict[str, Measure]:
    """The speeds of answers beside those of the sequential baseline.

    Args:
      baseline, test: answers to the same prompts; those with seconds were decoded alone.
      batches: the baseline's and the model's of the same prompts. Only full ones count, at their first prompt.
      rows: prompts of a full batch.
    """
    both = [not (b.error or t.error) for b, t in zip(baseline, test, strict=True)]
    timed = [bool(is_there and b.wall_s and t.wall_s) for is_there, b, t in zip(both, baseline, test)]
    theoretical = [math.log(theoretical_speedup(b, t)) for b, t in zip(baseline, test)]
    realized = [math.log(b.wall_s / t.wall_s) if yes else 0.0 for yes, b, t in zip(timed, baseline, test)]
    branched = [is_there and t.promises > 0 for is_there, t in zip(both, test)]
    parallel = [math.log(parallelism(each)) for each in test]
    efficiency = np.subtract(realized, theoretical)
    full, ratios = [False] * len(test), [0.0] * len(test)
    places = itertools.accumulate((len(slow.answers) for slow, _ in batches), initial=0)
    for place, (slow, fast) in zip(places, batches):
        if len(slow.answers) == rows and slow.wall_s and fast.wall_s:
            full[place], ratios[place] = True, math.log(slow.wall_s / fast.wall_s)
    found: dict[str, tuple[str, Any, Any]] = {
        "theoretical": ("theoretical speedup", theoretical, both),
        "realized": ("realized speedup, batch 1", realized, timed),
        "realized together": (f"realized speedup, batch {rows}", ratios, full),
        "efficiency": ("efficiency, batch 1", efficiency, timed),
        "efficiency branched": (
            "efficiency, batch 1, where any branch",
            efficiency,
            np.logical_and(timed, branched),
        ),
        "parallelism": ("parallelism", parallel, both),
        "parallelism branched": ("parallelism, where any branch", parallel, branched),
    }
    return {
        name: Measure(title, "speed", Values(np.where(chosen, values, 0.0), np.array(chosen, np.float64)))
        for name, (title, values, chosen) in found.items()
        if any(chosen)
    }


def win_rate_of(chances: Sequence[float | None], name: str) -> Measure:
    """The judge's probability that an answer is better, of those that it judged."""
    known = np.array([math.nan if chance is None else chance for chance in chances], np.float64)
    return Measure(name, "percent", Values(np.nan_to_num(known), np.isfinite(known).astype(np.float64)))


def audit_gap_of(audited: Sequence[Audited], prompts: int) -> Measure:
    """What blocks lose without sight of their siblings; a line of the audit's file is a prompt's answer."""
    above, below = np.zeros(prompts), np.zeros(prompts)
    for each in audited:
        blocks = [part for part in each.measured if part.is_block]
        above[each.line - 1] += sum(part.loss for part in blocks)
        below[each.line - 1] += sum(part.tokens for part in blocks)
    return Measure("audit gap, nats per token", "nats", Values(above, below))


# ------------------------------------------------------------------------------------------------------ tables


def measure_table(models: Mapping[str, Measures]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a measure a row, a model a column, each mean with its 95 % interval."""
    longest_first = sorted(models.values(), key=len, reverse=True)
    order = dict.fromkeys(name for measures in longest_first for name in measures)
    rows = []
    for name in _in_order(order):
        known = [measures.get(name) for measures in models.values()]
        title = next(each.title for each in known if each)
        rows.append([title, *(each.shown(each.interval) if each else "" for each in known)])
    return ["measure", *models], rows


COMPARED = ("win rate", "theoretical", "realized", "realized together", "neat_branched", "doubled")
"""Measures of which the differences of all pairs of models are shown."""


def pair_table(models: Mapping[str, Measures]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a pair of models a row, the difference of each measure with its 95 % interval."""
    names = [name for name in COMPARED if sum(name in measures for measures in models.values()) > 1]
    titles = {
        name: measures[name].title for measures in models.values() for name in names if name in measures
    }
    rows = []
    for (first, mine), (second, theirs) in itertools.combinations(models.items(), 2):
        cells = [
            mine[name].shown(mine[name].less(theirs[name]), signed=True)
            if name in mine and name in theirs
            else ""
            for name in names
        ]
        rows.append([f"{first} against {second}", *cells])
    return ["models", *(titles[name] for name in names)], rows


def _in_order(names: Iterable[str]) -> list[str]:
    """The measures of quality first, then of speed, then the others as they come."""
    speeds = ("theoretical", "realized", "realized together", "efficiency", "efficiency branched")
    first = ("win rate", *speeds, "parallelism", "parallelism branched")
    return sorted(names, key=lambda name: first.index(name) if name in first else len(first))
