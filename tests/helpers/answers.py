"""Answers of `pasta_jax.decode` by a small random model."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pasta_jax
from pasta_jax.lang import tags
from pasta_jax.model import ModelConfig, init_params
from pasta_jax.testing import WordTokenizer

WORDS = WordTokenizer("rivers and cities of the world")


PROMPT, OTHER = "rivers", "cities of the world"


SEEDS = range(2, 8)


@functools.cache
def model() -> pasta_jax.Model:
    """Random, and fond of tags: what it writes is nonsense, in several threads."""
    config = ModelConfig(
        vocab_size=len(WORDS.vocabulary) + 1, num_layers=1, model_dim=32, num_heads=2, num_kv_heads=1, head_dim=8,
        mlp_dim=32, tie_embeddings=False,
    )  # fmt: skip
    params = init_params(config, jax.random.key(1))
    head = 0.35 * np.array(params["head"])
    for piece in tags.PIECES:
        head[:, WORDS.vocabulary.tag_ids[piece]] *= 3.0 if piece == tags.PROMISE_OPEN else 8.0
    head[:, WORDS.vocabulary.eos] *= 8.0
    return pasta_jax.Model({**params, "head": jnp.asarray(head)}, config, WORDS)


def options(**changes: Any) -> Any:
    return dict(max_new_tokens=100, max_branch_tokens=20, temperature=1.0, open_bias=3.5) | changes


@functools.cache
def results() -> list[pasta_jax.DecodeResult]:
    return [pasta_jax.decode(model(), PROMPT, **options(seed=seed)) for seed in SEEDS]


def what_was_said(result: pasta_jax.DecodeResult) -> tuple[Any, ...]:
    """All of a result but the time it took."""
    return result.annotated, result.tokens.tolist(), result.branches, result.stop_reason, result.issues
