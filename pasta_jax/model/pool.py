"""The pool: the padded KV cache of a batch of rows, allocated once, written in decode order, never moved.

It does not know which thread an entry belongs to: `may_attend` says who reads what.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from flax import struct

from pasta_jax.arrays import Array
from pasta_jax.model.config import ModelConfig


@struct.dataclass
class Pool:
    """Keys and values, one array for each layer, so that a step updates each of them in place.

    Heads come before entries, which is the order in which attention multiplies: no step transposes what it reads.
    """

    k: tuple[Array, ...]  # Z times [B, K, P, H], compute dtype; rotary positions already applied
    v: tuple[Array, ...]  # Z times [B, K, P, H], compute dtype


def empty_pool(config: ModelConfig, rows: int, entries: int) -> Pool:
    """A pool of `rows` rows with `entries` entries each, all zero."""
    shape = (rows, config.num_kv_heads, entries, config.head_dim)
    k, v = (tuple(jnp.zeros(shape, config.dtype) for _ in range(config.num_layers)) for _ in range(2))
    return Pool(k, v)


@jax.named_scope("write_pool")
def write(pool_BxKxPxH: Array, new_BxKxQxH: Array, start_B: Array) -> Array:
    """Replaces entries start_B[b] .. start_B[b] + Q - 1 of each row b; in place under `jit`.

    Args:
      pool_BxKxPxH: keys or values of one layer.
      new_BxKxQxH: those of this call's tokens, same dtype.
      start_B: int32 [B], at most P - Q. There is no check: a larger one is clamped to P - Q and overwrites older
        entries, so leave room in the pool for a whole step.
    """
    if pool_BxKxPxH.shape[0] == 1:  # a slice update, where several rows need a scatter
        pool_KxPxH, new_KxQxH = pool_BxKxPxH[0], new_BxKxQxH[0]
        return jax.lax.dynamic_update_slice_in_dim(pool_KxPxH, new_KxQxH, start_B[0], axis=1)[None]
    return jax.vmap(functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=1))(
        pool_BxKxPxH, new_BxKxQxH, start_B
    )


def pool_bytes(config: ModelConfig, rows: int, entries: int) -> int:
    """Memory of `empty_pool(config, rows, entries)`: keys and values, 2 Z B P K H numbers.

    >>> pool_bytes(ModelConfig(num_layers=4, num_kv_heads=1, head_dim=32), rows=1, entries=512)
    524288
    """
    per_layer = math.prod((rows, config.num_kv_heads, entries, config.head_dim))
    return 2 * config.num_layers * per_layer * jnp.dtype(config.dtype).itemsize
