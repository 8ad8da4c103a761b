"""The decoder: the pool path against the whole pass, causality, padding, counts, configurations."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from pasta_jax.model import (
    ModelConfig,
    Pool,
    Transformer,
    empty_pool,
    init_params,
    param_count,
    pool_bytes,
    scan,
)
from pasta_jax.model import blocks as blocks_module
from pasta_jax.model.attention import attend
from pasta_jax.model.blocks import Matrix, attend_to_earlier
from pasta_jax.model.forms import fuse, outputs_first, quantize
from pasta_jax.model.pool import write
from pasta_jax.training.update import Documents
from tests.helpers import full, slow
from tests.helpers.models import GEMMA, LLAMA, TINY, inputs, random_params

KINDS = pytest.mark.parametrize("config", [TINY, LLAMA, GEMMA], ids=["plain", "llama", "gemma"])


@functools.partial(jax.jit, static_argnums=0)
def forward(config: ModelConfig, params: Any, *args: Any) -> tuple[Any, Any]:
    return Transformer(config).apply({"params": params}, *args)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config: ModelConfig, params: Any, hidden: Any) -> Any:
    return Transformer(config).apply({"params": params}, hidden, method="logits")


@KINDS
def test_the_pool_in_random_chunks_equals_the_whole_pass(config: ModelConfig, seed: int) -> None:
    """Rows stand at their own places of the pool; only the used prefix is attended to."""
    rng = np.random.default_rng(seed)
    rows, length, entries, lanes = 3, 16, 40, 5
    params = random_params(config, rng)
    tokens, positions, may_attend = inputs(rng, rows, length)
    whole, own = forward(config, params, tokens, positions, may_attend)
    assert own.k[0].shape == (rows, config.num_kv_heads, length, config.head_dim)

    # Row b's tokens go to its entries in order; a step takes up to `lanes` of them, the other lanes are idle:
    # token 0, nothing visible, written where the next step's tokens go.
    junk = jax.tree.map(lambda x: x + 7.0, empty_pool(config, rows, entries))  # never read, so never seen
    pool, done = junk, np.zeros(rows, np.int32)
    key_positions = np.pad(positions, ((0, 0), (0, lanes)))
    collected = np.zeros(whole.shape, np.float32)
    while (done < length).any():
        take = np.minimum(rng.integers(0, lanes + 1, rows), length - done)
        step_tokens, step_positions = np.zeros((2, rows, lanes), np.int32)
        step_attend = np.zeros((rows, lanes, length + lanes), bool)
        for b in range(rows):
            now = slice(done[b], done[b] + take[b])
            step_tokens[b, : take[b]] = tokens[b, now]
            step_positions[b, : take[b]] = positions[b, now]
            step_attend[b, : take[b], :length] = may_attend[b, now]
        hidden, pool = forward(
            config, params, step_tokens, step_positions, step_attend, pool, done, key_positions
        )
        for b in range(rows):
            collected[b, done[b] : done[b] + take[b]] = hidden[b, : take[b]]
        done = done + take.astype(np.int32)
    np.testing.assert_allclose(collected, whole, atol=1e-5, rtol=1e-5)


def test_prefill_then_one_token_at_a_time_equals_the_whole_pass(seed: int) -> None:
    """One row: the other way to write, and a static prefix of the pool that grows."""
    rng = np.random.default_rng(seed)
    length, prompt = 8, 5
    params = random_params(TINY, rng)
    tokens, positions, may_attend = inputs(rng, 1, length)
    whole, _ = forward(TINY, params, tokens, positions, may_attend)
    pool: Pool | None = empty_pool(TINY, 1, 32)
    pieces = []
    for start, stop in [(0, prompt), *((i, i + 1) for i in range(prompt, length))]:
        now = slice(start, stop)
        attend = may_attend[:, now, :stop]
        hidden, pool = forward(
            TINY, params, tokens[:, now], positions[:, now], attend, pool, jnp.array([start])
        )
        pieces.append(hidden)
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), whole, atol=1e-5, rtol=1e-5)


def test_each_row_writes_at_its_own_start() -> None:
    new = jnp.arange(1.0, 5.0).reshape(2, 1, 2, 1)
    written = write(jnp.zeros((2, 1, 5, 1)), new, jnp.array([0, 3]))[:, 0, :, 0]
    np.testing.assert_array_equal(written, [[1, 2, 0, 0, 0], [0, 0, 0, 3, 4]])
    one = write(jnp.zeros((1, 1, 5, 1)), new[:1], jnp.array([2]))[:, 0, :, 0]
    np.testing.assert_array_equal(one, [[0, 0, 1, 2, 0]])


def test_a_later_token_changes_nothing_before_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    length, changed = 10, 6
    params = random_params(TINY, rng)
    tokens, positions, _ = inputs(rng, 1, length)
    causal = np.tril(np.ones((1, length, length), bool))
    other = tokens.copy()
    other[0, changed] = (tokens[0, changed] + 1) % TINY.vocab_size
    one, two = (forward(TINY, params, t, positions, causal)[0] for t in (tokens, other))
    differs = (np.asarray(one) != np.asarray(two)).any(-1)[0]
    assert differs.tolist() == [i >= changed for i in range(length)]


@pytest.mark.parametrize(
    ("length", "block"), [(1, 128), (64, 128), (65, 128), (65, 30), slow(150, 25), full(600, 128)]
)
def test_blocks_of_queries_give_what_all_at_once_gives(
    length: int, block: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spans of one block, and of several and a rest."""
    monkeypatch.setattr(blocks_module, "BLOCK", block)
    rng = np.random.default_rng(seed)
    shapes = ((2, length, 4, 8), (2, 2, length, 8), (2, 2, length, 8))
    q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    may_attend = inputs(rng, 2, length)[2]
    may_attend[0, length // 2] = False  # padding sees nothing

    def both(one: Any) -> Any:
        gradient = jax.grad(lambda *qkv: (one(*qkv, may_attend) ** 2).sum(), (0, 1, 2))
        return jax.jit(lambda *qkv: (one(*qkv, may_attend), gradient(*qkv)))(q, k, v)

    def by_blocks(q: Any, k: Any, v: Any, matrix: Any) -> Any:
        return attend_to_earlier(q, k, v, Matrix(matrix))

    for blocks, whole in zip(jax.tree.leaves(both(by_blocks)), jax.tree.leaves(both(attend)), strict=True):
        np.testing.assert_allclose(blocks, whole, atol=1e-4)


def test_only_differences_of_positions_matter(seed: int) -> None:
    params = random_params(TINY, np.random.default_rng(seed))
    tokens, positions, may_attend = inputs(np.random.default_rng(seed), 2, 9)
    original, _ = forward(TINY, params, tokens, positions, may_attend)
    moved, _ = forward(TINY, params, tokens, positions + 100, may_attend)
    mixed, _ = forward(TINY, params, tokens, positions[:, ::-1], may_attend)
    np.testing.assert_allclose(original, moved, atol=1e-4)
    assert np.abs(original - mixed).max() > 1e-2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_query_without_keys_is_finite_and_hurts_nobody(dtype: str, seed: int) -> None:
    config = dataclasses.replace(TINY, dtype=dtype)
    params = random_params(config, np.random.default_rng(seed))
    tokens, positions, may_attend = inputs(np.random.default_rng(seed), 2, 8)
    may_attend[:, 5:, :] = False
    may_attend[:, :, 5:] = False

    def loss(params: Any) -> Any:
        hidden, _ = forward(config, params, tokens, positions, may_attend)
        logits = logits_of(config, params, hidden)
        assert hidden.dtype == dtype and logits.dtype == jnp.float32
        return (logits**2).mean()

    value, gradient = jax.value_and_grad(loss)(params)
    assert np.isfinite(value)
    assert all(np.isfinite(g.astype(np.float32)).all() for g in jax.tree.leaves(gradient))


@pytest.mark.slow
def test_one_visible_key_gives_the_gradient_of_finite_differences() -> None:
    """A softmax over one key is 1 whatever the score; over two it is not."""
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 2, 1, 4))
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    for may_attend in ([[[1, 0], [1, 1]]], [[[1, 0], [0, 0]]]):
        attended = functools.partial(attend, may_attend_BxQxP=jnp.array(may_attend, bool))
        check_grads(attended, (q, k, v), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


def test_names_shapes_and_count() -> None:
    D, N, K, H, F, V, Z = 16, 4, 2, 8, 32, 48, 2
    params = jax.eval_shape(lambda key: init_params(TINY, key), jax.random.key(0))
    shapes = jax.tree.map(lambda x: x.shape, params)
    layer = {
        "attn_norm": {"scale": (D,)},
        "attn": {"q_proj": (D, N, H), "k_proj": (D, K, H), "v_proj": (D, K, H), "o_proj": (N, H, D)},
        "mlp_norm": {"scale": (D,)},
        "mlp": {"gate_proj": (D, F), "up_proj": (D, F), "down_proj": (F, D)},
    }
    expected: dict[str, Any] = {f"layer_{z}": layer for z in range(Z)}
    expected |= {"embed": {"embedding": (V, D)}, "final_norm": {"scale": (D,)}}
    assert shapes == expected and type(params) is dict
    assert (
        param_count(params) == 48 * 16 + 2 * (16 + 16 * 8 * (4 + 2 + 2 + 4) + 16 + 3 * 16 * 32) + 16 == 6_992
    )
    untied = jax.eval_shape(lambda key: init_params(LLAMA, key), jax.random.key(0))
    assert param_count(untied) == 6_992 + 16 * 48 and untied["head"].shape == (D, V)
    assert (
        param_count(jax.eval_shape(lambda k: init_params(ModelConfig(), k), jax.random.key(0))) == 1_148_032
    )


@pytest.mark.parametrize("config", [TINY, LLAMA], ids=["gemma", "llama"])
def test_a_new_model_starts_near_the_uniform_distribution(config: ModelConfig) -> None:
    wide = dataclasses.replace(config, num_layers=1, model_dim=128, vocab_size=512)
    params = jax.jit(init_params, static_argnums=0)(wide, jax.random.key(0))
    tokens, positions, may_attend = inputs(np.random.default_rng(0), 4, 16)
    hidden, _ = forward(wide, params, tokens, positions, may_attend)
    logits = logits_of(wide, params, hidden)
    assert 0.5 < float(hidden.std()) < 2 and 0.5 < float(logits.std()) < 2
    embedded = Transformer(wide).apply({"params": params}, tokens, method=lambda m, t: m.embed(t))
    assert np.isclose(np.std(np.asarray(embedded)), 1.0 if wide.embed_scale else 128**-0.5, rtol=0.1)


def test_pool_bytes_counts_what_is_allocated() -> None:
    for dtype in ("float32", "bfloat16"):
        config = dataclasses.replace(TINY, dtype=dtype)
        pool = empty_pool(config, rows=2, entries=10)
        assert pool_bytes(config, 2, 10) == sum(x.nbytes for x in jax.tree.leaves(pool))


def test_shapes_that_do_not_fit_say_so() -> None:
    model, params = Transformer(TINY), random_params(TINY, np.random.default_rng(0))
    tokens, positions, may_attend = inputs(np.random.default_rng(0), 2, 4)
    pool = empty_pool(TINY, 2, 8)
    with pytest.raises(ValueError, match="4 keys, its own tokens"):
        model.apply({"params": params}, tokens, positions, may_attend[:, :, :3])
    with pytest.raises(ValueError, match="at most the pool's 8 entries"):
        model.apply({"params": params}, tokens, positions, np.ones((2, 4, 9), bool), pool, np.zeros(2, int))
    with pytest.raises(ValueError, match=r"may_attend is \[1, 4, 4\]; 2 rows of 4 queries"):
        model.apply({"params": params}, tokens, positions, may_attend[:1])
    with pytest.raises(ValueError, match="go together"):
        model.apply({"params": params}, tokens, positions, may_attend, pool)


def test_what_is_turned_for_decoding_can_be_used_up() -> None:
    weights = {name: jnp.arange(6.0).reshape(2, 3) for name in ("up_proj", "scale")}
    turned = outputs_first(weights, donate=True)
    np.testing.assert_array_equal(turned["up_proj"].array, np.arange(6.0).reshape(2, 3).T)
    assert weights["up_proj"].is_deleted() and turned["scale"] is weights["scale"]


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("change", [fuse, outputs_first, "fuse int8"])
def test_weights_turned_for_decoding_say_the_same(config: ModelConfig, change: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    params = random_params(config, rng)
    if change == "fuse int8":
        change, params = fuse, quantize(params)
    tokens, positions, may_attend = inputs(rng, 2, 9)
    turned = change(params)
    structure: Any = jax.tree.structure(turned)
    assert structure != jax.tree.structure(params)
    assert param_count(turned) == param_count(params)
    actual, expected = (
        logits_of(config, p, forward(config, p, tokens, positions, may_attend)[0]) for p in (turned, params)
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="Only plain weights|nothing to fuse"):
        change(turned)


@pytest.mark.parametrize("unrolled", [0, 8], ids=["scan", "unrolled"])
def test_a_pass_of_stacked_layers_is_that_of_layer_after_layer(
    unrolled: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also its gradients; with global and local layers, which differ in angles and in what they see."""
    monkeypatch.setattr(scan, "UNROLLED", unrolled)
    config = dataclasses.replace(
        TINY, num_layers=3, layer_kinds=("local", "global"), sliding_window=4, local_rope_base=100.0
    )
    rng = np.random.default_rng(seed)
    params = random_params(config, rng)
    tokens, positions, may_attend = inputs(rng, 2, 12)
    weights = rng.normal(size=(2, 12, config.model_dim)).astype(np.float32)
    matrix = Matrix(jnp.asarray(may_attend))

    def expected(params: Any) -> Any:
        return (forward(config, params, tokens, positions, may_attend)[0] * weights).sum()

    def found(params: Any) -> Any:
        return (scan.hidden_states(Transformer(config), params, tokens, positions, matrix) * weights).sum()

    results = [jax.tree.leaves(jax.jit(jax.value_and_grad(f))(params)) for f in (found, expected)]
    for x, y in zip(*results, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("remat", scan.POLICIES)
def test_no_loop_over_layers_keeps_a_mask(remat: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All masks of a document would be L x L, made before the loop because no layer changes them."""
    monkeypatch.setattr(scan, "UNROLLED", 0)
    L, config = 256, dataclasses.replace(TINY, num_layers=2)
    params = random_params(config, np.random.default_rng(0))
    line = jnp.arange(L, dtype=jnp.int32)[None]
    sees = Documents(line + 1, line, line, jnp.zeros((1, L, 1), jnp.uint32))

    def loss(params: Any) -> Any:
        return scan.hidden_states(Transformer(config), params, line % 8, line, sees, remat).sum()

    outside = [v.aval for eqn in jax.make_jaxpr(jax.grad(loss))(params).eqns for v in eqn.outvars]
    assert not [aval for aval in outside if aval.dtype == bool and aval.size > 8 * L]
