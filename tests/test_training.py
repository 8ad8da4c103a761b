"""The training loop: it learns, resumes bit by bit, stops in good order, and shards without a difference."""

import dataclasses
import json
import os
import pathlib
import signal
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import CheckpointManager as Manager

from pasta_jax.arrays import ThreadedTokens
from pasta_jax.checkpoints.about import CheckpointError, find_checkpoint, read_metadata
from pasta_jax.config import ConfigError, LogConfig, OptimizerConfig
from pasta_jax.data.batches import Shuffled
from pasta_jax.training import loop, signals
from pasta_jax.training.losses import Scores
from pasta_jax.training.metrics import read_metrics
from pasta_jax.training.signals import Stopped
from pasta_jax.training.state import TrainState, decays, make_schedule
from tests.helpers import optimized
from tests.helpers.training import CONFIG, TOKENIZER, VOCABULARY, Counting, assert_same, changed, train

pytestmark = pytest.mark.slow


class At(Counting):
    """The same; something happens when one document is asked for."""

    def __init__(self, index: int, happens: Callable[[], object]):
        self.index, self.happens = index, happens

    def __getitem__(self, index: int) -> ThreadedTokens:
        if index == self.index:
            self.happens()
        return super().__getitem__(index)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainState, pathlib.Path]:
    """An uninterrupted run."""
    workdir = tmp_path_factory.mktemp("whole")
    return train(workdir), workdir


def test_it_learns_and_writes_down_what_it_did(whole: tuple[TrainState, pathlib.Path]) -> None:
    _, workdir = whole
    lines = read_metrics(str(workdir / "metrics.jsonl"))
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    names = {"step", "loss", "accuracy", "targets", "lr", "grad_norm", "tokens_per_s", "packing"}
    assert set(lines[0]) == names - {"tokens_per_s"}  # the first step is compiling
    for line in lines[1:]:
        assert set(line) == names
        assert 0.8 < line["packing"] <= 1
    assert json.loads((workdir / "config.json").read_text())["data"]["rows"] == 8
    assert json.loads((workdir / "env.json").read_text())["versions"]["jax"] == jax.__version__
    assert find_checkpoint(workdir).name == "8"


def test_resuming_is_bit_identical(
    whole: tuple[TrainState, pathlib.Path], tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(tmp_path, stop_after=3)
    metrics = tmp_path / "metrics.jsonl"
    foreign = b'\xff\xfe\n5\n[]\n{"loss": 1.0}\n{"step": "4"}\n'
    # A run that was cut off after its last save, and what no run wrote.
    metrics.write_bytes(foreign + metrics.read_bytes() + b'{"step": 4, "loss": 1.0}\n{"step": 5, "lo')
    resumed = train(tmp_path)
    assert_same(resumed, whole[0])
    lines = read_metrics(str(tmp_path / "metrics.jsonl"))
    uninterrupted = read_metrics(str(whole[1] / "metrics.jsonl"))
    assert [(x["step"], x["loss"]) for x in lines] == [(x["step"], x["loss"]) for x in uninterrupted]
    assert_same(train(tmp_path), whole[0])  # and once it is finished, running it again changes nothing
    assert_same(train(tmp_path, dataclasses.replace(CONFIG, steps=5)), whole[0])
    assert (
        f"{tmp_path} is at step 8, past config.steps=5. To go on, set --config.steps above 8" in caplog.text
    )


class Equal(Counting):
    """64 documents of 8 tokens each: two batches, which end where an epoch ends."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> ThreadedTokens:
        fields = Counting()[index * 7 + 1000].fields()
        long = [np.concatenate([field, field])[:8] for field in fields.values()]
        document = ThreadedTokens(**dict(zip(fields, long, strict=True)))
        line = np.arange(8, dtype=np.int32)
        return dataclasses.replace(document, position=line, order=line)


def test_resuming_at_the_edge_of_an_epoch_is_bit_identical(tmp_path: pathlib.Path) -> None:
    config, source = dataclasses.replace(CONFIG, steps=5), Shuffled(Equal(), seed=3)
    whole = train(tmp_path / "whole", config, source=source)
    for stop in (2, 4):
        workdir = tmp_path / str(stop)
        train(workdir, config, source=source, stop_after=stop)
        assert read_metadata(find_checkpoint(workdir)).data_index == 32 * stop, "an epoch is 64 documents"
        assert_same(train(workdir, config, source=source), whole)


def test_sigterm_saves_and_resumes(whole: tuple[TrainState, pathlib.Path], tmp_path: pathlib.Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    source = At(130, lambda: os.kill(os.getpid(), signal.SIGTERM))
    config = changed(log={"every": 8})
    with pytest.raises(Stopped) as stopped:
        train(tmp_path, config, source=source)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    assert 1 <= int(find_checkpoint(tmp_path).name) < 8
    assert_same(train(tmp_path, config), whole[0])
    # The line has the mean of all its steps, those before the interruption too.
    (line,) = read_metrics(str(tmp_path / "metrics.jsonl"))
    lines = read_metrics(str(whole[1] / "metrics.jsonl"))
    for name in ("loss", "accuracy", "grad_norm", "packing"):
        assert line[name] == pytest.approx(np.mean([each[name] for each in lines]), rel=1e-9)
    assert line["lr"] == lines[-1]["lr"]


def test_sigterm_while_the_last_step_is_saved(
    whole: tuple[TrainState, pathlib.Path], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is saved whole, and what would come after this training does not begin."""
    before, save = signal.getsignal(signal.SIGTERM), loop.Checkpoints.save

    def saved(self: loop.Checkpoints, state: TrainState, *args: Any) -> None:
        save(self, state, *args)
        if state.step == 8:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop.Checkpoints, "save", saved)
    with pytest.raises(Stopped):
        train(tmp_path)
    assert signal.getsignal(signal.SIGTERM) is before
    assert find_checkpoint(tmp_path).name == "8"
    assert_same(train(tmp_path), whole[0])


def test_a_signal_that_comes_too_late_to_be_heeded_has_its_usual_effect(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While processes agree at the end that none has come."""
    heard: list[int] = []

    def agreed(number: int) -> tuple[int]:
        signal.raise_signal(signal.SIGTERM)
        return (number,)

    monkeypatch.setattr(signals, "agreed", agreed)
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        with signals.stop_requests() as request:
            pass
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM] and request.signal is None


def test_sigterm_before_the_first_step(
    whole: tuple[TrainState, pathlib.Path], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As while weights are read: it leaves at once, and nothing is lost."""
    train(tmp_path, stop_after=4)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "write_run_info", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped):
            train(tmp_path)
    assert find_checkpoint(tmp_path).name == "4"
    assert_same(train(tmp_path), whole[0])


def test_a_damaged_newest_checkpoint_costs_the_steps_since_the_one_before(
    whole: tuple[TrainState, pathlib.Path], tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(tmp_path)
    newest = tmp_path / "checkpoints" / "8"
    (newest / "pasta" / "pasta.json").write_text("{")
    assert_same(train(tmp_path), whole[0])
    assert f"{newest} is damaged, and renamed to 8.damaged." in caplog.text
    assert "Going back to step 4." in caplog.text
    lines = read_metrics(str(tmp_path / "metrics.jsonl"))
    assert [line["step"] for line in lines] == list(range(1, 9))


def test_a_save_that_fails_in_the_background_stops_the_run_before_the_next_is_due(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Manager, "_finalize_checkpoint", fails)
    config = dataclasses.replace(changed(checkpoint={"every_steps": 60}), steps=1000)
    with pytest.raises(CheckpointError, match=r"Step 60 in .* could not be written: the disk is full\. "):
        train(tmp_path, config)
    assert 60 <= read_metrics(str(tmp_path / "metrics.jsonl"))[-1]["step"] < 120


def test_sharded_is_unsharded(whole: tuple[TrainState, pathlib.Path], tmp_path: pathlib.Path) -> None:
    with optimized():  # as users run it
        sharded = train(tmp_path, changed(mesh={"data": 2, "fsdp": 2, "tensor": 2}))
    q_proj = sharded.params["layer_0"]["attn"]["q_proj"]
    assert len({str(shard.index) for shard in q_proj.addressable_shards}) == 4
    for x, y in zip(jax.tree.leaves(sharded), jax.tree.leaves(whole[0])):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_a_checkpoint_of_one_mesh_goes_on_on_another(
    whole: tuple[TrainState, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    train(tmp_path, changed(mesh={"data": 1, "fsdp": 4, "tensor": 2}), stop_after=4)
    resumed = train(tmp_path, changed(mesh={"data": 2}))
    for x, y in zip(jax.tree.leaves(resumed), jax.tree.leaves(whole[0])):
        np.testing.assert_allclose(x, y, atol=1e-5)


GOLDEN = {"loss": 5.9306159, "grad_norm": 1.8433651, "params": 1255.67289, "embedding": 0.24205364}


def test_golden_step(tmp_path: pathlib.Path) -> None:
    with optimized():  # as users run it
        state = train(tmp_path, stop_after=1)
    (line,) = read_metrics(str(tmp_path / "metrics.jsonl"))
    found = {name: line[name] for name in ("loss", "grad_norm")}
    found["params"] = sum(float(jnp.abs(x).sum()) for x in jax.tree.leaves(state.params))
    found["embedding"] = float(state.params["embed"]["embedding"][15, 3])
    assert found == pytest.approx(GOLDEN, rel=1e-4), (
        f"One SFT step gives other numbers than before. If you meant this, update GOLDEN to {found}."
    )


class Poisoned(Counting):
    """The same; token 99, on which the losses below are not finite, comes up at step 8."""

    def __getitem__(self, index: int) -> ThreadedTokens:
        document = super().__getitem__(index)
        if index == 180:
            document.token[0] = 99
        return document


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: pathlib.Path) -> None:
    def loss_fn(scores: Scores, batch: ThreadedTokens) -> Any:
        sums = loop.sft(scores, batch)
        loss = jnp.where(jnp.any(batch.token == 99), jnp.nan, sums.values["loss"])
        return dataclasses.replace(sums, values=sums.values | {"loss": loss})

    # Step 8 is one that is saved; nothing else makes the loop look at it at once.
    config = dataclasses.replace(CONFIG, steps=12, log=LogConfig(every=100))
    with pytest.raises(loop.NonFiniteLoss, match=r"nan at step 8; step 4 in .* is good, and is kept"):
        train(tmp_path, config, source=Poisoned(), stage=loop.Stage(ThreadedTokens, loss_fn))
    assert find_checkpoint(tmp_path).name == "4"


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_is_saved(tmp_path: pathlib.Path) -> None:
    def loss_fn(scores: Scores, batch: ThreadedTokens) -> Any:
        sums = loop.sft(scores, batch)
        # The square root of 1, or of 0, where its slope is infinite: the loss is what it was, its gradient NaN.
        inside = jnp.where(jnp.any(batch.token == 99), 0.0, 1.0)
        loss = sums.values["loss"] + jnp.sqrt(inside + 0.0 * scores.logprob.sum()) - inside
        return dataclasses.replace(sums, values=sums.values | {"loss": loss})

    config = dataclasses.replace(CONFIG, steps=8, log=LogConfig(every=100))
    message = r"norm of the gradient is nan at step 8; step 4 in .* is good, and is kept"
    with pytest.raises(loop.NonFiniteLoss, match=message):
        train(tmp_path, config, source=Poisoned(), stage=loop.Stage(ThreadedTokens, loss_fn))
    assert find_checkpoint(tmp_path).name == "4"


def test_an_error_in_the_data_is_raised(tmp_path: pathlib.Path) -> None:
    def fail() -> None:
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        train(tmp_path, source=At(50, fail))


def test_starting_from_weights(whole: tuple[TrainState, pathlib.Path], tmp_path: pathlib.Path) -> None:
    config = dataclasses.replace(CONFIG, init_from=str(whole[1]), steps=1)
    train(tmp_path, config)
    (line,) = read_metrics(str(tmp_path / "metrics.jsonl"))
    assert line["loss"] < read_metrics(str(whole[1] / "metrics.jsonl"))[-2]["loss"] * 1.2
    other = changed(config, model={"mlp_dim": 64})
    with pytest.raises(
        CheckpointError, match=r"First difference: layer_0/mlp/\w+ is \(.*32.*\) in the checkpoint"
    ):
        train(tmp_path / "other", other)
    with pytest.raises(CheckpointError, match="no such directory"):
        train(tmp_path / "none", dataclasses.replace(CONFIG, init_from=str(tmp_path / "nowhere")))


def test_a_workdir_of_another_experiment_is_refused(whole: tuple[TrainState, pathlib.Path]) -> None:
    before = (whole[1] / "config.json").read_text()
    with pytest.raises(
        CheckpointError, match=r"already has step 8 of a different config \(optimizer.lr\)\. Use"
    ):
        train(whole[1], changed(optimizer={"lr": 1.0}))
    assert (whole[1] / "config.json").read_text() == before


def test_sizes_that_do_not_go_together(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=f"the tokenizer has {VOCABULARY} ids"):
        train(tmp_path, changed(model={"vocab_size": 64}))
    with pytest.raises(ConfigError, match=r"does not divide rows B=6"):
        train(tmp_path, changed(data={"rows": 6}, mesh={"data": 4}))
    with pytest.raises(ConfigError, match=r"config.mesh: mesh .* devices"):
        loop.train(CONFIG, source=Counting(), tokenizer=TOKENIZER, workdir=tmp_path)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # Warm-up 1/2, 1; then over 4 steps from 1 down to a half.
        ("constant", [0.5, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.875, 0.75, 0.625, 0.5]),
        ("cosine", [0.5, 1, 1, 0.5 + 0.25 * (1 + 2**-0.5), 0.75, 0.5 + 0.25 * (1 - 2**-0.5), 0.5]),
    ],
)
def test_schedules(kind: Any, expected: list[float]) -> None:
    schedule = make_schedule(OptimizerConfig(lr=1, warmup_steps=2, schedule=kind, final_lr=0.5), steps=6)
    np.testing.assert_allclose([schedule(i) for i in range(7)], expected, rtol=1e-6)


def test_norms_do_not_decay(whole: tuple[TrainState, pathlib.Path]) -> None:
    mask = decays(whole[0].params)
    assert mask["embed"]["embedding"]
    assert mask["layer_0"]["mlp"]["up_proj"]
    assert not mask["layer_0"]["mlp_norm"]["scale"]
    assert not mask["final_norm"]["scale"]
