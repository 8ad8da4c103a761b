"""What decoding does for the sake of CPUs, and of XLA's code for them. TPUs and GPUs need none of it."""

from __future__ import annotations

import os

import jax
import numpy as np

from pasta_jax.decoding.state import RowState
from pasta_jax.model import Pool

CACHED_BYTES = 8 * 2**20
"""Weights of at most this size stay in a processor's cache from one step to the next."""


SMALL_BUCKET = 128
"""Entries of the pool that steps of several rows read at first, where the weights come from main memory.

XLA computes thin products of attention slowly, on one core, so entries that are not used yet are dear. With one row
there is little of it; where weights are cached, compiling another loop takes longer than it saves
(docs/lab-log.md)."""


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


def without_B(pool: Pool) -> Pool:
    """A pool as loops carry it. A single row loses its B: XLA on a CPU would copy [1, K, P, H] in each step."""
    return jax.tree.map(lambda leaf: leaf[0] if leaf.shape[0] == 1 else leaf, pool)


def with_B(pool: Pool) -> Pool:
    """`without_B` undone."""
    return jax.tree.map(lambda leaf: leaf[None] if leaf.ndim == 3 else leaf, pool)


def read_row(rows: RowState, row: int) -> RowState:
    """A row of a batch, copied: the arrays of a CPU are the host's, so no program has to take it out."""
    return jax.tree.map(lambda leaf: np.array(np.asarray(leaf)[row]), rows)
