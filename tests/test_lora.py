"""Adapters: merged is unmerged, what begins changes nothing, and a checkpoint of them finds its weights again."""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasta_jax import sharding
from pasta_jax.checkpoints.about import BaseWeights, CheckpointError, find_checkpoint, read_metadata
from pasta_jax.checkpoints.fingerprint import apart, fingerprint, sample
from pasta_jax.checkpoints.load import load_params, load_parts
from pasta_jax.checkpoints.save import Checkpoints
from pasta_jax.config import Config, ConfigError
from pasta_jax.experiment import with_lora_rows
from pasta_jax.model import Lora, ModelConfig, Transformer, init_params
from pasta_jax.model.forms import quantize
from pasta_jax.model.lora import ALIKE, join, merge, split, start
from pasta_jax.train import run as run_training
from pasta_jax.training import loop
from pasta_jax.training.loop import sft, starting_weights
from pasta_jax.training.metrics import read_metrics
from pasta_jax.training.state import TrainState, decays
from pasta_jax.training.update import make_update
from tests.helpers import only_full
from tests.helpers.conversion import bring_in
from tests.helpers.conversion import run as convert
from tests.helpers.hf_folders import CONFIGS, write_hf_folder
from tests.helpers.models import GEMMA, LLAMA, TINY, inputs, random_params
from tests.helpers.training import CONFIG, TOKENIZER, assert_same, changed, train

LORA = Lora(rank=3, alpha=6.0, rows=(5, 2, 40))


@functools.partial(jax.jit, static_argnums=(0, 1))
def logits_of(config: ModelConfig, lora: Lora, params: Any, *args: Any) -> Any:
    model = Transformer(config, lora)
    hidden: Any = model.apply({"params": params}, *args)
    return model.apply({"params": params}, hidden[0], method="logits")


def with_adapters(config: ModelConfig, lora: Lora, rng: np.random.Generator) -> Any:
    """Weights and adapters, all of them random; none is zero."""
    shapes = jax.eval_shape(functools.partial(init_params, config, lora=lora), jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), shapes)


@pytest.mark.slow
@pytest.mark.parametrize("config", [TINY, LLAMA, GEMMA], ids=["tied", "untied", "gemma"])
def test_merged_is_unmerged(config: ModelConfig, seed: int) -> None:
    rng = np.random.default_rng(seed)
    params = with_adapters(config, LORA, rng)
    tokens, *rest = inputs(rng, 2, 12)
    tokens[:, ::3] = rng.choice(LORA.rows, tokens[:, ::3].shape)
    expected = logits_of(config, LORA, params, tokens, *rest)
    merged = merge(params, LORA)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, split(params)[0])
    found = logits_of(config, Lora(), merged, tokens, *rest)
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(found, expected, atol=1e-5 * max(scale, 1.0))
    without = logits_of(config, Lora(), split(params)[0], tokens, *rest)
    assert float(jnp.abs(without - expected).max()) > 0.01 * scale


@pytest.mark.slow
def test_adapters_begin_without_a_change(seed: int) -> None:
    """Unless rows of the table are alike: then, and only then, they are told apart."""
    rng = np.random.default_rng(seed)
    base = random_params(LLAMA, rng)
    trained = start(base, LORA, jax.random.key(seed))
    shapes = jax.eval_shape(functools.partial(init_params, LLAMA, lora=LORA), jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), trained) == jax.tree.map(
        lambda x: (x.shape, x.dtype), split(shapes)[1]
    )
    joined = join(base, trained)
    assert_same(split(joined), (base, trained))
    args = inputs(rng, 2, 12)
    np.testing.assert_allclose(
        logits_of(LLAMA, LORA, joined, *args), logits_of(LLAMA, Lora(), base, *args), atol=1e-5
    )
    a = trained["layer_0"]["mlp"]["up_proj_lora_a"]
    assert not np.array_equal(a, trained["layer_1"]["mlp"]["up_proj_lora_a"])
    assert np.asarray(a).std() == pytest.approx(LLAMA.model_dim**-0.5, rel=0.4)
    assert start(base, LORA, jax.random.key(0), jnp.bfloat16)["head_rows"].dtype == jnp.bfloat16

    table = np.array(base["embed"]["embedding"])
    table[5] = table[2]  # alike; 40 is not
    again = start({**base, "embed": {"embedding": table}}, LORA, jax.random.key(seed))
    rows, scale = np.asarray(again["embed"]["embedding_rows"]), np.sqrt(np.mean(table**2))
    np.testing.assert_array_equal(rows[2], table[40])
    for i in (0, 1):
        assert 0 < np.sqrt(np.mean((rows[i] - table[2]) ** 2)) < 0.3 * scale
    assert np.sqrt(np.mean((rows[0] - rows[1]) ** 2)) > ALIKE * scale
    np.testing.assert_array_equal(again["head_rows"], trained["head_rows"])


@pytest.mark.slow
def test_on_a_mesh_and_using_up_what_it_merges(seed: int) -> None:
    mesh = sharding.make_mesh(2, 2, 2)
    params = with_adapters(LLAMA, LORA, np.random.default_rng(seed))
    expected = merge(params, LORA)
    placed = jax.device_put(params, sharding.param_shardings(params, mesh))
    trained = start(split(placed)[0], LORA, jax.random.key(1))
    for x, y in zip(
        jax.tree.leaves(trained), jax.tree.leaves(start(split(params)[0], LORA, jax.random.key(1)))
    ):
        np.testing.assert_allclose(x, y, atol=1e-6)
    assert fingerprint(placed) == fingerprint(params)
    merged = merge(placed, LORA, donate=True)
    shardings = sharding.param_shardings(merged, mesh)
    for leaf, like, place in zip(
        jax.tree.leaves(merged), jax.tree.leaves(expected), jax.tree.leaves(shardings), strict=True
    ):
        np.testing.assert_allclose(leaf, like, atol=1e-5)
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    assert placed["layer_0"]["mlp"]["up_proj"].is_deleted()


def test_what_cannot_have_adapters_is_refused() -> None:
    base = {"mlp": {"up_proj": jnp.zeros((4, 4), jnp.int8)}}
    with pytest.raises(ValueError, match="up_proj is int8: adapters go with plain weights"):
        start(base, Lora(rank=2), jax.random.key(0))
    with pytest.raises(ValueError, match="up_proj is Int8: adapters go with plain weights"):
        merge(quantize({"mlp": {"up_proj": jnp.ones((4, 4))}}), Lora(rank=2))
    with pytest.raises(ValueError, match="None of the targets o_proj is among the weights"):
        start({"mlp": {"up_proj": jnp.zeros((4, 4))}}, Lora(rank=2, targets=("o_proj",)), jax.random.key(0))
    with pytest.raises(ConfigError, match=r"init_from is empty: adapters go beside"):
        Config(lora=Lora(rank=2))
    with pytest.raises(ConfigError, match=r"lora\.rows must be different ids below"):
        Config(init_from="x", lora=Lora(rank=2, rows=(3, 3)))


def test_fingerprints_tell_weights_apart(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And samples say how far apart they are."""
    params = random_params(TINY, np.random.default_rng(seed))
    same = fingerprint(params)
    assert fingerprint(jax.tree.map(np.asarray, params)) == same
    moved = jax.tree.map(lambda x: x * 1.001, params)
    cast = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    renamed = {("layer_9" if name == "layer_1" else name): value for name, value in params.items()}
    assert len({same, *map(fingerprint, (moved, cast, renamed))}) == 4
    few = sample(params)
    assert [apart(sample(tree), few) for tree in (params, moved)] == [0, pytest.approx(0.001, rel=0.1)]
    assert 1e-4 < apart(sample(cast), few) < 0.01 < 1 < apart(-few, few)
    assert apart(few[1:], few) == apart(few * np.nan, few) == np.inf
    monkeypatch.setattr("pasta_jax.checkpoints.fingerprint._is_here", lambda leaf: False)  # on an accelerator
    np.testing.assert_array_equal(sample(params), few)


# ------------------------------------------------------------------------------------------------- training

BF16 = changed(CONFIG, model={"dtype": "bfloat16"})


def save_random(workdir: pathlib.Path, seed: int) -> pathlib.Path:
    """A model of random weights, saved in float32 as one trained so would be."""
    config = dataclasses.replace(BF16, param_dtype="float32")
    shapes = jax.eval_shape(functools.partial(init_params, CONFIG.model), jax.random.key(0))
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), shapes)
    with Checkpoints(workdir, config, TOKENIZER) as run:
        run.save(TrainState(params, {"nothing": jnp.zeros(1)}, jnp.int32(1)), data_index=0)
    return workdir


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A model that computes in bfloat16: runs/base below a folder of its own."""
    return save_random(tmp_path_factory.mktemp("all") / "runs" / "base", seed=0)


def lora_config(base: os.PathLike[str] | str) -> Config:
    lora = Lora(rank=2, targets=("q_proj", "down_proj"))
    config = dataclasses.replace(BF16, steps=4, init_from=str(base), lora=lora, param_dtype="float32")
    return with_lora_rows(config, TOKENIZER)


@pytest.fixture(scope="module")
def adapted(base: pathlib.Path) -> pathlib.Path:
    """Adapters beside it, trained in one go: runs/adapted."""
    workdir = base.parent / "adapted"
    train(workdir, lora_config(base))
    return workdir


@pytest.mark.slow
def test_adapters_are_trained_and_nothing_else(adapted: pathlib.Path, base: pathlib.Path) -> None:
    frozen, trained, about = load_parts(adapted)
    assert_same(frozen, jax.tree.map(lambda x: x.astype(jnp.bfloat16), load_params(base)[0]))
    rows = tuple(sorted(TOKENIZER.vocabulary.tag_ids.values()))
    assert about.config.lora.rows == rows and len(rows) == 6
    assert {x.dtype for x in jax.tree.leaves(trained)} == {jnp.dtype("float32")}
    b = trained["layer_0"]["mlp"]["down_proj_lora_b"]
    assert float(jnp.abs(b).max()) > 0
    own = frozen["embed"]["embedding"][jnp.array(rows)].astype(jnp.float32)
    assert (np.abs(trained["embed"]["embedding_rows"] - own).max(axis=1) > 1e-3).all()
    saved = json.loads((find_checkpoint(adapted) / "params" / "_METADATA").read_text())
    assert "'up_proj'" not in str(saved) and "down_proj_lora_a" in str(saved)
    losses = [line["loss"] for line in read_metrics(str(adapted / "metrics.jsonl"))]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_resuming_is_bit_identical(adapted: pathlib.Path, base: pathlib.Path, tmp_path: pathlib.Path) -> None:
    train(tmp_path, lora_config(base), stop_after=1)
    moved = shutil.copytree(base, tmp_path / "moved")
    state = train(tmp_path, lora_config(moved))  # the same weights elsewhere
    assert_same(state.params, load_parts(adapted)[1])


@pytest.mark.slow
def test_what_is_loaded_is_base_and_adapters(adapted: pathlib.Path) -> None:
    frozen, trained, about = load_parts(adapted)
    wanted = merge(join(frozen, trained), about.config.lora)
    found, _ = load_params(adapted)
    assert_same(found, wanted)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("bfloat16")}
    exact = jax.eval_shape(functools.partial(init_params, CONFIG.model), jax.random.key(0))
    wide, _ = load_params(adapted, expected=exact)
    for x, y in zip(jax.tree.leaves(wide), jax.tree.leaves(found), strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_array_equal(x.astype(jnp.bfloat16), y)


@pytest.mark.slow
def test_the_base_is_found_by_a_relative_path_and_told_by_what_it_is(
    adapted: pathlib.Path, base: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tmp_path / "elsewhere" / "runs"
    shutil.copytree(adapted, runs / "adapted")
    file = find_checkpoint(runs / "adapted") / "pasta" / "pasta.json"
    about = json.loads(file.read_text())
    file.write_text(json.dumps(about | {"base": about["base"] | {"path": "runs/base"}}))
    message = r"adapters for the weights in runs/base, which is not there.*base=DIRECTORY"
    with pytest.raises(CheckpointError, match=message):
        load_params(runs / "adapted")
    expected, _ = load_params(adapted)
    assert_same(load_params(runs / "adapted", base=base)[0], expected)
    (runs / "base").symlink_to(base)
    monkeypatch.chdir(tmp_path)
    assert_same(load_params("elsewhere/runs/adapted")[0], expected)  # from the folders above the checkpoint
    monkeypatch.chdir(base.parents[1])
    (runs / "base").unlink()
    assert_same(load_params(runs / "adapted")[0], expected)  # from here

    other = save_random(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match=r"adapters for other weights than those in .*other"):
        load_params(adapted, base=other)
    with pytest.raises(CheckpointError, match=r"adapters for other weights"):
        train(adapted, lora_config(other))


def starting(config: Config) -> tuple[Any, Any, BaseWeights | None]:
    """What training with a configuration begins with; nothing is trained."""
    mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
    config = with_lora_rows(config, TOKENIZER)
    return starting_weights(config, TOKENIZER, make_update(config, mesh, sft), mesh)


@pytest.mark.slow
def test_training_goes_on_from_adapters(adapted: pathlib.Path) -> None:
    """The same kind: they themselves. Others, or none: from what the two are together."""
    config = lora_config(adapted)
    frozen, trained, about = load_parts(adapted)
    found, beside, mark = starting(config)
    assert_same((found, beside), (trained, frozen))
    assert mark == about.base
    together, _ = load_params(adapted)
    found, beside, mark = starting(dataclasses.replace(config, lora=Lora(rank=1, targets=("o_proj",))))
    assert_same(beside, together)
    assert set(found["layer_0"]) == {"attn"} and mark and mark.path == str(adapted)
    found, beside, mark = starting(dataclasses.replace(config, lora=Lora()))
    assert (beside, mark) == ({}, None)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("float32")}
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(together), strict=True):
        np.testing.assert_array_equal(x.astype(jnp.bfloat16), y)


def test_adapters_decay_and_rows_like_embeddings() -> None:
    mask = decays(jax.eval_shape(functools.partial(init_params, GEMMA, lora=LORA), jax.random.key(0)))
    assert mask["embed"]["embedding_rows"]
    assert mask["layer_0"]["attn"]["q_proj_lora_a"] and mask["layer_0"]["attn"]["q_proj_lora_b"]
    assert not mask["layer_0"]["attn"]["q_norm"] and not mask["layer_0"]["attn"]["q_proj_bias"]


@only_full
def test_trained_twice_they_are_equal_to_the_byte(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the commands' own functions, from records to PEFT's files; the second run is stopped half-way."""
    write_hf_folder(tmp_path / "hf", CONFIGS["gemma"])
    bring_in(tmp_path / "hf", tmp_path / "W")
    promises = '<promise topic="Nile" tokens=1 /><async>the Nile is long</async>' * 2
    records = [{"prompt": f"the rivers {i}", "response": f"And {i}: {promises}"} for i in range(5)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = changed(data={"sources": ((f"{tmp_path}/mine.jsonl", 1.0),), "rows": 2, "length": 96})
    config = dataclasses.replace(
        config, steps=4, init_from=f"{tmp_path}/W", lora=Lora(rank=2), param_dtype="float32"
    )
    mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
    real, written = loop.train, dict[str, dict[str, bytes]]()
    stop: int | None
    for name, seed, stops in (("one", 11, [None]), ("two", 11, [2, None]), ("other", 12, [None])):
        for stop in stops:
            monkeypatch.setattr(loop, "train", functools.partial(real, mesh=mesh, stop_after=stop))
            run_training(dataclasses.replace(config, seed=seed), str(tmp_path / name))
        assert convert(f"--from={tmp_path}/{name}", f"--to={tmp_path}/{name}-peft", "--dtype=bfloat16") == 0
        written[name] = {path.name: path.read_bytes() for path in (tmp_path / f"{name}-peft").iterdir()}
    assert read_metadata(find_checkpoint(tmp_path / "two")).step == 4
    assert written["two"] == written["one"] and len(written["one"]) >= 4
    different = {name for name, content in written["one"].items() if written["other"][name] != content}
    assert different == {"adapter_model.safetensors"}, "another seed gives other adapters"
