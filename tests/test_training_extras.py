"""Beside the training itself: held-out loss, profiles, Weights & Biases, memory, and the time left."""

import dataclasses
import glob
import gzip
import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import types
from typing import Any

import numpy as np
import pytest

from pasta_jax import memory
from pasta_jax.arrays import NO_TARGET, PairedTokens, ThreadedTokens
from pasta_jax.checkpoints.about import find_checkpoint
from pasta_jax.config import ConfigError, DataConfig
from pasta_jax.data.batches import batches, held_out
from pasta_jax.data.sources import make_sources, make_tokenizer
from pasta_jax.overrides import load_config
from pasta_jax.preference.pairs import Pair, pair_batches
from pasta_jax.training import loop, metrics, profile
from pasta_jax.training.metrics import MetricsWriter, read_metrics
from pasta_jax.training.profile import Profiler
from pasta_jax.training.signals import Stopped
from tests.helpers.training import CONFIG, Counting, assert_same, changed, train

pytestmark = pytest.mark.slow

TINY = str(pathlib.Path(__file__).parents[1] / "configs" / "tiny.py")


class First(Counting):
    """Some of the documents that count upwards."""

    def __init__(self, *numbers: int):
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> ThreadedTokens:
        return super().__getitem__(self.numbers[index])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, pathlib.Path]:
    workdir = tmp_path_factory.mktemp("plain")
    return train(workdir), workdir


def test_the_held_out_loss_is_that_of_training_and_changes_nothing_else(
    plain: tuple[Any, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    """Held out here is what the last step trains on: the weights before it have that step's loss."""
    rows, length = CONFIG.data.rows, CONFIG.data.length
    ends = [end for _, (_, end) in zip(range(8), batches(Counting(), 0, rows, length))]
    config = changed(log={"held_out_every": 7})
    config = dataclasses.replace(config, microbatches=2)
    same_as_step_8 = loop.SFT, First(*range(ends[6], ends[7]))
    train(tmp_path, config, stop_after=5, held_out=same_as_step_8)
    state = train(tmp_path, config, held_out=same_as_step_8)
    assert_same(state, train(tmp_path / "2", dataclasses.replace(config, microbatches=2)))
    ours, theirs = (np.asarray(x.params["embed"]["embedding"]) for x in (state, plain[0]))
    np.testing.assert_allclose(ours, theirs, atol=1e-6, rtol=1e-5)
    lines = {line["step"]: line for line in read_metrics(str(tmp_path / "metrics.jsonl"))}
    assert [step for step in lines if "held_out_loss" in lines[step]] == [5, 7, 8]
    for name in ("loss", "accuracy"):
        assert lines[7][f"held_out_{name}"] == pytest.approx(lines[8][name], rel=1e-5)
    assert lines[8]["held_out_loss"] < lines[7]["held_out_loss"] < lines[5]["held_out_loss"]


def test_a_measurement_that_is_cut_off_is_done_by_the_next_start(
    plain: tuple[Any, pathlib.Path], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line of that step is then the same as without an interruption."""
    examples, config = First(*range(300, 330)), changed(log={"held_out_every": 3, "every": 2})
    train(tmp_path / "whole", config, held_out=(loop.SFT, examples))

    class Stopping(First):
        def __getitem__(self, index: int) -> ThreadedTokens:
            if index == 0:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.1)
            return super().__getitem__(index)

    with pytest.raises(Stopped):
        train(tmp_path / "cut", config, held_out=(loop.SFT, Stopping(*range(300, 330))))
    assert find_checkpoint(tmp_path / "cut").name == "3"
    assert [line["step"] for line in read_metrics(str(tmp_path / "cut" / "metrics.jsonl"))] == [2]
    with pytest.raises(Stopped):  # again, before the first step
        train(tmp_path / "cut", config, held_out=(loop.SFT, Stopping(*range(300, 330))))
    killed = metrics.MetricsWriter.write

    def write_and_die(self: MetricsWriter, step: int, line: Any) -> None:
        killed(self, step, line)
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(metrics.MetricsWriter, "write", write_and_die)
        with pytest.raises(ZeroDivisionError):  # after that line, before a checkpoint
            train(tmp_path / "cut", config, held_out=(loop.SFT, examples))
    state = train(tmp_path / "cut", config, held_out=(loop.SFT, examples))
    assert_same(state, plain[0])
    whole, cut = (read_metrics(str(tmp_path / name / "metrics.jsonl")) for name in ("whole", "cut"))
    assert [line["step"] for line in cut] == [2, 3, 4, 6, 8] and "held_out_loss" in cut[1]
    for lines in (whole, cut):
        for line in lines:
            line.pop("tokens_per_s", None)
    assert cut == whole


def test_every_held_out_example_counts_once() -> None:
    documents = First(*range(17))
    found = list(batches(documents, 0, 2, 32, end=17))
    assert found[-1][1] == 17
    assert sum(int(batch.doc.max(axis=1).sum()) for batch, _ in found) == 17

    def pair(number: int) -> Pair:
        fields = Counting()[number].fields()
        n = len(fields["token"])
        extra = [(np.full(n, sign, np.int32), np.zeros(n, np.float32)) for sign in (1, -1)]
        return Pair(*(PairedTokens(**fields, pair=sign, reference=zero) for sign, zero in extra))

    # Two microbatches of a row each; the last batch has a pair for the first alone.
    whole = list(pair_batches([pair(i) for i in range(3)], 0, 2, 32, parts=2, end=3))
    assert [index for _, index in whole] == [2, 3]
    assert [[int(row.max()) for row in batch.pair] for batch, _ in whole] == [[1, 1], [1, 0]]
    assert (whole[-1][0].target[1] == NO_TARGET).all()


def test_a_share_of_the_examples_or_a_file(tmp_path: pathlib.Path) -> None:
    file, other = tmp_path / "data.jsonl", tmp_path / "other.jsonl"
    lines = [{"prompt": f"Which {n}?", "response": "word " * (n + 1)} for n in range(10)]
    file.write_text("\n".join(map(json.dumps, lines)))
    other.write_text(json.dumps({"prompt": "Which?", "response": "none"}))
    config = DataConfig(sources=((str(file), 1.0),))
    tokenizer = make_tokenizer(config)

    def lengths(held: str, seed: int = 0) -> tuple[list[int], list[int]]:
        source, documents = make_sources(dataclasses.replace(config, held_out=held), tokenizer, seed)
        size: int = len(source)  # type: ignore[arg-type]
        return [len(source[i]) for i in range(size)], [len(document) for document in documents]

    everything, none = lengths("")
    trained, held = lengths("0.3")
    assert not none and len(held) == 3 and sorted(trained + held) == sorted(everything)
    assert not {*trained} & {*held} and lengths("0.3") == (trained, held) != lengths("0.3", seed=1)
    assert lengths(str(other))[0] == everything and len(lengths(str(other))[1]) == 1
    assert len(lengths("0.01")[1]) == 1
    with pytest.raises(
        ConfigError, match=r"config.data.held_out leaves nothing of .*data.jsonl \(10 examples"
    ):
        lengths("0.99")
    with pytest.raises(ConfigError, match=r"config.data.held_out: Cannot read .*none.jsonl"):
        lengths(str(tmp_path / "none.jsonl"))
    with pytest.raises(ConfigError, match="config.data.held_out is a share .* the almanac generates"):
        make_sources(DataConfig(held_out="0.1"), tokenizer, 0)
    with pytest.raises(
        ConfigError, match=r"held_out=.*data.jsonl is trained on too: config.data.sources names"
    ):
        lengths(str(file))
    same = [*lines[:4], *({"prompt": "Which 9?", "response": "word " * n} for n in range(20, 23)), *lines[4:]]
    file.write_text("\n".join(map(json.dumps, same)))
    sides = [lengths("0.1", seed) for seed in range(12)]
    assert {len(held) for _, held in sides} == {1, 4}, "those with the same prompt are on the same side"
    assert all(not {*trained} & {*held} for trained, held in sides)
    with pytest.raises(ConfigError, match=r"config.data.sources: '\.' is neither"):
        make_sources(DataConfig(sources=((".", 1.0),)), tokenizer, 0)
    assert held_out("abca", 0.0, 7) == ([0, 1, 2, 3], [])
    assert held_out(["", "", ""], 0.4, 7) == ([0, 1], [2])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "data.held_out=1.5",
            "config.data.held_out must be a file of records, as a.jsonl, or a share between 0 and 1, got '1.5'",
        ),
        ("data.held_out=data.txt", "config.data.held_out must be a file of records"),
        (
            "log.profile=10",
            "config.log.profile must be FIRST:END, as 10:13 for steps 10, 11 and 12, got '10'",
        ),
        ("log.profile=5:5", "config.log.profile must be FIRST:END"),
    ],
)
def test_what_cannot_be_held_out_or_profiled(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(TINY, [override])


PROFILED = """
import sys
from tests.helpers.training import changed, train

train(sys.argv[1], changed(log={"profile": "2:4"}), stop_after=4)
"""


def test_a_profile_has_the_steps_and_the_names_of_the_code(tmp_path: pathlib.Path) -> None:
    """In a process of its own: where libtpu was loaded without a TPU, as by other tests, profiling crashes."""
    root = pathlib.Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", PROFILED, str(tmp_path)], cwd=root, check=True, timeout=300)
    [file] = glob.glob(str(tmp_path / "profile/plugins/profile/*/*.xplane.pb"))
    data = pathlib.Path(file).read_bytes()
    for name in (
        "embed",
        "attn",
        "attend",
        "q_proj",
        "mlp",
        "up_proj",
        "final_norm",
        "logits",
        "loss",
        "optimizer",
    ):
        assert re.search(rb"[/(]%b[/)]" % name.encode(), data), name
    [trace] = glob.glob(str(tmp_path / "profile/plugins/profile/*/*.trace.json.gz"))
    with gzip.open(trace) as text:
        events = json.load(text)["traceEvents"]
    steps = {event["args"]["step_num"] for event in events if event.get("name") == "train"}
    assert steps == {"2", "3"}


def test_profiling_is_refused_where_it_would_crash(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what is loaded: libtpu, and no TPU."""
    monkeypatch.setattr(profile, "MAPPINGS", tmp_path / "maps")
    Profiler(range(2, 4), str(tmp_path))  # nothing is known
    (tmp_path / "maps").write_text("7f00-7f10 r-xp 0 00:00 1  /site-packages/libtpu/libtpu.so\n")
    with pytest.raises(ConfigError, match="libtpu is installed and there is no TPU; profiling would crash"):
        Profiler(range(2, 4), str(tmp_path))
    Profiler(range(0), str(tmp_path))


class FakeWandb(types.ModuleType):
    """Writes down what is sent."""

    def __init__(self, fault: Exception | None = None):
        super().__init__("wandb")
        self.fault = fault
        self.calls: list[tuple[str, Any]] = []

    def init(self, **options: Any) -> "FakeWandb":
        if self.fault:
            raise self.fault
        self.calls.append(("init", options))
        return self

    def log(self, measurements: dict[str, float], step: int) -> None:
        self.calls.append(("log", {"step": step, **measurements}))

    def finish(self, exit_code: int) -> None:
        self.calls.append(("finish", exit_code))


def test_wandb_gets_every_line_and_a_resumed_run_goes_on(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(log={"wandb": "rivers"})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="^config.log.wandb needs wandb"):
        MetricsWriter(str(tmp_path), first_step=0, config=config)
    fault = FakeWandb(RuntimeError("No API key\nconfigured."))
    monkeypatch.setitem(sys.modules, "wandb", fault)
    with pytest.raises(
        ConfigError, match=r"^config.log.wandb: RuntimeError: No API key configured. \(WANDB_"
    ):
        MetricsWriter(str(tmp_path), first_step=0, config=config)
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for first in (0, 1):
        with MetricsWriter(str(tmp_path), first_step=first, config=config) as writer:
            writer.write(first + 1, {"loss": 0.5})
    with pytest.raises(KeyError), MetricsWriter(str(tmp_path), first_step=2, config=config):
        raise KeyError
    begun = [options for name, options in fake.calls if name == "init"]
    assert len({options["id"] for options in begun}) == 1
    assert begun[0]["project"] == "rivers" and begun[0]["config"]["data"]["rows"] == 8
    assert [call for call in fake.calls if call[0] != "init"] == [
        *(("log", {"step": 1, "loss": 0.5}), ("finish", 0)),
        *(("log", {"step": 2, "loss": 0.5}), ("finish", 0)),
        ("finish", 1),
    ]
    monkeypatch.setattr(metrics, "is_writer", lambda: False)
    fake.calls.clear()
    with MetricsWriter(str(tmp_path), first_step=2, config=config):
        pass
    assert not fake.calls


def test_the_memory_is_predicted_and_measured(
    plain: tuple[Any, pathlib.Path], tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", loop.LOG.name):
        train(tmp_path, stop_after=1)
    assert "Memory of each device, predicted: 0.0" in caplog.text
    found = re.search(
        r"Memory after the first step, measured: at most ([\d.]+) GiB of this process", caplog.text
    )
    assert found and 0.1 < float(found[1]) < 100
    sizes = types.SimpleNamespace(
        argument_size_in_bytes=3 << 30, temp_size_in_bytes=1 << 30, output_size_in_bytes=3 << 30,
        alias_size_in_bytes=2 << 30,
    )  # fmt: skip
    program = types.SimpleNamespace(memory_analysis=lambda: sizes)
    stats = [{"bytes_limit": 16 << 30, "peak_bytes_in_use": peak << 30} for peak in (4, 6)]
    devices = [types.SimpleNamespace(memory_stats=lambda s=s: s) for s in stats]
    assert "predicted: 5.0 of 16.0 GiB: 3.0 for weights, optimizer and batch, 2.0 while" in memory.predicted(
        program, devices[0]
    )
    assert memory.measured(devices) == "Memory after the first step, measured: at most 6.0 GiB of a device."


def test_the_time_left_does_not_count_compiling(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    config = dataclasses.replace(CONFIG, steps=103)
    with (
        caplog.at_level("INFO", loop.LOG.name),
        MetricsWriter(str(tmp_path), first_step=0, config=config) as w,
    ):
        now[0] = 1000.0  # compiling
        w.progress(1)
        w.write(1, {"loss": 1.0})
        now[0] = 1020.0
        w.progress(3)
        w.write(3, {"loss": 1.0})
        with w.not_counted():  # the first measurement of what is held out compiles too
            now[0] = 2000.0
        w.write(3, {"loss": 1.0})
    assert re.findall(r"time left \S+", caplog.text) == ["time left 16:40"] * 2
    bar: Any = io.StringIO()
    bar.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", bar)
    now[0] = 0.0
    with MetricsWriter(str(tmp_path), first_step=0, config=config) as w:
        now[0] = 1000.0
        w.progress(1)
        with w.not_counted():
            now[0] = 2000.0
        now[0] = 2020.0
        w.progress(3)
    assert "3/103 [00:20<16:40, 10.00s/step]" in bar.getvalue()
