"""Law 9: sharded == unsharded on eight fake devices; the table, its checks and what they say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from pasta_jax import sharding
from pasta_jax.model import Lora, ModelConfig, Transformer, empty_pool, forms, init_params
from pasta_jax.sharding import (
    abstract,
    batch_sharding,
    decoding_mesh,
    make_mesh,
    param_shardings,
    pool_shardings,
    replicated,
)
from tests.helpers.models import random_params

CONFIG = ModelConfig(
    vocab_size=32, num_layers=2, model_dim=16, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=32
)
ONE_KV_HEAD = ModelConfig(
    vocab_size=32, num_layers=2, model_dim=16, num_heads=4, num_kv_heads=1, head_dim=8, mlp_dim=32
)


def shapes_of(config: ModelConfig) -> dict:
    return jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))


def eight(tensor: int = 1, data: int = 1, fsdp: int = -1) -> AbstractMesh:
    fsdp = 8 // (tensor * data) if fsdp == -1 else fsdp
    return AbstractMesh((data, fsdp, tensor), ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3)


@pytest.mark.slow
@pytest.mark.parametrize("config", [CONFIG, ONE_KV_HEAD], ids=["K=2", "K=1"])
def test_sharded_training_pass_and_gradient_equal_unsharded(config: ModelConfig, seed: int) -> None:
    mesh = make_mesh(2, 2, 2)
    rng = np.random.default_rng(seed)
    tokens, positions = rng.integers(0, config.vocab_size, (2, 8, 10), np.int32)
    may_attend = np.tril(rng.random((8, 10, 10)) < 0.6)
    params = random_params(config, rng)

    def loss(params, tokens, positions, may_attend):
        hidden, _ = Transformer(config).apply({"params": params}, tokens, positions, may_attend)
        logits = Transformer(config).apply({"params": params}, hidden, method="logits")
        return -jax.nn.log_softmax(jnp.asarray(logits))[..., 0].mean(), logits

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, expected), expected_gradient = step(params, tokens, positions, may_attend)
    placed = jax.device_put(params, param_shardings(params, mesh))
    batch = jax.device_put((tokens, positions, may_attend), batch_sharding(mesh, rows=8))
    (_, logits), gradient = step(placed, *batch)

    q_proj, tokens_placed = placed["layer_0"]["attn"]["q_proj"], batch[0]
    assert q_proj.addressable_shards[0].data.shape == (16 // 2, 4 // 2, 8)
    assert tokens_placed.addressable_shards[0].data.shape == (8 // 4, 10)
    np.testing.assert_allclose(logits, expected, atol=1e-5, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), gradient, expected_gradient
    )


@pytest.mark.slow
@pytest.mark.parametrize("config", [CONFIG, ONE_KV_HEAD], ids=["K=2", "K=1"])
def test_sharded_decode_step_equals_unsharded_and_keeps_the_pool_in_place(
    config: ModelConfig, seed: int
) -> None:
    mesh = make_mesh(2, 2, 2)
    rng = np.random.default_rng(seed)
    rows, lanes, entries = 8, 2, 12
    tokens, positions = rng.integers(0, config.vocab_size, (2, rows, lanes), np.int32)
    start = rng.integers(0, entries - lanes, rows, np.int32)
    may_attend = rng.random((rows, lanes, entries)) < 0.6
    params = random_params(config, rng)
    keys = rng.normal(size=(rows, config.num_kv_heads, entries, config.head_dim)).astype(np.float32)
    pool = jax.tree.map(lambda _: jnp.asarray(keys), empty_pool(config, rows, entries))

    @jax.jit
    def step(params, pool, *args):
        tokens, positions, may_attend, start = args
        return Transformer(config).apply({"params": params}, tokens, positions, may_attend, pool, start)

    hidden, written = step(params, pool, tokens, positions, may_attend, start)
    batch = jax.device_put((tokens, positions, may_attend, start), batch_sharding(mesh))
    placed_pool = jax.device_put(pool, pool_shardings(pool, mesh))
    placed_hidden, placed_written = step(
        jax.device_put(params, param_shardings(params, mesh)), placed_pool, *batch
    )
    np.testing.assert_allclose(placed_hidden, hidden, atol=1e-5, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), placed_written, written)
    heads = max(config.num_kv_heads // 2, 1)
    assert placed_written.k[0].addressable_shards[0].data.shape == (2, heads, entries, config.head_dim)


def test_optimizer_state_lies_where_its_parameters_lie() -> None:
    params, mesh = shapes_of(CONFIG), eight(tensor=2)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(lambda step: 1e-3))
    state = param_shardings(jax.eval_shape(optimizer.init, params), mesh)
    places = param_shardings(params, mesh)
    adam = state[1][0]
    assert adam.mu == places and adam.nu == places and adam.count == replicated(mesh)
    assert places["layer_1"]["mlp"]["down_proj"].spec == PartitionSpec(("tensor",), ("fsdp",))
    assert places["layer_1"]["attn"]["o_proj"].spec == PartitionSpec(("tensor",), None, ("fsdp",))
    assert places["embed"]["embedding"].spec == PartitionSpec(("tensor",), ("fsdp",))


def test_every_parameter_is_in_the_table_and_nothing_else_passes() -> None:
    full = ModelConfig(tie_embeddings=False, qkv_bias=True, qk_norm=True, post_norms=True)
    lora = Lora(rank=2, rows=(3, 5))
    names = set()
    for form in (
        lambda params: params,
        forms.quantize,
        forms.fuse,
        lambda params: forms.fuse(forms.quantize(params)),
    ):
        shapes = jax.eval_shape(lambda key, form=form: form(init_params(full, key, lora)), jax.random.key(0))
        param_shardings(shapes, eight())  # as many dimensions as the table says
        names |= {path[-1] for path in flatten_dict(shapes)}
    assert names == set(sharding.PARAMETERS)
    with pytest.raises(ValueError, match=r"\['adapter'\] has no dimensions"):
        param_shardings({"adapter": jax.ShapeDtypeStruct((4, 4), jnp.float32)}, eight())


@pytest.mark.slow
def test_a_program_compiles_from_shapes_alone() -> None:
    mesh = make_mesh(2, 2, 2)
    params = abstract(shapes_of(CONFIG), param_shardings(shapes_of(CONFIG), mesh))
    shapes = jax.eval_shape(lambda: empty_pool(CONFIG, 4, 16))
    pool = abstract(shapes, pool_shardings(shapes, mesh))
    numbers = abstract(jax.ShapeDtypeStruct((4, 2), jnp.int32), batch_sharding(mesh, 4))
    start = abstract(jax.ShapeDtypeStruct((4,), jnp.int32), batch_sharding(mesh, 4))
    may_attend = abstract(jax.ShapeDtypeStruct((4, 2, 16), bool), batch_sharding(mesh, 4))

    def step(params, pool, tokens, may_attend, start):
        return Transformer(CONFIG).apply({"params": params}, tokens, tokens, may_attend, pool, start)

    compiled = jax.jit(step, donate_argnums=1).lower(params, pool, numbers, may_attend, start).compile()
    assert compiled.output_shardings[1].k[0].is_equivalent_to(pool.k[0].sharding, 4)


def test_mesh_sizes() -> None:
    assert dict(make_mesh().shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    assert dict(make_mesh(data=-1, fsdp=1, tensor=4).shape) == {"data": 2, "fsdp": 1, "tensor": 4}
    assert dict(make_mesh(devices=jax.devices()[:3]).shape) == {"data": 1, "fsdp": 3, "tensor": 1}
    assert set(make_mesh().axis_types) == {AxisType.Auto}
    with pytest.raises(ValueError, match="tensor=3 needs a multiple of 3 devices; there are 8"):
        make_mesh(tensor=3)
    with pytest.raises(ValueError, match="needs 4 devices; there are 8"):
        make_mesh(2, 2, 1)
    with pytest.raises(ValueError, match="one of them may be -1"):
        make_mesh(-1, -1, 1)


def test_to_decode_weights_are_split_by_heads_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many neighbours as divide them; rows over the rest."""
    config = ModelConfig(vocab_size=48, num_layers=1, model_dim=32, num_heads=4, head_dim=8, mlp_dim=48)
    for mesh, heads, expected in (
        (make_mesh(), 4, (2, 1, 4)),
        (make_mesh(), 8, (1, 1, 8)),
        (make_mesh(2, 2, 2), 6, (4, 1, 2)),
        (make_mesh(devices=jax.devices()[:6]), 6, (1, 1, 6)),
        (make_mesh(devices=jax.devices()[:1]), 4, (1, 1, 1)),
        (make_mesh(), 5, (8, 1, 1)),
    ):
        shapes = shapes_of(dataclasses.replace(config, num_heads=heads, num_kv_heads=1))
        assert tuple(decoding_mesh(mesh, shapes).shape.values()) == expected
    whole = sum(leaf.size * 4 for leaf in jax.tree.leaves(shapes_of(config)))
    for memory, expected in ((2 * whole, (2, 1, 4)), (whole // 4, (1, 8, 1))):
        assert tuple(decoding_mesh(make_mesh(), shapes_of(config), memory).shape.values()) == expected
    monkeypatch.setattr(sharding, "NEIGHBOURS", 2)
    for memory, expected in ((2 * whole, (4, 1, 2)), (1.2 * whole, (2, 1, 4))):
        assert tuple(decoding_mesh(make_mesh(), shapes_of(config), memory).shape.values()) == expected
    with pytest.raises(ValueError, match="does not divide num_heads"):
        decoding_mesh(make_mesh(tensor=2), shapes_of(dataclasses.replace(config, num_heads=3)))


def test_what_does_not_divide_is_said_in_words() -> None:
    def place(dims: str, *shape: int, mesh: AbstractMesh) -> PartitionSpec:
        return sharding.sharding(dims, shape, mesh).spec

    three = eight(tensor=3, fsdp=1)
    with pytest.raises(ValueError, match=r"^tensor=3 does not divide num_kv_heads K=8. Use 1, 2, 4 or 8.$"):
        place("DKH", 16, 8, 4, mesh=three)
    with pytest.raises(ValueError, match=r"^tensor=3 does not divide num_heads N=7. Use 1 or 7.$"):
        place("DNH", 16, 7, 4, mesh=three)
    with pytest.raises(
        ValueError, match=r"^data\*fsdp=8 does not divide rows B=4. Use 1, 2 or 4, or a multiple of 8 rows.$"
    ):
        batch_sharding(eight(), rows=4)
    with pytest.raises(ValueError, match="two dimensions on mesh axis fsdp"):
        place("BLD", 8, 10, 16, mesh=eight())
    with pytest.raises(ValueError, match="names 3 dimensions"):
        place("DNH", 16, 8, mesh=eight())


def test_fewer_kv_heads_than_chips_are_replicated() -> None:
    places = param_shardings(shapes_of(ONE_KV_HEAD), eight(tensor=4))["layer_0"]["attn"]
    assert places["k_proj"].spec == PartitionSpec(("fsdp",), None, None)
    assert places["q_proj"].spec == PartitionSpec(("fsdp",), ("tensor",), None)
