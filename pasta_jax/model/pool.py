"""The pool: the padded KV memory of a batch of rows, allocated once, written in decode order, never moved.

Which entry belongs to which thread is nobody's business here: `may_attend` says who reads what.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from pasta_jax.arrays import Array
from pasta_jax.model.config import ModelConfig


@functools.partial(jax.tree_util.register_dataclass, data_fields=["k", "v"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Pool:
    """Keys and values of every layer: Z arrays each, so that a step updates each of them in place.

    Heads come before entries, as attention multiplies them: no step transposes what it reads.
    """

    k: tuple[Array, ...]  # Z times [B, K, P, H], compute dtype; rotary positions already applied
    v: tuple[Array, ...]  # Z times [B, K, P, H], compute dtype


def empty_pool(config: ModelConfig, rows: int, entries: int) -> Pool:
    """A pool of `rows` rows with `entries` entries each, all zero."""
    shape = (rows, config.num_kv_heads, entries, config.head_dim)
    k, v = (tuple(jnp.zeros(shape, config.dtype) for _ in range(config.num_layers)) for _ in range(2))
    return Pool(k, v)


def write(pool_BxKxPxH: Array, new_BxKxQxH: Array, start_B: Array) -> Array:
    """Entries start_B[b] .. start_B[b] + Q - 1 of each row b replaced by the new ones, in place under `jit`.

    Args:
      pool_BxKxPxH: keys or values of one layer.
      new_BxKxQxH: what this call made, same dtype.
      start_B: int32 [B], at most P - Q. There is no check: a larger one is moved back to P - Q and overwrites
        older entries, so leave room in the pool for a whole step.
    """
    if pool_BxKxPxH.shape[0] == 1:  # an update at one known place, where many rows need a scatter
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
