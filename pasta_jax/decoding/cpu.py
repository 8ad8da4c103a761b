"""What decoding does for the sake of CPUs, and of XLA's code for them. TPUs and GPUs need none of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING

import jax

if TYPE_CHECKING:
    from pasta_jax.decoding.loop import Batch

CACHED_BYTES = 8 * 2**20
"""Weights of at most this size stay in a processor's cache from one step to the next."""


def widths_for(lanes: int, *, cached: bool) -> tuple[int, ...]:
    """The widths that are worth compiling, up to S = `lanes`; each takes its time to compile.

    Where the weights come from main memory, two lanes cost little less than four; where they are cached, each lane
    costs (docs/lab-log.md).

    >>> widths_for(16, cached=False), widths_for(16, cached=True)
    ((1, 4, 8, 16), (1, 2, 3, 4, 6, 8, 12, 16))
    """
    powers = [1 << i for i in range(lanes.bit_length())]
    widths = {*powers, *(3 * power for power in powers)} if cached else {*powers} - {2}
    return tuple(sorted({width for width in widths if width < lanes} | {lanes}))


def pool_buckets(buckets: Iterable[int], entries: int) -> list[int]:
    """The parts of a pool that are worth a program. XLA on a CPU copies the part it reads: it has to be small."""
    return [bucket for bucket in buckets if 3 * bucket <= entries]


def without_B(batch: Batch) -> Batch:
    """A batch as loops carry it. The pool of a single row loses its B: XLA on a CPU would copy [1, K, P, H]."""
    alone = batch.rows.stop.shape[0] == 1
    return _reshaped(batch, drop_B=True) if alone else batch


def with_B(batch: Batch) -> Batch:
    """`without_B` undone."""
    alone = batch.rows.stop.shape[0] == 1
    return _reshaped(batch, drop_B=False) if alone else batch


def _reshaped(batch: Batch, *, drop_B: bool) -> Batch:
    pool = jax.tree.map(lambda leaf: leaf[0] if drop_B else leaf[None], batch.pool)
    return dataclasses.replace(batch, pool=pool)
