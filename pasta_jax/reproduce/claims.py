"""The claims of the paper and the project's own bars: whether the results support them.

A claim is judged by means. Overall numbers come with 95 % intervals, so that a reader sees what is within noise. If
a claim fails, the evidence names the families of prompts in which it fails.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

from pasta_jax.reproduce.results import Estimate, Result, by_round, headline, height, upper_hull

VERDICTS = {True: "holds", False: "does not hold", None: "not measured"}


@dataclasses.dataclass(frozen=True)
class Claim:
    """One statement.

    Attributes:
      holds: whether the results support it; None if it was not measured.
      evidence: the numbers.
    """

    text: str
    holds: bool | None
    evidence: str

    @property
    def verdict(self) -> str:
        """`holds` in words."""
        return VERDICTS[self.holds]


def claims(results: Sequence[Result], exact: float | None = None) -> list[Claim]:
    """All claims, in the paper's order.

    Args:
      results: of every model; the main comparison must be timed.
      exact: theoretical speedup of exact annotations of the same prompts, if known.
    """
    shown = headline(results)
    by_name = {result.name: result for result in shown}
    baseline, sft, apar, sot = (by_name[name] for name in ("Baseline-SFT", "PASTA-SFT", "APAR", "SoT"))
    trained = [result for result in shown if result.method == "PASTA-BoN"]  # one for each lambda
    return [
        *_better_at_once(trained, (apar, sot)),
        _above_the_segment(trained, apar),
        _no_loss(trained, baseline),
        _speed_end(trained, exact),
        *_apars_weaknesses(apar, sft, baseline),
        *_stays_sequential(trained, sft),
        _syncs(trained),
        *_rises(results),
    ]


def _better_at_once(trained: Sequence[Result], rivals: Sequence[Result]) -> Iterator[Claim]:
    def lost(result: Result, rival: Result) -> list[str]:
        """The measures in which `result` is not better."""
        return [name for name, value in _MEASURES.items() if value(result).mean <= value(rival).mean]

    for rival in rivals:
        winners = [result for result in trained if not lost(result, rival)]
        best = max(winners, key=_speed) if winners else max(trained, key=lambda r: r.win_rate.mean)
        yield _claim(
            f"A PASTA-BoN point is better than {rival.name} in win rate, truth and realized speedup at once",
            bool(winners),
            _summary(best),
            _summary(rival),
            _difference(best, rival),
            *(_behind(best, rival, name) for name in lost(best, rival)),
        )


def _above_the_segment(trained: Sequence[Result], apar: Result) -> Claim:
    """Compares the frontier with the segment from Baseline-SFT (1x, 50 %) to APAR.

    The frontier is the upper hull of Baseline-SFT and PASTA-BoN. Hull and segment start at the same point, so the
    hull is above the whole segment if it is above its end.
    """
    text = "The PASTA frontier lies above the segment from Baseline-SFT to APAR"
    if _speed(apar) <= 1.0:
        return _claim(text, None, _summary(apar), "it is no faster than Baseline-SFT: there is no segment")
    points = [(1.0, 0.5), *((_speed(result), result.win_rate.mean) for result in trained)]
    at_apar = height(upper_hull(points), _speed(apar))
    if at_apar is None:
        return _claim(text, False, _summary(apar), *map(_summary, trained), "no point is as fast as APAR")
    holds = at_apar > apar.win_rate.mean
    best = max(trained, key=lambda result: (_speed(result) >= _speed(apar), result.win_rate.mean))
    return _claim(
        text,
        holds,
        f"at APAR's speed the line between its points is at {100 * at_apar:.1f} %",
        _summary(apar),
        _summary(best),
        "" if holds else _behind(best, apar, "win_rate"),
    )


def _no_loss(trained: Sequence[Result], baseline: Result) -> Claim:
    safe = [result for result in trained if result.win_rate.mean >= 0.5]
    best = max(safe, key=_speed) if safe else max(trained, key=lambda result: result.win_rate.mean)
    holds = bool(safe) and _speed(best) >= 1.5
    return _claim(
        "At no loss of quality (win rate at least 50 %) realized speedup is at least 1.5x",
        holds,
        _summary(best),
        "" if safe else _behind(best, baseline, "win_rate"),
    )


def _speed_end(trained: Sequence[Result], exact: float | None) -> Claim:
    fastest = max(trained, key=_speed)
    return _claim(
        "The speed end reaches the paper's 1.93x realized",
        _speed(fastest) >= 1.93,
        _summary(fastest),
        ""
        if exact is None
        else f"exact annotations of these prompts, each sync in its place: {exact:.2f}x theoretical",
    )


def _apars_weaknesses(apar: Result, sft: Result, baseline: Result) -> Iterator[Claim]:
    yield _claim(
        "APAR misses the independent parts of prose",
        apar.families["prose"]["theoretical"] < 1.1,
        f"APAR {apar.families['prose']['theoretical']:.2f}x theoretical on prose",
        f"{sft.name} {sft.families['prose']['theoretical']:.2f}x",
    )
    harmed = _percent(apar, "chain", "truth") < _percent(baseline, "chain", "truth") - 3
    yield _claim(
        "APAR harms chain (by more than 3 points of truth)",
        harmed,
        f"truth {_percent(apar, 'chain', 'truth'):.1f} %",
        f"Baseline-SFT {_percent(baseline, 'chain', 'truth'):.1f} %",
        f"it forks in {_percent(apar, 'chain', 'promised'):.1f} % of chain answers, "
        f"{apar.families['chain']['theoretical']:.2f}x theoretical",
        "" if harmed else "so its branches need nothing that they cannot see",
    )


def _stays_sequential(trained: Sequence[Result], sft: Result) -> Iterator[Claim]:
    for family in ("chain", "single"):
        shares = [_percent(result, family, "promised") for result in trained]
        yield _claim(
            f"After the second stage {family} stays sequential (promises in under 2 % of answers)",
            max(shares) < 2.0,
            *(f"{r.name} {share:.1f} %" for r, share in zip(trained, shares, strict=True)),
            f"{sft.name} {_percent(sft, family, 'promised'):.1f} %",
        )


def _syncs(trained: Sequence[Result]) -> Claim:
    """The evidence gives the share of answers with branches, and the truth."""
    shares = [_percent(result, "compare", "concludes_last") for result in trained]
    return _claim(
        "After the second stage every compare answer waits for its branches before the conclusion",
        min(shares) == 100.0,
        *(
            f"{r.name} {share:.1f} % (with branches: {_percent(r, 'compare', 'promised'):.1f} %; truth: "
            f"{_percent(r, 'compare', 'truth'):.1f} %)"
            for r, share in zip(trained, shares, strict=True)
        ),
    )


def _rises(results: Sequence[Result]) -> Iterator[Claim]:
    for weight, line in by_round(results).items():
        wins = [result.win_rate for result in line]
        rises = all(_wins_more(*pair) for pair in itertools.pairwise(line))
        overlap = wins[-1].low <= wins[0].high and wins[0].low <= wins[-1].high
        falls = next((pair for pair in itertools.pairwise(line) if not _wins_more(*pair)), None)
        yield _claim(
            f"Win rate rises from PASTA-SFT through the rounds at lambda {weight:g}",
            rises,
            " to ".join(map(_in_percent, wins)),
            "the intervals of first and last overlap" if overlap else "",
            _behind(falls[1], falls[0], "win_rate") if falls else "",
        )


# ------------------------------------------------------------------------------------------------- evidence


def _claim(text: str, holds: bool | None, *evidence: str) -> Claim:
    return Claim(text, holds, "; ".join(filter(None, evidence)))


def _speed(result: Result) -> float:
    return _realized(result).mean


def _percent(result: Result, family: str, measure: str) -> float:
    return 100 * result.families[family][measure]


def _realized(result: Result) -> Estimate:
    if result.realized is None:
        raise ValueError(f"{result.name} was not timed; claims about speed need realized speedups.")
    return result.realized


_MEASURES: Mapping[str, Callable[[Result], Estimate]] = {
    "win_rate": lambda result: result.win_rate,
    "truth": lambda result: result.truth,
    "realized": _realized,
}


def _difference(result: Result, rival: Result) -> str:
    """Intervals of the differences on the same prompts, which show whether they are noise."""
    if not (paired := result.against.get(rival.name)):
        return ""
    points = [
        f"{paired[name].mean * 100:+.1f} [{paired[name].low * 100:+.1f}, {paired[name].high * 100:+.1f}]"
        for name in ("win_rate", "truth")
    ]
    return (
        f"paired differences: {points[0]} points of win rate, {points[1]} points of truth, "
        f"{paired['realized'].text(2)} times as fast"
    )


def _summary(result: Result) -> str:
    win_rate, truth = _in_percent(result.win_rate), _in_percent(result.truth)
    return f"{result.name} {win_rate} win rate, {truth} truth at {_realized(result).text(2)}x"


def _in_percent(estimate: Estimate) -> str:
    return f"{estimate.scaled(100).text(1)} %"


def _wins_more(earlier: Result, later: Result) -> bool:
    return later.win_rate.mean > earlier.win_rate.mean


def _behind(result: Result, rival: Result, measure: str) -> str:
    """The families in which a result is worse than a rival, the largest gap first; "" if there are none."""
    gaps = sorted(
        (result.families[family][measure] - rival.families[family][measure], family)
        for family in rival.families
    )
    if measure == "realized":
        shown = ", ".join(f"{family} {gap:+.2f}x" for gap, family in gaps if gap < -0.005)
        return f"realized by family, against {rival.name}: {shown}" if shown else ""
    shown = ", ".join(f"{family} {100 * gap:+.1f}" for gap, family in gaps if gap < -0.0005)
    answers = rival.prompts // max(1, len(rival.families)) * rival.seeds
    name = measure.replace("_", " ")
    what = f"points of {name} by family, about {answers} answers each, against {rival.name}"
    return f"{what}: {shown}" if shown else ""
