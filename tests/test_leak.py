"""Law 4: d logits(q) / d embedding(k) is exactly zero iff q may not see k, through the whole model.

It tests visibility through the whole model, not the matrix builder: a leak in any layer would show.
"""

import dataclasses
import random
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasta_jax.model import ModelConfig, Transformer, empty_pool, forward, logits
from pasta_jax.model.transformer import Embed
from pasta_jax.visibility import visible
from tests.helpers import slow
from tests.helpers.models import random_params
from tests.helpers.trees import Writer, random_tree

CONFIG = ModelConfig(
    vocab_size=24, num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=32
)


def nested() -> Writer:
    """Two branches at once, one with a branch of its own, then a join of both and a third after it."""
    writer = Writer()
    main = writer.main
    main.write(2)
    one = main.fork()
    one.write(1)
    main.write(1)
    inner = one.fork()
    two = main.fork()
    for thread in (inner, two, one, main, inner):
        thread.write(1)
    one.join(inner)
    one.write(1)
    main.join(one, two)
    main.write(1)
    three = main.fork()
    main.write(1)
    three.write(1)
    main.join(three)
    main.write(1)
    return writer


def influence(
    may_attend: np.ndarray, seed: int, *, with_pool: bool, config: ModelConfig = CONFIG
) -> np.ndarray:
    """bool [Q, P]: whether the gradient of any logit of q reaches the embedding of k at all."""
    length = len(may_attend)
    rng = np.random.default_rng(seed)
    model, params = Transformer(config), random_params(config, rng)
    tokens = rng.integers(0, config.vocab_size, (1, length), np.int32)
    positions = 3 * rng.permutation(length).astype(np.int32)[None]  # any will do: visibility never reads them
    if config.sliding_window:
        positions = np.sort(positions)
    embedded = model.apply({"params": params}, tokens, method=lambda m, t: m.embed(t))
    memory = (empty_pool(config, 1, length + 4), jnp.zeros(1, jnp.int32), positions) if with_pool else ()

    weights_V = rng.normal(size=config.vocab_size).astype(np.float32)

    def logits_of(embedded: jax.Array) -> jax.Array:
        def with_embedded(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            embeds = isinstance(context.module, Embed) and context.method_name == "__call__"
            return embedded if embeds else call(*args, **kwargs)

        with nn.intercept_methods(with_embedded):
            hidden, _ = forward(model, params, tokens, positions, jnp.asarray(may_attend)[None], *memory)
        return logits(model, params, hidden)[0]

    def reaches(one_query: jax.Array) -> jax.Array:
        """Cotangents of one query's logits in, which embeddings they reach out: bool [P]."""
        _, pull = jax.vjp(logits_of, embedded)
        return jnp.any(pull(one_query[:, None] * weights_V)[0][0] != 0, axis=-1)

    # Not vmap: from about a hundred queries on, XLA for CPU (jax 0.10.2) gets some of its rows plainly wrong.
    return np.asarray(jax.jit(lambda ones: jax.lax.map(reaches, ones))(jnp.eye(length)))


@pytest.mark.parametrize("with_pool", [False, True], ids=["own tokens", "pool"])
def test_nothing_leaks_in_a_nested_program(with_pool: bool, seed: int) -> None:
    tokens = nested().tokens()
    may_attend = visible(tokens, tokens)
    past = np.tri(len(may_attend), k=-1, dtype=bool)
    assert may_attend[past].any() and not may_attend[past].all() and may_attend[-1].all()
    np.testing.assert_array_equal(influence(may_attend, seed, with_pool=with_pool), may_attend)


@pytest.mark.parametrize("case", [0, slow(1), slow(2)])
def test_nothing_leaks_in_random_programs(case: int, seed: int) -> None:
    rng = random.Random(seed + case)
    while True:
        writer, may_attend = random_tree(rng, threads=10)
        if len(may_attend) >= 20:
            break
    tokens = writer.tokens()
    np.testing.assert_array_equal(visible(tokens, tokens), may_attend)
    np.testing.assert_array_equal(influence(may_attend, seed, with_pool=case % 2 == 1), may_attend)


def test_nothing_leaks_between_blocks_of_queries(seed: int) -> None:
    """A whole pass of more than one block (`attend_to_earlier`)."""
    rng = random.Random(seed)
    while True:
        _, may_attend = random_tree(rng, threads=10, events=150)
        if len(may_attend) >= 70:
            break
    np.testing.assert_array_equal(influence(may_attend, seed, with_pool=False), may_attend)


@pytest.mark.parametrize("with_pool", [False, True], ids=["own tokens", "pool"])
def test_local_layers_see_the_window_of_their_own_position(with_pool: bool, seed: int) -> None:
    """Two layers, so what is just outside of the window may reach through what is in it."""
    window = 9  # three tokens, at three positions each
    config = dataclasses.replace(CONFIG, layer_kinds=("local",), sliding_window=window)
    tokens = nested().tokens()
    may_attend = visible(tokens, tokens)
    index = np.arange(len(may_attend))
    local = may_attend & (3 * (index[:, None] - index[None, :]) < window)
    through_both = (local.astype(int) @ local.astype(int)) > 0  # a token sees itself
    assert (through_both & ~local).any() and (may_attend & ~through_both).any()
    found = influence(may_attend, seed, with_pool=with_pool, config=config)
    np.testing.assert_array_equal(found, through_both)


def test_padding_reaches_nobody_and_nobody_reaches_padding(seed: int) -> None:
    """Only its own residual stream reaches a query that sees nothing."""
    may_attend = np.tril(np.ones((8, 8), bool))
    may_attend[5:], may_attend[:, 5:] = False, False
    own = np.eye(8, dtype=bool)
    np.testing.assert_array_equal(influence(may_attend, seed, with_pool=False), may_attend | own)
