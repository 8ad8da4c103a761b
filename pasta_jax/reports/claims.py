"""What the paper says, and whether these results say so too.

A claim is judged by means; its evidence shows the 95 % intervals, so that a reader sees what is within noise,
and where a claim fails, the families of prompts in which it is lost.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from pasta_jax.reports.results import Estimate, Result, by_round, headline


@dataclasses.dataclass(frozen=True)
class Claim:
    """One statement of the paper, or of its authors' argument.

    Attributes:
      holds: None if it was not measured.
      evidence: the numbers.
    """

    text: str
    holds: bool | None
    evidence: str


@dataclasses.dataclass(frozen=True)
class Compared:
    """The main comparison, by roles; `trained` is PASTA-BoN, by lambda."""

    baseline: Result
    sft: Result
    apar: Result
    sot: Result
    trained: Sequence[Result]


def claims(results: Sequence[Result], ceiling: float | None = None) -> list[Claim]:
    """All of them, in the paper's order.

    Args:
      results: of every model; those of the main comparison were timed.
      ceiling: theoretical speedup of perfect annotations on the same prompts, if it is known.
    """
    shown = headline(results)
    by_name = {result.name: result for result in shown}
    compared = Compared(
        baseline=by_name["Baseline-SFT"],
        sft=by_name["PASTA-SFT"],
        apar=by_name["APAR"],
        sot=by_name["SoT"],
        trained=[result for result in shown if result.method == "PASTA-BoN"],
    )
    return [
        *_better_at_once(compared),
        _above_the_segment(compared),
        _no_loss(compared),
        _speed_end(compared, ceiling),
        *_rivals_weaknesses(compared),
        *_stays_sequential(compared),
        _syncs(compared),
        *_rises(results),
    ]


def _better_at_once(compared: Compared) -> Iterator[Claim]:
    def better(result: Result, rival: Result) -> bool:
        return (
            _speed(result) > _speed(rival)
            and result.win_rate.mean > rival.win_rate.mean
            and result.truth.mean > rival.truth.mean
        )

    for rival in (compared.apar, compared.sot):
        winners = [result for result in compared.trained if better(result, rival)]
        best = max(winners or compared.trained, key=_speed)
        yield _claim(
            f"A PASTA-BoN point is better than {rival.name} in win rate, truth and realized speedup at once",
            bool(winners),
            _said(best),
            _said(rival),
            *([] if winners else [_lost_in(best)]),
        )


def _above_the_segment(compared: Compared) -> Claim:
    """From Baseline-SFT (1x, 50 %) to APAR, a straight line; PASTA-BoN must be over it and reach as far."""
    apar, trained = compared.apar, compared.trained
    text = "The PASTA frontier lies above the segment from Baseline-SFT to APAR"
    if _speed(apar) <= 1.0:
        return _claim(text, None, _said(apar), "there is no segment")

    def above(result: Result) -> bool:
        share = (_speed(result) - 1.0) / (_speed(apar) - 1.0)
        return result.win_rate.mean > 0.5 + share * (apar.win_rate.mean - 0.5)

    within = [result for result in trained if _speed(result) <= _speed(apar)]
    beyond = [result for result in trained if _speed(result) > _speed(apar)]
    best = max(beyond, key=lambda result: result.win_rate.mean, default=None)
    # From the baseline to a point beyond APAR that wins as often, the frontier itself is a line above the segment.
    reaches = best is not None and best.win_rate.mean > apar.win_rate.mean
    holds = reaches and all(map(above, within))
    fails = [result for result in within if not above(result)] or ([best] if best and not reaches else [])
    return _claim(text, holds, *map(_said, (*within, *([best] if best else []), apar)), *map(_lost_in, fails))


def _no_loss(compared: Compared) -> Claim:
    safe = [result for result in compared.trained if result.win_rate.mean >= 0.5]
    if safe:
        best = max(safe, key=_speed)
    else:
        best = max(compared.trained, key=lambda result: result.win_rate.mean)
    holds = bool(safe) and _speed(best) >= 1.5
    return _claim(
        "At no loss of quality (win rate at least 50 %) realized speedup is at least 1.5x",
        holds,
        _said(best),
        *([] if safe else [_lost_in(best)]),
    )


def _speed_end(compared: Compared, ceiling: float | None) -> Claim:
    fastest = max(compared.trained, key=_speed)
    return _claim(
        "The speed end reaches the paper's 1.93x realized",
        _speed(fastest) >= 1.93,
        _said(fastest),
        *([] if ceiling is None else [f"perfect annotations of these prompts: {ceiling:.2f}x theoretical"]),
    )


def _rivals_weaknesses(compared: Compared) -> Iterator[Claim]:
    apar, sft, baseline = compared.apar, compared.sft, compared.baseline
    yield _claim(
        "APAR misses the independent parts of prose",
        apar.families["prose"]["theoretical"] < 1.1,
        f"APAR {apar.families['prose']['theoretical']:.2f}x theoretical on prose",
        f"{sft.name} {sft.families['prose']['theoretical']:.2f}x",
    )
    yield _claim(
        "APAR harms chain",
        _percent(apar, "chain", "truth") < _percent(baseline, "chain", "truth") - 3,
        f"truth {_percent(apar, 'chain', 'truth'):.1f} %",
        f"Baseline-SFT {_percent(baseline, 'chain', 'truth'):.1f} %",
        f"it forks in {_percent(apar, 'chain', 'promised'):.1f} % of chain answers",
    )


def _stays_sequential(compared: Compared) -> Iterator[Claim]:
    for family in ("chain", "single"):
        shares = [_percent(result, family, "promised") for result in compared.trained]
        yield _claim(
            f"After the second stage {family} stays sequential (promises in under 2 % of answers)",
            max(shares) < 2.0,
            *(f"{r.name} {share:.1f} %" for r, share in zip(compared.trained, shares, strict=True)),
            f"{compared.sft.name} {_percent(compared.sft, family, 'promised'):.1f} %",
        )


def _syncs(compared: Compared) -> Claim:
    shares = [_percent(result, "compare", "joined") for result in compared.trained]
    return _claim(
        "After the second stage every compare answer waits for its branches before the conclusion",
        min(shares) == 100.0,
        *(f"{r.name} {share:.1f} %" for r, share in zip(compared.trained, shares, strict=True)),
    )


def _rises(results: Sequence[Result]) -> Iterator[Claim]:
    for weight, line in by_round(results).items():
        wins = [result.win_rate for result in line]
        rises = all(later.mean > earlier.mean for earlier, later in itertools.pairwise(wins))
        apart = rises and wins[-1].low > wins[0].high
        yield _claim(
            f"Win rate rises from PASTA-SFT through the rounds at lambda {weight:g}",
            rises,
            " to ".join(map(_in_percent, wins)),
            *([] if apart or not rises else ["first and last are within noise"]),
            *([] if rises else [_lost_in(line[-1])]),
        )


# ------------------------------------------------------------------------------------------------- in words


def _claim(text: str, holds: bool | None, *evidence: str) -> Claim:
    return Claim(text, holds, "; ".join(filter(None, evidence)))


def _speed(result: Result) -> float:
    if result.realized is None:
        raise ValueError(f"{result.name} was not timed; claims about speed need realized speedups.")
    return result.realized.mean


def _percent(result: Result, family: str, measure: str) -> float:
    return 100 * result.families[family][measure]


def _said(result: Result) -> str:
    assert result.realized is not None
    return (
        f"{result.name} {_in_percent(result.win_rate)} win rate, {_in_percent(result.truth)} truth at "
        f"{_with_interval(result.realized, 2)}x"
    )


def _in_percent(estimate: Estimate) -> str:
    return f"{_with_interval(estimate.scaled(100), 1)} %"


def _with_interval(estimate: Estimate, digits: int) -> str:
    mean, low, high = (f"{x:.{digits}f}" for x in dataclasses.astuple(estimate))
    return f"{mean} [{low}, {high}]" if estimate.has_interval else mean


def _lost_in(result: Result) -> str:
    """The families that cost a result its win rate, the worst first; nothing if none does."""
    wins = {family: measures["win_rate"] for family, measures in result.families.items()}
    lost = sorted((win, family) for family, win in wins.items() if win < 0.49)
    said = ", ".join(f"{family} ({100 * win:.0f} %)" for win, family in lost)
    return f"{result.name} loses in {said}" if said else ""
