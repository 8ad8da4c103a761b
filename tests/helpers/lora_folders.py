"""Adapters beside a small imported model, random instead of trained."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasta_jax.checkpoints.about import BaseWeights
from pasta_jax.checkpoints.fingerprint import fingerprint
from pasta_jax.checkpoints.save import Checkpoints
from pasta_jax.config import Config
from pasta_jax.interchange.origin import carry
from pasta_jax.model import Lora, ModelConfig, Transformer, init_params
from pasta_jax.model.lora import split
from pasta_jax.tokens.base import TextTokenizer
from pasta_jax.training.state import TrainState
from tests.helpers.conversion import bring_in
from tests.helpers.hf_folders import CONFIGS, write_hf_folder


def imported(
    family: str, folder: pathlib.Path, rows: bool = True
) -> tuple[Config, TextTokenizer, dict[str, Any], dict[str, Any]]:
    """A published model brought in to FOLDER/W, and random adapters beside it."""
    write_hf_folder(folder / "hf", CONFIGS[family], dtype=np.float32)
    ready, base = bring_in(folder / "hf", folder / "W")
    tokenizer = ready.tokenizer
    assert isinstance(tokenizer, TextTokenizer)
    ids = tuple(tokenizer.vocabulary.tag_ids.values()) if rows else ()
    config = Config(model=ready.config, lora=Lora(rank=3, alpha=12.0, rows=ids), init_from=str(folder / "W"))
    shapes = jax.eval_shape(lambda: init_params(config.model, jax.random.key(0), config.lora))
    rng = np.random.default_rng(5)
    adapters = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape, scale=0.1), x.dtype), split(shapes)[1]
    )
    return config, tokenizer, base, adapters


def save(workdir: pathlib.Path, config: Config, tokenizer: Any, base: Any, adapters: Any) -> None:
    """A workdir of adapters after three steps beside the base in config.init_from."""
    with Checkpoints(workdir, config, tokenizer) as checkpoints:
        state = TrainState(adapters, {"count": jnp.zeros(())}, jnp.int32(3))
        checkpoints.save(state, 0, BaseWeights(config.init_from, fingerprint(base)))
    carry(config.init_from, workdir)


def logits_here(model: ModelConfig, lora: Lora, params: Any, tokens: np.ndarray) -> np.ndarray:
    transformer = Transformer(model, lora)
    n = tokens.shape[1]
    positions, causal = np.arange(n)[None], np.tril(np.ones((1, n, n), bool))
    hidden: Any = transformer.apply({"params": params}, tokens, positions, causal)
    return np.asarray(transformer.apply({"params": params}, hidden[0], method="logits"))


def peft_or_skip() -> tuple[Any, Any, Any]:
    return tuple(pytest.importorskip(name) for name in ("torch", "transformers", "peft"))


def some_tokens(config: ModelConfig, ids: Sequence[int]) -> np.ndarray:
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (1, 24))
    tokens[0, ::4] = ids[:6]
    return tokens
