"""The work of a reproduction, in cells that are each done once.

WORKDIR/base                    the base model that all others start from, as in the paper
        seed-0/NAME             the models of a seed; bon-4/round-1, round-2
        seed-0/answers/         their answers; those of the main comparison are timed in turns
        cells/NAME.json         written when a cell is finished: its seconds
        configs.json            the configurations that all of it was made from
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pasta_jax.config import Config, ConfigError
from pasta_jax.files import Stamp
from pasta_jax.overrides import load_config
from pasta_jax.verbs import config_file

POSITIONS = {"Pred-1X": ("pred", 1), "Const-40": ("const", 40), "Shared": ("shared", 0)}
"""The position schemes besides Pred-10X that need no oracle when decoding: scheme and unit."""

SFT = {"baseline": 145, "pasta": 145, "apar": 145, "sot": 145}
"""The finetuned models, and the seconds that each takes."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is done.

    Attributes:
      seeds: of finetuning and sampling; there is one base model.
      weights: the lambdas.
      rounds: of preference optimization.
      timed: number of prompts whose decodes are timed, all systems taking turns.
      counted: number of prompts of answers that are not timed.
      positions: the position schemes to ablate, names in POSITIONS.
      efficiencies: the efficiency terms to ablate, besides the speedup.
      efficiency_weights: the lambdas of that ablation.
      adapt: applied to every configuration, so that a test can train smaller models.
    """

    seeds: tuple[int, ...]
    weights: tuple[float, ...]
    rounds: int
    timed: int
    counted: int
    positions: tuple[str, ...] = ()
    efficiencies: tuple[str, ...] = ()
    efficiency_weights: tuple[float, ...] = ()
    adapt: Callable[[Config], Config] = lambda config: config

    def config(self, variant: str, *settings: str) -> Config:
        """A variant of configs/tiny.py."""
        return self.adapt(load_config(f"{config_file('tiny.py')}:{variant}", settings))

    def configs(self) -> dict[str, Config]:
        """The configurations that a reproduction is made from, by variant."""
        return {variant: self.config(variant) for variant in ("base", *SFT, "preference")}


QUICK = Plan((0,), (1.0, 4.0, math.inf), rounds=2, timed=140, counted=140)
FULL = Plan(
    seeds=(0, 1, 2),
    weights=(1.0, 2.0, 4.0, 8.0, math.inf),
    rounds=2,
    timed=210,
    counted=210,
    positions=tuple(POSITIONS),
    efficiencies=("harmonic", "arithmetic", "parallelism"),
    efficiency_weights=(1.0, 4.0),
)


@dataclasses.dataclass(frozen=True)
class Cell:
    """A part of the work that is done once.

    Attributes:
      name: of the file that records that it is done.
      seconds: its approximate time on two cores (EPYC, AVX-512), to announce how long a run will take.
      run: does the work; an earlier call may have been interrupted.
    """

    name: str
    seconds: int
    run: Callable[[], None]


@dataclasses.dataclass(frozen=True)
class Paths:
    """The paths of a reproduction."""

    root: str

    @property
    def base(self) -> str:
        return os.path.join(self.root, "base")

    def model(self, seed: int, name: str) -> str:
        return os.path.join(self.root, f"seed-{seed}", name)

    def first_round(self, seed: int, weight: float) -> str:
        return os.path.join(self.model(seed, bon(weight)), "round-1")

    def timed(self, seed: int, plan: Plan) -> str:
        """The folder of timed answers. It names the plan, because a quick and a full one may share a workdir."""
        return os.path.join(self.root, f"seed-{seed}", "answers", f"timed-{len(plan.weights)}-{plan.timed}")

    def counted(self, seed: int, plan: Plan) -> str:
        """The folder of answers that are not timed."""
        return os.path.join(self.root, f"seed-{seed}", "answers", f"counted-{plan.counted}")

    def record(self, cell: str) -> str:
        """The file that says that a cell is finished."""
        return os.path.join(self.root, "cells", f"{cell}.json")


def bon(weight: float, efficiency: str = "speedup") -> str:
    """The name of a model of preference optimization.

    >>> bon(4.0), bon(math.inf, "harmonic")
    ('bon-4', 'bon-inf-harmonic')
    """
    return f"bon-{weight:g}" + ("" if efficiency == "speedup" else f"-{efficiency}")


def seconds(folder: Paths, cell: Cell) -> float | None:
    """The seconds that a finished cell took; None if it is not finished."""
    with contextlib.suppress(FileNotFoundError), open(folder.record(cell.name), encoding="utf-8") as file:
        return float(json.load(file)["seconds"])
    return None


def cells(plan: Plan, workdir: str) -> Iterator[Cell]:
    """All the work, in order."""
    folder = Paths(workdir)
    yield Cell("base", 240, lambda: _train(plan.config("base"), folder.base))
    for seed in plan.seeds:
        yield from _seed_cells(plan, folder, seed)
    seed = plan.seeds[0]
    for scheme in plan.positions:
        run = functools.partial(_ablate_positions, plan, folder, seed, scheme)
        yield Cell(f"positions-{scheme}", 150, run)
    for efficiency in plan.efficiencies:
        for weight in plan.efficiency_weights:
            run = functools.partial(_ablate_efficiency, plan, folder, seed, weight, efficiency)
            yield Cell(f"efficiency-{bon(weight, efficiency)}", 30, run)


def _seed_cells(plan: Plan, folder: Paths, seed: int) -> Iterator[Cell]:
    def cell(name: str, seconds: int, function: Callable[..., None], *arguments: Any) -> Cell:
        run = functools.partial(function, plan, folder, seed, *arguments)
        return Cell(f"seed-{seed}-{name}", seconds, run)

    for name, duration in SFT.items():
        yield cell(name, duration, _finetune, name)
    yield cell("samples", 60, _sample)
    for weight in plan.weights:
        yield cell(bon(weight), 20 + 50 * (plan.rounds - 1), _prefer, weight, plan.rounds)
    systems = 4 + len(plan.weights)
    yield cell(f"timed-{systems}-{plan.timed}", 5 * systems + plan.timed * systems // 15, _time)
    if plan.rounds > 1:
        models = {f"{bon(weight)}-round-1": folder.first_round(seed, weight) for weight in plan.weights}
        yield cell(f"counted-{len(models)}-{plan.counted}", 10 + 6 * len(models), _count, models)


def _train(config: Config, workdir: str) -> None:
    from pasta_jax import train

    train.run(config, workdir)


def _finetune(plan: Plan, folder: Paths, seed: int, name: str) -> None:
    _train(plan.config(name, f"init_from={folder.base}", f"seed={seed}"), folder.model(seed, name))


def _preference(
    plan: Plan, folder: Paths, seed: int, weight: float, rounds: int, efficiency: str = "speedup"
) -> Config:
    return plan.config(
        "preference",
        f"init_from={folder.model(seed, 'pasta')}",
        f"preference.baseline={folder.model(seed, 'baseline')}",
        f"preference.quality_weight={weight}",
        f"preference.rounds={rounds}",
        f"preference.efficiency={efficiency}",
        f"seed={seed}",
    )


def _sample(plan: Plan, folder: Paths, seed: int) -> None:
    """The samples of the first round. All lambdas share them: they are drawn from the same policy."""
    from pasta_jax.loading import load
    from pasta_jax.preference import rounds

    workdir = folder.model(seed, "samples")
    os.makedirs(workdir, exist_ok=True)
    stamp, sources = _sources(folder, seed)
    if stamp.check(sources):  # of an interrupted run, or of other models
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(workdir, "samples.jsonl"))
        stamp.write(sources)
    policy, baseline = (load(folder.model(seed, name)) for name in ("pasta", "baseline"))
    rounds.draw(_preference(plan, folder, seed, 1.0, 1), 1, policy, baseline, workdir)


def _sources(folder: Paths, seed: int) -> tuple[Stamp, dict[str, Any]]:
    """The stamp of a seed's samples, and the models that they must be of."""
    from pasta_jax.checkpoints.about import checkpoint_identity

    stamp = Stamp(os.path.join(folder.model(seed, "samples"), "about.json"))
    return stamp, {name: checkpoint_identity(folder.model(seed, name)) for name in ("pasta", "baseline")}


def _prefer(
    plan: Plan, folder: Paths, seed: int, weight: float, rounds: int, efficiency: str = "speedup"
) -> None:
    samples, workdir = folder.model(seed, "samples"), folder.model(seed, bon(weight, efficiency))
    stamp, sources = _sources(folder, seed)
    if stamp.check(sources):
        record = folder.record(f"seed-{seed}-samples")
        raise ConfigError(f"{samples} was sampled from other models. Remove {record} and run again.")
    first = os.path.join(workdir, "round-1")
    if not os.path.exists(os.path.join(first, "samples.jsonl")):
        os.makedirs(first, exist_ok=True)
        shutil.copy(os.path.join(samples, "samples.jsonl"), first)
    _train(_preference(plan, folder, seed, weight, rounds, efficiency), workdir)


def _time(plan: Plan, folder: Paths, seed: int) -> None:
    """All the systems of the main comparison, taking turns at each prompt."""
    from pasta_jax.checkpoints.about import checkpoint_identity
    from pasta_jax.decoding.engine import Decoder
    from pasta_jax.evaluate.systems import LIMITS, decoding, evaluate, skeleton_of_thought
    from pasta_jax.loading import load

    baseline = load(folder.model(seed, "baseline"))
    engine = Decoder(baseline, limits=LIMITS)  # similar models share its compiled programs
    systems = {"baseline": decoding(baseline, like=engine)}
    for name in ("pasta", *map(bon, plan.weights)):
        systems[name] = decoding(load(folder.model(seed, name)), like=engine)
    systems["apar"] = decoding(load(folder.model(seed, "apar")))
    systems["sot"] = skeleton_of_thought(load(folder.model(seed, "sot")))
    about = {name: checkpoint_identity(folder.model(seed, name)) for name in systems}
    evaluate(systems, plan.timed, folder.timed(seed, plan), about)


def _count(plan: Plan, folder: Paths, seed: int, models: Mapping[str, str]) -> None:
    """Answers of models that need no timing, by name and workdir; they are compared with the timed baseline."""
    from pasta_jax.data import almanac
    from pasta_jax.evaluate.systems import answer_at_once, batched_decoder, write_answers
    from pasta_jax.loading import load

    tasks, engine = almanac.evaluation_tasks(plan.counted), None
    answers = folder.counted(seed, plan)
    os.makedirs(answers, exist_ok=True)
    for name, workdir in models.items():
        model = load(workdir)
        engine = engine.for_model(model) if engine else batched_decoder(model)
        write_answers(os.path.join(answers, f"{name}.jsonl"), answer_at_once(model, tasks, like=engine))


def _ablate_positions(plan: Plan, folder: Paths, seed: int, scheme: str) -> None:
    kind, unit = POSITIONS[scheme]
    workdir = folder.model(seed, f"positions-{scheme}")
    settings = (f"seed={seed}", f"data.positions.scheme={kind}", f"data.positions.unit={unit}")
    _train(plan.config("pasta", f"init_from={folder.base}", *settings), workdir)
    _count(plan, folder, seed, {scheme: workdir})


def _ablate_efficiency(plan: Plan, folder: Paths, seed: int, weight: float, efficiency: str) -> None:
    _prefer(plan, folder, seed, weight, 1, efficiency)
    name = bon(weight, efficiency)
    _count(plan, folder, seed, {name: folder.model(seed, name)})
