"""Several processes: two of four devices do what one of eight does (law 9), and end together."""

from __future__ import annotations

import json
import pathlib
import signal
import time

import jax
import numpy as np
import pytest

from pasta_jax.checkpoints.about import find_checkpoint
from pasta_jax.checkpoints.load import load_params
from pasta_jax.training.metrics import read_metrics
from tests.helpers import FULL, full, only_full, several
from tests.helpers.commands import Fork
from tests.helpers.started import fork, free_port, wait

MESHES = [*several.MESHES] if FULL else ["8x1"]
"""One process starts on 8x1, and two go on."""

STOPPED = "2x4" if FULL else "8x1"
"""Two processes start on it in the folder `stopped`, one of them gets a signal, and one process goes on."""

ALIKE = {"stopped": STOPPED, "damaged": "4x2"}
"""What two processes do in these folders ends as one process does on the mesh."""

PARTS = [*MESHES, "tell", *(["adapters", "decode", "round", "load"] if FULL else [])]


# ------------------------------------------------------------------------------------------ two are one (law 9)


def pair(work: pathlib.Path, *parts: str) -> list[Fork]:
    """Two processes, whose output goes to log-0 and log-1 beside the folder."""
    port, logs = str(free_port()), [work.parent / f"log-{index}" for index in range(2)]
    line = ["-m", "tests.helpers.several"]
    return [fork([*line, str(i), port, str(work), *parts], logs[i]) for i in range(2)]


def said(work: pathlib.Path, index: int) -> list[str]:
    """What a process said, without what XLA says of its connections, whose lines may run into each other."""
    lines = (work.parent / f"log-{index}").read_text().splitlines()
    return [line for line in lines if "[Gloo]" not in line and "peer ranks" not in line]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, pathlib.Path]:
    """The folders of one process of eight devices, and of two of four."""
    one, two = (tmp_path_factory.mktemp(name) / "work" for name in ("one", "two"))
    for folder in (one, two):
        folder.mkdir()
    several.train(two, "8x1", stop_after=2)
    damage = ["damage"] if FULL else []
    started = pair(two, f"{STOPPED}:signal", *PARTS, *damage, "evaluate")
    several.do(one, PARTS)
    assert wait(started, 200) == [0, 0], said(two, 0) + said(two, 1)
    several.train(two, STOPPED, workdir="stopped")
    return one, two


def assert_close(found: pathlib.Path, expected: pathlib.Path) -> None:
    with np.load(found) as a, np.load(expected) as b:
        assert a.files == b.files
        for name in a.files:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MESHES, "stopped", full("lora"), full("damaged")])
def test_two_processes_train_like_one(runs: tuple[pathlib.Path, pathlib.Path], name: str) -> None:
    """The same losses, gradients, weights and optimizer; each also goes on where the other stopped."""
    one, two = runs
    alike = ALIKE.get(name, name)
    expected = read_metrics(str(one / alike / "metrics.jsonl"))
    found = read_metrics(str(two / name / "metrics.jsonl"))
    assert [line["step"] for line in found] == ([1, 2] if name == "lora" else [1, 2, 3, 4])
    assert ("held_out_loss" in found[-1]) == (name == "lora")
    for line, same in zip(found, expected, strict=True):
        for key in {*same} - {"tokens_per_s"}:
            assert line[key] == pytest.approx(same[key], rel=1e-5), key
    assert_close(two / f"{name}.npz", one / f"{alike}.npz")


@pytest.mark.slow
@only_full
def test_if_one_cannot_read_its_part_both_go_back(runs: tuple[pathlib.Path, pathlib.Path]) -> None:
    """And train to the same end: that is in `test_two_processes_train_like_one`."""
    _, two = runs
    assert {path.name for path in (two / "damaged" / "checkpoints").iterdir()} == {"2", "4", "4.damaged"}
    assert [
        line for line in said(two, 0) if "4 is damaged, and renamed to 4.damaged. (another process" in line
    ]


@pytest.mark.slow
def test_a_signal_to_one_stops_both_after_the_same_step(runs: tuple[pathlib.Path, pathlib.Path]) -> None:
    """And is saved: `test_two_processes_train_like_one` has what one process made of it."""
    _, two = runs
    assert [(two.parent / f"stopped-{i}").read_text() for i in range(2)] == ["143", "143"]
    assert [line for line in said(two, 0) if "Stopped at step 2. Run the same command again" in line]


@pytest.mark.slow
def test_the_first_alone_evaluates(runs: tuple[pathlib.Path, pathlib.Path]) -> None:
    """The other waits for it, and ends as it does."""
    _, two = runs
    assert (two.parent / "evaluated").read_text() == "0\n"
    if FULL:
        assert len((two / "evaluation" / "PASTA.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_one_process_reads_what_two_saved(runs: tuple[pathlib.Path, pathlib.Path]) -> None:
    _, two = runs
    params, about = load_params(two / "8x1")
    assert about.step == 4
    with np.load(two / "8x1.npz") as saved:
        written = {array.tobytes() for array in saved.values()}
    assert {np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)} <= written


@pytest.mark.slow
@only_full
def test_two_processes_decode_like_one(runs: tuple[pathlib.Path, pathlib.Path]) -> None:
    """Their rows lie on both."""
    expected, found = (json.loads((folder / "texts.json").read_text()) for folder in runs)
    assert len({*expected}) > 1 and any("<promise" in text for text in expected)
    assert found == expected


@pytest.mark.slow
def test_what_the_first_computes_is_told_to_the_others_bit_for_bit(
    runs: tuple[pathlib.Path, pathlib.Path],
) -> None:
    one, two = runs
    told = [(folder.parent / f"told-{i}").read_text() for folder, i in ((one, 0), (two, 0), (two, 1))]
    assert told == [str([0.0, -1 / 3])] * 3


@pytest.mark.slow
@only_full
def test_two_processes_do_a_round_like_one(runs: tuple[pathlib.Path, pathlib.Path]) -> None:
    """The same samples, pairs, reference and losses; and each can decode with the model alone."""
    one, two = runs
    folder = pathlib.Path("round", "preference", "round-1")
    for name in ("samples.jsonl", "pairs.jsonl"):
        assert (two / folder / name).read_text() == (one / folder / name).read_text()
    assert_close(two / folder / "reference.npz", one / folder / "reference.npz")
    expected, found = (read_metrics(str(run / folder / "metrics.jsonl")) for run in runs)
    assert found and [x["loss"] for x in found] == pytest.approx([x["loss"] for x in expected], rel=1e-4)
    alone = (one.parent / "alone-0").read_text()
    assert alone and {(two.parent / f"alone-{i}").read_text() for i in range(2)} == {alone}


@pytest.mark.slow
def test_the_first_alone_writes(runs: tuple[pathlib.Path, pathlib.Path]) -> None:
    """The parts of a checkpoint apart, which Orbax has every process write, and puts together."""
    _, two = runs
    first, second = (json.loads((two.parent / f"writes-{i}.json").read_text()) for i in range(2))
    others = [line for line in second if "/checkpoints/" not in line]
    assert others == []
    for name in ("config.json", "env.json"):
        assert first.count(f"open 8x1/{name}.tmp") == 1
    assert first.count("open 8x1/metrics.jsonl.tmp") == first.count("open 8x1/metrics.jsonl") == 1
    assert json.loads((two / "8x1" / "env.json").read_text())["processes"] == 2
    assert not [*two.rglob("*.tmp")]
    assert said(two, 1) == []


# ------------------------------------------------------------------------------------------------ how they end


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "statuses", "says"),
    [
        ("refuse", [1, 2], "Process 1 of 2: The data is not here."),
        full("fail", [1, 1], "Process 1 of 2: Process 1 of 2 ended with status 1."),
    ],
)
def test_one_that_fails_ends_the_other(
    tmp_path: pathlib.Path, part: str, statuses: list[int], says: str
) -> None:
    """Though that one waits for it."""
    work = tmp_path / "work"
    work.mkdir()
    assert wait(pair(work, part), 60) == statuses
    assert said(work, 0) == [says]
    assert (said(work, 1) == []) == (part == "refuse")


COMMAND = [
    *("-m", "pasta_jax.train", "--config=configs/tiny.py:base", "--config.model.num_layers=1"),
    *("--config.data.rows=8", "--config.log.every=1", "--config.steps=100000"),
    *("--config.checkpoint.every_minutes=0", "--processes=2"),
]


def commands(work: pathlib.Path, *workdirs: pathlib.Path, saves: int = 0) -> list[Fork]:
    port, logs = free_port(), [work.parent / f"log-{index}" for index in range(2)]
    command = [*COMMAND, f"--config.checkpoint.every_steps={saves}"]
    return [
        fork([*command, f"--workdir={folder}", f"--coordinator=127.0.0.1:{port}", f"--process_id={i}"], log)
        for i, (folder, log) in enumerate(zip(workdirs, logs, strict=True))
    ]


def wait_for_step(work: pathlib.Path, step: int, started: list[Fork]) -> None:
    deadline = time.monotonic() + 120
    while not [line for line in read_metrics(str(work / "metrics.jsonl")) if line["step"] >= step]:
        assert time.monotonic() < deadline and started[0].poll() is None, said(work, 0)
        time.sleep(0.2)


@pytest.mark.slow
@only_full
@pytest.mark.parametrize("saves", [0, 1])
def test_a_signal_or_the_loss_of_one_ends_both_and_the_next_start_goes_on(
    saves: int, tmp_path: pathlib.Path
) -> None:
    work = tmp_path / "work"
    started = commands(work, work, work, saves=saves)
    wait_for_step(work, 2, started)
    started[1].send_signal(signal.SIGTERM)  # one host alone
    assert wait(started, 60) == [143, 143]
    step = int(find_checkpoint(work).name)
    assert read_metrics(str(work / "metrics.jsonl"))[-1]["step"] == step
    assert said(work, 0)[-1].endswith(f"Stopped at step {step}. Run the same command again to go on.")
    started = commands(work, work, work)
    wait_for_step(work, step + 1, started)
    started[1].kill()
    assert wait(started, 60) == [1, -signal.SIGKILL]
    assert (
        said(work, 0)[-1]
        == "Process 1 of 2 was lost, and with it the run. Run the same command again to go on."
    )
    assert any(f"Going on from step {step} of" in line for line in said(work, 0))
    assert [line["step"] for line in read_metrics(str(work / "metrics.jsonl"))][:step] == [
        *range(1, step + 1)
    ]


@pytest.mark.slow
@only_full
def test_a_workdir_that_is_not_shared_is_refused(tmp_path: pathlib.Path) -> None:
    work, other = tmp_path / "a" / "work", tmp_path / "b" / "work"
    work.parent.mkdir()
    assert wait(commands(work, work, other), 60) == [2, 2]
    lines = said(work, 0)
    assert len(lines) == 1, lines
    assert lines[0].startswith(
        f"{work} of process 1 is not that of the first. The workdir must be on a file system"
    )
