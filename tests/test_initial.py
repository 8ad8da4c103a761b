"""New parameters: those of flax's own init, made by few programs, each leaf where it belongs."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasta_jax import sharding
from pasta_jax.model import Lora, ModelConfig, Transformer, init_params, param_shapes
from pasta_jax.model.initial import Initial, fold_of, leaf_program
from pasta_jax.model.lora import split, start
from tests.helpers import FULL, compilations, full, slow

SMALL = ModelConfig(vocab_size=40, num_layers=2, model_dim=8, num_heads=2, head_dim=4, mlp_dim=16)
ALL = dataclasses.replace(
    SMALL,
    tie_embeddings=False,
    qkv_bias=True,
    qk_norm=True,
    post_norms=True,
    norm_offset=0.0,
    dtype="bfloat16",
)
LORA = Lora(rank=2, rows=(3, 5))


def of_flax(config: ModelConfig, lora: Lora, key: Any) -> Any:
    token = jnp.zeros((1, 1), jnp.int32)
    return Transformer(config, lora).init(key, token, token, jnp.ones((1, 1, 1), bool))["params"]


@pytest.mark.parametrize("config", [full(SMALL), slow(ALL)], ids=["gemma", "all"])
def test_leaf_by_leaf_the_values_are_those_of_one_program(config: ModelConfig) -> None:
    """Bit for bit, so that a training from scratch repeats one of before."""
    for lora in (Lora(), LORA) if FULL else (LORA,):
        expected = jax.jit(functools.partial(of_flax, config, lora))(jax.random.key(7))
        found = init_params(config, jax.random.key(7), lora)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        described = jax.tree.map(lambda x: (x.shape, x.dtype), (found, param_shapes(config, lora)))
        assert described[0] == described[1] == jax.tree.map(lambda x: (x.shape, x.dtype), expected)


def test_keys_are_folded_as_ever() -> None:
    """They must not change with versions of flax."""
    assert fold_of(("embed", "embedding"), 1) == 173_047_674
    assert fold_of(("layer_11", "attn", "q_proj_lora_a"), 2) == 1_013_025_604


def test_deep_models_need_no_more_programs_than_shallow_ones() -> None:
    deep = dataclasses.replace(SMALL, num_layers=9, mlp_dim=24)
    with compilations() as first:
        params = init_params(deep, jax.random.key(0))
    with compilations() as again:
        init_params(deep, jax.random.key(1))
    kinds = {(leaf.shape, path[-1].key) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    assert len(first) <= len(kinds) + 2 < len(jax.tree.leaves(params)) / 6 and again == []


def test_a_leaf_is_made_where_it_belongs(seed: int) -> None:
    """No device ever holds the whole of one that is split; adapters keep the places they are given, too."""
    mesh = sharding.make_mesh(1, 4, 2)
    config = dataclasses.replace(SMALL, model_dim=16, num_kv_heads=2)
    places = sharding.param_shardings(param_shapes(config, LORA), mesh)
    params = init_params(config, jax.random.key(seed), LORA, places)
    for leaf, place in zip(jax.tree.leaves(params), jax.tree.leaves(places), strict=True):
        assert leaf.sharding == place
    alone = init_params(config, jax.random.key(seed), LORA)
    jax.tree.map(np.testing.assert_array_equal, params, alone)
    adapters = split(places)[1]
    trained = start(split(params)[0], LORA, jax.random.key(1), jnp.bfloat16, adapters)
    for leaf, place in zip(jax.tree.leaves(trained), jax.tree.leaves(adapters), strict=True):
        assert leaf.sharding == place and leaf.dtype == jnp.bfloat16


def test_the_program_of_a_leaf_holds_no_more_than_a_part() -> None:
    place = sharding.sharding("VD", (512, 256), sharding.make_mesh(1, 4, 2))
    whole = 512 * 256 * 4
    normal, dtype = Initial(deviation=1.0), jnp.dtype("float32")
    lowered = leaf_program(place).lower(jax.random.key(0), np.uint32(3), normal, (512, 256), dtype)
    memory = lowered.compile().memory_analysis()
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < 5 / 8 * whole  # five parts of eight
