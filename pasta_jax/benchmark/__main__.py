"""Measures the engine's speed on this machine: `python -m pasta_jax.benchmark --model=300m --out=runs/benchmark`.

    width     time of a decode step against its width, the number of lanes used
    replay    realized by theoretical speedup for each kind of tree
    pool      time of a decode step against the used part of the pool
    batch     tokens per second against concurrent requests
    prefix    time to the first token after a long system prompt, fed anew and kept
    admission goodput of requests side by side, by which of their branches wait
    peers     sequential decode and prefill, compared with Hugging Face transformers on the same weights
    train     an update of training, compared with transformers on torch and with tunix, each where it is installed
    startup   from the start of Python to the first token, with and without the compilation cache

Weights are random unless --model is a path. Measurements that are compared take turns, in one run. What is
compiled and the first of each measurement are logged as they come. Prints medians with quartiles, and writes
results.json and a figure for each part.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags
from etils import epath

from pasta_jax.figures import can_draw
from pasta_jax.files import write_json
from pasta_jax.verbs import begin, refuse, run_main

if TYPE_CHECKING:
    from pasta_jax.benchmark.measure import TableRow
    from pasta_jax.benchmark.measurements import Effort

LOG = logging.getLogger("pasta_jax")

PARTS = ("startup", "train", "width", "replay", "pool", "batch", "prefix", "admission", "peers")
"""In order of measurement: first those whose processes need the accelerator that this one takes; then those that
compile little."""

RESULTS = "results.json"

PLAN_FLAGS = {
    "repeats": ("repeats", "Repeats of each measurement."),
    "tokens": ("branch_tokens", "Mean length of a branch."),
    "answers": ("answers_per_kind", "Answers to replay of each kind of tree."),
    "real": ("real_responses", "Number of given responses to replay."),
    "steps": ("steps", "Steps over which the time of a step is averaged."),
    "pool": ("entries", "Entries of the pool, with those that idle lanes write; replay may need more."),
    "prompt": (
        "prompt_tokens",
        "Length of the prompts in the comparison with peers, and of the system prompt.",
    ),
    "rows": ("train_rows", "Rows of a batch in training."),
    "length": ("train_length", "Tokens of a row in training."),
}
"""Flags that change the effort: the field, and the help."""


def benchmark(
    what: Sequence[str],
    model_name: str,
    out: str,
    effort: Effort,
    *,
    dtype: str | None = None,
    responses_file: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Measures, and writes the results of each part as soon as it is done.

    Args:
      what: some of PARTS.
      model_name, dtype: as for `models.model_of`.
      out: folder of the results.
      effort: how much is measured.
      responses_file: real responses to replay.
      seed: of texts, shapes and prompts.

    Returns:
      The contents of results.json.
    """
    from pasta_jax.benchmark import measure, measurements, peers, serving, startup, training
    from pasta_jax.benchmark.models import model_of
    from pasta_jax.model import param_count

    loads = measure.load_average()
    responses = measurements.read_responses(responses_file) if responses_file else []
    os.makedirs(out, exist_ok=True)
    effort_fields = dataclasses.asdict(effort) | {"seed": seed}
    results: dict[str, Any] = {"model": {"name": model_name}, "effort": effort_fields, "parts": {}}
    if "startup" in what:
        LOG.info("startup: %d times two starts", effort.repeats)
        starts = startup.startup(model_name, dtype, effort.repeats, entries=effort.entries)
    if "train" in what:
        updates = training.train(model_name, dtype, effort, seed)
    results["machine"] = {"load_average": loads, **measure.machine()}
    model = model_of(model_name, dtype, responses)
    results["model"] |= {
        "parameters": param_count(model.params),
        "config": dataclasses.asdict(model.config),
    }
    LOG.info("%s", _described(results))

    def rng() -> random.Random:
        return random.Random(seed)

    measures: dict[str, Callable[[], list[TableRow]]] = {
        "startup": lambda: starts,
        "train": lambda: updates,
        "width": lambda: measurements.measure_width(model, effort, rng()),
        "replay": lambda: measurements.measure_replay(model, effort, rng(), responses),
        "batch": lambda: measurements.measure_batch(model, effort, rng()),
        "pool": lambda: measurements.measure_pool_fill(model, effort, rng()),
        "prefix": lambda: serving.measure_prefix(model, effort, rng()),
        "admission": lambda: serving.measure_admission(model, effort, rng()),
        "peers": lambda: peers.peers(model, effort, rng()),
    }
    for part in (part for part in PARTS if part in what):
        if part == "peers" and (reason := peers.missing()):
            results["parts"][part] = {"skipped": reason}
            print(f"{part}\n{reason}\n", flush=True)
        else:
            LOG.info("%s", part)
            points = measures[part]()
            results["parts"][part] = {"points": [for_json(point) for point in points]}
            shown = table(points)
            note = f"{measure.NOISE_MEANS}\n" if measure.NOISE in shown else ""
            print(f"{part}\n{shown}\n{note}", flush=True)
        _write(out, part, results)
    return results


def table(points: Sequence[TableRow]) -> str:
    """A Markdown table with a column for each number."""
    from pasta_jax.benchmark.measure import number
    from pasta_jax.terminal import markdown_table

    def cell(value: Any) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, tuple):
            return ", ".join(map(str, value))
        return number(value) if isinstance(value, float) else str(value)

    return markdown_table([*points[0]], [[cell(value) for value in point.values()] for point in points])


def for_json(point: TableRow) -> dict[str, Any]:
    """A point for JSON, which has neither NaN nor infinity."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {name: plain(item) for name, item in dataclasses.asdict(value).items()}
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {name: plain(value) for name, value in point.items()}


def _write(out: str, part: str, results: dict[str, Any]) -> None:
    write_json(os.path.join(out, RESULTS), results, allow_nan=False)
    points = results["parts"][part].get("points")
    if not points or not can_draw(f"The figure of {part}"):
        return
    from pasta_jax.benchmark.figures import draw

    draw(part, points, os.path.join(out, f"{part}.png"), _described(results))


def _described(results: dict[str, Any]) -> str:
    machine, model = results["machine"], results["model"]
    hardware = machine["accelerator"] or f"{machine['cores']} cores of {machine['cpu']}"
    size = f"{model['parameters'] / 1e6:.4g} million parameters, {model['config']['dtype']}"
    loads = machine["load_average"]
    busy = "" if loads is None else f", load {loads[0]}"
    return f"{model['name']}: {size}; {hardware}, jax {machine['packages']['jax']}{busy}"


def main(argv: Sequence[str]) -> None:
    """Runs the command line. A mistake ends in one line and status 2."""
    values = flags.FLAGS
    unknown = sorted({*values.what} - {*PARTS, "all"})
    if len(argv) > 1 or unknown:
        refuse(f"--what must be all, or a comma-separated list of {', '.join(PARTS)}.")
    if values.responses and not os.path.isfile(values.responses):
        refuse(f"--responses={values.responses}: there is no such file.")
    begin()
    from pasta_jax.benchmark.measure import log_compiling
    from pasta_jax.benchmark.measurements import QUICK, Effort
    from pasta_jax.benchmark.models import NAMED
    from pasta_jax.interchange.importing import kind_of

    log_compiling()
    try:
        name = values.model or ("gemma25m" if values.what == ["train"] else "tiny")
        if name not in NAMED and kind_of(name)[0] == "workdir" and not epath.Path(name).exists():
            raise ValueError(f"--model={name} is neither {', '.join(NAMED)} nor a path.")
        effort = QUICK if values.quick else Effort()
        given: dict[str, Any] = {
            field: values[flag].value
            for flag, (field, _) in PLAN_FLAGS.items()
            if values[flag].value is not None
        }
        effort = dataclasses.replace(effort, **given)
        what = PARTS if "all" in values.what else tuple(values.what)
        options = dict(dtype=values.dtype, responses_file=values.responses, seed=values.seed)
        benchmark(what, name, values.out, effort, **options)
    except (ValueError, OSError, RuntimeError) as error:
        refuse(str(error))


def command() -> None:
    """Parses the command line and runs `main`."""
    flags.DEFINE_list("what", ["all"], f"Some of {', '.join(PARTS)}, or all.")
    flags.DEFINE_string(
        "model",
        None,
        "A size (tiny, 300m, gemma25m, gemma7b), with random weights; or a path. By default tiny, "
        "and gemma25m for train alone.",
    )
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of the weights; by default the model's own.")
    flags.DEFINE_string("out", "runs/benchmark", "Folder of results.json and the figures.")
    flags.DEFINE_string("responses", None, "JSONL file of real responses to replay, in the field `response`.")
    flags.DEFINE_bool("quick", False, "Less of everything: a check that it works, in a minute or two.")
    flags.DEFINE_integer("seed", 0, "Of texts, shapes and prompts.")
    for name, (_, help) in PLAN_FLAGS.items():
        flags.DEFINE_integer(name, None, help, lower_bound=1)
    run_main(main)


if __name__ == "__main__":
    command()
