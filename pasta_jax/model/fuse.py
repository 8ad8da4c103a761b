"""Queries, keys and values by one matrix, to decode on an accelerator (docs/lab-log.md says why)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from pasta_jax.model.config import ModelConfig

PARTS = ("q_proj", "k_proj", "v_proj")


def fuse(params: Any, config: ModelConfig) -> tuple[Any, ModelConfig]:
    """The parameters with each layer's q, k and v side by side as `qkv_proj` [D, (N + 2 K) H]; and their config.

    Args:
      params: plain or int8 weights, adapters merged. All but these three of a layer are shared with the result.
      config: theirs.

    Raises:
      ValueError: weights that are fused already, or transposed.
    """
    if config.fused_qkv or config.weights == "transposed":
        raise ValueError(f"weights={config.weights!r}, fused_qkv={config.fused_qkv}: nothing to fuse.")

    def below(tree: dict[str, Any]) -> dict[str, Any]:
        fused = dict(tree)
        for end, rows in (("", (config.model_dim,)), ("_scale", ())):
            parts = [fused.pop(name + end) for name in PARTS if name + end in tree]
            if parts:
                fused["qkv_proj" + end] = jnp.concatenate(
                    [jnp.reshape(x, (*rows, -1)) for x in parts], axis=-1
                )
        return {name: below(leaf) if isinstance(leaf, dict) else leaf for name, leaf in fused.items()}

    return below(params), dataclasses.replace(config, fused_qkv=True)
