"""Scores: how fast an answer is, how good, and both at once (paper section 4).

    score = efficiency + quality_weight * quality

Speed is counted in decode steps, so it does not depend on the machine. Quality comes from a judge that says
which of two answers is better, and how sure it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Protocol, TypeAlias

from pasta_jax.config import PreferenceConfig
from pasta_jax.data import almanac
from pasta_jax.data.judgement import Preference
from pasta_jax.preference.sample import Record


class Counted(Protocol):
    """The counts that speed is computed from: `Stats`, or any record of a measured answer."""

    @property
    def output_tokens(self) -> int: ...
    @property
    def text_tokens(self) -> int: ...
    @property
    def critical_path(self) -> int: ...


class Judge(Protocol):
    """Compares two answers to a prompt."""

    def __call__(self, prompt: str, a: str, b: str, /) -> Preference: ...


JUDGES: dict[str, Judge] = {"almanac": almanac.compare}
"""By the names of `preference.judge`."""

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


def quality(judge: Judge, prompt: str, answer: str, opponents: Iterable[str]) -> float:
    """Confidence in wins / confidence in losses, against each opponent in both orders.

    The paper does not say what becomes of an answer that never loses. Here one confident win and one
    confident loss are added, so that the ratio is finite, and 1 against equals; a tie counts half its confidence to
    each side.

    >>> def shorter(prompt, a, b):
    ...     return Preference(None if len(a) == len(b) else int(len(b) < len(a)), 0.75)
    >>> quality(shorter, "", "ab", ["abc"]), quality(shorter, "", "ab", ["cd"]), quality(shorter, "", "ab", ["a"])
    (2.5, 1.0, 0.4)
    """
    won = lost = 1.0
    for opponent in opponents:
        for position, (a, b) in enumerate(((answer, opponent), (opponent, answer))):
            winner, confidence = judge(prompt, a, b)
            won += confidence * (0.5 if winner is None else winner == position)
            lost += confidence * (0.5 if winner is None else winner != position)
    return won / lost


def scores(record: Record, config: PreferenceConfig) -> list[float]:
    """The score of each sample; its opponents are the baseline's answer and the reference."""
    judge, efficiency = JUDGES[config.judge], EFFICIENCIES[config.efficiency]
    opponents = (record.baseline.text, record.prompt.reference)
    return [
        combined(
            efficiency(theoretical_speedup(record.baseline.stats, answer.stats), parallelism(answer.stats)),
            quality(judge, record.prompt.text, answer.text, opponents),
            config.quality_weight,
        )
        for answer in record.samples
    ]


def combined(efficiency: float, quality: float, quality_weight: float) -> float:
    """Efficiency + quality_weight * quality; quality alone if the weight is infinite."""
    return quality if math.isinf(quality_weight) else efficiency + quality_weight * quality
