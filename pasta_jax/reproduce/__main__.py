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
            configs.json            what all of it is of
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
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

from absl import app, flags

from pasta_jax.checkpoints.about import CheckpointError
from pasta_jax.config import Config, ConfigError
from pasta_jax.evaluate.systems import Measured, read_answers
from pasta_jax.files import replacing
from pasta_jax.overrides import load_config, to_dict
from pasta_jax.reproduce.claims import claims
from pasta_jax.reproduce.measures import Found, exact_speedup, measured
from pasta_jax.reproduce.results import Result
from pasta_jax.verbs import refuse, show_log

LOG = logging.getLogger("pasta_jax")

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = CONFIGS / "tiny.py"

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
      ablated: lambdas of the ablation of the efficiency term, finite ones; without any, positions are not ablated
        either.
    """

    seeds: tuple[int, ...]
    weights: tuple[float, ...]
    rounds: int
    timed: int
    counted: int
    ablated: tuple[float, ...]


FULL = Plan((0, 1, 2), (1.0, 2.0, 4.0, 8.0, math.inf), rounds=2, timed=210, counted=210, ablated=(1.0, 4.0))
QUICK = Plan((0,), (1.0, 4.0, math.inf), rounds=2, timed=140, counted=140, ablated=())


@dataclasses.dataclass(frozen=True)
class Cell:
    """A part of the work that is done once.

    Attributes:
      name: of the file that says that it is done.
      seconds: about what it takes on two cores (EPYC, AVX-512), to say beforehand how long a run will take.
      run: does it; may have been cut off before.
    """

    name: str
    seconds: int
    run: Callable[[], None]


# ---------------------------------------------------------------------------------------------------- cells


def cells(plan: Plan, workdir: str) -> Iterator[Cell]:
    """All the work, in order."""
    here = Folder(workdir)
    yield Cell("base", 240, lambda: _train(_tiny("base"), here.base))
    for seed in plan.seeds:
        yield from _seed_cells(plan, here, seed)
    if plan.ablated:
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


SFT = {"baseline": 145, "pasta": 145, "apar": 145, "sot": 145}
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
        yield cell(name, seconds, functools.partial(_finetune, here, seed, name))
    yield cell("samples", 60, functools.partial(_sample, here, seed))
    for weight in plan.weights:
        run = functools.partial(_prefer, here, seed, weight, plan.rounds)
        yield cell(bon(weight), 20 + 50 * (plan.rounds - 1), run)
    systems = 4 + len(plan.weights)
    yield cell(
        f"timed-{systems}-{plan.timed}",
        5 * systems + plan.timed * systems // 15,
        functools.partial(_time, plan, here, seed),
    )
    if plan.rounds > 1:
        first = {f"{bon(w)}-round-1": os.path.join(here.model(seed, bon(w)), "round-1") for w in plan.weights}
        yield cell(
            f"counted-{len(first)}-{plan.counted}",
            10 + 6 * len(first),
            functools.partial(_count, plan, here, seed, first),
        )


def _ablation_cells(plan: Plan, here: Folder, seed: int) -> Iterator[Cell]:
    for scheme in POSITIONS:
        yield Cell(f"positions-{scheme}", 150, functools.partial(_ablate_positions, plan, here, seed, scheme))
    for efficiency in EFFICIENCIES:
        for weight in plan.ablated:
            run = functools.partial(_ablate_efficiency, plan, here, seed, weight, efficiency)
            yield Cell(f"efficiency-{bon(weight, efficiency)}", 30, run)


def _ablate_positions(plan: Plan, here: Folder, seed: int, scheme: str) -> None:
    kind, unit = POSITIONS[scheme]
    workdir = here.model(seed, f"positions-{scheme}")
    wishes = (f"seed={seed}", f"data.positions.scheme={kind}", f"data.positions.unit={unit}")
    _train(_tiny("pasta", f"init_from={here.base}", *wishes), workdir)
    _count(plan, here, seed, {scheme: workdir})


def _ablate_efficiency(plan: Plan, here: Folder, seed: int, weight: float, efficiency: str) -> None:
    _prefer(here, seed, weight, 1, efficiency)
    name = bon(weight, efficiency)
    _count(plan, here, seed, {name: here.model(seed, name)})


def _tiny(variant: str, *wishes: str) -> Config:
    return load_config(f"{TINY}:{variant}", wishes)


def _preference(here: Folder, seed: int, weight: float, rounds: int, efficiency: str = "speedup") -> Config:
    return load_config(
        f"{TINY}:preference",
        [
            f"init_from={here.model(seed, 'pasta')}",
            f"preference.baseline={here.model(seed, 'baseline')}",
            f"preference.quality_weight={weight}",
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
    from pasta_jax.loading import load
    from pasta_jax.preference import rounds

    folder = here.model(seed, "samples")
    os.makedirs(folder, exist_ok=True)
    if _drawn_by(folder) != (marks := _drawers(here, seed)):  # of a run that was cut off, or of other models
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(folder, "samples.jsonl"))
        with replacing(os.path.join(folder, "about.json")) as file:
            json.dump(marks, file)
    policy, baseline = (load(here.model(seed, name)) for name in ("pasta", "baseline"))
    rounds.draw(_preference(here, seed, 1.0, 1), 1, policy, baseline, folder)


def _drawers(here: Folder, seed: int) -> dict[str, Any]:
    """The models whose answers the samples are, as marks that JSON can hold."""
    from pasta_jax.checkpoints.about import checkpoint_mark

    marks = {name: checkpoint_mark(here.model(seed, name)) for name in ("pasta", "baseline")}
    return dict(json.loads(json.dumps(marks)))


def _drawn_by(folder: str) -> Any:
    """Those of the samples that are there; None without any."""
    with contextlib.suppress(OSError, ValueError), open(os.path.join(folder, "about.json")) as file:
        return json.load(file)
    return None


def _prefer(here: Folder, seed: int, weight: float, count: int, efficiency: str = "speedup") -> None:
    workdir, samples = here.model(seed, bon(weight, efficiency)), here.model(seed, "samples")
    if _drawn_by(samples) != _drawers(here, seed):
        mark = os.path.join(here.root, "cells", f"seed-{seed}-samples.json")
        raise ConfigError(f"{samples} is of other models than there are now. Remove {mark} and run again.")
    first = os.path.join(workdir, "round-1")
    if not os.path.exists(os.path.join(first, "samples.jsonl")):
        os.makedirs(first, exist_ok=True)
        shutil.copy(os.path.join(samples, "samples.jsonl"), first)
    _train(_preference(here, seed, weight, count, efficiency), workdir)


def _time(plan: Plan, here: Folder, seed: int) -> None:
    """All the systems of the main comparison, taking turns at each prompt."""
    from pasta_jax.checkpoints.about import checkpoint_mark
    from pasta_jax.decoding.engine import Decoder
    from pasta_jax.evaluate.systems import LIMITS, decoding, evaluate, skeleton_of_thought
    from pasta_jax.loading import load

    baseline = load(here.model(seed, "baseline"))
    engine = Decoder(baseline, limits=LIMITS)  # models that are alike share what is compiled
    systems = {"baseline": decoding(baseline, like=engine)}
    for name in ("pasta", *map(bon, plan.weights)):
        systems[name] = decoding(load(here.model(seed, name)), like=engine)
    systems["apar"] = decoding(load(here.model(seed, "apar")))
    systems["sot"] = skeleton_of_thought(load(here.model(seed, "sot")))
    about = {name: checkpoint_mark(here.model(seed, name)) for name in systems}
    evaluate(systems, plan.timed, here.answers(seed, _timed(plan)), about)


def _timed(plan: Plan) -> str:
    """The folder of a plan's timed answers: a quick plan and a full one may share a workdir."""
    return f"timed-{len(plan.weights)}-{plan.timed}"


def _count(plan: Plan, here: Folder, seed: int, models: Mapping[str, str]) -> None:
    """Answers of models that need not be timed; the baseline's are those that were."""
    from pasta_jax.data import almanac
    from pasta_jax.evaluate.systems import answer_at_once, batched_decoder, write_answers
    from pasta_jax.loading import load

    tasks, engine = almanac.evaluation_tasks(plan.counted), None
    folder = here.answers(seed, f"counted-{plan.counted}")
    os.makedirs(folder, exist_ok=True)
    for name, workdir in models.items():
        model = load(workdir)
        engine = engine.for_model(model) if engine else batched_decoder(model)
        write_answers(os.path.join(folder, f"{name}.jsonl"), answer_at_once(model, tasks, like=engine))


# -------------------------------------------------------------------------------------------------- results


def results(plan: Plan, workdir: str) -> list[Result]:
    """All that was measured, as the report shows it."""
    here = Folder(workdir)

    def timed(seed: int, name: str) -> list[Measured]:
        return read_answers(os.path.join(here.answers(seed, _timed(plan)), f"{name}.jsonl"))

    def counted(seed: int, name: str) -> list[Measured]:
        return read_answers(os.path.join(here.answers(seed, f"counted-{plan.counted}"), f"{name}.jsonl"))

    baseline = [timed(seed, "baseline") for seed in plan.seeds]
    found = [measured("Baseline-SFT", "Baseline-SFT", Found(baseline, baseline))]
    others = {
        method: Found(baseline, [timed(seed, name) for seed in plan.seeds])
        for name, method in (("pasta", "PASTA-SFT"), ("apar", "APAR"), ("sot", "SoT"))
    }
    found += [measured(method, method, answers) for method, answers in others.items()]
    rivals = {name: others[name] for name in ("APAR", "SoT")}
    for weight in plan.weights:
        named = f"PASTA-BoN-{weight:g}"
        answers = [timed(seed, bon(weight)) for seed in plan.seeds]
        found.append(
            measured(named, "PASTA-BoN", Found(baseline, answers), weight, plan.rounds, rivals=rivals)
        )
        if plan.rounds > 1:
            first = [counted(seed, f"{bon(weight)}-round-1") for seed in plan.seeds]
            found.append(measured(f"{named}, round 1", "PASTA-BoN", Found(baseline, first), weight, 1))
    if plan.ablated:
        seed = plan.seeds[0]
        for name in POSITIONS:
            one = Found(baseline[:1], [counted(seed, name)])
            found.append(measured(f"PASTA-SFT, {name}", "PASTA-SFT", one, positions=name))
        for efficiency in EFFICIENCIES:
            for weight in plan.ablated:
                one = Found(baseline[:1], [counted(seed, bon(weight, efficiency))])
                named = f"PASTA-BoN-{weight:g}, {efficiency}"
                found.append(measured(named, "PASTA-BoN", one, weight, 1, efficiency=efficiency))
    return found


# ----------------------------------------------------------------------------------------------------- verb


def write(plan: Plan, workdir: str, about: Mapping[str, Any]) -> None:
    """results.json, figures, report.md and report.html from the answers in `workdir`."""
    from pasta_jax.reproduce import page, plots

    found, exact = results(plan, workdir), exact_speedup(plan.timed)
    with replacing(os.path.join(workdir, "results.json")) as file:
        rows = [dataclasses.asdict(result) for result in found]
        for row in rows:
            row["weight"] = "inf" if row["weight"] == math.inf else row["weight"]  # JSON has no infinity
        tree = {"about": about, "exact_annotations": exact, "results": rows}
        json.dump(tree, file, indent=1, allow_nan=False)
    figures = [
        ("frontier", plots.frontier, "Quality against speed; the paper's Figure 4."),
        ("rounds", plots.rounds, "Rounds of preference optimisation; the paper's Figure 5."),
        ("families", plots.families, "Families of prompts."),
    ]
    if plan.ablated:
        figures[2:2] = [
            ("positions", plots.positions, "Position schemes, PASTA-SFT; the paper's Figure 6."),
            ("efficiency", plots.efficiency_terms, "Efficiency terms, one round; the paper's Figure 8."),
        ]
    paths = []
    for name, draw, caption in figures:
        paths.append((os.path.join(workdir, f"{name}.png"), caption))
        draw(found, paths[-1][0])
    page.write_report(workdir, about, found, claims(found, exact), paths)


def run(plan: Plan, workdir: str) -> None:
    """All cells that are not finished.

    Raises:
      ConfigError: `workdir` was begun with other configurations.
    """
    _check_same(workdir)
    todo = [*cells(plan, workdir)]
    done = {cell.name: seconds for cell in todo if (seconds := _seconds(workdir, cell)) is not None}
    left = sum(cell.seconds for cell in todo if cell.name not in done)
    total = sum(cell.seconds for cell in todo)
    print(
        f"{len(todo)} cells, about {total / 60:.0f} minutes on two cores; "
        f"{len(done)} are done, about {left / 60:.0f} minutes are left.",
        file=sys.stderr,
        flush=True,
    )
    for number, cell in enumerate(todo, start=1):
        if cell.name in done:
            continue
        LOG.info(
            "Cell %d of %d: %s (about %d s; about %.0f min left)",
            number,
            len(todo),
            cell.name,
            cell.seconds,
            left / 60,
        )
        begun = time.monotonic()
        cell.run()
        left -= cell.seconds
        os.makedirs(os.path.join(workdir, "cells"), exist_ok=True)
        with replacing(_mark(workdir, cell)) as file:
            json.dump({"seconds": round(time.monotonic() - begun, 1)}, file)


def _check_same(workdir: str) -> None:
    """Keeps the configurations beside what is made with them; what others left is not mixed in."""
    path = os.path.join(workdir, "configs.json")
    if os.path.isdir(workdir) and (there := {*os.listdir(workdir)}) and not there & {"configs.json", "cells"}:
        raise ConfigError(f"{workdir} holds {min(there)} and more, and no reproduction. Use a new --workdir.")
    trees = {name: to_dict(_tiny(name)) for name in ("base", *SFT)}
    trees["preference"] = to_dict(load_config(f"{TINY}:preference"))
    if os.path.exists(path) or os.path.exists(os.path.join(workdir, "cells")):
        found = {}
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                found = json.load(file)
        changed = [name for name, tree in json.loads(json.dumps(trees)).items() if found.get(name) != tree]
        if changed:
            raise ConfigError(
                f"{workdir} was begun with another configuration ({', '.join(changed)} differ). "
                "Use a new --workdir."
            )
    os.makedirs(workdir, exist_ok=True)
    with replacing(path) as file:
        json.dump(trees, file, indent=1)


def _mark(workdir: str, cell: Cell) -> str:
    return os.path.join(workdir, "cells", f"{cell.name}.json")


def _seconds(workdir: str, cell: Cell) -> float | None:
    """What a finished cell took; None if it is not finished."""
    if not os.path.exists(_mark(workdir, cell)):
        return None
    with open(_mark(workdir, cell), encoding="utf-8") as file:
        return float(json.load(file)["seconds"])


def about_this(plan: Plan, workdir: str) -> dict[str, Any]:
    """Where and how it was run."""
    import jax

    from pasta_jax.checkpoints.about import versions

    seconds = [_seconds(workdir, cell) for cell in cells(plan, workdir)]
    return {
        "command": "python -m pasta_jax.reproduce " + " ".join(sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}; jax on {jax.devices()[0].device_kind}",
        "versions": versions(),
        "seeds": list(plan.seeds),
        "prompts": f"{plan.timed} held out, in turns over seven families; timed at batch 1, second of two runs",
        "intervals": "95 %, bootstrap over prompts"
        + (" and seeds" if len(plan.seeds) > 1 else " of one seed"),
        "base model": "one, of seed 0; seeds are of finetuning and sampling",
        "training": "Baseline-SFT, PASTA-SFT, APAR and SoT: the same base, steps and rate; PASTA-BoN goes on from "
        "PASTA-SFT",
        "engine": "realized: both sides in the same engine of 8 lanes, as in the paper (SoT's points in rows of "
        "one lane, which is faster); a baseline in an engine of one lane is faster on a CPU (docs/performance.md)",
        "chosen beforehand": "kv heads, steps and rate, for PASTA and the baseline; margin, alpha and rate of the "
        "second stage; the annotator's habit: all on evaluation prompts, seed 0 (docs/lab-log.md); nothing for "
        "the rivals",
        "differs from the paper": "N = 8 samples (10), alpha 0.1 (0.005), rate 2e-4 (5e-7), margin 4 nats (not "
        "stated); quality is a ratio of confidences with one added on each side, at most 5, so lambda is not on "
        "the paper's scale; of two answers as true as each other the shorter wins; oracle positions not tried",
        "win rate": "the judge's: higher truth wins, with equal truth the shorter text; a tie counts half",
        "time": f"{sum(filter(None, seconds)) / 60:.0f} minutes; of cells that were cut off, the last session's",
    }


def main(argv: Sequence[str]) -> None:
    """The verb."""
    if len(argv) > 1:
        refuse(f"Cannot make sense of {' '.join(argv[1:])!r}. Add --quick, or nothing.")
    if not TINY.exists():
        refuse("This needs configs/, which is in the repository only. Clone it, and run make reproduce.")
    values = flags.FLAGS
    plan = QUICK if values.quick else FULL
    workdir = values.workdir or ("runs/reproduce-quick" if values.quick else "runs/reproduce")
    whole = os.path.abspath(
        workdir
    )  # models know each other by path: another spelling would be another model
    show_log()
    try:
        run(plan, whole)
        write(plan, whole, about_this(plan, whole))
    except (ConfigError, CheckpointError) as error:
        refuse(str(error))
    print(f"Report: {workdir}/report.html (and report.md), numbers: {workdir}/results.json")


def command() -> None:
    """Parses the command line and runs `main`."""
    flags.DEFINE_bool("quick", False, "One seed, three lambdas, fewer prompts, no ablations.")
    flags.DEFINE_string("workdir", None, "Where everything goes; the same one resumes.")
    app.run(main)


if __name__ == "__main__":
    command()
