"""From answers to results: what was measured of each model, with intervals."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np

from pasta_jax.config import ConfigError
from pasta_jax.data import almanac
from pasta_jax.decoding.trace import critical_path
from pasta_jax.evaluate.systems import Measured, concludes_last, geometric_mean, realized, win
from pasta_jax.lang.program import Program, Text
from pasta_jax.preference.score import parallelism, theoretical_speedup
from pasta_jax.reproduce.results import EFFICIENCY, POSITIONS, Estimate, Result
from pasta_jax.tokens.detokenize import threads_of
from pasta_jax.tokens.layout import layout_example

SPEEDS = ("theoretical", "parallelism", "realized")
"""Measures whose means are geometric."""


@dataclasses.dataclass(frozen=True)
class Found:
    """Answers of one model a seed, beside the baseline's of that seed: [seeds][prompts]."""

    baseline: list[list[Measured]]
    test: list[list[Measured]]

    def table(self) -> dict[str, np.ndarray]:
        """Every measure of every answer, float64 [seeds, prompts]; speeds as logarithms."""
        for b, t in zip(self.baseline, self.test, strict=True):
            if [answer.prompt for answer in b] != [answer.prompt for answer in t] or not b:
                raise ConfigError(
                    "Answers are missing, or to other prompts. Remove this seed's cells and run again."
                )

        def each(measure: Callable[[Measured, Measured], float]) -> np.ndarray:
            return np.array(
                [
                    [measure(b, t) for b, t in zip(*both, strict=True)]
                    for both in zip(self.baseline, self.test, strict=True)
                ]
            )

        measures = {
            "win_rate": each(win),
            "truth": each(lambda b, t: t.truth),
            "theoretical": np.log(each(theoretical_speedup)),
            "parallelism": np.log(each(lambda b, t: parallelism(t))),
            "promises": each(lambda b, t: t.promises),
            "promised": each(lambda b, t: t.promises > 0),
            "concludes_last": each(lambda b, t: concludes_last(t)),
        }
        if all(t.wall_s for answers in self.test for t in answers):
            measures["realized"] = np.log(each(realized))
        return measures


def estimate(values: np.ndarray, name: str, draws: int = 2000) -> Estimate:
    """Mean and 95 % interval of a measure [seeds, prompts]; a geometric mean for speeds.

    A bootstrap over prompts and seeds: prompts are drawn anew with all their seeds, and seeds anew for each
    draw where there are several.
    """
    rng = np.random.default_rng(0)
    seeds, prompts = values.shape
    means = np.empty(draws)
    for i in range(draws):
        rows = rng.integers(seeds, size=seeds)
        means[i] = values[rows][:, rng.integers(prompts, size=prompts)].mean()
    low, high = np.quantile(means, [0.025, 0.975])
    scale = np.exp if name in SPEEDS else float
    return Estimate(*(float(scale(x)) for x in (values.mean(), low, high)))


def measured(
    name: str,
    method: str,
    found: Found,
    weight: float | None = None,
    round: int = 0,
    positions: str = POSITIONS,
    efficiency: str = EFFICIENCY,
    rivals: Mapping[str, Found] | None = None,
) -> Result:
    """What the report shows of a model, and paired differences from rivals by name; else as in `Result`."""
    table = found.table()
    if not method.startswith("PASTA"):
        table.pop("concludes_last")  # nothing to read it from
    kinds = np.array([answer.family for answer in found.baseline[0]])
    families = {}
    for family in dict.fromkeys(kinds.tolist()):
        means = {key: float(values[:, kinds == family].mean()) for key, values in table.items()}
        families[family] = {k: math.exp(v) if k in SPEEDS else v for k, v in means.items()}
    whole = {key: estimate(values, key) for key, values in table.items()}
    return Result(
        name=name,
        method=method,
        seeds=len(found.test),
        prompts=len(kinds),
        weight=weight,
        round=round,
        win_rate=whole["win_rate"],
        truth=whole["truth"],
        theoretical=whole["theoretical"],
        parallelism=whole["parallelism"],
        realized=whole.get("realized"),
        families=families,
        positions=positions,
        efficiency=efficiency,
        against={rival: differences(found, theirs) for rival, theirs in (rivals or {}).items()},
    )


def differences(test: Found, rival: Found) -> dict[str, Estimate]:
    """A model against a rival on the same prompts and seeds (`Result.against`).

    The same prompt is as hard for both, so a difference of theirs has less noise than each of them.
    """
    ours, theirs = test.table(), rival.table()
    return {name: estimate(ours[name] - theirs[name], name) for name in ("win_rate", "truth", "realized")}


def exact_speedup(prompts: int) -> float:
    """Theoretical speedup of the true answers under exact annotations, a geometric mean.

    Exact: all that is independent is promised, and what needs it waits for it. No upper bound: a model that
    knows an answer by heart may leave out a sync, and APAR's tags cost fewer tokens.
    """
    tokenizer = almanac.load_tokenizer()

    def steps(task: almanac.Task, program: Program) -> int:
        start = len(tokenizer.encode_prompt(task.prompt))
        threads = threads_of(layout_example(tokenizer, task.prompt, program), start)
        return critical_path(threads, tokenizer.vocabulary)

    def speedup(task: almanac.Task) -> float:
        exact = almanac.annotate_exactly(task, lambda text: len(tokenizer.encode(text)))
        return steps(task, Program((Text(almanac.plain(task)),))) / steps(task, exact)

    return geometric_mean([speedup(task) for task in almanac.evaluation_tasks(prompts)])
