"""A batch computed in parts, to need memory for one only; the parts' sums add up to the batch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from pasta_jax import sharding
from pasta_jax.arrays import Array

T = TypeVar("T")
Fields = dict[str, Array]
"""The fields of a batch by name, [B, L, ...] each."""


def rows_sharding(mesh: Any, rows: int, parts: int) -> jax.sharding.NamedSharding:
    """The sharding of a batch of which each part is spread over all devices.

    Raises:
      ValueError: the devices do not divide the rows of a part.
    """
    try:
        return sharding.batch_sharding(mesh, rows // parts)
    except ValueError as error:
        if parts == 1:
            raise
        share = f"each of {parts} microbatches has {rows // parts} of {rows} rows"
        raise ValueError(f"{share}, over all devices: {error}") from error


def split_rows(fields: Fields, parts: int, mesh: Any) -> Fields:
    """[B, L, ...] to [parts, B / parts, L, ...]; the rows of each part are spread over the mesh, if any."""

    def split(value: Array) -> Array:
        value = value.reshape(parts, -1, *value.shape[1:])
        if mesh is None:
            return value
        over_rows = sharding.batch_sharding(mesh).spec
        spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, *over_rows))
        return jax.lax.with_sharding_constraint(value, spread)

    return jax.tree.map(split, fields)


def sum_over_parts(
    of_part: Callable[[Fields], T], fields: Fields, parts: int, mesh: Any, constrain: Callable[[T], T]
) -> T:
    """The sum of a function over the parts; floating-point values are added up in float32.

    Args:
      of_part: from the fields of a part, [B / parts, L, ...], to a tree of arrays.
      fields: of the batch.
      parts: how many; with one it is the function itself.
      mesh: as in `split_rows`.
      constrain: sets the sharding of the sums while they are added up.
    """
    if parts == 1:
        return of_part(fields)
    split = split_rows(fields, parts, mesh)

    def nothing(like: Any) -> Array:
        return jnp.zeros(like.shape, jnp.float32 if jnp.issubdtype(like.dtype, jnp.floating) else like.dtype)

    def add(total: T, part: Fields) -> tuple[T, None]:
        return constrain(jax.tree.map(lambda a, b: (a + b).astype(a.dtype), total, of_part(part))), None

    first = jax.tree.map(lambda value: value[0], split)
    zeros = jax.tree.map(nothing, jax.eval_shape(of_part, first))
    return jax.lax.scan(add, constrain(zeros), split)[0]


def map_parts(of_part: Callable[[Fields], T], fields: Fields, parts: int, mesh: Any) -> T:
    """A function of rows, part by part: a tree of arrays [B, ...]."""
    if parts == 1:
        return of_part(fields)
    parts_of_rows = jax.lax.map(of_part, split_rows(fields, parts, mesh))
    return jax.tree.map(lambda rows: rows.reshape(-1, *rows.shape[2:]), parts_of_rows)
