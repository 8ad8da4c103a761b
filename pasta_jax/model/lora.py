"""Adapters as functions of the plain nested dict of parameters: set apart, begun, and merged into the weights.

An adapter is a leaf beside a matrix W: `name_lora_a` (A) and `name_lora_b` (B), for W + alpha / rank * A B
(Hu et al. 2021); or `embedding_rows` and `head_rows`, which take the place of some vocabulary ids' rows in
embedding and head. Everything here works on arrays wherever they lie.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pasta_jax.arrays import Array
from pasta_jax.model.config import Lora
from pasta_jax.sharding import MATRICES

Params = Any
"""A nested dict of arrays with stable names."""

SUFFIXES = ("_lora_a", "_lora_b", "_rows")
"""How the names of adapters end; no other parameter's do."""

TABLES = {"embedding": 0, "head": 1}
"""Names of what has vocabulary ids, and along which dimension."""

ALIKE, NOISE = 0.05, 0.1
"""Rows nearer to each other than ALIKE get noise of NOISE; both times the root mean square of the table."""


def split(params: Params) -> tuple[Params, Params]:
    """The weights that stay as they are, and the adapters: two nested dicts, for `join`.

    >>> split({"mlp": {"up_proj": 1, "up_proj_lora_a": 2}, "norm": {"scale": 3}})
    ({'mlp': {'up_proj': 1}, 'norm': {'scale': 3}}, {'mlp': {'up_proj_lora_a': 2}})
    """
    frozen: dict[str, Any] = {}
    trained: dict[str, Any] = {}
    for name, value in params.items():
        if not isinstance(value, dict):
            (trained if name.endswith(SUFFIXES) else frozen)[name] = value
            continue
        for side, below in zip((frozen, trained), split(value), strict=True):
            if below:
                side[name] = below
    return frozen, trained


def join(frozen: Params, trained: Params) -> Params:
    """The way back from `split`."""
    joined = {**frozen, **trained}
    for name in frozen.keys() & trained.keys():
        joined[name] = join(frozen[name], trained[name])
    return joined


def start(base: Params, lora: Lora, key: Array, dtype: Any = None) -> Params:
    """Adapters that change nothing: A is random, B zero, the rows are copies of the table's own.

    Rows that are nearly alike (those of reserved ids, never trained, often are) would be learnt alike, and tags
    could not be told apart. Such rows get noise of a tenth of their table's scale: that is the one change.

    Args:
      base: plain weights, whose names and shapes say where adapters go.
      lora: their rank, targets and rows.
      key: the same one gives the same adapters, whatever mesh the weights lie on.
      dtype: of the adapters; by default each as its matrix.

    Raises:
      ValueError: none of the targets is there, or weights in int8.
    """

    def begin(below: Params, path: str) -> Params:
        adapters: dict[str, Any] = {}
        for name, value in below.items():
            here = jax.random.fold_in(key, zlib.crc32(f"{path}/{name}".encode()))
            if isinstance(value, dict):
                if made := begin(value, f"{path}/{name}"):
                    adapters[name] = made
            elif name in lora.targets:
                _check_plain(name, value)
                rows, columns = _split_shape(name, value.shape)
                kind = dtype or value.dtype
                a = jax.random.normal(here, (*rows, lora.rank)) * math.prod(rows) ** -0.5
                adapters[f"{name}_lora_a"] = a.astype(kind)
                adapters[f"{name}_lora_b"] = jnp.zeros((lora.rank, *columns), kind)
            elif name in TABLES and lora.rows:
                _check_plain(name, value)
                rows = _rows_apart(value, TABLES[name], lora.rows, here)
                adapters[f"{name}_rows"] = rows.astype(dtype or value.dtype)
        return adapters

    adapters = begin(base, "")
    if not any(name.endswith("_lora_a") for name in _names(adapters)):
        raise ValueError(f"None of the targets {', '.join(lora.targets)} is among the weights.")
    return adapters


def merge(params: Params, lora: Lora, *, dtype: Any = None, donate: bool = False) -> Params:
    """Plain weights that do what the weights and their adapters do: sums in float32, then cast.

    Leaf by leaf, each where it lies, so that with `donate` never more than one is held twice.

    Args:
      params: weights and adapters together, as `join` gives them.
      lora: what the adapters were trained with.
      dtype: of the result; by default each as it was.
      donate: use up the arrays in `params`, which may not be touched again.

    Raises:
      ValueError: weights in int8.
    """
    used = (0,) if donate else ()

    @functools.partial(jax.jit, donate_argnums=used, static_argnames="kind")
    def add(matrix: Array, a: Array, b: Array, kind: Any) -> Array:
        rank, inner = a.shape[-1], a.ndim - 1
        a32, b32 = a.astype(jnp.float32).reshape(-1, rank), b.astype(jnp.float32).reshape(rank, -1)
        product = jnp.matmul(a32, b32, precision=jax.lax.Precision.HIGHEST).reshape(
            *a.shape[:-1], *b.shape[1:]
        )
        assert product.ndim == matrix.ndim == inner + b.ndim - 1
        return (matrix.astype(jnp.float32) + lora.alpha / lora.rank * product).astype(kind)

    @functools.partial(jax.jit, donate_argnums=used, static_argnames=("kind", "axis"))
    def put(table: Array, rows: Array, kind: Any, axis: int) -> Array:
        table, ids = table.astype(kind), jnp.array(lora.rows)
        return table.at[(slice(None),) * axis + (ids,)].set(rows.astype(kind))

    @functools.partial(jax.jit, donate_argnums=used, static_argnames="kind")
    def cast(leaf: Array, kind: Any) -> Array:
        return leaf.astype(kind)

    def plain(below: Params) -> Params:
        merged = {}
        for name, value in below.items():
            if isinstance(value, dict):
                merged[name] = plain(value)
                continue
            if name.endswith(SUFFIXES):
                continue
            kind = jnp.dtype(dtype or value.dtype)
            if f"{name}_lora_a" in below:
                _check_plain(name, value)
                made = add(value, below[f"{name}_lora_a"], below[f"{name}_lora_b"], kind)
            elif f"{name}_rows" in below:
                _check_plain(name, value)
                made = put(value, below[f"{name}_rows"], kind, TABLES[name])
            else:
                made = value if kind == value.dtype else cast(value, kind)
            merged[name] = _placed_like(made, value)
        return merged

    return plain(params)


def _placed_like(made: Any, value: Any) -> Any:
    """Where `value` lay: the compiler need not have left it there."""
    return jax.device_put(made, value.sharding) if isinstance(value, jax.Array) else made


def _rows_apart(table: Array, axis: int, rows: tuple[int, ...], key: Array) -> Array:
    """Copies of a table's rows, float32, those that have a twin among them with noise."""
    own = jnp.take(table, jnp.array(rows), axis=axis).astype(jnp.float32)
    scale = jnp.sqrt(jnp.mean(jnp.square(table.astype(jnp.float32))))
    flat = own if axis == 0 else own.T
    apart = jnp.sqrt(jnp.mean(jnp.square(flat[:, None] - flat[None]), axis=-1))
    has_twin = jnp.any((apart < ALIKE * scale) & ~jnp.eye(len(rows), dtype=bool), axis=-1)
    noise = jnp.where(has_twin[:, None], NOISE * scale * jax.random.normal(key, flat.shape), 0.0)
    return own + (noise if axis == 0 else noise.T)


def _split_shape(name: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the matrix contracts, and what it makes."""
    inner = len(MATRICES[name][0])
    return shape[:inner], shape[inner:]


def _check_plain(name: str, value: Any) -> None:
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(
            f"{name} is {value.dtype}: adapters go with plain weights. Quantise after merging them."
        )


def _names(tree: Params) -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _names(value)
        else:
            yield name
