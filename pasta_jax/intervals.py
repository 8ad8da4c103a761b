"""Means over answers with 95 % intervals, and differences of two models' means over the same prompts.

A mean is a sum over answers divided by another: lists with one marker by lists, logarithms of speeds by 1. Its
standard error is that of what each answer adds to it (the delta method), over the answers that count in it, with
Student's t for how few they are; a difference is paired: it is taken answer by answer. Of shares of yes or no the
interval is Wilson's, which is not empty at 0 % and 100 %, and there of other shares too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import special

QUANTILE = 0.975
"""The quantile at the upper end of 95 %."""

Z = float(special.ndtri(QUANTILE))
"""Standard errors to each side of 95 % of a normal distribution."""


class Interval(NamedTuple):
    """A mean with its 95 % interval; nan where there is nothing to say."""

    mean: float
    low: float
    high: float

    @property
    def is_known(self) -> bool:
        """Whether there is a mean."""
        return math.isfinite(self.mean)


UNKNOWN = Interval(math.nan, math.nan, math.nan)


@dataclasses.dataclass(frozen=True)
class Values:
    """A measure of n answers.

    Attributes:
      above, below: float64 [n]; the mean is the sum of the first divided by that of the second.
    """

    above: np.ndarray
    below: np.ndarray

    @classmethod
    def counted(cls, answers: Sequence[Any], above: str, below: str) -> Values:
        """Of two attributes of each answer."""
        return cls(
            *(np.array([getattr(each, name) for each in answers], np.float64) for name in (above, below))
        )

    @property
    def mean(self) -> float:
        """It is nan if there is nothing to divide by."""
        below = float(self.below.sum())
        return float(self.above.sum()) / below if below else math.nan

    @property
    def count(self) -> int:
        """How many answers count."""
        return int(np.count_nonzero(self.below))

    @property
    def influence(self) -> np.ndarray:
        """What each answer adds to the mean's distance from the truth, times n: float64 [n]."""
        return (self.above - self.mean * self.below) / self.below.mean()

    @property
    def interval(self) -> Interval:
        """The mean and its interval.

        >>> values = Values(np.array([2.0, 6.0]), np.array([1.0, 2.0]))
        >>> tuple(round(each, 2) for each in values.interval)
        (2.67, -2.98, 8.31)
        """
        return _around(self.mean, self.influence, self.below != 0) if math.isfinite(self.mean) else UNKNOWN

    @property
    def share(self) -> Interval:
        """The same of a share of what is counted, which lies between 0 and 1; of yes or no it is Wilson's.

        >>> values = Values(np.array([1.0, 0, 0, 0]), np.ones(4))
        >>> tuple(round(each, 2) for each in values.share)
        (0.25, 0.05, 0.7)
        """
        if not math.isfinite(self.mean):
            return UNKNOWN
        if np.isin(self.above, (0, 1)).all() and np.isin(self.below, (0, 1)).all():
            return _wilson(self.mean, self.count)
        mean, low, high = self.interval
        if mean in (0, 1):
            return _wilson(mean, self.count)
        return Interval(mean, max(low, 0.0), min(high, 1.0)) if low < high else Interval(mean, low, high)

    def less(self, other: Values) -> Interval:
        """The difference of two means of the same n prompts, this one's less the other's."""
        if not math.isfinite(difference := self.mean - other.mean):
            return UNKNOWN
        return _around(difference, self.influence - other.influence, (self.below != 0) | (other.below != 0))


def _around(mean: float, influence: np.ndarray, counts: np.ndarray) -> Interval:
    """Over the answers that count; without an interval where there are not two, or all say the same."""
    n, adds = int(counts.sum()), influence[counts] * counts.mean()
    if n < 2 or np.ptp(adds) < 1e-12:
        return Interval(mean, math.nan, math.nan)
    half = float(special.stdtrit(n - 1, QUANTILE)) * float(adds.std(ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def _wilson(share: float, count: int) -> Interval:
    scale = 1 + Z**2 / count
    middle = (share + Z**2 / (2 * count)) / scale
    half = Z / scale * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))
