"""Small models with random parameters, and inputs for them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pasta_jax.model import ModelConfig, RopeScaling, init_params

TINY = ModelConfig(
    vocab_size=48, num_layers=2, model_dim=16, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=32
)


LLAMA = dataclasses.replace(
    TINY, activation="silu", norm_offset=0.0, embed_scale=False, tie_embeddings=False, norm_eps=1e-5
)


GEMMA = dataclasses.replace(  # of all generations at once
    TINY,
    num_layers=3,
    post_norms=True,
    qk_norm=True,
    qkv_bias=True,
    query_scale=5.0,
    attn_softcap=3.0,
    final_softcap=4.0,
    sliding_window=120,
    layer_kinds=("local", "global"),
    local_rope_base=100.0,
    rope_scaling=RopeScaling("linear", factor=8.0),
)


def random_params(config: ModelConfig, rng: np.random.Generator) -> Any:
    """Parameters away from any special value (no norm scale is 0); no compiling."""
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), shapes)


def inputs(rng: np.random.Generator, rows: int, length: int) -> tuple[Any, Any, Any]:
    """Random tokens and positions, and random visibility among the past (itself always)."""
    tokens = rng.integers(0, TINY.vocab_size, (rows, length), np.int32)
    positions = rng.integers(0, 500, (rows, length), np.int32)
    may_attend = np.tril(rng.random((rows, length, length)) < 0.6) | np.eye(length, dtype=bool)
    return tokens, positions, may_attend
