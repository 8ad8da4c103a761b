"""Scores: how fast an answer is, how good, and both at once (paper section 4).

    score = efficiency + quality_weight * quality                    efficiency_when = "always", the paper's
    score = efficiency * [quality >= 1] + quality_weight * quality   efficiency_when = "not_worse"

Speed is counted in decode steps, so it does not depend on the machine. Quality comes from a judge that says
which of two answers is better, and how sure it is; against equals it is 1. With "not_worse", one that is judged
worse than its opponents gets nothing for its speed: no structure, however fast, makes up for a bad answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np

from pasta_jax.config import PreferenceConfig
from pasta_jax.judges.bulk import judge_all
from pasta_jax.judges.protocol import Comparison, Judge, Preference
from pasta_jax.preference.sample import Record
from pasta_jax.processes.agreement import from_first, several


class Counted(Protocol):
    """The counts that speed is computed from: `Stats`, or any record of a measured answer."""

    @property
    def output_tokens(self) -> int: ...
    @property
    def text_tokens(self) -> int: ...
    @property
    def critical_path(self) -> int: ...


ROUNDING = 1e-9
"""By which the quality of an equal may lie below 1: the order of a sum."""

Efficiency: TypeAlias = Callable[[float, float], float]

EFFICIENCIES: dict[str, Efficiency] = {
    "speedup": lambda speedup, parallelism: speedup,
    "parallelism": lambda speedup, parallelism: parallelism,
    "harmonic": lambda speedup, parallelism: 2 * speedup * parallelism / (speedup + parallelism),
    "arithmetic": lambda speedup, parallelism: (speedup + parallelism) / 2,
}
"""The efficiency terms that the paper compares (section 6.3), from theoretical speedup and parallelism."""


def theoretical_speedup(baseline: Counted, answer: Counted) -> float:
    """Tokens of the baseline's answer / critical path of this one."""
    return max(1, baseline.output_tokens) / answer.critical_path


def parallelism(answer: Counted) -> float:
    """Tokens without tags / critical path."""
    return max(1, answer.text_tokens) / answer.critical_path


def quality(said: Iterable[tuple[int, Preference]]) -> float:
    """Confidence in wins / confidence in losses, against each opponent in both orders.

    The paper does not say what becomes of an answer that never loses. Here one confident win and one
    confident loss are added, so that the ratio is finite, and 1 against equals; a tie counts half its confidence to
    each side.

    Args:
      said: for each comparison the place of the answer, 0 or 1, and the judge's preference.

    >>> win, loss, tie = (Preference(winner, 0.75) for winner in (0, 1, None))
    >>> quality([(0, win), (1, loss)]), quality([(0, tie), (1, tie)]), quality([(1, win), (0, loss)])
    (2.5, 1.0, 0.4)
    """
    won = lost = 1.0
    for place, (winner, confidence) in said:
        won += confidence * (0.5 if winner is None else winner == place)
        lost += confidence * (0.5 if winner is None else winner != place)
    return won / lost


class Asked(NamedTuple):
    """A comparison in which a sample takes part: it is the answer a (0) or b (1)."""

    sample: int
    place: int
    comparison: Comparison


def comparisons_of(record: Record) -> list[Asked]:
    """What a judge is asked about a prompt's samples: each against its opponents, in both orders.

    The opponents are the baseline's answer and, if there is one, that of the data.
    """
    prompt, reference = record.prompt.asked, record.prompt.reference
    opponents = [record.baseline.text, *([reference] if reference is not None else [])]
    return [
        Asked(
            i,
            place,
            Comparison(prompt, *((answer.text, opponent) if place == 0 else (opponent, answer.text))),
        )
        for i, answer in enumerate(record.samples)
        for opponent in opponents
        for place in (0, 1)
    ]


def qualities(records: Sequence[Record], judge: Judge, path: str | None = None) -> list[list[float]]:
    """The quality of each sample of each record.

    Of several processes the first asks, and the others wait to be told; a judge with a model that is spread over
    all of them is asked by all.

    Args:
      records: with the same number of samples.
      judge: asked once about each comparison.
      path: of what it said, JSONL (`judges.bulk`).

    Raises:
      JudgeError: the judge cannot say.
    """
    asked = [comparisons_of(record) for record in records]

    def work() -> np.ndarray:
        comparisons = [each.comparison for of_record in asked for each in of_record]
        told = iter(judge_all(judge, comparisons, None if shared else path))
        return np.array([_by_sample(of_record, told) for of_record in asked], np.float64)

    shared = several() and getattr(judge, "on_all_devices", False)
    found = work() if shared else from_first(work, np.zeros((len(records), len(records[0].samples))))
    return [[float(value) for value in row] for row in found]


def _by_sample(asked: Sequence[Asked], told: Iterator[Preference]) -> list[float]:
    """The quality of each sample of a record; takes from `told` what was said of its comparisons."""
    said: dict[int, list[tuple[int, Preference]]] = {}
    for each in asked:
        said.setdefault(each.sample, []).append((each.place, next(told)))
    return [quality(said[i]) for i in sorted(said)]


def scores(record: Record, qualities: Sequence[float], config: PreferenceConfig) -> list[float]:
    """The score of each sample, from its quality."""
    efficiency = EFFICIENCIES[config.efficiency]
    return [
        combined(
            efficiency(theoretical_speedup(record.baseline.stats, answer.stats), parallelism(answer.stats)),
            quality,
            config.quality_weight,
            config.efficiency_when,
        )
        for answer, quality in zip(record.samples, qualities, strict=True)
    ]


def combined(efficiency: float, quality: float, quality_weight: float, when: str = "always") -> float:
    """The score, as above; quality alone if its weight is infinite.

    >>> [combined(3.0, quality, 1.0, when) for when in ("always", "not_worse") for quality in (0.5, 1.0, 2.0)]
    [3.5, 4.0, 5.0, 0.5, 4.0, 5.0]
    """
    if math.isinf(quality_weight):
        return quality
    counts = when == "always" or quality >= 1 - ROUNDING
    return (efficiency if counts else 0.0) + quality_weight * quality
