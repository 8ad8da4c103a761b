"""Which TPU slice? Compiles an experiment's programs for one that is not there, and says what each chip needs.

    python -m pasta_jax.compile --config=configs/tiny.py --topology=v5e:2x4 [--quantize=int8]

Needs libtpu (Linux), but no TPU. For training and decoding it prints, for each chip: memory by kind and whether it
fits, operations, bytes of memory and of the network, and from these the least time and the tokens a second that it
allows. Where training does not fit, it finds the nearest settings that do. --table=FILE makes the table of
docs/tpu.md, and goes on where it was interrupted.
"""

from __future__ import annotations

import concurrent.futures
import functools
import os
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from pasta_jax.chips import chip_named
from pasta_jax.config import Config, ConfigError
from pasta_jax.memory import gib
from pasta_jax.overrides import load_config, split_overrides
from pasta_jax.verbs import begin, refuse, run_main

PROGRAMS = ("train", "reference", "preference", "admit", "decode")


def main(argv: Sequence[str], *, overrides: Sequence[str]) -> None:
    """Runs the command. A user's mistake ends in one line and status 2."""
    values = flags.FLAGS
    if len(argv) > 1 or not (values.config or values.table):
        refuse(f"Which experiment? Add --config=configs/tiny.py. {__doc__.splitlines()[0]}")
    # No device is opened: without this jax looks for TPUs, finds none, and prints a line that looks like an error.
    if not os.environ.get("JAX_PLATFORMS"):
        import jax

        jax.config.update("jax_platforms", "cpu")
    begin()
    try:
        if values.table:
            from pasta_jax.compile.table import make_table

            make_table(values.table, only=values.only)
            return
        compile_all(load_config(values.config, overrides), overrides)
    except (ConfigError, ValueError, RuntimeError) as error:
        refuse(" ".join(str(error).split()))


def compile_all(config: Config, overrides: Sequence[str]) -> None:
    """Compiles and reports the programs of an experiment. Raises ConfigError or ValueError."""
    from pasta_jax import sharding
    from pasta_jax.compile import choices
    from pasta_jax.compile.programs import decoder_programs, decoding_jobs, topology_devices, training_jobs
    from pasta_jax.compile.report import lines
    from pasta_jax.decoding import cpu
    from pasta_jax.decoding.state import Limits
    from pasta_jax.experiment import resolve
    from pasta_jax.model import param_shapes

    values = flags.FLAGS
    devices = topology_devices(values.topology)
    chip, shape = chip_named(values.topology)
    config, tokenizer = resolve(config, overrides=overrides, ahead=True)

    def mesh_of(config: Config, tensor: int = 0) -> Any:
        """The mesh of an experiment; with another size of tensor, fsdp takes the rest."""
        if tensor and tensor != config.mesh.tensor:
            return sharding.make_mesh(config.mesh.data, -1, tensor, devices)
        return sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)

    def decoding(rows: int, pool: int, int8: bool, tensor: int) -> Any:
        limits = Limits(values.lanes, max(values.lanes, config.data.threads), pool)
        mesh = sharding.decoding_mesh(mesh_of(config, tensor), param_shapes(config.model), chip.hbm)
        return decoding_jobs(decoder_programs(config, mesh, tokenizer, int8=int8, limits=limits, rows=rows))

    sizes = dict(
        rows=values.rows, pool=values.pool, int8=values.quantize == "int8", tensor=config.mesh.tensor
    )
    mesh = mesh_of(config)
    jobs = training_jobs(config, mesh) + decoding(**sizes)
    wanted = values.only or PROGRAMS
    if unknown := sorted({*values.only} - {job.name for job in jobs}):
        raise ConfigError(
            f"--only={','.join(unknown)}: this experiment has {', '.join(job.name for job in jobs)}."
        )
    jobs = [job for job in jobs if job.name in wanted]
    cores = min(len(jobs), cpu.cores())
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    print(
        f"{values.topology}: {len(devices)} devices ({axes}), {gib(chip.hbm)} GiB each. Compiling "
        f"{', '.join(job.name for job in jobs)}, {cores} at a time, for about "
        f"{_minutes(config, [job.name for job in jobs], cores)}; nothing is run.",
        flush=True,
    )
    if any(job.name in ("train", "preference") for job in jobs):
        _say_choices(config, mesh)
    if {"admit", "decode", "reference"} & {job.name for job in jobs}:
        own = sharding.decoding_mesh(mesh, param_shapes(config.model), chip.hbm).shape
        _say(
            f"To decode: data {own['data']}, tensor {own['tensor']}; fsdp would gather weights in each step."
        )
    reports = []
    for report in examined(jobs, chip, shape, cores):
        reports.append(report)
        print("\n".join(lines(report)), flush=True)
    _say_epochs(config, tokenizer, reports)
    advice = []
    for report in reports:
        if report.fits:
            continue
        if report.name in ("admit", "decode"):
            words = choices.smaller_decoder(decoding, chip, **sizes)
        else:
            settings = choices.training_settings(config)
            found = choices.that_fits(settings, mesh_of, chip, shape, report.name, _say)
            words = str(found[0]) if found else ""
            if found:
                print("\n".join(lines(found[1])), flush=True)
            if larger := choices.larger_slice(config, chip, shape):
                words = f"{words}, or (by estimate) {larger}" if words else f"(by estimate) {larger}"
        if words and words not in advice:
            advice.append(words)
    if not all(report.fits for report in reports):
        tried = f"Add {', or '.join(advice)}" if advice else "Nothing that was tried fits"
        refuse(f"Does not fit: {', '.join(r.name for r in reports if not r.fits)}. {tried}.")


def examined(jobs: Any, chip: Any, shape: tuple[int, ...], cores: int) -> Any:
    """Reports on programs as they finish, so many compiled at a time."""
    from pasta_jax.compile.report import examine

    with concurrent.futures.ThreadPoolExecutor(cores) as pool:
        futures = [pool.submit(examine, job, chip, shape) for job in jobs]
        try:
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _minutes(config: Config, names: Sequence[str], cores: int) -> str:
    """How long compiling takes, from what it took on two cores (docs/performance.md)."""
    wide = min(1.0, config.model.model_dim / 2048)
    scanned = 20 + 100 * wide  # one layer for all, and the optimizer
    unrolled = 10 + (0.5 + 2.5 * wide) * config.model.num_layers
    seconds = sum(unrolled if name in ("admit", "decode") else scanned for name in names) / cores
    return f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.0f} minutes"


def _say(line: str) -> None:
    print(line, flush=True)


def _say_choices(config: Config, mesh: Any) -> None:
    from pasta_jax.compile.programs import update_of
    from pasta_jax.experiment import stages
    from pasta_jax.model.kernels import words_for

    _say(str(update_of(stages(config)[-1], mesh)[0].remat))
    _say(words_for(config.model, config.data.length, mesh))


def _say_epochs(config: Config, tokenizer: Any, reports: Any) -> None:
    """Hours of a pass over the data, of --epoch_tokens, or of the experiment's steps, at the most speed."""
    tokens, what = flags.FLAGS.epoch_tokens, "tokens"
    if not tokens:
        tokens, what = (
            config.steps * config.data.rows * config.data.length,
            f"tokens of {config.steps:,} steps",
        )
        if config.epochs:
            steps = _epoch_steps(config, tokenizer)
            if steps is None:
                _say("Hours of an epoch: its file is not here; add --epoch_tokens=N.")
                return
            tokens, what = (
                steps * config.data.rows * config.data.length,
                "tokens of an epoch, padding included",
            )
    for report in reports:
        if report.name in ("train", "preference") and report.fits:
            hours = tokens / report.tokens_per_s / 3600
            _say(f"{report.name}: {tokens:,.0f} {what} take at least {hours:.2g} hours.")


def _epoch_steps(config: Config, tokenizer: Any) -> int | None:
    """Steps of a pass over the experiment's file; None if it cannot be read."""
    from pasta_jax.data.records import RecordError
    from pasta_jax.data.sources import make_source, steps_of_epochs

    try:
        return steps_of_epochs(config.data, make_source(config.data, tokenizer, config.seed), 1.0)
    except (ConfigError, RecordError, OSError):
        return None


def command() -> None:
    """Parses the command line and runs `main`."""
    flags.DEFINE_string("config", None, "The experiment, as configs/tiny.py.")
    flags.DEFINE_string("topology", "v5e:2x4", "Generation (v4, v5e, v5p, v6e, v7x) and shape, in chips.")
    flags.DEFINE_list("only", [], f"Some of {', '.join(PROGRAMS)}; by default all of the experiment.")
    flags.DEFINE_integer("epoch_tokens", 0, "Tokens of an epoch, to state its hours.", lower_bound=0)
    flags.DEFINE_integer("rows", 8, "Requests decoded at once.", lower_bound=1)
    flags.DEFINE_integer("lanes", 8, "Maximum threads of a request that decode in one step.", lower_bound=1)
    flags.DEFINE_integer(
        "pool", 1024, "Maximum tokens of a request, prompt and answer together.", lower_bound=1
    )
    flags.DEFINE_enum("quantize", None, ["int8"], "Weights of the decode programs.")
    flags.DEFINE_string("table", None, "Make the table of docs/tpu.md, whose rows are kept in this file.")
    overrides, rest = split_overrides(sys.argv)
    run_main(functools.partial(main, overrides=overrides), argv=rest)


if __name__ == "__main__":
    command()
