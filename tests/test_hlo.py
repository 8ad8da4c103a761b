"""What the compiled decode loop does to memory: it keeps the pool in place, and eight lanes cost what one does."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pasta_jax import sharding
from pasta_jax.compile import hlo
from pasta_jax.compile import programs as ahead
from pasta_jax.config import Config
from pasta_jax.decoding.compiled import ProgramKey
from pasta_jax.decoding.engine import Decoder
from pasta_jax.decoding.model import Model
from pasta_jax.decoding.state import Limits
from pasta_jax.model import ModelConfig, empty_pool, init_params
from pasta_jax.model.presets import presets
from pasta_jax.testing import WordTokenizer
from tests.helpers import AS_FOR_USERS, FULL, full, only_full, optimized
from tests.helpers.hlo import bytes_of_a_step, lowered, written

pytestmark = pytest.mark.slow

WORDS = WordTokenizer("the river and the cities of a world")

# ---------------------------------------------------------------------------------------- reading a program

STEPS, WRITTEN = 5, 3


def loop(change: Any, pool: Any, new: Any) -> Any:
    """Writes into the pool step by step; `change` is what else happens to it."""

    def step(i: Any, pool: Any) -> Any:
        return change(jax.lax.dynamic_update_slice_in_dim(pool, new + i, WRITTEN * i, axis=0))

    return jax.lax.fori_loop(0, STEPS, step, pool)


def program_of(change: Any, *, donate: bool = True) -> hlo.HloModule:
    pool, new = (jax.ShapeDtypeStruct((rows, 16), "float32") for rows in (100, WRITTEN))
    jitted = jax.jit(functools.partial(loop, change), donate_argnums=(0,) if donate else ())
    return hlo.read(jitted.lower(pool, new).compile())


def test_what_is_changed_in_place_is_not_written_anew() -> None:
    program = program_of(lambda pool: pool)
    assert written(program, 1600, 1600) == []
    assert program.aliases == {0}
    assert WRITTEN * 16 * 4 <= hlo.moved(program, program.loop) < 4 * WRITTEN * 16 * 4


@pytest.mark.parametrize(
    "change",
    [
        lambda pool: pool[::-1],
        lambda pool: pool.reshape(16, 100).T,
        lambda pool: pool.astype(jnp.bfloat16).astype(jnp.float32) + pool[::-1],
        lambda pool: jax.lax.optimization_barrier(pool.reshape(16, 100).T).reshape(100, 16),
    ],
)
def test_a_copy_is_found(change: Any) -> None:
    program = program_of(change)
    assert any(line.startswith(program.loop) for line in written(program, 1600, 1600))
    assert hlo.moved(program, program.loop) >= 2 * 1600 * 4


def test_a_copy_around_the_loop_is_found() -> None:
    """What is not donated has to be copied once, before the loop changes it."""
    program = program_of(lambda pool: pool, donate=False)
    assert program.aliases == frozenset()
    copies = written(program, 1600, 1600)
    assert len(copies) == 1 and copies[0].startswith(program.entry)


def test_bytes_of_a_matrix_and_of_a_few_of_its_rows() -> None:
    D, F = 256, 384

    def run(x: Any, w: Any, ids: Any) -> Any:
        return jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ w) @ w.T + w.T[ids, :].sum(), x)

    shapes = [jax.ShapeDtypeStruct(s, "float32") for s in ((8, D), (D, F))]
    program = hlo.read(jax.jit(run).lower(*shapes, jax.ShapeDtypeStruct((2,), "int32")).compile())
    matrix, hidden = 4 * D * F, 4 * 8 * F
    assert 2 * matrix <= hlo.moved(program, program.loop) < 2 * matrix + 20 * hidden


def test_what_lies_within_the_chip() -> None:
    """A TPU's text, in short: an array of 4,096 bytes is fetched ahead, and read from the chip's own memory."""
    text = """HloModule short, input_output_alias={ {1}: (1, {}, may-alias) }, entry_computation_layout={()}

%fused (p.0: bf16[1024,2], p.1: bf16[8,1024]) -> bf16[8,2] {
  %p.1 = bf16[8,1024]{1,0:T(8,128)(2,1)} parameter(1)
  %p.0 = bf16[1024,2]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %dot = bf16[8,2]{1,0} convolution(%p.1, %p.0), dim_labels=bf_io->bf
}

ENTRY %main (w: bf16[1024,2], x: bf16[8,1024]) -> (bf16[8,2], bf16[8,1024]) {
  %w = bf16[1024,2]{1,0:T(8,128)(2,1)} parameter(0)
  %x = bf16[8,1024]{1,0:T(8,128)(2,1)} parameter(1)
  %copy-start = (bf16[1024,2]{1,0:T(8,128)(2,1)S(1)}, bf16[1024,2]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%w)
  %copy-done = bf16[1024,2]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  %y = bf16[8,2]{1,0:T(8,128)(2,1)} fusion(%copy-done, %x), kind=kOutput, calls=%fused
  ROOT %tuple = (bf16[8,2]{1,0}, /*index=1*/bf16[8,1024]{1,0}) tuple(%y, %x)
}
"""
    program = hlo.parse(text)
    assert program.aliases == {1}
    assert hlo.moved(program, "main") == 4096 + 8 * 1024 * 2 + 8 * 2 * 2
    assert written(program, 2048, 2048) == []
    within = text.replace("(2,1)S(1)}, bf16", "(2,1)}, bf16")  # from main memory to main memory
    assert written(hlo.parse(within), 2048, 2048) == ["main: copy-start = copy-start [1024, 2]"]


# -------------------------------------------------------------------------------------------- the decode loop


@pytest.fixture(autouse=True, scope="module")
def compiled_as_for_users() -> Iterator[None]:
    """What is read in the compiled programs is what users run."""
    with optimized():
        yield


def lower(model: ModelConfig, mesh: Any, limits: Limits, rows: int) -> tuple[Any, int]:
    """The decode loop, lowered; and how many numbers a chip holds of a layer's keys."""
    compiled = ahead.decoder_programs(Config(model=model), mesh, limits=limits, rows=rows)
    decode = lowered(ahead.decoding_jobs(compiled))["decode"]
    pool = jax.eval_shape(lambda: empty_pool(model, rows, limits.pool + limits.lanes))
    keys = pool.k[0]
    return decode, math.prod(sharding.pool_shardings(pool, mesh).k[0].shard_shape(keys.shape))


@functools.cache
def on_cpu(rows: int, cached: int) -> tuple[Any, int]:
    """The loop of a decoder whose keys are much larger than scores, and than all else; how many there are.

    Weights of no more than `cached` bytes are decoded as they are, others with outputs first.
    """
    config = ModelConfig(
        vocab_size=len(WORDS.vocabulary), num_layers=1, model_dim=32, num_heads=2, num_kv_heads=2, head_dim=64,
        mlp_dim=32,
    )  # fmt: skip
    model = Model(init_params(config, jax.random.key(0)), config, WORDS)
    sizes: dict[str, Any] = dict(limits=Limits(lanes=2, threads=4, pool=2000), rows=rows, widths=(1,))
    decoder = Decoder(model, pool_buckets=(), cached_bytes=cached, xla_options=AS_FOR_USERS, **sizes)
    assert decoder.compiled.form == ("fused" if cached else "outputs_first")
    return decoder.compiled.executable(ProgramKey("decode", length=2002)), rows * 2 * 2002 * 64


LAYERS = 28 if FULL else 2


@functools.cache
def on_tpu(topology: str, lanes: int) -> tuple[Any, int]:
    """Gemma 7B, or two layers of it, with the whole vocabulary; one request a chip, or a group of four."""
    devices = ahead.topology_devices(topology)
    rows = -(-len(devices) // 4)
    mesh = sharding.make_mesh(rows, 1, -1, devices=devices)
    model = dataclasses.replace(presets()["gemma-7b"].config, num_layers=LAYERS)
    decode, keys = lower(model, mesh, Limits(lanes, threads=16, pool=2048), rows)
    return decode.compile(), keys


TOPOLOGIES = [
    pytest.param("v6e:1x1", marks=pytest.mark.tpu),
    pytest.param("v5e:2x4", marks=[pytest.mark.tpu, only_full]),
]


CPU = {
    f"{rows} row{'s' * (rows > 1)}, {weights} weights": (rows, cached)
    for rows in (1, 3)
    for weights, cached in (("small", 2**23), ("large", 0))
}


TWICE = CPU.keys() - {"3 rows, large weights"}
"""Small weights lie as on TPUs."""


@pytest.fixture(params=[*(full(name) if name in TWICE else name for name in CPU), *TOPOLOGIES])
def decoding(request: pytest.FixtureRequest) -> tuple[Any, int]:
    """The loop compiled, and how many numbers there are in a layer's keys."""
    if request.param in CPU:
        return on_cpu(*CPU[request.param])
    tpu_or_skip()
    return on_tpu(request.param, 8)


def tpu_or_skip() -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("libtpu is for Linux")
    pytest.importorskip("libtpu")


def test_the_pool_goes_in_and_comes_out_in_its_place(decoding: tuple[Any, int]) -> None:
    compiled, keys = decoding
    assert not ahead.host_calls(compiled.as_text())
    program = hlo.read(compiled)
    entry = program.computations[program.entry].values()
    pool = [i.number for i in entry if i.op == "parameter" and math.prod(i.shapes[0].dims) == keys]
    assert set(pool) <= program.aliases and len(pool) in (2, 2 * LAYERS)


def test_nothing_copies_the_pool(decoding: tuple[Any, int]) -> None:
    """Neither in a step nor around the loop: nothing that is half as large as a layer's keys is written."""
    compiled, keys = decoding
    program = hlo.read(compiled)
    assert written(program, keys // 2, keys) == []


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_eight_lanes_move_the_bytes_of_one(topology: str, record_property: Any) -> None:
    """Compiled for TPUs: a step moves the weights, for one lane or eight.

    By the compiler's own count, and by what goes to and from main memory in the loop alone
    (docs/performance.md says how they differ).
    """
    tpu_or_skip()
    compiled = {lanes: on_tpu(topology, lanes)[0] for lanes in (1, 8)}
    counted = {lanes: program.cost_analysis()["bytes accessed"] for lanes, program in compiled.items()}
    moved = {lanes: bytes_of_a_step(program) for lanes, program in compiled.items()}
    for name, count in (("bytes accessed", counted), ("of main memory", moved)):
        ratio = count[8] / count[1]
        print(f"{topology}, {LAYERS} layers, {name}: {count[8]:.4g} by {count[1]:.4g}, {ratio:.4f}")
        record_property(f"{name}, 8 lanes by 1", ratio)
        assert ratio <= 1.10
