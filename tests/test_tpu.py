"""Law 10, first proof: the tiny model's programs compile for a real TPU slice, and never wait for the host."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from pasta_jax import sharding
from pasta_jax.compile import programs as ahead
from pasta_jax.decoding.state import Limits
from pasta_jax.experiment import resolve
from pasta_jax.overrides import load_config
from tests.helpers import only_full, optimized
from tests.helpers.hlo import lowered

pytestmark = pytest.mark.tpu

TINY = str(Path(__file__).parent.parent / "configs" / "tiny.py")
MESH = ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "data.rows=8"]


@pytest.fixture(autouse=True, scope="module")
def compiled_as_for_users() -> Iterator[None]:
    """What is read in the compiled programs is what users run."""
    with optimized():
        yield


@pytest.fixture(scope="module")
def mesh() -> Any:
    if not sys.platform.startswith("linux"):
        pytest.skip("libtpu is for Linux")
    pytest.importorskip("libtpu")
    return sharding.make_mesh(2, 2, 2, devices=ahead.topology_devices("v5e:2x4"))


def is_spread(compiled: Any) -> bool:
    """The arrays with heads, mlp or vocabulary in them (parameters, pool) are split over chips, all 20 or more."""
    return sum(not place.is_fully_replicated for place in jax.tree.leaves(compiled.input_shardings[0])) > 20


def test_train_step(mesh):
    compiled = lowered(ahead.training_jobs(load_config(TINY, MESH), mesh))["train"].compile()
    assert "tpu" in str(mesh.devices.flat[0]).lower()
    assert not ahead.host_calls(compiled.as_text())
    assert is_spread(compiled)
    text = compiled.as_text()
    assert "all-reduce" in text or "reduce-scatter" in text  # gradients really cross chips


def test_prefill_and_decode_loop(mesh):
    config = load_config(TINY, MESH)
    limits = Limits(lanes=8, threads=16, pool=512)
    decoder = ahead.decoder_programs(config, mesh, limits=limits, rows=8)
    compiled = {verb: program.compile() for verb, program in lowered(ahead.decoding_jobs(decoder)).items()}
    for program in compiled.values():
        assert not ahead.host_calls(program.as_text())
        assert is_spread(program)
    assert "while" in compiled["decode"].as_text()


def test_a_host_callback_would_be_found():
    """The check can fail: a program with a callback is caught, on the one backend that is always here."""

    def asks_the_host(x: Any) -> Any:
        return jax.pure_callback(lambda y: y, jax.ShapeDtypeStruct((), "float32"), x)

    compiled = jax.jit(asks_the_host).lower(jax.ShapeDtypeStruct((), "float32")).compile()
    assert ahead.host_calls(compiled.as_text() or "")


@only_full
def test_second_stage_with_adapters_in_parts(mesh):
    """What training runs is what is compiled: adapters, float32 masters, remat, microbatches, the reference."""
    settings = ["stage=preference", "init_from=sft", "lora.rank=4", "param_dtype=float32", "remat=true"]
    settings += ["microbatches=2", "model.dtype=bfloat16", "model.num_layers=1"]
    config = load_config(TINY, MESH + settings)
    programs = lowered(ahead.training_jobs(resolve(config, ahead=True)[0], mesh))
    assert set(programs) == {"reference", "preference"}
    for name, program in programs.items():
        compiled = program.compile()
        assert not ahead.host_calls(compiled.as_text())
        names = {
            str(path[-1].key)
            for path, _ in jax.tree_util.tree_leaves_with_path(program.in_avals)
            if hasattr(path[-1], "key")
        }
        assert ("q_proj_lora_a" in names) == (name == "preference")
        assert "while" in compiled.as_text()  # part by part
