"""Models to measure: random weights of named sizes, which cost as much to run as trained ones."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pasta_jax.decoding.model import Model
from pasta_jax.loading import in_dtype, load
from pasta_jax.model import ModelConfig, init_params
from pasta_jax.model.presets import preset
from pasta_jax.testing import WordTokenizer
from pasta_jax.tokens.tokenizer import Vocabulary

NAMED = {
    "tiny": ModelConfig(),
    "300m": ModelConfig(
        vocab_size=32_000, num_layers=24, model_dim=1024, num_heads=16, num_kv_heads=8, head_dim=64, mlp_dim=2816,
        norm_eps=1e-5, activation="silu", norm_offset=0.0, embed_scale=False,
    ),
    "gemma25m": dataclasses.replace(
        preset("gemma-2-2b").config, vocab_size=24_576, num_layers=6, model_dim=384, num_heads=6, num_kv_heads=3,
        head_dim=64, query_scale=64, mlp_dim=1536, dtype="float32",
    ),
    "gemma7b": preset("gemma-7b").config,
}  # fmt: skip
"""Sizes by name: the tiny model, one of Llama's shape, a small one of Gemma 2's, and a published one."""

MAX_DEPTH = 3


def model_of(name: str, dtype: str | None = None, texts: Sequence[str] = ()) -> Model:
    """A model with random weights, or what `load` returns.

    Args:
      name: a size in NAMED, for random weights; else a path for `load`.
      dtype: as for `load`.
      texts: for random weights, texts whose words the tokenizer must know.
    """
    if name not in NAMED or os.path.exists(name):
        return load(name, dtype=dtype)
    config = in_dtype(NAMED[name], dtype)
    tokenizer = WordTokenizer(*texts, vocab_size=config.vocab_size)
    params = init_params(config, jax.random.key(0))
    return Model(silent(params, config, tokenizer.vocabulary), config, tokenizer, max_depth=MAX_DEPTH)


def silent(params: dict[str, Any], config: ModelConfig, vocabulary: Vocabulary) -> dict[str, Any]:
    """The same weights, but they write no tag and end no answer unless a script forces them to.

    The logits of those ids are zero, and among so many others one is always larger.
    """
    special = jnp.array([*vocabulary.tag_ids.values(), *vocabulary.stops, *vocabulary.control])
    if config.tie_embeddings:
        embedding = jnp.asarray(params["embed"]["embedding"]).at[special].set(0)
        return {**params, "embed": {**params["embed"], "embedding": embedding}}
    return {**params, "head": jnp.asarray(params["head"]).at[:, special].set(0)}
