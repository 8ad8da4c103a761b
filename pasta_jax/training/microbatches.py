"""A batch worked through in parts, so that memory is needed for one: the parts' sums are those of the whole."""

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
    """Where a batch lies of which each part is to be spread over all devices.

    Raises:
      ValueError: the devices do not divide the rows of a part.
    """
    try:
        return sharding.batch_sharding(mesh, rows // parts)
    except ValueError as error:
        if parts == 1:
            raise
        said = f"each of {parts} microbatches has {rows // parts} of {rows} rows, over all devices: {error}"
        raise ValueError(said) from error


def split_rows(fields: Fields, parts: int, mesh: Any) -> Fields:
    """[B, L, ...] to [parts, B / parts, L, ...]; the rows of each part are spread over the mesh, if any."""

    def split(value: Array) -> Array:
        value = value.reshape(parts, -1, *value.shape[1:])
        if mesh is None:
            return value
        over_rows = sharding.batch_sharding(mesh).spec
        lies = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, *over_rows))
        return jax.lax.with_sharding_constraint(value, lies)

    return jax.tree.map(split, fields)


def sum_over_parts(
    of_part: Callable[[Fields], T], fields: Fields, parts: int, mesh: Any, placed: Callable[[T], T]
) -> T:
    """The sum of a function of each part; what is a fraction is added up in float32.

    Args:
      of_part: from the fields of a part, [B / parts, L, ...], to a tree of arrays.
      fields: of the batch.
      parts: how many; with one it is the function itself.
      mesh: as in `split_rows`.
      placed: constrains where the sums lie while they are added up.
    """
    if parts == 1:
        return of_part(fields)
    split = split_rows(fields, parts, mesh)

    def nothing(like: Any) -> Array:
        return jnp.zeros(like.shape, jnp.float32 if jnp.issubdtype(like.dtype, jnp.floating) else like.dtype)

    def add(total: T, part: Fields) -> tuple[T, None]:
        return placed(jax.tree.map(lambda a, b: (a + b).astype(a.dtype), total, of_part(part))), None

    first = jax.tree.map(lambda value: value[0], split)
    zeros = jax.tree.map(nothing, jax.eval_shape(of_part, first))
    return jax.lax.scan(add, placed(zeros), split)[0]


def map_parts(of_part: Callable[[Fields], Array], fields: Fields, parts: int, mesh: Any) -> Array:
    """A function of rows, part by part: [B, ...]."""
    if parts == 1:
        return of_part(fields)
    found = jax.lax.map(of_part, split_rows(fields, parts, mesh))
    return found.reshape(-1, *found.shape[2:])
