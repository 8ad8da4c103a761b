"""Fingerprints of weights: the same wherever the files are and whatever the mesh is."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pasta_jax import sharding
from pasta_jax.arrays import Array

SAMPLES = 64
"""Values of a leaf that enter the hash, or all if there are fewer."""


def fingerprint(params: Any) -> str:
    """A hash of the names, shapes, dtypes and some values of all leaves; the same on every mesh.

    The values are taken at even distances in the flat array. Training changes nearly all values of a leaf, and
    with them the fingerprint.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    values = jax.device_get(_sampled([leaf for _, leaf in leaves]))
    digest = hashlib.sha256()
    for (path, leaf), sample in zip(leaves, values, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        digest.update(f"{name} {tuple(leaf.shape)} {jnp.dtype(leaf.dtype).name}\n".encode())
        digest.update((np.asarray(sample, np.float32) + 0.0).tobytes())  # -0 is 0
    return digest.hexdigest()


def _sampled(leaves: list[Array]) -> list[Array]:
    """Float32 [SAMPLES] of each leaf, replicated on every device."""
    indices = [_spread(leaf.shape) for leaf in leaves]

    def sample(leaves: list[Array]) -> list[Array]:
        return [leaf[index].astype(jnp.float32) for leaf, index in zip(leaves, indices, strict=True)]

    mesh = sharding.mesh_of(leaves)
    return jax.jit(sample, out_shardings=None if mesh is None else sharding.replicated(mesh))(leaves)


def _spread(shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Indices of values at even distances."""
    size = math.prod(shape)
    return np.unravel_index(np.linspace(0, size - 1, min(SAMPLES, size)).astype(np.int64), shape)
