"""The second stage with adapters, from a plain model through two rounds; samples are made up, all else is real."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasta_jax.checkpoints.about import find_checkpoint, read_metadata
from pasta_jax.checkpoints.load import load_params, load_parts
from pasta_jax.checkpoints.save import Checkpoints
from pasta_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    LogConfig,
    MeshConfig,
    OptimizerConfig,
    PreferenceConfig,
)
from pasta_jax.data import almanac
from pasta_jax.data.sources import make_tokenizer
from pasta_jax.decoding.model import Model
from pasta_jax.experiment import resolve
from pasta_jax.lang.parse import parse
from pasta_jax.loading import load
from pasta_jax.model import Lora, ModelConfig
from pasta_jax.preference import rounds
from pasta_jax.preference.sample import Prompt, Record, Sample
from pasta_jax.tokens.layout import layout_example
from pasta_jax.training.metrics import read_metrics
from pasta_jax.training.state import TrainState
from tests.helpers.models import random_params
from tests.helpers.samples import made_up

pytestmark = pytest.mark.slow

MODEL = ModelConfig(vocab_size=1408, num_layers=1, model_dim=16, head_dim=8, mlp_dim=16, num_heads=2)
CONFIG = Config(
    stage="preference",
    init_from="base",
    model=MODEL,
    lora=Lora(rank=2, targets=("q_proj", "down_proj")),
    microbatches=2,
    data=DataConfig(rows=8, length=32),
    optimizer=OptimizerConfig(b1=0.0),
    preference=PreferenceConfig(prompts_per_round=4, rounds=2, samples=2, lr=1e-2, epochs_per_round=8.0),
    mesh=MeshConfig(fsdp=4, tensor=2),
    checkpoint=CheckpointConfig(every_steps=0, every_minutes=0),
    log=LogConfig(every=1),
)


def answer(prompt: str, annotated: str) -> Sample:
    document = layout_example(almanac.load_tokenizer(), prompt, parse(annotated))
    return made_up(annotated, document, critical_path=10)


def records() -> list[Record]:
    """Four prompts, a right answer and a wrong one to each."""
    found = []
    for country, right in (("Peru", "Lima"), ("Cuba", "Havana"), ("France", "Paris"), ("Japan", "Tokyo")):
        prompt = f"What is the capital of {country}?"
        good, bad = (answer(prompt, f"Its capital is {city}.") for city in (right, "Cusco"))
        found.append(Record(Prompt(prompt, good.text), good, (good, bad)))
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("runs") / "base"
    params = random_params(MODEL, np.random.default_rng(0))
    config = dataclasses.replace(CONFIG, stage="sft", init_from="", lora=Lora())
    with Checkpoints(workdir, config, make_tokenizer(config.data)) as run:
        run.save(TrainState(params, {"nothing": jnp.zeros(1)}, jnp.int32(1)), data_index=0)
    return workdir


def test_rounds_with_adapters(
    base: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training starts from the model that is the reference: at its first step no answer has gained anything."""
    drawn: list[tuple[Model, Model]] = []

    def draw(config: Config, number: int, policy: Model, baseline: Model, folder: str) -> list[Record]:
        assert policy.mesh is not None and dict(policy.mesh.shape) == {"data": 4, "fsdp": 1, "tensor": 2}
        drawn.append((policy, baseline))
        return records()

    monkeypatch.setattr(rounds, "draw", draw)
    held: list[int] = []
    trained = rounds.train

    def train(*args: Any, **kwargs: Any) -> Any:
        drawn.clear()
        held.append(
            sum(isinstance(leaf, jax.Array) and leaf.shape == (1408, 16) for leaf in jax.live_arrays())
        )
        return trained(*args, **kwargs)

    monkeypatch.setattr(rounds, "train", train)
    config = dataclasses.replace(CONFIG, init_from=str(base))
    last = rounds.run(resolve(config)[0], str(tmp_path))
    assert last == str(tmp_path / "round-2")
    assert held == [0, 0], "the models that drew the samples are still held while training"

    plain, _ = load_params(base)
    before: Any = None
    for number in (1, 2):
        folder = tmp_path / f"round-{number}"
        assert json.loads((folder / "round.json").read_text())["pairs"] == 4
        first, *_, end = read_metrics(str(folder / "metrics.jsonl"))
        assert abs(first["margin"]) < 1e-3 < abs(end["margin"])
        about = read_metadata(find_checkpoint(folder))
        assert about.base and about.base.path == str(base)
        frozen, adapters, _ = load_parts(folder)
        jax.tree.map(np.testing.assert_array_equal, frozen, plain)
        assert any((np.asarray(x) != 0).any() for x in jax.tree.leaves(adapters))
        a = np.asarray(adapters["layer_0"]["mlp"]["down_proj_lora_a"])
        if before is not None:
            assert 0 < np.abs(a - before).max() < 0.1, "A was drawn anew: the adapters did not go on"
        before = a
    assert load(tmp_path).config == MODEL
