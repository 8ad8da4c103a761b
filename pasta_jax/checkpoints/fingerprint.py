"""Fingerprints, samples and checksums of arrays: the same wherever the files are and whatever the mesh is."""

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

FEW = 8
"""Values of a leaf in a sample that adapters carry along."""


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


def sample(params: Any) -> np.ndarray:
    """FEW values of each leaf at even distances, float32 [leaves, FEW]. `apart` compares two.

    Those of accelerators are taken where they are; on a CPU nothing is compiled for it.
    """
    leaves = jax.tree.leaves(params)
    if all(map(_is_here, leaves)):
        values = [np.asarray(leaf)[_spread(leaf.shape, FEW)] for leaf in leaves]
    else:
        values = jax.device_get(_sampled(leaves, FEW))
    return np.stack([np.asarray(each, np.float32) for each in values])


def apart(values: np.ndarray, others: np.ndarray) -> float:
    """How far two samples are apart: the root mean square difference by that of `others`, over all leaves.

    Unlike fingerprints it says how much differs: rounding to bfloat16 makes about 0.002, four bits a weight about
    0.1, other weights more than 1. Infinite if the leaves are not as many, or values are not finite.
    """
    if values.shape != others.shape:
        return math.inf
    changed, size = np.square(values - others).sum(axis=-1), np.square(others).sum(axis=-1)
    distance = float(np.sqrt(np.mean(changed / np.maximum(size, np.finfo(np.float32).tiny))))
    return distance if math.isfinite(distance) else math.inf


def checksums(tree: Any) -> dict[str, str]:
    """A checksum of every array, by its name in the tree ("layer_0/attn/q_proj"): of all bits, in their order.

    It is the sum modulo 2**32 of the values' bits, each times an odd number that its index gives, so a change of
    one value always changes it. Arrays of accelerators are summed where they are.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sums = jax.device_get([(_sum_here if _is_here(leaf) else _sum_there)(leaf) for _, leaf in leaves])
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    return {name: f"{int(value):08x}" for name, value in zip(names, sums, strict=True)}


def _is_here(leaf: Any) -> bool:
    """Whether an array lies in this process's memory."""
    if not isinstance(leaf, jax.Array):
        return True
    return leaf.is_fully_addressable and next(iter(leaf.devices())).platform == "cpu"


def _factor(index: Any) -> Any:
    """An odd uint32 for each index, all bits of which matter; of NumPy or JAX."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):  # the last steps of MurmurHash3
        index = (index ^ (index >> np.uint32(shift))) * np.uint32(factor)
    return index | np.uint32(1)


BLOCK = 1 << 16
"""The factor of a value is that of its place in a block of values, times that of the block."""


def _sum_here(leaf: Any) -> np.uint32:
    bits = np.ascontiguousarray(leaf).reshape(-1)
    bits = bits.view(f"uint{8 * bits.itemsize}")
    factors = _factor(np.arange(min(BLOCK, bits.size), dtype=np.uint32))
    blocks = _factor(np.arange(0, bits.size, BLOCK, dtype=np.int64).astype(np.uint32))
    products, total = np.empty_like(factors), 0
    for number, block in enumerate(blocks):
        part = bits[number * BLOCK : (number + 1) * BLOCK]
        product = np.multiply(part, factors[: part.size], out=products[: part.size])
        total += int(block) * int(product.sum(dtype=np.uint32))
    return np.uint32(total % 2**32)


@jax.jit
def _sum_there(leaf: Array) -> Array:
    bits = leaf.astype(jnp.uint8) if leaf.dtype == jnp.bool_ else leaf
    bits = jax.lax.bitcast_convert_type(bits, jnp.dtype(f"uint{8 * bits.dtype.itemsize}"))
    index = jnp.zeros(leaf.shape, jnp.uint32)
    for axis, size in enumerate(leaf.shape):
        index = index * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    factors = _factor(index % np.uint32(BLOCK)) * _factor(index // np.uint32(BLOCK) * np.uint32(BLOCK))
    return jnp.sum(bits.astype(jnp.uint32) * factors, dtype=jnp.uint32)


def _sampled(leaves: list[Array], count: int | None = None) -> list[Array]:
    """Float32 [SAMPLES] of each leaf, or [count], replicated on every device."""
    indices = [_spread(leaf.shape, count) for leaf in leaves]

    def taken(leaves: list[Array]) -> list[Array]:
        return [leaf[index].astype(jnp.float32) for leaf, index in zip(leaves, indices, strict=True)]

    mesh = sharding.mesh_of(leaves)
    return jax.jit(taken, out_shardings=None if mesh is None else sharding.replicated(mesh))(leaves)


def _spread(shape: tuple[int, ...], count: int | None = None) -> tuple[np.ndarray, ...]:
    """Indices of values at even distances; of a small leaf some stand twice if `count` says so."""
    size = math.prod(shape)
    count = min(SAMPLES, size) if count is None else count
    return np.unravel_index(np.linspace(0, size - 1, count).astype(np.int64), shape)
