"""Attention of documents to themselves, forward and backward, with memory linear in their length.

Queries go by blocks, each with the keys up to its end: no token of a document order may attend to a later one, so
almost half of the scores need not be computed. Who may attend to whom is computed for a block at a time, and never
kept. The backward pass computes the scores once more (as FlashAttention does, Dao et al. 2022), from the sums of
the softmax that the forward pass has kept.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from pasta_jax.arrays import Array
from pasta_jax.model.attention import attend_and_sum, grouped, scores_of, ungrouped
from pasta_jax.rounding import ceil_div

SPANS = 8
"""Spans of queries, of equal length: each has its own part of the program, and keys up to its end."""

BLOCK = 128
"""Maximum number of queries whose scores are in memory at once. A span goes through its blocks in a loop."""

SHORT = 64
"""Spans of fewer queries would only make more programs."""

ATTENDED = "attended"
"""Name, for policies of `jax.checkpoint`, of what the backward pass needs of the forward pass."""


class MayAttend(Protocol):
    """Who may attend to whom, a block of queries at a time; a pytree."""

    def block(self, start: Array | int, size: int, keys: int) -> Array:
        """Bool [B, size, keys]: the queries from `start` on, and the first keys."""


@struct.dataclass
class Matrix:
    """`MayAttend` from a matrix [B, L, L]."""

    matrix: Array

    def block(self, start: Array | int, size: int, keys: int) -> Array:
        return some(jnp.asarray(self.matrix), start, size)[..., :keys]


def some(array: Array, start: Array | int, size: int, axis: int = 1) -> Array:
    """Some of an array's entries along an axis: a plain slice if `start` is known."""
    if isinstance(start, int):
        return jax.lax.slice_in_dim(array, start, start + size, axis=axis)
    return jax.lax.dynamic_slice_in_dim(array, start, size, axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attend_to_earlier(
    q_BxLxNxH: Array,
    k_BxKxLxH: Array,
    v_BxKxLxH: Array,
    may_attend: Any,
    query_scale: float = 0.0,
    softcap: float = 0.0,
) -> Array:
    """`attend` where no query may attend to a later key: [B, L, N, H].

    Args:
      q_BxLxNxH, k_BxKxLxH, v_BxKxLxH: of the same tokens.
      may_attend: a `MayAttend`.
      query_scale, softcap: as for `attend`.
    """
    return _forward(q_BxLxNxH, k_BxKxLxH, v_BxKxLxH, may_attend, query_scale, softcap)[0]


@jax.named_scope("attend")
def _forward(
    q: Array, k: Array, v: Array, may_attend: Any, query_scale: float, softcap: float
) -> tuple[Array, tuple[Any, ...]]:
    def one(start: Array | int, size: int, keys: int) -> tuple[Array, Array]:
        allowed_BxQxP = may_attend.block(start, size, keys)
        q_BxQxNxH = some(q, start, size)
        return attend_and_sum(q_BxQxNxH, k[:, :, :keys], v[:, :, :keys], allowed_BxQxP, query_scale, softcap)

    out, total = [], []
    for start, size, count, keys in _runs(q.shape[1]):
        if count == 1:
            parts = one(start, size, keys)
            out.append(parts[0])
            total.append(parts[1])
        else:
            starts = start + size * jnp.arange(count)
            outs, totals = jax.lax.map(functools.partial(one, size=size, keys=keys), starts)
            out.append(jnp.moveaxis(outs, 0, 1).reshape(q.shape[0], count * size, *q.shape[2:]))
            total.append(jnp.moveaxis(totals, 0, 3).reshape(*totals.shape[1:4], count * size))
    out_BxLxNxH, total_BxKxGxL = jnp.concatenate(out, axis=1), jnp.concatenate(total, axis=3)
    kept = checkpoint_name(out_BxLxNxH, ATTENDED), checkpoint_name(total_BxKxGxL, ATTENDED)
    return kept[0], (q, k, v, may_attend, *kept)


@jax.named_scope("attend")
def _backward(query_scale: float, softcap: float, kept: tuple[Any, ...], cotangent: Array) -> tuple[Any, ...]:
    q, k, v, may_attend, out, total_BxKxGxL = kept
    K, f32 = k.shape[1], jnp.float32
    # What the softmax takes off: the mean of the cotangents of its weights.
    mean_BxLxN = jnp.sum(cotangent.astype(f32) * out.astype(f32), axis=-1)

    def one(
        sums: tuple[Array, Array], start: Array | int, size: int, keys: int
    ) -> tuple[tuple[Array, Array], Array]:
        k_BxKxPxH, v_BxKxPxH = k[:, :, :keys], v[:, :, :keys]
        allowed_BxQxP = may_attend.block(start, size, keys)
        q_BxKxGQxH, g_BxKxGQxH = (grouped(some(x, start, size), K) for x in (q, cotangent))
        mean_BxKxGQx1 = grouped(some(mean_BxLxN, start, size)[..., None], K)
        total_BxKxGQx1 = _flat(some(total_BxKxGxL, start, size, axis=3))[..., None]
        scores, slope, scaled = scores_of(q_BxKxGQxH, k_BxKxPxH, allowed_BxQxP, query_scale, softcap)
        weight = jnp.exp(scores - total_BxKxGQx1)
        of_weight = jnp.einsum("BKRH,BKPH->BKRP", g_BxKxGQxH, v_BxKxPxH, preferred_element_type=f32)
        of_score = (weight * (of_weight - mean_BxKxGQx1) * slope).astype(k.dtype)
        weight = weight.astype(v.dtype)
        of_v = jnp.einsum("BKRP,BKRH->BKPH", weight, g_BxKxGQxH, preferred_element_type=f32)
        of_k = jnp.einsum("BKRP,BKRH->BKPH", of_score, scaled, preferred_element_type=f32)
        of_q = jnp.einsum("BKRP,BKPH->BKRH", of_score, k_BxKxPxH, preferred_element_type=f32)
        of_q_BxQxNxH = ungrouped(of_q / math.sqrt(query_scale or q.shape[-1]), size).astype(q.dtype)
        return (sums[0] + of_k, sums[1] + of_v), of_q_BxQxNxH

    of_q, of_k, of_v = [], jnp.zeros(k.shape, f32), jnp.zeros(v.shape, f32)
    for start, size, count, keys in _runs(q.shape[1]):
        sums = of_k[:, :, :keys], of_v[:, :, :keys]
        if count == 1:
            sums, part = one(sums, start, size, keys)
        else:
            starts = start + size * jnp.arange(count)
            sums, parts = jax.lax.scan(functools.partial(one, size=size, keys=keys), sums, starts)
            part = jnp.moveaxis(parts, 0, 1).reshape(q.shape[0], count * size, *q.shape[2:])
        of_q.append(part)
        of_k, of_v = of_k.at[:, :, :keys].set(sums[0]), of_v.at[:, :, :keys].set(sums[1])
    none = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), may_attend)
    return jnp.concatenate(of_q, axis=1), of_k.astype(k.dtype), of_v.astype(v.dtype), none


attend_to_earlier.defvjp(_forward, _backward)


def _flat(x_BxKxGxQ: Array) -> Array:
    return x_BxKxGxQ.reshape(*x_BxKxGxQ.shape[:2], -1)


def _runs(length: int) -> Iterator[tuple[int, int, int, int]]:
    """Spans of queries as runs of blocks: first query, block, number of blocks, keys.

    >>> list(_runs(65))
    [(0, 64, 1, 64), (64, 1, 1, 65)]
    >>> list(_runs(2048))[:2], list(_runs(1100))[-2:]
    ([(0, 128, 2, 256), (256, 128, 2, 512)], [(828, 69, 2, 966), (966, 67, 2, 1100)])
    """
    span = max(SHORT, ceil_div(length, SPANS))
    for start in range(0, length, span):
        end = min(length, start + span)
        count = ceil_div(end - start, BLOCK)
        size = ceil_div(end - start, count)
        whole = (end - start) // size
        yield start, size, whole, start + whole * size if whole < count else end
        if whole < count:
            yield start + whole * size, end - start - whole * size, 1, end
