"""An experiment resolved: what its configuration leaves open comes from the checkpoint and the tokenizer."""

import dataclasses
import pathlib
import re
import shutil

import numpy as np
import pytest

from pasta_jax.checkpoints.about import CheckpointError
from pasta_jax.checkpoints.save import Checkpoints
from pasta_jax.config import Config, ConfigError, DataConfig
from pasta_jax.data.sources import make_tokenizer
from pasta_jax.experiment import resolve, round_of, stages
from pasta_jax.model.config import Lora, ModelConfig
from pasta_jax.overrides import override

MODEL = ModelConfig(vocab_size=1408, num_layers=2, dtype="bfloat16")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A workdir of weights."""
    workdir = tmp_path_factory.mktemp("start")
    config = Config(model=MODEL)
    with Checkpoints(workdir, config, make_tokenizer(config.data)) as run:
        run.save_weights({"a": np.ones(2)})
    return str(workdir)


def test_model_and_tokenizer_are_those_of_the_start(start: str, tmp_path: pathlib.Path) -> None:
    config = Config(init_from=start, data=DataConfig(tokenizer="elsewhere/tokenizer.model", dialect="apar"))
    resolved, tokenizer = resolve(config)
    assert resolved.model == dataclasses.replace(MODEL, dtype="float32"), "the dtype is the configuration's"
    assert resolved.data == dataclasses.replace(config.data, tokenizer="almanac")
    assert tokenizer.vocabulary.dialect == "apar"
    with pytest.raises(CheckpointError, match="no such directory"):
        resolve(Config(init_from=str(tmp_path / "none")))


def test_an_override_that_contradicts_the_start_is_refused(start: str) -> None:
    def resolved(*overrides: str) -> Config:
        return resolve(override(Config(init_from=start), overrides), overrides=overrides)[0]

    assert resolved("model.num_layers=2", "model.dtype=bfloat16", "steps=3").model == MODEL
    for text, message in {
        "model.num_layers=3": r"config.model.num_layers is 3, but .* has 2, and training starts from it. Leave",
        "data.tokenizer=x.model": r"config.data.tokenizer is 'x.model', but .* has 'almanac'",
    }.items():
        with pytest.raises(ConfigError, match=message):
            resolved(text)


def test_a_run_that_goes_on_is_asked_itself(start: str, caplog: pytest.LogCaptureFixture) -> None:
    """Only a first start says that its model is not the configuration's; what is refused is told from the run."""
    resolve(Config(init_from=start))
    assert f"The model is that of {start}; it differs from the configuration in model." in caplog.text
    caplog.clear()
    gone = Config(init_from="runs/elsewhere")
    resolve(gone, workdir=start)
    assert not caplog.text
    layers = ["model.num_layers=3"]
    with pytest.raises(ConfigError, match=f"is 3, but {start} has 2, and training"):
        resolve(override(gone, layers), workdir=start, overrides=layers)


def test_the_almanacs_tokenizer_is_not_taken_for_own_text_without_a_word(
    start: str, caplog: pytest.LogCaptureFixture
) -> None:
    own = Config(data=DataConfig(sources=(("almanac:plain", 1.0), ("mine.jsonl", 1.0))))
    resolve(own)
    assert caplog.text.count("mine.jsonl will be learnt with the almanac's tokenizer") == 1
    assert "python -m pasta_jax.tokenizer --text=mine.jsonl --vocab_size=8000" in caplog.text
    caplog.clear()
    resolve(own, overrides=["data.tokenizer=almanac"])  # it is meant
    resolve(own, workdir=start)  # it was said when the run began
    resolve(dataclasses.replace(own, init_from=start))
    resolve(Config())
    resolve(Config(data=DataConfig(sources=(("prepared:mine", 1.0),))))  # its tokenizer is checked
    assert "tokenizer" not in caplog.text


def test_a_run_whose_newest_checkpoint_is_damaged_is_asked_at_the_one_before(
    start: str, tmp_path: pathlib.Path
) -> None:
    """Training goes back to it; a start from another run does not."""
    workdir = tmp_path / "run"
    shutil.copytree(start, workdir)
    for step, text in ((1, None), (2, "{"), (3, None)):
        about = workdir / "checkpoints" / str(step) / "pasta" / "pasta.json"
        about.parent.mkdir(parents=True)
        if text:
            about.write_text(text)
    assert resolve(Config(init_from="runs/elsewhere"), workdir=str(workdir))[0].model.num_layers == 2
    with pytest.raises(
        CheckpointError, match=r"3 is not a checkpoint of pasta_jax: it has no pasta/pasta.json"
    ):
        resolve(Config(init_from=str(workdir)))
    shutil.rmtree(workdir / "checkpoints" / "0")
    with pytest.raises(CheckpointError, match=r"3 is not a checkpoint of pasta_jax"):
        resolve(Config(init_from="runs/elsewhere"), workdir=str(workdir))


def test_to_compile_a_start_need_not_be_there(start: str, tmp_path: pathlib.Path) -> None:
    none = Config(init_from=str(tmp_path / "none"), model=MODEL)
    assert resolve(none, ahead=True)[0] == none
    there = Config(init_from=start, model=dataclasses.replace(MODEL, num_layers=7))
    assert resolve(there, ahead=True)[0].model == MODEL


def test_adapters_train_the_rows_of_the_tags(start: str) -> None:
    config = Config(init_from=start, lora=Lora(rank=2))
    resolved, tokenizer = resolve(config)
    assert resolved.lora.rows == tuple(sorted(tokenizer.vocabulary.tag_ids.values()))
    named = dataclasses.replace(config, lora=Lora(rank=2, rows=(5,)))
    assert resolve(named)[0].lora.rows == (5,)


def test_stages_and_rounds(start: str) -> None:
    config = Config(stage="both")
    assert [(stage.stage, stage.init_from) for stage in stages(config)] == [
        ("sft", ""),
        ("preference", "sft"),
    ]
    assert stages(Config()) == [Config()]
    round_1 = round_of(config, start, steps=30)
    assert (round_1.init_from, round_1.steps) == (start, 30)
    assert (round_1.optimizer.lr, round_1.optimizer.warmup_steps) == (config.preference.lr, 3)


@pytest.mark.parametrize(
    ("config", "overrides", "message"),
    [
        (Config(epochs=3.0, steps=7), ["steps=7"], r"config.steps=7 does not count: config.epochs=3 sets"),
        (Config(steps=7), ["steps=7"], ""),
        (Config(epochs=3.0), ["seed=1"], ""),
    ],
)
def test_steps_that_do_not_count_are_said_at_the_start(
    config: Config, overrides: list[str], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    resolve(config, overrides=overrides)
    assert bool(caplog.messages) == bool(message) and re.match(message, "".join(caplog.messages))


def test_steps_do_not_count_in_the_second_stage(start: str, caplog: pytest.LogCaptureFixture) -> None:
    resolve(Config(stage="preference", init_from=start, steps=9), overrides=["steps=9"])
    assert "config.steps=9 does not count in the second stage" in caplog.text
