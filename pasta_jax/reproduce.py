"""What the paper claims, tried on Almanac: PASTA, its rivals and its ablations from one base model.

    python -m pasta_jax.reproduce [--quick] [--workdir=runs/reproduce]

Trains and evaluates, with three seeds, Baseline-SFT, PASTA-SFT, PASTA-BoN for several lambdas over two rounds,
APAR and Skeleton-of-Thought, then the ablations, and writes report.md, report.html, results.json and figures.
The work is cut into cells; one that is finished is never done again, so the same command goes on where it was
cut off. --quick does one seed, three lambdas and fewer prompts, and no ablation that needs a model of its own.

    WORKDIR/base                    one base model for all, as in the paper
            seed-0/NAME             the models of a seed; bon-4/round-1, round-2
            seed-0/answers/         what each of them answered, those of a comparison timed side by side
            cells/NAME.json         written when a cell is finished: its seconds
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from pasta_jax.config import Config, load_config
from pasta_jax.evaluation import Answer
from pasta_jax.verbs import refuse, show_log

LOG = logging.getLogger("pasta_jax")

CONFIGS = Path(__file__).parent.parent / "configs"
TINY, PREFERENCE = CONFIGS / "tiny.py", CONFIGS / "tiny_preference.py"

POSITIONS = {
    "Pred-1X": ("pred", 1),
    "Const-40": ("const", 40),
    "Shared": ("shared", 0),
}
"""Position schemes beside Pred-10X that need no oracle when decoding."""

EFFICIENCIES = ("harmonic", "arithmetic", "parallelism")
"""Efficiency terms beside the speedup."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is done.

    Attributes:
      seeds: of finetuning and sampling; the base model is one.
      weights: lambdas.
      rounds: of preference optimisation.
      timed: prompts whose decodes are timed, all systems taking turns.
      counted: prompts of answers that are not timed.
      ablations: whether models are trained for the ablations of positions and of the efficiency term.
    """

    seeds: tuple[int, ...]
    weights: tuple[float, ...]
    rounds: int
    timed: int
    counted: int
    ablations: bool


FULL = Plan((0, 1, 2), (1.0, 2.0, 4.0, 8.0, math.inf), rounds=2, timed=350, counted=350, ablations=True)
QUICK = Plan((0,), (1.0, 4.0, math.inf), rounds=2, timed=140, counted=140, ablations=False)


@dataclasses.dataclass(frozen=True)
class Cell:
    """A part of the work that is done once.

    Attributes:
      name: of the file that says that it is done.
      seconds: what it takes on two cores (Xeon, AVX-512), as measured.
      run: does it; may have been cut off before.
    """

    name: str
    seconds: int
    run: Callable[[], None]


# ---------------------------------------------------------------------------------------------------- cells


def cells(plan: Plan, workdir: str) -> Iterator[Cell]:
    """All the work, in order."""
    here = Folder(workdir)
    yield Cell("base", 320, lambda: _train(_tiny("base"), here.base))
    for seed in plan.seeds:
        yield from _seed_cells(plan, here, seed)
    if plan.ablations:
        yield from _ablation_cells(plan, here, plan.seeds[0])


@dataclasses.dataclass(frozen=True)
class Folder:
    """Where what is."""

    root: str

    @property
    def base(self) -> str:
        return os.path.join(self.root, "base")

    def model(self, seed: int, name: str) -> str:
        return os.path.join(self.root, f"seed-{seed}", name)

    def answers(self, seed: int, kind: str) -> str:
        return os.path.join(self.root, f"seed-{seed}", "answers", kind)


SFT = {"baseline": 50, "pasta": 130, "apar": 110, "sot": 50}
"""Finetuned models, and the seconds that each takes."""


def bon(weight: float, efficiency: str = "speedup") -> str:
    """The name of a model of preference optimisation.

    >>> bon(4.0), bon(math.inf, "harmonic")
    ('bon-4', 'bon-inf-harmonic')
    """
    return f"bon-{weight:g}" + ("" if efficiency == "speedup" else f"-{efficiency}")


def _seed_cells(plan: Plan, here: Folder, seed: int) -> Iterator[Cell]:
    def cell(name: str, seconds: int, run: Callable[[], None]) -> Cell:
        return Cell(f"seed-{seed}-{name}", seconds, run)

    for name, seconds in SFT.items():
        yield cell(name, seconds, lambda name=name: _finetune(here, seed, name))
    yield cell("samples", 60, lambda: _sample(here, seed))
    for weight in plan.weights:
        yield cell(
            bon(weight), 25 + 85 * (plan.rounds - 1), lambda w=weight: _prefer(here, seed, w, plan.rounds)
        )
    systems = 4 + len(plan.weights)
    yield cell("timed", 30 * systems + plan.timed * systems // 8, lambda: _time(plan, here, seed))
    if plan.rounds > 1:
        first = {f"{bon(w)}-round-1": os.path.join(here.model(seed, bon(w)), "round-1") for w in plan.weights}
        yield cell("counted", 20 + 12 * len(first), lambda: _count(plan, here, seed, first))


def _ablation_cells(plan: Plan, here: Folder, seed: int) -> Iterator[Cell]:
    for name, (scheme, unit) in POSITIONS.items():
        wishes = [f"data.positions.scheme={scheme}", f"data.positions.unit={unit}"]
        model = {name: here.model(seed, f"positions-{name}")}
        run = lambda model=model, name=name, wishes=wishes: (  # noqa: E731
            _train(_tiny("pasta", f"init_from={here.base}", f"seed={seed}", *wishes), model[name]),
            _count(plan, here, seed, model),
        )
        yield Cell(f"positions-{name}", 150, run)
    for efficiency in EFFICIENCIES:
        for weight in plan.weights:
            name = bon(weight, efficiency)
            run = lambda name=name, weight=weight, efficiency=efficiency: (  # noqa: E731
                _prefer(here, seed, weight, 1, efficiency),
                _count(plan, here, seed, {name: here.model(seed, name)}),
            )
            yield Cell(f"efficiency-{name}", 40, run)


def _tiny(variant: str, *wishes: str) -> Config:
    return load_config(f"{TINY}:{variant}", wishes)


def _preference(here: Folder, seed: int, weight: float, rounds: int, efficiency: str = "speedup") -> Config:
    return load_config(
        str(PREFERENCE),
        [
            f"init_from={here.model(seed, 'pasta')}",
            f"preference.baseline={here.model(seed, 'baseline')}",
            f"preference.weight={weight}",
            f"preference.rounds={rounds}",
            f"preference.efficiency={efficiency}",
            f"seed={seed}",
        ],
    )


def _train(config: Config, workdir: str) -> None:
    from pasta_jax import train

    train.run(config, workdir)


def _finetune(here: Folder, seed: int, name: str) -> None:
    _train(_tiny(name, f"init_from={here.base}", f"seed={seed}"), here.model(seed, name))


def _sample(here: Folder, seed: int) -> None:
    """The samples of the first round, which all lambdas share: it is the same policy that draws them."""
    from pasta_jax.preference import rounds

    rounds.draw(_preference(here, seed, 1.0, 1), 1, here.model(seed, "pasta"), here.model(seed, "samples"))


def _prefer(here: Folder, seed: int, weight: float, count: int, efficiency: str = "speedup") -> None:
    workdir = here.model(seed, bon(weight, efficiency))
    first = os.path.join(workdir, "round-1")
    if not os.path.exists(os.path.join(first, "samples.jsonl")):
        os.makedirs(first, exist_ok=True)
        shutil.copy(os.path.join(here.model(seed, "samples"), "samples.jsonl"), first)
    _train(_preference(here, seed, weight, count, efficiency), workdir)


def _time(plan: Plan, here: Folder, seed: int) -> None:
    """All the systems of the main comparison, taking turns at each prompt."""
    from pasta_jax.decoding.engine import Decoder
    from pasta_jax.evaluation import LIMITS, decoding, evaluate, skeleton_of_thought
    from pasta_jax.loading import load

    baseline = load(here.model(seed, "baseline"))
    engine = Decoder(baseline, limits=LIMITS)  # models that are alike share what is compiled
    systems = {"baseline": decoding(baseline, like=engine)}
    for name in ("pasta", *map(bon, plan.weights)):
        systems[name] = decoding(load(here.model(seed, name)), like=engine)
    systems["apar"] = decoding(load(here.model(seed, "apar")))
    systems["sot"] = skeleton_of_thought(load(here.model(seed, "sot")))
    evaluate(systems, plan.timed, here.answers(seed, "timed"), {"seed": seed, "systems": [*systems]})


def _count(plan: Plan, here: Folder, seed: int, models: Mapping[str, str]) -> None:
    """Answers of models that need not be timed; the baseline's are those that were."""
    from pasta_jax.data import almanac
    from pasta_jax.evaluation import answer_at_once, batched_decoder, write_answers
    from pasta_jax.loading import load

    tasks, engine = almanac.evaluation_tasks(plan.counted), None
    os.makedirs(here.answers(seed, "counted"), exist_ok=True)
    for name, workdir in models.items():
        model = load(workdir)
        engine = engine.for_model(model) if engine else batched_decoder(model)
        path = os.path.join(here.answers(seed, "counted"), f"{name}.jsonl")
        write_answers(path, answer_at_once(model, tasks, like=engine))


# -------------------------------------------------------------------------------------------------- results


@dataclasses.dataclass(frozen=True)
class Found:
    """Answers of one model a seed, beside the baseline's of that seed: [seeds][prompts]."""

    baseline: list[list[Answer]]
    test: list[list[Answer]]

    def table(self) -> dict[str, np.ndarray]:
        """Every measure of every answer, float64 [seeds, prompts]; speeds as logarithms."""
        from pasta_jax.evaluation import parallelism, realized, theoretical, win

        def each(measure: Callable[[Answer, Answer], float]) -> np.ndarray:
            return np.array(
                [
                    [measure(b, t) for b, t in zip(*both)]
                    for both in zip(self.baseline, self.test, strict=True)
                ]
            )

        measures = {
            "win_rate": each(win),
            "truth": each(lambda b, t: t.truth),
            "theoretical": np.log(each(theoretical)),
            "parallelism": np.log(each(lambda b, t: parallelism(t))),
            "promises": each(lambda b, t: t.promises),
            "promised": each(lambda b, t: t.promises > 0),
            "synced": each(lambda b, t: t.syncs > 0),
        }
        if all(t.wall_s for answers in self.test for t in answers):
            measures["realized"] = np.log(each(realized))
        return measures


SPEEDS = ("theoretical", "parallelism", "realized")


def estimate(values: np.ndarray, name: str, draws: int = 2000) -> Any:
    """Mean and 95 % interval of a measure [seeds, prompts]; a geometric mean for speeds.

    A bootstrap over prompts and seeds: prompts are drawn anew with all their seeds, and seeds anew for each
    draw where there are several.
    """
    from pasta_jax.reports.results import Estimate

    rng = np.random.default_rng(0)
    seeds, prompts = values.shape
    means = np.empty(draws)
    for i in range(draws):
        rows = rng.integers(seeds, size=seeds)
        means[i] = values[rows][:, rng.integers(prompts, size=prompts)].mean()
    low, high = np.quantile(means, [0.025, 0.975])
    scale = np.exp if name in SPEEDS else float
    return Estimate(*(float(scale(x)) for x in (values.mean(), low, high)))


def results(plan: Plan, workdir: str) -> list[Any]:
    """All that was measured, as the report shows it."""
    from pasta_jax.evaluation import read_answers

    here = Folder(workdir)

    def timed(seed: int, name: str) -> list[Answer]:
        return read_answers(os.path.join(here.answers(seed, "timed"), f"{name}.jsonl"))

    def counted(seed: int, name: str) -> list[Answer]:
        return read_answers(os.path.join(here.answers(seed, "counted"), f"{name}.jsonl"))

    baseline = [timed(seed, "baseline") for seed in plan.seeds]
    found = [_result("Baseline-SFT", "Baseline-SFT", Found(baseline, baseline))]
    for name, method in (("pasta", "PASTA-SFT"), ("apar", "APAR"), ("sot", "SoT")):
        found.append(_result(method, method, Found(baseline, [timed(seed, name) for seed in plan.seeds])))
    for weight in plan.weights:
        named = f"PASTA-BoN-{weight:g}"
        answers = [timed(seed, bon(weight)) for seed in plan.seeds]
        found.append(_result(named, "PASTA-BoN", Found(baseline, answers), weight, plan.rounds))
        if plan.rounds > 1:
            first = [counted(seed, f"{bon(weight)}-round-1") for seed in plan.seeds]
            found.append(_result(f"{named}, round 1", "PASTA-BoN", Found(baseline, first), weight, 1))
    if plan.ablations:
        seed = plan.seeds[0]
        for name in POSITIONS:
            one = Found(baseline[:1], [counted(seed, name)])
            found.append(_result(f"PASTA-SFT, {name}", "PASTA-SFT", one, positions=name))
        for efficiency in EFFICIENCIES:
            for weight in plan.weights:
                one = Found(baseline[:1], [counted(seed, bon(weight, efficiency))])
                named = f"PASTA-BoN-{weight:g}, {efficiency}"
                found.append(_result(named, "PASTA-BoN", one, weight, 1, efficiency=efficiency))
    return found


def _result(
    name: str, method: str, found: Found, weight: float | None = None, round: int = 0, **labels: str
) -> Any:
    from pasta_jax.reports.results import Result

    table = found.table()
    kinds = np.array([answer.family for answer in found.baseline[0]])
    families = {}
    for family in dict.fromkeys(kinds.tolist()):
        means = {key: float(values[:, kinds == family].mean()) for key, values in table.items()}
        families[family] = {k: math.exp(v) if k in SPEEDS else v for k, v in means.items()}
    return Result(
        name=name,
        method=method,
        seeds=len(found.test),
        prompts=len(kinds),
        weight=weight,
        round=round,
        realized=estimate(table["realized"], "realized") if "realized" in table else None,
        families=families,
        **{key: estimate(table[key], key) for key in ("win_rate", "truth", "theoretical", "parallelism")},
        **labels,
    )
