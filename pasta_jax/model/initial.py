"""How parameters start, and the programs that make them: one for each kind of leaf, whatever the number of layers.

A program of all leaves at once takes XLA minutes on a GPU. Leaf by leaf, a model has about ten kinds, and each leaf
is where it belongs from the start. The key of a leaf is folded from its path, as `Module.init` of flax does it, so
its values depend on no other leaf.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pasta_jax.arrays import Array
from pasta_jax.model.config import ModelConfig
from pasta_jax.sharding import MATRICES


@dataclasses.dataclass(frozen=True)
class Initial:
    """An initializer that flax takes: a normal distribution of this deviation, or without one a constant."""

    deviation: float = 0.0
    constant: float = 0.0

    def __call__(self, key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        if self.deviation:
            return nn.initializers.normal(self.deviation)(key, shape, dtype)
        return jnp.full(shape, self.constant, dtype)


def initial(config: ModelConfig, name: str, shape: tuple[int, ...]) -> Initial:
    """How the parameter of this name and shape starts. Biases, B of adapters and rows of theirs are zero."""
    if name in ("scale", "q_norm", "k_norm"):  # norms multiply by one
        return Initial(constant=1.0 - config.norm_offset)
    if name in ("embedding", "head"):
        return Initial(deviation=config.model_dim**-0.5)
    matrix = name.removesuffix("_lora_a")
    if matrix not in MATRICES:
        return Initial()
    fan_in = math.prod(shape[: len(MATRICES[matrix][0])])
    # What is added to the residual stream starts so small that 2 Z such sums leave its variance as it is.
    sums = 2 * config.num_layers if name in ("o_proj", "down_proj") else 1
    return Initial(deviation=(fan_in * sums) ** -0.5)


def fold_of(path: tuple[str, ...], number: int) -> int:
    """What is folded into the key for a parameter: of its path, and its number in its module, counted from 1."""
    data = "".join(path[:-1]).encode() + bytes([number])
    return int.from_bytes(hashlib.sha1(data).digest()[:4], "big")


def new_leaf(
    how: Initial, key: Array, fold: int, shape: tuple[int, ...], dtype: Any, sharding: Any = None
) -> Array:
    """A new parameter, made where `sharding` says, by a program that serves all leaves of its kind."""
    return leaf_program(sharding)(key, np.uint32(fold), how, shape, jnp.dtype(dtype))


def leaf_program(sharding: Any) -> Any:
    """The jitted function of `new_leaf`. The same function each time, so jax reuses what it compiled."""
    return jax.jit(_leaf, static_argnums=(2, 3, 4), out_shardings=sharding)


def _leaf(key: Array, fold: Array, how: Initial, shape: tuple[int, ...], dtype: Any) -> Array:
    return how(jax.random.fold_in(key, fold), shape, dtype)
