"""python -m pasta_jax.train, as a person meets it, and the sources that its configuration names."""

import dataclasses
import json
import os
import pathlib
import subprocess

import numpy as np
import pytest

from pasta_jax import train
from pasta_jax.arrays import NO_TARGET
from pasta_jax.checkpoints.about import find_checkpoint, read_metadata
from pasta_jax.config import Config, ConfigError, DataConfig
from pasta_jax.data.sources import make_source, make_tokenizer, steps_of_epochs
from pasta_jax.files import locked
from pasta_jax.training import loop
from pasta_jax.training.metrics import read_metrics
from tests.helpers import full
from tests.helpers.commands import python
from tests.helpers.layouts import write_files

pytestmark = pytest.mark.slow

TINY = "--config=configs/tiny.py"
SMALL = ["--config.model.num_layers=1", "--config.data.rows=2", "--config.log.every=1"]
PROMISE = '<promise topic="rivers" tokens=1 /><async>The Nile.</async>'


def train_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return python("-m", "pasta_jax.train", *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Which experiment? Add --config=configs/tiny.py."),
        ([TINY], "Where to? Add --workdir=DIRECTORY."),
        full(
            [TINY, "--config.learning_rate=1"],
            'No config field "learning_rate". Did you mean "optimizer.lr"?',
        ),
        ([TINY, "--config.steps=50k", "--print_config"], 'config.steps must be an int, got "50k".'),
        full(["--config=configs/none.py"], "No configuration file configs/none.py"),
        full([TINY, "more"], "Cannot make sense of 'more'."),
    ],
)
def test_mistakes_end_in_one_line_and_status_2(arguments: list[str], message: str) -> None:
    done = train_command(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("override", "message"),
    [
        full("seed=-1", "config.seed must be at least 0, got -1."),
        ("data.threads=4", "The answer promises more than 3 branches. Raise --config.data.threads above 4"),
        ("data.length=8", "need more than the 8 tokens of a row. Set --config.data.length=512"),
    ],
)
def test_data_that_does_not_fit_ends_in_one_line_and_status_2(
    override: str, message: str, tmp_path: pathlib.Path
) -> None:
    done = train_command(TINY + ":pasta", f"--workdir={tmp_path}", *SMALL, f"--config.{override}")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert message in done.stderr.splitlines()[-1]


def test_print_config() -> None:
    done = train_command(TINY + ":pasta", "--print_config", "--config.optimizer.lr=1e-4")
    assert done.returncode == 0
    assert "config.optimizer.lr = 0.0001 " in done.stdout
    assert "# peak learning rate" in done.stdout


@pytest.mark.slow
def test_two_steps_and_two_more(tmp_path: pathlib.Path) -> None:
    workdir = tmp_path / "run"
    arguments = [TINY + ":base", f"--workdir={workdir}", *SMALL]
    first = train_command(*arguments, "--config.steps=2")
    assert first.returncode == 0, first.stderr
    again = train_command(*arguments, "--config.steps=3")
    assert again.returncode == 0, again.stderr
    assert "Going on from step 2" in again.stderr
    assert "step 3  loss" in again.stderr
    assert [line["step"] for line in read_metrics(str(workdir / "metrics.jsonl"))] == [1, 2, 3]
    other = train_command(*arguments, "--config.seed=1")
    assert other.returncode == 2
    assert "already has step 3 of a different config (seed). Use a new --workdir" in other.stderr
    assert "Traceback" not in other.stderr


@pytest.mark.slow
def test_files_of_every_layout_are_trained_on(tmp_path: pathlib.Path) -> None:
    """Two steps on all of them together: the first document of each is in the first batch."""
    files, workdir = write_files(tmp_path), tmp_path / "run"
    names = ",".join(map(str, files.values()))
    arguments = [TINY + ":pasta", f"--workdir={workdir}", *SMALL, "--config.steps=2"]
    done = train_command(*arguments, f"--config.data.sources={names}")
    assert done.returncode == 0, done.stderr
    metadata = read_metadata(find_checkpoint(workdir))
    assert metadata.step == 2 and metadata.data_index >= 2 * len(files)
    assert {each["examples"] for each in metadata.data.values()} == {2}
    assert len({each["sha256"] for each in metadata.data.values()}) == 1
    assert metadata.data.keys() == {*map(str, files.values())}


def test_a_disk_that_takes_no_more_ends_in_one_line(tmp_path: pathlib.Path) -> None:
    """A file of more than 100 KB cannot be written: the checkpoint fails, in a thread of Orbax."""
    code = """if True:
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        from pasta_jax import train
        train.command()
    """
    arguments = [TINY + ":base", f"--workdir={tmp_path}", *SMALL, "--config.steps=3"]
    arguments += ["--config.checkpoint.every_steps=1", "--compilation_cache="]
    done = python("-c", code, *arguments)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert "Step 1 in" in line and "could not be written: " in line and "No step was saved" in line, line


def test_a_workdir_in_use_is_refused(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(tmp_path), pytest.raises(SystemExit) as ended:
        train.run(Config(), str(tmp_path))
    assert ended.value.code == 2
    assert f"{tmp_path} is in use: process {os.getpid()} on" in capsys.readouterr().err


def test_the_run_is_told_what_its_data_are(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Number and hash of the examples: of their text, not of how the file spells it."""
    file, seen = tmp_path / "data.jsonl", []
    monkeypatch.setattr(loop, "train", lambda config, *, data, **_: seen.append(data))
    record = {"prompt": "Rivers?", "response": f"One: {PROMISE}"}
    for lines in (
        [record],
        [{"id": 1, **record}, {"prompt": "broken"}],
        [record, record],
        [record | {"response": "The Nile."}],
        [record | {"response": f"One: {PROMISE}".replace("rivers", "river")}],
    ):
        file.write_text("\n".join(map(json.dumps, lines)))
        data = DataConfig(sources=((str(file), 1.0),), max_unusable=0.5)
        train.run(Config(data=data), str(tmp_path / "run"))
    assert [each[str(file)]["examples"] for each in seen] == [1, 1, 2, 1, 1]
    hashes = [each[str(file)]["sha256"] for each in seen]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 4
    mixed = Config(data=DataConfig(sources=((str(file), 1.0), ("almanac:plain", 1.0))))
    train.run(mixed, str(tmp_path / "run"))
    assert seen[-1] == seen[-2]


# ------------------------------------------------------------------------------------------------ sources


def test_records_that_cannot_be_used_are_reported_and_kept(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [
        {"prompt": "Rivers?", "response": f"One: {PROMISE}"},
        {"prompt": "Rivers?", "response": "One: <promise"},
        {"prompt": "Rivers?", "response": PROMISE + "</async>"},
        {"prompt": "Rivers?", "response": "long " * 100},
        {"prompt": "Rivers?", "response": PROMISE * 20},
    ]
    file, invalid = tmp_path / "data.jsonl", tmp_path / "invalid.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    config = DataConfig(sources=((str(file), 1.0),), length=256, max_unusable=0.6)
    source = make_source(config, make_tokenizer(config), seed=0, invalid=invalid)
    assert len({tuple(source[i].token) for i in range(10)}) == 2
    kept = [json.loads(line) for line in invalid.read_text().splitlines()]
    assert sorted(k["line"] for k in kept) == [3, 4, 5]
    total = "3 of 5 records cannot be used (60.0%): 1 tags, 1 longer than a row, 1 too many branches"
    assert total in caplog.text
    strict = dataclasses.replace(config, max_unusable=0.59)
    with pytest.raises(ConfigError) as stopped:
        make_source(strict, make_tokenizer(config), seed=0, invalid=tmp_path / "again.jsonl")
    said = str(stopped.value)
    assert said.startswith(f"config.data.sources: {file}: {total}. ") and "\n" not in said
    assert "by --config.data.max_unusable=0.6. The first: " in said
    assert said.endswith(f"All are in {tmp_path / 'again.jsonl'}.")
    assert (tmp_path / "again.jsonl").read_text() == invalid.read_text(), "kept although the run stops"
    assert "</async> without <async>" in caplog.text
    assert "tokens, a row holds 256. Set --config.data.length=" in caplog.text
    assert "promises more than 15 branches" in caplog.text


def test_epochs_say_how_many_steps(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    """Eleven documents of one length, two to a row of 100 and two rows to a batch: 2.75 batches hold them."""
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"prompt": "Rivers?", "response": "word " * 6}) + "\n")
    file.write_text(file.read_text() * 11)
    config = DataConfig(sources=((str(file), 1.0),), rows=2, length=100)
    source = make_source(config, make_tokenizer(config), seed=0)
    assert 34 <= len(source[0]) <= 50, "two fit into a row, three do not"
    assert steps_of_epochs(config, source, 1) == 3
    assert steps_of_epochs(config, source, 4) == 11
    assert steps_of_epochs(config, source, 0.1) == 1
    few = dataclasses.replace(config, rows=64)
    assert steps_of_epochs(few, source, 4) == 1
    assert "holds 128 of these documents: one step sees each of them 11.6 times" in caplog.text
    with pytest.raises(ConfigError, match="the almanac is endless"):
        steps_of_epochs(config, make_source(DataConfig(), make_tokenizer(config), seed=0), 1)


def test_unknown_and_unusable_sources(tmp_path: pathlib.Path) -> None:
    tokenizer = make_tokenizer(DataConfig())
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{}\n")
    for name, message in {
        "almanac:none": "no almanac:none. Use one of almanac:base, almanac:plain",
        "wikipedia": "'wikipedia' is neither almanac:NAME nor a file of records",
        str(tmp_path / "none.jsonl"): "No such file",
        str(empty): "is empty",
        str(bad): "1 of 1 records cannot be used",
    }.items():
        with pytest.raises(ConfigError, match=message):
            make_source(DataConfig(sources=((name, 1.0),)), tokenizer, seed=0)


def test_the_almanac_by_index() -> None:
    config = DataConfig(sources=(("almanac:base", 1.0), ("almanac:annotated", 1.0)))
    tokenizer = make_tokenizer(config)
    source, same, other = (make_source(config, tokenizer, seed) for seed in (3, 3, 4))
    documents = [source[i] for i in range(20)]
    for i, document in enumerate(documents):
        np.testing.assert_array_equal(document.token, same[i].token)
        assert len(document) <= config.length
        assert (document.target != NO_TARGET).any()
    assert any(document.thread.max() > 0 for document in documents)
    assert any(len(other[i]) != len(source[i]) for i in range(20))
