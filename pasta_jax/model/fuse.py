"""Queries, keys and values by one matrix, to decode on an accelerator (docs/PERFORMANCE.md says why)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from pasta_jax.model.config import ModelConfig

PARTS = ("q_proj", "k_proj", "v_proj")


def fuse(params: Any, config: ModelConfig) -> tuple[Any, ModelConfig]:
    """The parameters with each layer's q, k and v side by side as `qkv_proj` [D, (N + 2 K) H]; and their config.

    Args:
      params: plain weights, adapters merged. All but these three of a layer are shared with the result.
      config: theirs.

    Raises:
      ValueError: weights that are not plain.
    """
    if config.weights != "plain":
        raise ValueError(f"weights={config.weights!r}: only plain weights are fused.")

    def below(tree: dict[str, Any]) -> dict[str, Any]:
        rest = {
            name: below(leaf) if isinstance(leaf, dict) else leaf
            for name, leaf in tree.items()
            if name not in PARTS
        }
        if PARTS[0] in tree:
            matrices = [jnp.reshape(tree[name], (config.model_dim, -1)) for name in PARTS]
            rest["qkv_proj"] = jnp.concatenate(matrices, axis=1)
        return rest

    return below(params), dataclasses.replace(config, weights="fused")
