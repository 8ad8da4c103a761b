"""A random model that likes tags, so that its answers have many threads."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pasta_jax.arrays import NO_DOC, NO_TARGET
from pasta_jax.decoding.engine import Decoder
from pasta_jax.decoding.model import Model
from pasta_jax.decoding.state import Limits
from pasta_jax.decoding.trace import Trace, as_document
from pasta_jax.lang import tags
from pasta_jax.model import ModelConfig, Transformer, init_params
from pasta_jax.testing import WordTokenizer
from pasta_jax.visibility import visible

WORDS = WordTokenizer("rivers and cities of the world")


PROMPTS = ("rivers", "cities of the world", "the", "and the rivers", "world")


@functools.cache
def chatty_model() -> Model:
    """A random model that loves tags: what it writes is nonsense, in many threads."""
    config = ModelConfig(
        vocab_size=len(WORDS.vocabulary) + 1, num_layers=2, model_dim=32, num_heads=4, num_kv_heads=2, head_dim=8,
        mlp_dim=64, tie_embeddings=False, layer_kinds=("local", "global"), sliding_window=25,
    )  # fmt: skip
    params = init_params(config, jax.random.key(3))
    # The head has no bias, so favour the tag pieces through one direction of the final norm's output.
    head = np.array(params["head"])
    head *= 0.35
    for piece, weight in ((tags.PROMISE_OPEN, 3.0), (tags.PROMISE_TOKENS, 6.0), (tags.PROMISE_CLOSE, 9.0)):
        head[:, WORDS.vocabulary.tag_ids[piece]] *= weight
    for piece, weight in ((tags.SYNC, 8.0), (tags.ASYNC_CLOSE, 9.0)):
        head[:, WORDS.vocabulary.tag_ids[piece]] *= weight
    head[:, WORDS.vocabulary.eos] *= 9.0
    return Model({**params, "head": jnp.asarray(head)}, config, WORDS)


def ids(prompt: str) -> list[int]:
    return WORDS.encode_prompt(prompt)


LIMITS = Limits(lanes=4, threads=8, pool=120)


@functools.cache
def decoder(rows: int = 6) -> Decoder:
    """Of small sizes, for requests side by side and alone."""
    return Decoder(chatty_model(), limits=LIMITS, rows=rows, chunk=16, prompt_buckets=(16,), widths=())


LENGTH = 320
"""Of the rows that traces are fed in: one length, one program."""


def once_through(model: Model, trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """The logits of the trace fed at once as a training row, and its targets: [n, V], [n]."""
    document = as_document(trace)
    size = -len(document) % LENGTH
    padded = {
        name: np.pad(array, [(0, size)] + [(0, 0)] * (array.ndim - 1))
        for name, array in document.fields().items()
    }
    padded["target"][len(document) :] = NO_TARGET
    assert (padded["doc"][len(document) :] == NO_DOC).all()
    row = dataclasses.replace(document, **{k: v[None] for k, v in padded.items()})
    logits = whole_pass(model.config)(model.params, row.token, row.position, visible(row, row))
    return np.asarray(logits)[0, : len(document)], document.target


@functools.cache
def whole_pass(config: ModelConfig) -> Any:
    """Logits of a training row, from parameters, tokens, positions and visibility."""
    transformer = Transformer(config)

    @jax.jit
    def run(params: Any, *row: Any) -> Any:
        hidden, _ = transformer.apply({"params": params}, *row)
        return transformer.apply({"params": params}, hidden, method="logits")

    return run


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """In numpy, which compiles nothing for each length."""
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
