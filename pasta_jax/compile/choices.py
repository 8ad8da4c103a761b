"""What to change where a program does not fit: cheap estimates first, and the compiler has the last word."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

from pasta_jax import experiment
from pasta_jax.chips import Chip, chip_named
from pasta_jax.compile.programs import Job, topology_devices, training_jobs, update_of
from pasta_jax.compile.report import Report, examine
from pasta_jax.config import Config, ConfigError
from pasta_jax.overrides import override
from pasta_jax.sharding import make_mesh

CONFIRMED = 3
"""Maximum number of settings that are compiled."""

FLAT, DEEP = "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16", "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8"
"""Shapes of slices that are rented, by the number of axes."""

TENSOR = (2, 4, 8)
"""Sizes of the mesh's tensor axis that are tried."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """Changes of an experiment, as the command line writes them, and what they come to."""

    changes: tuple[str, ...]
    config: Config

    def __str__(self) -> str:
        return " ".join(f"--config.{change}" for change in self.changes)


def training_settings(config: Config) -> Iterator[Setting]:
    """Settings that need less memory, the nearest first: remat, microbatches, the mesh, adapters."""
    tensor = max(1, config.mesh.tensor)
    meshes: list[tuple[str, ...]] = [()]
    meshes += [("mesh.fsdp=-1", f"mesh.tensor={size}") for size in TENSOR if size > tensor]
    parts = [n for n in range(2, config.data.rows + 1) if config.data.rows % n == 0 and n & (n - 1) == 0]
    smaller: list[tuple[str, ...]] = [(), *((f"microbatches={config.microbatches * n}",) for n in parts)]
    adapters: list[tuple[str, ...]] = [()] if config.lora.rank else [(), ("lora.rank=16",)]
    for lora, mesh, part in itertools.product(adapters, meshes, smaller):
        changes = ("remat=everything",) * (config.remat != "everything") + part + mesh + lora
        if changes:
            try:
                yield Setting(changes, override(config, changes))
            except ConfigError:
                continue  # adapters of a model from scratch


def that_fits(
    settings: Iterator[Setting],
    mesh_of: Callable[[Config], Any],
    chip: Chip,
    shape: tuple[int, ...],
    name: str,
    say: Callable[[str], None],
) -> tuple[Setting, Report] | None:
    """The first setting with which the program `name` of training fits, and its report.

    Args:
      settings: to try, in this order; those that do not divide the mesh are passed over.
      mesh_of: the mesh of an experiment.
      chip, shape: of the slice.
      name: "train", "preference" or "reference".
      say: is told what is compiled.
    """
    tried = 0
    for setting in settings:
        try:
            mesh = mesh_of(setting.config)
            stage = dataclasses.replace(setting.config, stage="sft" if name == "train" else "preference")
            if update_of(stage, mesh)[0].remat.needs.total > chip.hbm:
                continue
            jobs = {job.name: job for job in training_jobs(stage, mesh)}
        except ValueError:
            continue
        say(f"Trying {setting}")
        report = examine(jobs[name], chip, shape)
        if report.fits:
            return setting, report
        tried += 1
        if tried == CONFIRMED:
            break
    return None


def larger_slice(config: Config, chip: Chip, shape: tuple[int, ...]) -> str:
    """The next slice of a generation on which training fits by estimate, as flags; empty if none does.

    Rows grow with the devices that share them.
    """
    shapes = (FLAT if chip.axes == 2 else DEEP).split()
    for name in shapes:
        larger = f"{chip.name}:{name}"
        sizes = chip_named(larger)[1]
        if math.prod(sizes) <= math.prod(shape):
            continue
        try:
            mesh = make_mesh(config.mesh.data, -1, max(1, config.mesh.tensor), topology_devices(larger))
            rows = max(config.data.rows, config.microbatches * mesh.shape["data"] * mesh.shape["fsdp"])
            changed = override(config, [f"data.rows={rows}", "mesh.fsdp=-1", "remat=auto"])
            stages = [update_of(stage, mesh)[0] for stage in experiment.stages(changed)]
        except ValueError:
            continue
        if all(update.remat.needs.total <= chip.hbm for update in stages):
            more = f" --config.data.rows={rows}" if rows != config.data.rows else ""
            return f"--topology={larger} --config.mesh.fsdp=-1{more}"
    return ""


def smaller_decoder(jobs: Callable[..., list[Job]], chip: Chip, **sizes: Any) -> str:
    """What makes weights and pool small enough to decode, by their bytes alone; empty if nothing here does.

    Args:
      jobs: the decoding jobs for keyword arguments rows, pool, int8 and tensor.
      chip: of the slice.
      sizes: as they are now.
    """
    rows, pool, tensor = sizes["rows"], sizes["pool"], max(1, sizes["tensor"])
    ways: list[tuple[dict[str, Any], str]] = [
        *(({"tensor": size}, f"--config.mesh.tensor={size}") for size in TENSOR if size > tensor),
        ({"int8": True}, "--quantize=int8"),
        *(({"rows": rows // n}, f"--rows={rows // n}") for n in (2, 4, 8) if rows // n),
        *(({"pool": pool // n}, f"--pool={pool // n}") for n in (2, 4) if pool // n > 128),
        ({"int8": True, "tensor": 8}, "--quantize=int8 --config.mesh.tensor=8"),
    ]
    for changes, words in ways:
        try:
            needs = max(sum(job.parts.values()) for job in jobs(**{**sizes, **changes}))
        except ValueError:
            continue  # the mesh does not divide it
        if needs <= 0.85 * chip.hbm:
            return words
    return ""
