"""Adapters as functions of the nested dict of parameters: split off, started, and merged into the weights.

An adapter is a leaf beside a matrix W: `name_lora_a` (A) and `name_lora_b` (B), for W + alpha / rank * A B
(Hu et al. 2021); or `embedding_rows` and `head_rows`, which replace the rows of some vocabulary ids in embedding
and head. All functions keep the sharding of what they get.
"""

from __future__ import annotations

import functools
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from pasta_jax.arrays import Array
from pasta_jax.model.config import Lora
from pasta_jax.model.forms import Params
from pasta_jax.model.initial import Initial, new_leaf
from pasta_jax.sharding import MATRICES

SUFFIXES = ("_lora_a", "_lora_b", "_rows")
"""The ends of adapters' names, and of no other parameter's."""

TABLES = {"embedding": 0, "head": 1}
"""Parameters with a vocabulary dimension, and which that is."""

ALIKE, NOISE = 0.05, 0.1
"""Rows closer than ALIKE get noise of size NOISE; both in units of the table's root mean square."""


def split(params: Params) -> tuple[Params, Params]:
    """The frozen weights and the adapters, as two nested dicts for `join`.

    >>> split({"mlp": {"up_proj": 1, "up_proj_lora_a": 2}, "norm": {"scale": 3}})
    ({'mlp': {'up_proj': 1}, 'norm': {'scale': 3}}, {'mlp': {'up_proj_lora_a': 2}})
    """
    flat = flatten_dict(params)
    frozen = {path: leaf for path, leaf in flat.items() if not path[-1].endswith(SUFFIXES)}
    trained = {path: leaf for path, leaf in flat.items() if path[-1].endswith(SUFFIXES)}
    return unflatten_dict(frozen), unflatten_dict(trained)


def join(frozen: Params, trained: Params) -> Params:
    """The inverse of `split`."""
    return unflatten_dict({**flatten_dict(frozen), **flatten_dict(trained)})


def start(base: Params, lora: Lora, key: Array, dtype: Any = None, shardings: Any = None) -> Params:
    """Adapters that change nothing: A is random, B is zero, and rows are copies of the table's own.

    Rows that are nearly alike (those of reserved ids, never trained, often are) would be learnt alike, and tags
    could not be told apart. The one exception: such rows get noise of a tenth of their table's scale.

    Args:
      base: plain weights, whose names and shapes say where adapters go.
      lora: their rank, targets and rows.
      key: the same key gives the same adapters, whatever the mesh.
      dtype: of the adapters; by default each has its matrix's.
      shardings: the tree of where each adapter is made.

    Raises:
      ValueError: the weights have none of the targets, or are in int8.
    """
    places, adapters = flatten_dict(shardings or {}), dict[tuple[str, ...], Array]()
    for path, leaf in flatten_dict(base).items():
        *parents, name = path
        fold, kind = zlib.crc32("".join(f"/{part}" for part in path).encode()), dtype or leaf.dtype
        if name in lora.targets:
            _check_plain(name, leaf)
            inner = len(MATRICES[name][0])
            rows, columns = leaf.shape[:inner], leaf.shape[inner:]
            a, b = (*parents, f"{name}_lora_a"), (*parents, f"{name}_lora_b")
            normal = Initial(deviation=math.prod(rows) ** -0.5)
            drawn = new_leaf(normal, key, fold, (*rows, lora.rank), jnp.float32, places.get(a))
            adapters[a] = drawn.astype(kind)
            adapters[b] = new_leaf(Initial(), key, fold, (lora.rank, *columns), kind, places.get(b))
        elif name in TABLES and lora.rows:
            _check_plain(name, leaf)
            own = (*parents, f"{name}_rows")
            copy = jax.jit(_distinct_rows, static_argnums=(1, 2), out_shardings=places.get(own))
            adapters[own] = copy(leaf, TABLES[name], lora.rows, key, np.uint32(fold)).astype(kind)
    if not any(path[-1].endswith("_lora_a") for path in adapters):
        raise ValueError(f"None of the targets {', '.join(lora.targets)} is among the weights.")
    return unflatten_dict(adapters)


def merge(params: Params, lora: Lora, *, dtype: Any = None, donate: bool = False) -> Params:
    """Plain weights that compute what the weights with their adapters do; summed in float32, then cast.

    It goes leaf by leaf, so that with `donate` never more than one leaf is held twice.

    Args:
      params: weights and adapters together, from `join`.
      lora: with which the adapters were trained.
      dtype: of the result; by default that of each weight.
      donate: use up the arrays in `params`, which may not be used again.

    Raises:
      ValueError: weights in int8.
    """
    donated = (0,) if donate else ()

    @functools.partial(jax.jit, donate_argnums=donated, static_argnames="kind")
    def add(matrix: Array, a: Array, b: Array, kind: Any) -> Array:
        rank = a.shape[-1]
        a32, b32 = a.astype(jnp.float32).reshape(-1, rank), b.astype(jnp.float32).reshape(rank, -1)
        product = jnp.matmul(a32, b32, precision=jax.lax.Precision.HIGHEST).reshape(matrix.shape)
        return (matrix.astype(jnp.float32) + lora.alpha / lora.rank * product).astype(kind)

    @functools.partial(jax.jit, donate_argnums=donated, static_argnames=("kind", "axis"))
    def put(table: Array, rows: Array, kind: Any, axis: int) -> Array:
        table, ids = table.astype(kind), jnp.array(lora.rows)
        return table.at[(slice(None),) * axis + (ids,)].set(rows.astype(kind))

    @functools.partial(jax.jit, donate_argnums=donated, static_argnames="kind")
    def cast(leaf: Array, kind: Any) -> Array:
        return leaf.astype(kind)

    flat = flatten_dict(params)
    merged: dict[tuple[str, ...], Any] = {}
    for path, leaf in flat.items():
        *parents, name = path
        if name.endswith(SUFFIXES):
            continue
        _check_plain(name, leaf)
        kind = jnp.dtype(dtype or leaf.dtype)
        a, b, rows = (flat.get((*parents, name + suffix)) for suffix in SUFFIXES)
        if a is not None:
            changed = add(leaf, a, b, kind)
        elif rows is not None:
            changed = put(leaf, rows, kind, TABLES[name])
        else:
            changed = leaf if kind == leaf.dtype else cast(leaf, kind)
        merged[path] = _placed_like(changed, leaf)
    return unflatten_dict(merged)


def _placed_like(array: Any, original: Any) -> Any:
    """With the original's sharding, which the compiler need not have kept."""
    return jax.device_put(array, original.sharding) if isinstance(original, jax.Array) else array


def _distinct_rows(table: Array, axis: int, rows: tuple[int, ...], key: Array, fold: Array) -> Array:
    """Copies of a table's rows, float32; those that are nearly alike with noise."""
    own = jnp.take(table, jnp.array(rows), axis=axis).astype(jnp.float32)
    scale = jnp.sqrt(jnp.mean(jnp.square(table.astype(jnp.float32))))
    flat = own if axis == 0 else own.T
    distance = jnp.sqrt(jnp.mean(jnp.square(flat[:, None] - flat[None]), axis=-1))
    has_twin = jnp.any((distance < ALIKE * scale) & ~jnp.eye(len(rows), dtype=bool), axis=-1)
    drawn = jax.random.normal(jax.random.fold_in(key, fold), flat.shape)
    noise = jnp.where(has_twin[:, None], NOISE * scale * drawn, 0.0)
    return own + (noise if axis == 0 else noise.T)


def _check_plain(name: str, leaf: Any) -> None:
    kind = getattr(leaf, "dtype", type(leaf).__name__)
    if isinstance(kind, str) or not jnp.issubdtype(kind, jnp.floating):
        raise ValueError(f"{name} is {kind}: adapters go with plain weights. Quantise after merging them.")
