"""The table of docs/tpu.md: published models on slices of several generations, each compiled, and none run.

Its rows are kept in a file of JSON lines as they finish, so making it may be interrupted. What was not compiled yet
is in the table as such.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from pasta_jax.chips import chip_named, devices_in
from pasta_jax.compile.report import Report, examine
from pasta_jax.config import Config, DataConfig, MeshConfig
from pasta_jax.files import Lines, json_line, read_jsonl, write_jsonl
from pasta_jax.memory import GIB, gib
from pasta_jax.model.presets import preset
from pasta_jax.terminal import markdown_table

SLICES = {
    "v5e-8": "v5e:2x4", "v5p-8": "v5p:2x2x1", "v6e-8": "v6e:2x4", "v5e-64": "v5e:8x8", "v6e-64": "v6e:8x8",
    "v5e-256": "v5e:16x16", "v5e-16": "v5e:4x4", "v5p-16": "v5p:2x2x2",
}  # fmt: skip
"""Name of a slice to its topology; the numbers of v5p count its cores, two a chip."""

LENGTH = 2048
"""Tokens of a training row, and of the pool of a decoded request."""

LANES = 8


@dataclasses.dataclass(frozen=True)
class Case:
    """A row: a published model, what it does, and on which slice."""

    model: str
    what: str
    slice: str

    def __str__(self) -> str:
        return f"{self.model} {self.what} {self.slice}"


def cases() -> list[Case]:
    """All rows of the table, in the order in which they are compiled."""
    made = []
    for where in ("v5e-8", "v5p-8", "v6e-8", "v5e-64", "v6e-64", "v5e-256"):
        for model in ("gemma-2b", "gemma-7b"):
            made += [Case(model, what, where) for what in ("train", "decode", "preference")]
    made += [Case("gemma-2-27b", "decode", "v6e-8"), Case("gemma-2-27b", "decode", "v5p-16")]
    made += [Case("llama-3.1-8b", "train", "v5e-16"), Case("qwen3-8b", "train", "v5e-16")]
    return made


def config_of(case: Case) -> Config:
    """The experiment of a row: the recipe of configs/sft.py or preference.py, a row of tokens a device."""
    chip, shape = chip_named(SLICES[case.slice])
    rows = max(8, devices_in(chip, shape))
    return Config(
        stage="preference" if case.what == "preference" else "sft",
        init_from="runs/model",
        model=preset(case.model).config,
        data=DataConfig(rows=rows, length=LENGTH, threads=32),
        param_dtype="float32",
        mesh=MeshConfig(),
    )


def compiled_case(case: Case) -> dict[str, Any]:
    """The row of a case, for the file."""
    from pasta_jax import sharding
    from pasta_jax.compile.programs import decoder_programs, decoding_jobs, topology_devices, training_jobs
    from pasta_jax.decoding.state import Limits
    from pasta_jax.model import param_shapes

    config, topology = config_of(case), SLICES[case.slice]
    chip, shape = chip_named(topology)
    devices = topology_devices(topology)
    mesh, remat = sharding.make_mesh(devices=devices), ""
    if case.what == "decode":
        mesh = sharding.decoding_mesh(mesh, param_shapes(config.model), chip.hbm)
        limits = Limits(LANES, 32, LENGTH)
        rows = 8 * mesh.shape["data"]
        jobs = decoding_jobs(decoder_programs(config, mesh, limits=limits, rows=rows))
    else:
        from pasta_jax.compile.programs import update_of

        remat = update_of(config, mesh)[0].remat.remat
        jobs = training_jobs(config, mesh)
    started = time.process_time()
    report = examine(next(job for job in jobs if job.name == case.what), chip, shape)
    return {
        "case": str(case),
        "remat": remat,
        "cpu_s": round(time.process_time() - started),
        "tokens": report.tokens,
        **summary(report),
    }


def summary(report: Report) -> dict[str, Any]:
    """What the table says of a report."""
    return {
        "fits": report.fits,
        "too_much": report.too_much,
        "bytes": report.total if report.fits else 0,
        "limit": report.limit,
        "bound": report.bound,
        "seconds": report.seconds,
        "tokens_per_s": report.tokens_per_s,
        "compile_s": round(report.compile_s),
    }


def make_table(path: str, only: Sequence[str] = ()) -> None:
    """Compiles the cases that a file lacks, appends each as it finishes, and prints the table.

    Args:
      path: of the JSON lines.
      only: "train", "decode", "preference": which cases to compile.
    """
    done = rows_in(path)
    write_jsonl(path, done.values())  # without what an interrupted run may have left of a line
    missing = [case for case in cases() if str(case) not in done and (not only or case.what in only)]
    print(f"{len(done)} of {len(cases())} rows are in {path}; compiling {len(missing)}, some minutes each.")
    for case in missing:
        try:
            row = compiled_case(case)
        except RuntimeError as error:  # a fault of the compiler: the others may still compile
            print(f"{case}: {' '.join(str(error).split())[:200]}", flush=True)
            continue
        with Lines(path) as file:
            file.write(json_line(row))
        print(
            f"{case}: {'fits' if row['fits'] else 'does not fit'}, compiled in {row['compile_s']} s",
            flush=True,
        )
    print(rendered(rows_in(path)))


def rows_in(path: str) -> dict[str, dict[str, Any]]:
    """The rows of a file by case."""
    return {row["case"]: row for row in read_jsonl(path, dict)}


def rendered(rows: dict[str, dict[str, Any]]) -> str:
    """The table, in Markdown."""
    header = (
        "model, what",
        "slice",
        "GiB a chip",
        "fits",
        "remat",
        "bound by",
        "at least",
        "tokens/s, at most",
    )
    names = {"train": "SFT", "preference": "preference", "decode": f"decode, {LANES} lanes"}
    lines = []
    for case in sorted(cases(), key=lambda case: (case.model, list(names).index(case.what))):
        start = (f"{case.model}, {names[case.what]}", case.slice)
        row = rows.get(str(case))
        if row is None:
            lines.append((*start, "not compiled", "", "", "", "", ""))
        elif not row["fits"]:
            lines.append((*start, f"more than {row['limit'] / GIB:.1f}", "**no**", row["remat"], "", "", ""))
        else:
            memory = f"{gib(row['bytes'])} of {row['limit'] / GIB:.1f}"
            least = f"{max(row['seconds'].values()) * 1e3:,.3g} ms"
            speed = f"{row['tokens_per_s']:,.0f}"
            lines.append((*start, memory, "yes", row["remat"], row["bound"], least, speed))
    return markdown_table(header, lines)
