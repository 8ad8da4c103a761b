"""Tests the paper's claims on Almanac: PASTA, its rivals and its ablations from one base model.

    python -m pasta_jax.reproduce [--quick] [--workdir=runs/reproduce]

Trains and evaluates Baseline-SFT, PASTA-SFT, PASTA-BoN for several lambdas over two rounds, APAR and
Skeleton-of-Thought with three seeds, then the ablations, and writes report.md, report.html, results.json and
figures. The work is divided into cells (`cells.py`). A finished cell is never repeated, so the same command resumes
an interrupted run. --quick uses one seed, three lambdas and fewer prompts, and skips the ablations that need models
of their own.
"""

from __future__ import annotations

import dataclasses
import datetime
import logging
import math
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from pasta_jax.checkpoints.about import CheckpointError
from pasta_jax.config import ConfigError
from pasta_jax.extras import optional
from pasta_jax.figures import save
from pasta_jax.files import Stamp, write_json
from pasta_jax.overrides import to_dict
from pasta_jax.reproduce.cells import FULL, QUICK, Cell, Paths, Plan, cells, seconds
from pasta_jax.reproduce.claims import claims
from pasta_jax.reproduce.measures import exact_speedup, results
from pasta_jax.verbs import begin, refuse, run_main

LOG = logging.getLogger("pasta_jax")


def run(plan: Plan, workdir: str) -> None:
    """Runs all cells that are not finished.

    Raises:
      ConfigError: `workdir` was started with other configurations.
    """
    _check_same(plan, workdir)
    run_cells([*cells(plan, workdir)], workdir)


def run_cells(todo: Sequence[Cell], workdir: str) -> None:
    """Runs those that are not finished, and records that they are."""
    folder = Paths(workdir)
    os.makedirs(os.path.join(workdir, "cells"), exist_ok=True)
    waiting = [cell for cell in todo if seconds(folder, cell) is None]
    left = sum(cell.seconds for cell in waiting)
    print(
        f"{len(todo)} cells, about {sum(cell.seconds for cell in todo) / 60:.0f} minutes on two cores; "
        f"{len(todo) - len(waiting)} are done, about {left / 60:.0f} minutes are left.",
        file=sys.stderr,
        flush=True,
    )
    for cell in waiting:
        of_all = f"Cell {todo.index(cell) + 1} of {len(todo)}"
        LOG.info("%s: %s (about %d s; about %.0f min left)", of_all, cell.name, cell.seconds, left / 60)
        started = time.monotonic()
        cell.run()
        left -= cell.seconds
        write_json(folder.record(cell.name), {"seconds": round(time.monotonic() - started, 1)})


def _check_same(plan: Plan, workdir: str) -> None:
    """Keeps the configurations beside what is made from them, and refuses a folder of anything else."""
    stamp = Stamp(os.path.join(workdir, "configs.json"))
    configs = {name: to_dict(config) for name, config in plan.configs().items()}
    names = set(os.listdir(workdir)) if os.path.isdir(workdir) else set()
    if names and not names & {"configs.json", "cells"}:
        raise ConfigError(f"{workdir} holds {min(names)} and more, and no reproduction. Use a new --workdir.")
    if names and (changes := stamp.check(configs)):
        changed = ", ".join(dict.fromkeys(change.name.partition(".")[0] for change in changes))
        raise ConfigError(
            f"{workdir} was started with another configuration ({changed} differ). Use a new --workdir."
        )
    os.makedirs(workdir, exist_ok=True)
    stamp.write(configs)


def write(plan: Plan, workdir: str, about: Mapping[str, Any]) -> None:
    """Writes results.json, figures, report.md and report.html from the answers in `workdir`."""
    from pasta_jax.reproduce import page, plots

    measured, exact = results(plan, workdir), exact_speedup(plan.timed)
    rows = [dataclasses.asdict(result) for result in measured]
    for row in rows:
        row["weight"] = "inf" if row["weight"] == math.inf else row["weight"]  # JSON has no infinity
    tree = {"about": about, "exact_annotations": exact, "results": rows}
    write_json(os.path.join(workdir, "results.json"), tree, allow_nan=False)

    drawn = [
        ("frontier", plots.frontier, "Quality against speed; the paper's Figure 4."),
        ("rounds", plots.rounds, "Rounds of preference optimization; the paper's Figure 5."),
        ("positions", plots.positions, "Position schemes, PASTA-SFT; the paper's Figure 6."),
        ("efficiency", plots.efficiency_terms, "Efficiency terms, one round; the paper's Figure 8."),
        ("families", plots.families, "Families of prompts."),
    ]
    ablations = {"positions": plan.positions, "efficiency": plan.efficiencies}
    figures = []
    for name, draw, caption in drawn:
        if ablations.get(name, True):
            path = os.path.join(workdir, f"{name}.png")
            save(draw(measured), path)
            figures.append((path, caption))
    page.write_report(workdir, about, measured, claims(measured, exact), figures)


def about_this(plan: Plan, workdir: str) -> dict[str, Any]:
    """How and where it was run, for the report."""
    import jax

    from pasta_jax.checkpoints.about import versions
    from pasta_jax.evaluate.systems import LIMITS

    took = [seconds(Paths(workdir), cell) for cell in cells(plan, workdir)]
    stage = plan.config("preference").preference
    return {
        "command": "python -m pasta_jax.reproduce " + " ".join(sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}; jax on {jax.devices()[0].device_kind}",
        "versions": versions(),
        "seeds": list(plan.seeds),
        "prompts": f"{plan.timed} held out, from seven families; timed at batch 1, second of two runs",
        "intervals": f"95 %, bootstrap over prompts {'and seeds' if len(plan.seeds) > 1 else 'of one seed'}",
        "base model": "one, of seed 0; seeds are of finetuning and sampling",
        "training": "Baseline-SFT, PASTA-SFT, APAR and SoT: same base, steps and learning rate; PASTA-BoN starts "
        "from PASTA-SFT",
        "engine": f"realized: both sides in the same engine of {LIMITS.lanes} lanes, as in the paper (SoT's points "
        "in rows of one lane, which is faster); on a CPU a baseline in an engine of one lane is faster "
        "(docs/performance.md)",
        "chosen beforehand": "kv heads, steps and rate, for PASTA and the baseline; margin, alpha and rate of the "
        "second stage; the annotator's habit: all on evaluation prompts, seed 0 (docs/lab-log.md); nothing for "
        "the rivals",
        "differs from the paper": f"N = {stage.samples} samples (10), alpha {stage.alpha:g} (0.005), rate "
        f"{stage.lr:g} (5e-7), margin {stage.margin:g} nats (not stated); quality is a ratio of confidences with "
        f"one added on each side, at most 5, so lambda is not on the paper's scale; of two "
        "equally true answers the shorter wins; oracle positions not tried",
        "win rate": "the judge's: higher truth wins, with equal truth the shorter text; a tie counts half",
        "time": f"{sum(filter(None, took)) / 60:.0f} minutes; of interrupted cells, the last session's",
    }


def main(argv: Sequence[str]) -> None:
    """Runs the command line."""
    if len(argv) > 1:
        refuse(f"Unknown argument {' '.join(argv[1:])!r}. The options are --quick and --workdir.")
    values = flags.FLAGS
    plan = QUICK if values.quick else FULL
    workdir = values.workdir or ("runs/reproduce-quick" if values.quick else "runs/reproduce")
    path = os.path.abspath(workdir)  # models refer to each other by path, which must have one spelling
    begin()
    try:
        for package in ("jinja2", "matplotlib"):  # asked for at the end, after hours
            optional(package, "plot", "The report")
    except ImportError as error:
        refuse(str(error))
    try:
        run(plan, path)
        write(plan, path, about_this(plan, path))
    except (ConfigError, CheckpointError) as error:
        refuse(str(error))
    print(f"Report: {workdir}/report.html (and report.md), numbers: {workdir}/results.json")


def command() -> None:
    """Parses the command line and runs `main`."""
    flags.DEFINE_bool("quick", False, "One seed, three lambdas, fewer prompts, no ablations.")
    flags.DEFINE_string(
        "workdir",
        None,
        "Folder of all output (default runs/reproduce, or reproduce-quick); the same one resumes.",
    )
    run_main(main)


if __name__ == "__main__":
    command()
