"""Weights in int8, to decode: a matrix as whole numbers and a float32 scale for each of its columns.

A column is what one output sums over: of a layer's matrix all that it contracts, of an embedding one id's row,
of a head one id's column. Rounding is to nearest, symmetric about zero: w is about q * scale, |q| <= 127. A
decode step reads half the bytes that bfloat16 takes; products are in the model's dtype, scales come after the
sums (`layers.dense`). Norms and biases stay.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pasta_jax import sharding
from pasta_jax.arrays import Array
from pasta_jax.model.config import ModelConfig

LARGEST = 127

TINIEST = 1e-30
"""A column without a larger entry is zeros: its scale might be too small for a float."""


def contracted(name: str) -> tuple[int, ...] | None:
    """Along which dimensions a parameter's outputs sum; None for those that are not quantised.

    >>> contracted("o_proj"), contracted("embedding"), contracted("head"), contracted("q_proj_bias")
    ((0, 1), (1,), (0,), None)
    """
    if name in sharding.MATRICES:
        return tuple(range(len(sharding.MATRICES[name][0])))
    return {"embedding": (1,), "head": (0,)}.get(name)


def quantize_leaf(name: str, array: Any) -> dict[str, Any]:
    """A parameter in int8: {name: int8, name_scale: float32}; or {name: array} of one that stays.

    NumPy arrays give NumPy arrays, jax arrays are quantised where they lie; what is int8 already stays.
    """
    over = contracted(name)
    if over is None or array.dtype == np.int8:
        return {name: array}
    if isinstance(array, np.ndarray):
        whole, scale = _quantized(np, array, over)
    else:
        whole, scale = _on_device(name, array)(array)
    return {name: whole, f"{name}_scale": scale}


def quantize(params: Any, config: ModelConfig, *, donate: bool = False) -> tuple[Any, ModelConfig]:
    """All parameters, leaf by leaf, and the configuration that goes with them.

    Args:
      params: plain weights, adapters merged.
      config: theirs.
      donate: free each array of `params` once it is quantised; they may not be touched again. So never more
        than the model and one leaf is held.
    """

    def below(tree: Any) -> Any:
        found: dict[str, Any] = {}
        for name, value in tree.items():
            if isinstance(value, dict):
                found[name] = below(value)
                continue
            made = quantize_leaf(name, value)
            if donate and made[name] is not value and isinstance(value, jax.Array):
                jax.block_until_ready(made)
                value.delete()
            found |= made
        return found

    return below(params), dataclasses.replace(config, weights="int8")


def _quantized(xp: Any, array: Any, over: tuple[int, ...]) -> tuple[Any, Any]:
    values = array.astype(xp.float32)
    largest = xp.max(xp.abs(values), axis=over, keepdims=True)
    is_zero = largest <= TINIEST
    # A product, for quotients round differently on other machines.
    steps = xp.where(is_zero, 0.0, LARGEST / xp.where(is_zero, 1.0, largest)).astype(xp.float32)
    scale = xp.where(is_zero, 1.0, largest / LARGEST).astype(xp.float32)
    return xp.rint(values * steps).astype(xp.int8), xp.squeeze(scale, axis=over)


def _on_device(name: str, array: Array) -> Callable[[Array], tuple[Array, Array]]:
    places = array.sharding if isinstance(array, jax.Array) else None
    return _compiled(name, array.shape, places)


@functools.lru_cache(maxsize=64)
def _compiled(name: str, shape: tuple[int, ...], places: Any) -> Callable[[Array], tuple[Array, Array]]:
    """Jitted once for all layers alike; the scale lies with its columns."""
    over = contracted(name)
    assert over is not None
    out: Any = None
    if isinstance(places, jax.sharding.NamedSharding):
        columns = tuple(size for axis, size in enumerate(shape) if axis not in over)
        dims = sharding.PARAMETERS[f"{name}_scale"]
        out = (places, sharding.sharding(dims, columns, places.mesh))
    return jax.jit(functools.partial(_quantized, jnp, over=over), out_shardings=out)
