"""What a program costs, read from its text; what the command says of it, and what it proposes where none fits."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pasta_jax import sharding
from pasta_jax.chips import CHIPS, chip_named, network
from pasta_jax.compile import choices, hlo, report, table
from pasta_jax.compile.cost import Collective, Cost, by_kind, cost_of
from pasta_jax.compile.programs import Job, topology_devices, training_jobs
from pasta_jax.config import Config, DataConfig, MeshConfig
from pasta_jax.memory import GIB
from pasta_jax.model import ModelConfig

V5E, SHAPE = chip_named("v5e:2x4")

TPU_TEXT = """HloModule short, entry_computation_layout={()}

%product (p.0: bf16[2,128,64], p.1: bf16[2,32,64]) -> f32[2,128,32] {
  %p.0 = bf16[2,128,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p.1 = bf16[2,32,64]{2,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %c = f32[2,128,32]{2,1,0} convolution(%p.0, %p.1), window={size=2 lhs_dilate=2}, dim_labels=0bf_0oi->0bf
}

%scattered (p.0: bf16[64,64]) -> bf16[16,64] {
  %p.0 = bf16[64,64]{1,0} parameter(0)
  %r = bf16[64,64]{1,0} all-reduce(%p.0), channel_id=9, replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
  ROOT %s = bf16[16,64]{1,0} slice(%r), slice={[0:16], [0:64]}
}

%piece (p.0: bf16[16,64]) -> bf16[64,64] {
  %p.0 = bf16[16,64]{1,0} parameter(0)
  ROOT %g = bf16[64,64]{1,0} all-gather(%p.0), channel_id=7, replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}
}

%body (t: (u32[], bf16[16,64], bf16[64,64])) -> (u32[], bf16[16,64], bf16[64,64]) {
  %t = (u32[], bf16[16,64]{1,0}, bf16[64,64]{1,0}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%t), index=0
  %one = u32[]{:T(128)} constant(1)
  %next = u32[]{:T(128)} add(%i, %one)
  %after = u32[]{:T(128)} add(%next, %one)
  %x = bf16[16,64]{1,0} get-tuple-element(%t), index=1
  %y = bf16[64,64]{1,0} fusion(%x), kind=kCustom, calls=%piece
  %z = bf16[64,64]{1,0} fusion(%x), kind=kCustom, calls=%piece
  %w = bf16[16,64]{1,0} fusion(%y), kind=kCustom, calls=%scattered
  ROOT %u = (u32[], bf16[16,64]{1,0}, bf16[64,64]{1,0}) tuple(%after, %w, %z)
}

%condition (t: (u32[], bf16[16,64], bf16[64,64])) -> pred[] {
  %t = (u32[], bf16[16,64]{1,0}, bf16[64,64]{1,0}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%t), index=0
  %n = u32[]{:T(128)} constant(6)
  ROOT %less = pred[]{:T(512)} compare(%i, %n), direction=LT
}

ENTRY %main (a: bf16[2,128,64], b: bf16[2,32,64], t: (u32[], bf16[16,64], bf16[64,64])) -> f32[2,128,32] {
  %a = bf16[2,128,64]{2,1,0} parameter(0)
  %b = bf16[2,32,64]{2,1,0} parameter(1)
  %t = (u32[], bf16[16,64]{1,0}, bf16[64,64]{1,0}) parameter(2)
  %loop = (u32[], bf16[16,64]{1,0}, bf16[64,64]{1,0}) while(%t), condition=%condition, body=%body
  ROOT %out = f32[2,128,32]{2,1,0} fusion(%a, %b), kind=kOutput, calls=%product
}
"""


def test_what_a_tpu_program_costs() -> None:
    """A batch of products is a convolution with a window; a loop that adds 2 up to 6 goes round three times."""
    cost = cost_of(hlo.parse(TPU_TEXT))
    assert cost.flops == 2 * 2 * 128 * 32 * 64
    whole, small = 64 * 64 * 2, 16 * 64 * 2
    assert cost.collectives == (
        Collective("all-gather", whole * 3 / 4, 4, 3, whole + small),  # its two pieces share a channel
        Collective("all-reduce", whole * 3 / 4, 4, 3, whole),  # of which each device keeps a quarter
    )
    assert by_kind(cost.collectives) == {"all-gather": 3 * whole * 3 / 4, "all-reduce": 3 * whole * 3 / 4}
    arguments = 2 * 128 * 64 * 2 + 2 * 32 * 64 * 2
    counter = 2 * (4 + 4 + 4) + 4 + 4 + 1
    assert cost.bytes == arguments + 2 * 128 * 32 * 4 + 3 * (2 * small + 2 * whole + counter)


def test_elements_of_tuples_may_have_no_line_of_their_own() -> None:
    """As later versions of the compiler write them."""
    text = re.sub(r"  %\w = \S+ get-tuple-element\(.*\n", "", TPU_TEXT)
    text = re.sub(r"%([ix])\b", lambda match: f"%t#{'ix'.index(match[1])}", text)
    assert text.count("#") == 4
    assert cost_of(hlo.parse(text)) == cost_of(hlo.parse(TPU_TEXT))


def test_a_kernel_costs_what_it_says_of_itself() -> None:
    """Its products are not in the text; and what else it says breaks the line."""
    call = """  %own = f32[8,8]{1,0} custom-call(%a, %b), custom_call_target="tpu", frontend_attributes={a={
"xprof_metadata":"{\\"cost_estimate\\": {\\"flops\\": 5}}"
}}, backend_config={"custom_call_config":{"body":"TUw","cost_estimate":{"bytes_accessed":"7","flops":"1000"}}}
"""
    text = TPU_TEXT.replace("  ROOT %out", call + "  ROOT %out")
    found, before = (cost_of(hlo.parse(text)) for text in (text, TPU_TEXT))
    assert found.flops - before.flops == 1000
    assert found.bytes - before.bytes == 2 * 128 * 64 * 2 + 2 * 32 * 64 * 2 + 8 * 8 * 4


def test_pieces_of_a_gather_in_an_inner_loop_are_one_gather() -> None:
    start = "  %loop = (u32[]"
    first = "  %x = bf16[16,64]{1,0} get-tuple-element(%t), index=1\n"
    first += "  %y = bf16[64,64]{1,0} fusion(%x), kind=kCustom, calls=%piece\n"
    cost = cost_of(hlo.parse(TPU_TEXT.replace(start, first + start)))
    assert by_kind(cost.collectives)["all-gather"] == 64 * 64 * 2 * 3 / 4


def test_of_what_is_fetched_in_slices_each_slice_counts() -> None:
    """As the compiler writes it after it has generated code, and before."""
    text = """HloModule slices, entry_computation_layout={()}

%half (p.0: bf16[64,64]) -> bf16[32,64] {
  %p.0 = bf16[64,64]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %s = bf16[32,64]{1,0:T(8,128)(2,1)S(1)} slice(%p.0), slice={[0:32], [0:64]}
}

ENTRY %main (a: bf16[64,64]) -> bf16[32,64] {
  %a = bf16[64,64]{1,0:T(8,128)(2,1)} parameter(0)
  %b = ((bf16[64,64]{1,0}), bf16[32,64]{1,0:S(1)}, s32[]{:S(2)}) async-start(%a), calls=%half
  %c = ((bf16[64,64]{1,0}), bf16[32,64]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[32:64], [0:64]}
  %d = bf16[32,64]{1,0:S(1)} async-done(%b)
  ROOT %e = bf16[32,64]{1,0:S(1)} slice-done(%c)
}
"""
    assert cost_of(hlo.parse(text)).bytes == 64 * 64 * 2


def test_a_loop_counts_as_often_as_it_goes_round() -> None:
    def run(x: Any, weights: Any) -> Any:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    shapes = (jax.ShapeDtypeStruct((32, 48), "float32"), jax.ShapeDtypeStruct((7, 48, 48), "float32"))
    cost = cost_of(hlo.read(jax.jit(run).lower(*shapes).compile()))
    assert cost.flops == 7 * 2 * 32 * 48 * 48
    assert cost.bytes >= 7 * 4 * 48 * 48
    until = jax.jit(lambda x, w: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ w, x))
    cost = cost_of(hlo.read(until.lower(shapes[0], jax.ShapeDtypeStruct((48, 48), "float32")).compile()))
    assert cost.flops == 2 * 32 * 48 * 48, "of a loop without a known end, one round"


def test_the_least_time_and_its_bound() -> None:
    assert network(V5E, (2, 4), 4) == 50e9, "along a line"
    assert network(V5E, (2, 4), 8) == 100e9, "along both axes"
    assert network(V5E, (16, 16), 16) == 100e9, "around a ring"
    assert network(chip_named("v5p:4x4x4")[0], (4, 4, 4), 64) == 600e9
    cost = Cost(197e12, 819e9 / 2, (Collective("all-gather", 100e9, 8, 2), Collective("all-reduce", 1, 2)))
    seconds = cost.seconds(V5E, SHAPE)
    assert seconds["compute"] == 1 and seconds["memory"] == 0.5
    assert seconds["network"] == pytest.approx(2)
    made = report.Report("train", {"parameters": GIB}, V5E.hbm, cost, seconds, 1000, [], 3.0)
    assert (made.bound, made.tokens_per_s) == ("network", pytest.approx(500))
    text = "\n".join(report.lines(made))
    assert (
        "fits, 1.00 GiB of 15.8 GiB a chip (parameters 1.00 GiB)" in text
        and "bound by network, at most 500 tokens/s" in text
    )
    failed = dataclasses.replace(made, cost=None, too_much="the total memory is too much")
    assert report.lines(failed) == ["train (compiled in 3 s): DOES NOT FIT. the total memory is too much"]


@pytest.mark.parametrize("topology", ["v5e", "v9:2x2", "v5e:0x4", "v5e:2y4", ""])
def test_no_such_slice(topology: str) -> None:
    with pytest.raises(
        ValueError, match=r"write a generation \(v4, v5e, v5p, v6e, v7x\) and a shape, as v5e:2x4"
    ):
        chip_named(topology)


@pytest.mark.tpu
@pytest.mark.parametrize("name", [chip.name for chip in CHIPS])
def test_each_generation_has_its_devices(name: str) -> None:
    pytest.importorskip("libtpu")
    shape = "2x2x1" if chip_named(f"{name}:1")[0].axes == 3 else "2x2"
    chip, _ = chip_named(f"{name}:{shape}")
    devices = topology_devices(f"{name}:{shape}")
    assert len(devices) == 4 * chip.devices
    assert {device.device_kind for device in devices} == {chip.kind}
    with pytest.raises(ValueError, match=rf"--topology={name}:3x5x7x9: libtpu knows no such slice"):
        topology_devices(f"{name}:3x5x7x9")


# ------------------------------------------------------------------------------------------ what fits instead

CONFIG = Config(
    model=ModelConfig(num_layers=2, model_dim=64, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=128),
    data=DataConfig(rows=8, length=64),
    mesh=MeshConfig(fsdp=-1),
)


def test_settings_come_from_near_to_far() -> None:
    words = [str(setting) for setting in choices.training_settings(CONFIG)]
    assert words[:2] == ["--config.remat=everything", "--config.remat=everything --config.microbatches=2"]
    assert words.index("--config.remat=everything --config.mesh.fsdp=-1 --config.mesh.tensor=2") == 4
    assert not any("lora" in line for line in words), "adapters need a model to start from"
    adapted = [str(s) for s in choices.training_settings(dataclasses.replace(CONFIG, init_from="runs/x"))]
    assert adapted[: len(words)] == words and "--config.remat=everything --config.lora.rank=16" in adapted
    assert len(adapted) < 40


def test_the_first_that_fits_is_found_by_estimate_and_confirmed(monkeypatch: pytest.MonkeyPatch) -> None:
    def mesh_of(config: Config) -> Any:
        return sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, jax.devices())

    def examine(job: Job, chip: Any, shape: Any) -> report.Report:
        asked.append(job.parts)
        fits = len(asked) > refusals
        return report.Report(job.name, job.parts, chip.hbm, None, {}, 1, [], 0.0, "" if fits else "too much")

    monkeypatch.setattr(choices, "examine", examine)
    total = sum(training_jobs(CONFIG, mesh_of(CONFIG))[0].parts.values())
    for refusals, expected in ((0, 2), (1, 4), (choices.CONFIRMED, None)):
        asked: list[Any] = []
        said: list[str] = []
        found = choices.that_fits(
            choices.training_settings(CONFIG), mesh_of, V5E, SHAPE, "train", said.append
        )
        assert len(said) == len(asked) == min(refusals + 1, choices.CONFIRMED)
        assert (found is None) == (expected is None)
    assert total > 0
    small = dataclasses.replace(V5E, hbm=1)
    assert (
        choices.that_fits(choices.training_settings(CONFIG), mesh_of, small, SHAPE, "train", said.append)
        is None
    )


@pytest.mark.tpu
def test_the_next_slice() -> None:
    pytest.importorskip("libtpu")
    config = table.config_of(table.Case("gemma-7b", "train", "v5e-8"))
    words = choices.larger_slice(config, V5E, SHAPE)
    assert words == "--topology=v5e:4x4 --config.mesh.fsdp=-1 --config.data.rows=16"
    assert choices.larger_slice(config, V5E, (16, 16)) == ""


def test_a_smaller_decoder() -> None:
    def jobs(rows: int, pool: int, int8: bool, tensor: int) -> list[Job]:
        if tensor == 8:
            raise ValueError("heads")
        parameters = 10 * GIB // (2 if int8 else 1) // tensor
        return [Job("decode", lambda: None, {"parameters": parameters, "pool": rows * pool * 2**20}, 1)]

    now: dict[str, Any] = dict(rows=8, pool=1024, int8=False, tensor=1)
    assert choices.smaller_decoder(jobs, V5E, **now) == "--config.mesh.tensor=2"
    assert choices.smaller_decoder(jobs, V5E, **now | {"tensor": 4}) == "--quantize=int8"
    assert choices.smaller_decoder(jobs, dataclasses.replace(V5E, hbm=GIB), **now) == ""


# -------------------------------------------------------------------------------------------------- the table


def test_the_table_is_resumed_row_by_row(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, path = table.cases()[:3], tmp_path / "rows.jsonl"
    monkeypatch.setattr(table, "cases", lambda: rows)
    compiled: list[str] = []

    def compile_case(case: table.Case) -> dict[str, Any]:
        compiled.append(str(case))
        if len(compiled) == 2:
            raise KeyboardInterrupt
        row = dict(case=str(case), remat="dots", fits=case.what != "preference", limit=16 * GIB, compile_s=9)
        return row | dict(bytes=8 * GIB, bound="compute", seconds={"compute": 0.25}, tokens_per_s=65536.0)

    monkeypatch.setattr(table, "compiled_case", compile_case)
    with pytest.raises(KeyboardInterrupt):
        table.make_table(str(path))
    assert "not compiled" in table.rendered(table.rows_in(str(path)))
    table.make_table(str(path))
    assert compiled == [str(rows[0]), str(rows[1]), str(rows[1]), str(rows[2])]
    shown = table.rendered(table.rows_in(str(path)))
    assert capsys.readouterr().out.endswith(shown + "\n")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown.splitlines()[2:]]
    assert lines[0] == ["gemma-2b, SFT", "v5e-8", "8.0 of 16.0", "yes", "dots", "compute", "250 ms", "65,536"]
    assert lines[1][2:4] == ["more than 16.0", "**no**"]


@pytest.mark.tpu
@pytest.mark.parametrize("topology", ["v5e:4x4", "v6e:4x4", "v6e:8x8", "v5p:4x4x4", "v4:4x4x4"])
def test_heads_are_split_among_neighbours_on_every_slice(topology: str) -> None:
    """A slice need not have an axis of that many chips."""
    pytest.importorskip("libtpu")
    from pasta_jax.model import param_shapes
    from pasta_jax.model.presets import preset

    mesh = sharding.make_mesh(devices=topology_devices(topology))
    shapes = param_shapes(preset("gemma-7b").config)
    assert dict(sharding.decoding_mesh(mesh, shapes).shape) == {
        "data": mesh.size // 8,
        "fsdp": 1,
        "tensor": 8,
    }


def test_every_row_of_the_table_can_be_set_up() -> None:
    """The sizes divide each other: nothing is compiled here."""
    for case in table.cases():
        config = table.config_of(case)
        chip, shape = chip_named(table.SLICES[case.slice])
        devices = table.devices_in(chip, shape)
        assert config.data.rows % devices == config.model.model_dim % devices == 0, case


def test_the_page_shows_the_rows() -> None:
    docs = pathlib.Path(__file__).parents[1] / "docs"
    rows = docs / "tpu-table.jsonl"
    assert all(json.loads(line)["case"] for line in rows.read_text().splitlines())
    text = re.sub(r" +", " ", (docs / "tpu.md").read_text(encoding="utf-8"))
    for line in table.rendered(table.rows_in(str(rows))).splitlines()[2:]:
        assert re.sub(r" +", " ", line) in text
