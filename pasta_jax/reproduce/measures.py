"""From answers to results: the measures of each model, with intervals."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping

import numpy as np

from pasta_jax.config import ConfigError
from pasta_jax.data import almanac
from pasta_jax.evaluate.systems import Measured, concludes_last, geometric_mean, read_answers, realized, win
from pasta_jax.lang.program import Program, Text
from pasta_jax.preference.score import parallelism, theoretical_speedup
from pasta_jax.reproduce.cells import Paths, Plan, bon
from pasta_jax.reproduce.results import EFFICIENCY, POSITIONS, Estimate, Result
from pasta_jax.tokens.cost import critical_path
from pasta_jax.tokens.detokenize import threads_of
from pasta_jax.tokens.layout import layout_example

SPEEDS = ("theoretical", "parallelism", "realized")
"""Measures whose means are geometric."""


@dataclasses.dataclass(frozen=True)
class Paired:
    """Answers of a model and of the baseline to the same prompts: [seeds][prompts]."""

    baseline: list[list[Measured]]
    test: list[list[Measured]]

    def table(self) -> dict[str, np.ndarray]:
        """Every measure of every answer, float64 [seeds, prompts]; speeds as logarithms."""
        for b, t in zip(self.baseline, self.test, strict=True):
            if [answer.prompt for answer in b] != [answer.prompt for answer in t] or not b:
                raise ConfigError(
                    "Answers are missing, or to other prompts. Remove this seed's cells and run again."
                )

        def array(measure: Callable[[Measured, Measured], float]) -> np.ndarray:
            return np.array(
                [
                    [measure(b, t) for b, t in zip(*both, strict=True)]
                    for both in zip(self.baseline, self.test, strict=True)
                ]
            )

        measures = {
            "win_rate": array(win),
            "truth": array(lambda b, t: t.truth),
            "theoretical": np.log(array(theoretical_speedup)),
            "parallelism": np.log(array(lambda b, t: parallelism(t))),
            "promises": array(lambda b, t: t.promises),
            "promised": array(lambda b, t: t.promises > 0),
            "concludes_last": array(lambda b, t: concludes_last(t)),
        }
        if all(t.wall_s for test in self.test for t in test):
            measures["realized"] = np.log(array(realized))
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
    answers: Paired,
    weight: float | None = None,
    round: int = 0,
    positions: str = POSITIONS,
    efficiency: str = EFFICIENCY,
    rivals: Mapping[str, Paired] | None = None,
) -> Result:
    """A model's row of the report, with paired differences from its rivals, by name.

    The other arguments are those of `Result`.
    """
    table = answers.table()
    if not method.startswith("PASTA"):
        table.pop("concludes_last")  # its texts have no tags to read it from
    kinds = np.array([answer.family for answer in answers.baseline[0]])
    families = {}
    for family in dict.fromkeys(kinds.tolist()):
        means = {key: float(values[:, kinds == family].mean()) for key, values in table.items()}
        families[family] = {k: math.exp(v) if k in SPEEDS else v for k, v in means.items()}
    whole = {key: estimate(values, key) for key, values in table.items()}
    return Result(
        name=name,
        method=method,
        seeds=len(answers.test),
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
        against={rival: differences(answers, other) for rival, other in (rivals or {}).items()},
    )


def differences(test: Paired, rival: Paired) -> dict[str, Estimate]:
    """A model against a rival on the same prompts and seeds (`Result.against`).

    A prompt is equally hard for both, so their difference has less noise than either.
    """
    a, b = test.table(), rival.table()
    return {name: estimate(a[name] - b[name], name) for name in ("win_rate", "truth", "realized")}


def results(plan: Plan, workdir: str) -> list[Result]:
    """All that was measured, in the order of the report."""
    folder = Paths(workdir)

    def timed(seed: int, name: str) -> list[Measured]:
        return read_answers(os.path.join(folder.timed(seed, plan), f"{name}.jsonl"))

    def counted(seed: int, name: str) -> list[Measured]:
        return read_answers(os.path.join(folder.counted(seed, plan), f"{name}.jsonl"))

    baseline = [timed(seed, "baseline") for seed in plan.seeds]
    models = [measured("Baseline-SFT", "Baseline-SFT", Paired(baseline, baseline))]
    others = {
        method: Paired(baseline, [timed(seed, name) for seed in plan.seeds])
        for name, method in (("pasta", "PASTA-SFT"), ("apar", "APAR"), ("sot", "SoT"))
    }
    models += [measured(method, method, answers) for method, answers in others.items()]
    rivals = {name: others[name] for name in ("APAR", "SoT")}
    for weight in plan.weights:
        name = f"PASTA-BoN-{weight:g}"
        last = Paired(baseline, [timed(seed, bon(weight)) for seed in plan.seeds])
        models.append(measured(name, "PASTA-BoN", last, weight, plan.rounds, rivals=rivals))
        if plan.rounds > 1:
            first = Paired(baseline, [counted(seed, f"{bon(weight)}-round-1") for seed in plan.seeds])
            models.append(measured(f"{name}, round 1", "PASTA-BoN", first, weight, 1))
    seed = plan.seeds[0]
    for scheme in plan.positions:
        answers = Paired(baseline[:1], [counted(seed, scheme)])
        models.append(measured(f"PASTA-SFT, {scheme}", "PASTA-SFT", answers, positions=scheme))
    for efficiency in plan.efficiencies:
        for weight in plan.efficiency_weights:
            answers = Paired(baseline[:1], [counted(seed, bon(weight, efficiency))])
            name = f"PASTA-BoN-{weight:g}, {efficiency}"
            models.append(measured(name, "PASTA-BoN", answers, weight, 1, efficiency=efficiency))
    return models


def exact_speedup(prompts: int) -> float:
    """Theoretical speedup of the true answers under exact annotations, a geometric mean.

    Exact: everything independent is promised, and what depends on it waits. This is no upper bound: a model that
    knows an answer by heart may leave out a sync, and APAR's tags cost fewer tokens.
    """
    tokenizer = almanac.load_tokenizer()

    def steps(task: almanac.Task, program: Program) -> int:
        threads = threads_of(layout_example(tokenizer, task.prompt, program))
        return critical_path(threads, tokenizer.vocabulary)

    def speedup(task: almanac.Task) -> float:
        exact = almanac.annotate_exactly(task, lambda text: len(tokenizer.encode(text)))
        return steps(task, Program((Text(almanac.plain(task)),))) / steps(task, exact)

    return geometric_mean([speedup(task) for task in almanac.evaluation_tasks(prompts)])
