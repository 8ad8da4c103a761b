"""Weights in int8: near the plain ones, placed and loaded like them, half the bytes of a decode step."""

import dataclasses
import functools
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pasta_jax
from pasta_jax import sharding
from pasta_jax.checkpoints.save import Checkpoints
from pasta_jax.compile import programs as ahead
from pasta_jax.config import Config, DataConfig
from pasta_jax.data.sources import make_tokenizer
from pasta_jax.decoding.api import decoder_for
from pasta_jax.decoding.state import Limits
from pasta_jax.model import ModelConfig, Transformer, init_params
from pasta_jax.model.forms import LARGEST, Int8, contracted, is_plain, quantize, quantize_leaf
from pasta_jax.training.state import TrainState
from tests.helpers import only_full
from tests.helpers.hlo import lowered
from tests.helpers.models import GEMMA, LLAMA, TINY, inputs, random_params

pytestmark = pytest.mark.slow


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config: ModelConfig, params: Any, *args: Any) -> Any:
    hidden: Any = Transformer(config).apply({"params": params}, *args)
    return Transformer(config).apply({"params": params}, hidden[0], method="logits")


@pytest.mark.parametrize("config", [TINY, LLAMA, GEMMA], ids=["tied", "untied", "gemma"])
def test_logits_are_nearly_those_of_the_plain_weights(
    config: ModelConfig, seed: int, record_property: Any
) -> None:
    """All together. At single places attention may turn to another key; that, and how often the likeliest token
    is the same, is written down and not asked for.
    """
    rng = np.random.default_rng(seed)
    params, args = random_params(config, rng), inputs(rng, 4, 40)
    quantized = quantize(params)
    assert not is_plain(quantized) and isinstance(quantized["layer_0"]["attn"]["q_proj"], Int8)
    shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    shapes = jax.eval_shape(quantize, shapes)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), quantized) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes
    )
    expected, actual = (np.asarray(logits_of(config, p, *args)) for p in (params, quantized))
    by_position = cosine(expected, actual)
    agreement = float((expected.argmax(-1) == actual.argmax(-1)).mean())
    record_property("greedy_agreement", agreement)
    together = float(cosine(expected.ravel(), actual.ravel()))
    print(
        f"cosine {together:.5f}, at the worst place {by_position.min():.4f}; greedy agreement {agreement:.3f}"
    )
    assert together >= 0.999
    assert by_position.mean() >= 0.999


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of vectors, the last dimension."""
    return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


def test_a_leaf_by_hand_in_numpy_and_on_devices(seed: int) -> None:
    rng = np.random.default_rng(seed)
    quantized = quantize_leaf("up_proj", np.array([[1.0, 0.0], [-2.0, 0.0], [0.5, 0.0]], np.float32))
    assert quantized.values.tolist() == [[64, 0], [-127, 0], [32, 0]]  # 63.5 is rounded to even
    np.testing.assert_allclose(quantized.scale, [2 / LARGEST, 1.0], rtol=1e-6)
    mesh = sharding.make_mesh(2, 2, 2)
    for name, shape, scale in (
        ("o_proj", (4, 8, 16), (16,)),
        ("embedding", (32, 16), (32,)),
        ("head", (16, 32), (32,)),
    ):
        array = np.asarray(jnp.asarray(rng.normal(size=shape), jnp.bfloat16))
        one = quantize_leaf(name, array)
        assert isinstance(one.values, np.ndarray) and one.scale.shape == scale
        placed = jax.device_put(array, sharding.param_shardings({name: array}, mesh)[name])
        other = quantize_leaf(name, placed)
        shardings = sharding.param_shardings({name: other}, mesh)[name]
        for x, y, expected in (
            (other.values, one.values, shardings.values),
            (other.scale, one.scale, shardings.scale),
        ):
            np.testing.assert_allclose(x.astype(np.float32), y.astype(np.float32), rtol=1e-6)
            assert x.sharding.is_equivalent_to(expected, x.ndim)
        step = np.expand_dims(one.scale, contracted(name) or ())
        assert (np.abs(one.values * step - array.astype(np.float32)) <= 0.5001 * step).all()
        assert quantize_leaf(name, one) is one
    norm = np.ones(4, np.float32)
    assert quantize_leaf("scale", norm) is norm


def test_sources_are_freed_one_by_one(seed: int) -> None:
    params = random_params(LLAMA, np.random.default_rng(seed))
    quantized = quantize(params, donate=True)
    assert params["head"].is_deleted() and params["layer_0"]["attn"]["q_proj"].is_deleted()
    assert quantized["final_norm"]["scale"] is params["final_norm"]["scale"]


# ------------------------------------------------------------------------------------------ loading, decoding

MODEL = ModelConfig(
    vocab_size=1408, num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=16
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A random model, fond of promises, as a checkpoint."""
    workdir = tmp_path_factory.mktemp("written")
    config = Config(model=MODEL, data=DataConfig(rows=2))
    params = random_params(MODEL, np.random.default_rng(3))
    with Checkpoints(workdir, config, make_tokenizer(config.data)) as run:
        run.save(TrainState(params, {"nothing": jnp.zeros(1)}, jnp.int32(1)), data_index=0)
    return workdir


def test_a_model_is_loaded_as_asked(written: pathlib.Path) -> None:
    plain = pasta_jax.load(written)
    assert plain.config == MODEL and plain.mesh is None
    mesh = sharding.make_mesh(2, 2, 2)
    half = pasta_jax.load(written, mesh=mesh, dtype="bfloat16", quantize="int8")
    assert half.config == dataclasses.replace(MODEL, dtype="bfloat16") and not is_plain(half.params)
    assert half.mesh is mesh or half.mesh == mesh
    expected = quantize(jax.tree.map(lambda x: x.astype(jnp.bfloat16), plain.params))
    for x, y in zip(jax.tree.leaves(half.params), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x.astype(jnp.float32), y.astype(jnp.float32), rtol=1e-6)
    shardings = sharding.param_shardings(half.params, mesh)
    for x, placement in zip(jax.tree.leaves(half.params), jax.tree.leaves(shardings), strict=True):
        assert x.sharding.is_equivalent_to(placement, x.ndim)
    with pytest.raises(ValueError, match="dtype='float8' is unknown. Use float32 or bfloat16"):
        pasta_jax.load(written, dtype="float8")
    with pytest.raises(ValueError, match="quantize='int4' is unknown. Use int8"):
        pasta_jax.load(written, quantize="int4")


@only_full
@pytest.mark.parametrize("kind", [None, "int8"])
def test_a_model_on_a_mesh_says_what_it_says_on_one_device(written: pathlib.Path, kind: str | None) -> None:
    """One prompt, which rows over devices do not divide, in chunks, and all of it only by loading with a mesh."""
    say: Any = functools.partial(
        pasta_jax.decode,
        max_new_tokens=40,
        max_branch_tokens=6,
        temperature=0.7,
        seed=4,
        open_bias=12.0,
        cache_len=96,
    )
    prompt = "List the capitals of Peru and Cuba."
    expected = say(pasta_jax.load(written, quantize=kind), prompt)
    assert len(expected.branches) > 1
    spread = pasta_jax.load(written, mesh=sharding.make_mesh(2, 2, 2), quantize=kind)
    decoder = decoder_for(spread, Limits(8, 16, 96, spread.max_depth), 1)
    assert decoder.compiled.mesh is not None and decoder.compiled.rows == 4
    assert say(spread, prompt).annotated == expected.annotated
    decoder.session.chunk = 3  # what comes out of a call goes into the next
    assert say(spread, prompt).annotated == expected.annotated


# ------------------------------------------------------------------------------------------- bytes of a step


@pytest.mark.tpu
@only_full
def test_a_decode_step_reads_half_the_bytes(record_property: Any) -> None:
    """Compiled for a TPU, at a size where weights are nearly all that is read."""
    if not sys.platform.startswith("linux"):
        pytest.skip("libtpu is for Linux")
    pytest.importorskip("libtpu")
    mesh = sharding.make_mesh(1, 1, 1, devices=ahead.topology_devices("v5e:2x4")[:1])
    model = ModelConfig(
        vocab_size=4096, num_layers=1, model_dim=2048, num_heads=16, num_kv_heads=4, head_dim=128, mlp_dim=16_384,
        dtype="bfloat16", tie_embeddings=False,
    )  # fmt: skip
    read = {}
    limits = Limits(lanes=8, threads=16, pool=128)
    for form in ("plain", "int8"):
        programs = ahead.decoder_programs(
            Config(model=model), mesh, int8=form == "int8", limits=limits, rows=1
        )
        decode = lowered(ahead.decoding_jobs(programs))["decode"]
        read[form] = decode.compile().cost_analysis()["bytes accessed"]
    ratio = read["int8"] / read["plain"]
    record_property("bytes_int8_by_bfloat16", ratio)
    print(read, f"{ratio:.3f}")
    assert ratio <= 0.55
