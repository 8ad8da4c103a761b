"""Weights with their outputs first, to decode on a CPU (`layers.project_transposed` says why)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax

from pasta_jax.model.config import DENSE, ModelConfig
from pasta_jax.model.quantize import contracted


def transpose(params: Any, config: ModelConfig) -> tuple[Any, ModelConfig]:
    """All parameters, each matrix [contracted..., outputs...] as [outputs..., contracted...]; and their config.

    Args:
      params: plain weights, adapters merged. They stay as they are: both are held in memory.
      config: theirs.

    Raises:
      ValueError: weights that are not plain.
    """
    if config.weights != "plain" or config.fused_qkv:
        raise ValueError(f"weights={config.weights!r}: only plain weights are transposed.")

    def place(path: Any, leaf: Any) -> Any:
        name = path[-1].key
        return _turn(leaf, len(contracted(name) or ())) if name in (*DENSE, "head") else leaf

    return jax.tree_util.tree_map_with_path(place, params), dataclasses.replace(config, weights="transposed")


@functools.partial(jax.jit, static_argnums=1)
def _turn(matrix: jax.Array, inner: int) -> jax.Array:
    return matrix.transpose(*range(inner, matrix.ndim), *range(inner))
