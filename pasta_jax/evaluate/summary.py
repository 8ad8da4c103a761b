"""One model on a user's own prompts, in numbers: speed, quality by a judge, and the standard error of each.

Nothing is left out: an answer that was cut off or whose tags were not in order is judged as it is, and one that
failed has lost. Only what an answer that failed lacks, a speed, is missing from the speeds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from pasta_jax.evaluate.alpaca_eval import Estimate, percent
from pasta_jax.evaluate.answers import Answered
from pasta_jax.judges.protocol import Comparison, Preference
from pasta_jax.preference.score import parallelism, theoretical_speedup


@dataclasses.dataclass(frozen=True)
class Ratio:
    """A geometric mean, and its standard error: that of the mean logarithm, times the mean."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:.2f}x" if math.isnan(self.error) else f"{self.mean:.2f}x +- {self.error:.2f}"


def geometric(ratios: Sequence[float]) -> Ratio:
    """The geometric mean of ratios above 0.

    >>> str(geometric([1.0, 4.0]))
    '2.00x +- 1.39'
    """
    logs = np.log(np.asarray(ratios, np.float64))
    if not len(logs):
        return Ratio(math.nan, math.nan)
    mean = math.exp(logs.mean())
    return Ratio(mean, mean * float(logs.std(ddof=1)) / math.sqrt(len(logs)) if len(logs) > 1 else math.nan)


@dataclasses.dataclass(frozen=True)
class Speed:
    """How fast a model answered, beside the sequential baseline.

    Attributes:
      prompts: how many.
      theoretical: the baseline's tokens / the critical path. Speeds are geometric means (paper section 5.1).
      realized: the baseline's seconds / the model's, of the prompts that were answered at batch 1.
      parallelism: tokens without tags / critical path.
      promising: the share of answers with a promise, in per cent.
      tokens, baseline_tokens: mean tokens without tags.
      cut, malformed, failed: answers that a limit ended, with a fault in their tags, and prompts without an answer.
      baseline_cut, baseline_failed: of the baseline.
    """

    prompts: int
    theoretical: Ratio
    realized: Ratio
    parallelism: Ratio
    promising: Estimate
    tokens: float
    baseline_tokens: float
    cut: int
    malformed: int
    failed: int
    baseline_cut: int
    baseline_failed: int


def speed_of(baseline: Sequence[Answered], test: Sequence[Answered]) -> Speed:
    """The speeds of answers to the same prompts."""
    both = [(b, t) for b, t in zip(baseline, test, strict=True) if not (b.error or t.error)]
    return Speed(
        prompts=len(test),
        theoretical=geometric([theoretical_speedup(b, t) for b, t in both]),
        realized=geometric([b.wall_s / t.wall_s for b, t in both if b.wall_s and t.wall_s]),
        parallelism=geometric([parallelism(t) for _, t in both]),
        promising=percent(np.array([t.promises > 0 for t in test], np.float64)),
        tokens=float(np.mean([t.text_tokens for t in test])),
        baseline_tokens=float(np.mean([b.text_tokens for b in baseline])),
        cut=sum(t.is_cut for t in test),
        malformed=sum(t.is_malformed for t in test),
        failed=sum(bool(t.error) for t in test),
        baseline_cut=sum(b.is_cut for b in baseline),
        baseline_failed=sum(bool(b.error) for b in baseline),
    )


@dataclasses.dataclass(frozen=True)
class Quality:
    """How good the answers are beside an opponent's, by a judge that saw both orders.

    Attributes:
      win_rate: the mean of the judge's probability that the answer is better, in per cent; 50 against equals.
        Prompts without a verdict are left out.
      won, tied, lost: prompts by which side of a half that is.
      same_winner: of the prompts with a verdict in both orders and a winner in one at least, the share with the
        same winner in both, in per cent; None if there are none.
      length_controlled: AlpacaEval's, if it could be computed.
      unjudged: prompts without a verdict in one order at least.
      chances: the judge's probability that the answer is better, of each prompt; None without a verdict.
    """

    win_rate: Estimate
    won: int
    tied: int
    lost: int
    same_winner: float | None
    length_controlled: Estimate | None = None
    unjudged: int = 0
    chances: tuple[float | None, ...] = ()


@dataclasses.dataclass(frozen=True)
class Contest:
    """A prompt, the model's answer and the opponent's; None is one that failed."""

    prompt: object
    answer: str | None
    opponent: str | None

    @property
    def is_open(self) -> bool:
        """Whether a judge has to be asked."""
        return self.answer is not None and self.opponent is not None

    @property
    def comparisons(self) -> list[Comparison]:
        """Both orders, the model's answer first and last."""
        if self.answer is None or self.opponent is None:
            return []
        return [
            Comparison(self.prompt, self.answer, self.opponent),
            Comparison(self.prompt, self.opponent, self.answer),
        ]


def chances(contests: Sequence[Contest], said: Sequence[Preference]) -> tuple[np.ndarray, list[bool]]:
    """The judge's probability that the model's answer is better, the mean of both orders; nan without a verdict.

    Args:
      contests: one for each prompt.
      said: of their comparisons, in order.

    Returns:
      the probabilities, float64 [n], 0 to 1 or nan; and for each prompt that has a winner in one order at least,
      whether it has the same in both.
    """
    told = iter(said)
    found: list[float] = []
    agreed: list[bool] = []
    for contest in contests:
        if not contest.is_open:
            failed = contest.answer is None, contest.opponent is None
            found.append({(True, False): 0.0, (False, True): 1.0}.get(failed, 0.5))
            continue
        forth, back = next(told), next(told).swapped
        found.append((_chance(forth) + _chance(back)) / 2)
        if (same := forth.agrees(back)) is not None:
            agreed.append(same)
    return np.array(found, np.float64), agreed


def _chance(preference: Preference) -> float:
    """That the first is better; nan without a verdict.

    >>> [_chance(Preference(winner, 0.75)) for winner in (0, 1, None)]
    [0.75, 0.25, 0.5]
    """
    if not preference.is_verdict:
        return math.nan
    if preference.winner is None:
        return 0.5
    return preference.confidence if preference.winner == 0 else 1.0 - preference.confidence


def quality_of(chance: np.ndarray, agreed: Sequence[bool]) -> Quality:
    """The quality from `chances`, of which one at least is a number."""
    return Quality(
        win_rate=percent(chance[np.isfinite(chance)]),
        won=int((chance > 0.5).sum()),
        tied=int((chance == 0.5).sum()),
        lost=int((chance < 0.5).sum()),
        same_winner=100 * sum(agreed) / len(agreed) if agreed else None,
        unjudged=int(np.isnan(chance).sum()),
        chances=tuple(None if math.isnan(value) else float(value) for value in chance),
    )
