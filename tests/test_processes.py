"""Several processes: how they find each other, and that two of four devices do what one of eight does (law 9)."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import jax
import numpy as np
import pytest

from pasta_jax import verbs
from pasta_jax.checkpoints.about import find_checkpoint
from pasta_jax.checkpoints.load import load_params
from pasta_jax.processes import launchers
from pasta_jax.processes.launchers import Group, ProcessError, announced, asked
from pasta_jax.processes.meeting import SaidElsewhere, meet
from pasta_jax.training.metrics import read_metrics
from tests.helpers import FULL, ONE_DEVICE, full, several

ROOT = pathlib.Path(__file__).parents[1]

MESHES = [*several.MESHES] if FULL else ["8x1", "2x4"]
"""One process starts on 8x1 and two go on; two start on 2x4 and one goes on."""

PARTS = [*MESHES, "decode", *(["round", "load"] if FULL else [])]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def start(arguments: list[str], log: pathlib.Path, **env: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"XLA_FLAGS": f"{ONE_DEVICE} --xla_force_host_platform_device_count=4"} | env
    with log.open("wb") as err, log.with_suffix(".out").open("wb") as out:
        return subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env=environment, stdout=out, stderr=err
        )


# ------------------------------------------------------------------------------------------ two are one (law 9)


def pair(work: pathlib.Path, *parts: str) -> list[subprocess.Popen[bytes]]:
    """Two processes, whose output goes to log-0 and log-1 beside the folder."""
    port, logs = str(free_port()), [work.parent / f"log-{index}" for index in range(2)]
    line = ["-m", "tests.helpers.several"]
    return [start([*line, str(i), port, str(work), *parts], logs[i]) for i in range(2)]


def said(work: pathlib.Path, index: int) -> list[str]:
    """What a process said, without what XLA says of its connections."""
    lines = (work.parent / f"log-{index}").read_text().splitlines()
    return [line for line in lines if "[Gloo]" not in line]


def wait(started: list[subprocess.Popen[bytes]], seconds: float) -> list[int]:
    """The statuses with which processes end. None of them is left."""
    try:
        return [process.wait(timeout=seconds) for process in started]
    finally:
        for process in started:
            process.kill()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, pathlib.Path]:
    """The folders of one process of eight devices, and of two of four."""
    one, two = (tmp_path_factory.mktemp(name) / "work" for name in ("one", "two"))
    for folder in (one, two):
        folder.mkdir()
    several.train(two, "8x1", stop_after=2)
    started = pair(two, *(part + ":2" * (part == "2x4") for part in PARTS))
    several.do(one, PARTS)
    assert wait(started, 200) == [0, 0], said(two, 0) + said(two, 1)
    several.train(two, "2x4")
    return one, two


def assert_close(found: pathlib.Path, expected: pathlib.Path) -> None:
    with np.load(found) as a, np.load(expected) as b:
        assert a.files == b.files
        for name in a.files:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_two_processes_train_like_one(runs: tuple[pathlib.Path, pathlib.Path], mesh: str) -> None:
    """The same losses, gradients, weights and optimizer; each also goes on where the other stopped."""
    one, two = runs
    expected, found = (read_metrics(str(folder / mesh / "metrics.jsonl")) for folder in runs)
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    for name in ("loss", "grad_norm", "packing", "lr"):
        np.testing.assert_allclose([x[name] for x in found], [x[name] for x in expected], rtol=1e-5)
    assert_close(two / f"{mesh}.npz", one / f"{mesh}.npz")


@pytest.mark.slow
def test_one_process_reads_what_two_saved(runs: tuple[pathlib.Path, pathlib.Path]) -> None:
    _, two = runs
    params, about = load_params(two / "8x1")
    assert about.step == 4
    with np.load(two / "8x1.npz") as saved:
        written = {array.tobytes() for array in saved.values()}
    assert {np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)} <= written


@pytest.mark.slow
def test_two_processes_decode_like_one(runs: tuple[pathlib.Path, pathlib.Path]) -> None:
    """Their rows lie on both."""
    expected, found = (json.loads((folder / "texts.json").read_text()) for folder in runs)
    assert len({*expected}) > 1 and any("<promise" in text for text in expected)
    assert found == expected


@pytest.mark.slow
@pytest.mark.skipif(not FULL, reason="one of .ci/run's full counts")
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


def commands(work: pathlib.Path, *workdirs: pathlib.Path, saves: int = 0) -> list[subprocess.Popen[bytes]]:
    port, logs = free_port(), [work.parent / f"log-{index}" for index in range(2)]
    command = [*COMMAND, f"--config.checkpoint.every_steps={saves}"]
    return [
        start([*command, f"--workdir={folder}", f"--coordinator=127.0.0.1:{port}", f"--process_id={i}"], log)
        for i, (folder, log) in enumerate(zip(workdirs, logs, strict=True))
    ]


def wait_for_step(work: pathlib.Path, step: int, started: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + 120
    while not [line for line in read_metrics(str(work / "metrics.jsonl")) if line["step"] >= step]:
        assert time.monotonic() < deadline and started[0].poll() is None, said(work, 0)
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.skipif(not FULL, reason="one of .ci/run's full counts")
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
@pytest.mark.skipif(not FULL, reason="one of .ci/run's full counts")
def test_a_workdir_that_is_not_shared_is_refused(tmp_path: pathlib.Path) -> None:
    work, other = tmp_path / "a" / "work", tmp_path / "b" / "work"
    work.parent.mkdir()
    assert wait(commands(work, work, other), 60) == [2, 2]
    lines = said(work, 0)
    assert len(lines) == 1, lines
    assert lines[0].startswith(
        f"{work} of process 1 is not that of the first. The workdir must be on a file system"
    )


# --------------------------------------------------------------------------------------- how they find each other


def meet_all(count: int, *indices: int, timeout_s: float = 5.0) -> dict[int, Any]:
    """What comes of processes that are started with these numbers, each in a thread."""
    address, found = f"127.0.0.1:{free_port()}", dict[int, Any]()

    def run(place: int, index: int) -> None:
        try:
            found[place] = meet(Group(index, count, address, advice="Start them."), timeout_s)
        except ProcessError as error:
            found[place] = error

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(indices)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_they_meet_in_any_order() -> None:
    found = meet_all(3, 2, 0, 1)
    assert found[1].keys() == {1, 2} and found[0].keys() == found[2].keys() == {0}
    found[1][2].sendall(b"x")
    assert found[0][0].recv(1) == b"x"


def test_who_is_missing_is_said() -> None:
    """By the first, and by the others if it is the first that did not come."""
    found = meet_all(4, 0, 2, timeout_s=0.5)
    assert str(found[0]) == "2 of 4 processes came within 0 s; missing: 1, 3. Start them."
    assert isinstance(found[1], SaidElsewhere)
    found = meet_all(2, 1, timeout_s=0.5)
    assert re.fullmatch(
        r"The first of 2 processes was not met at 127\.0\.0\.1:\d+ within 0 s \(.+\); this is process 1\. "
        r"Start them\.",
        str(found[0]),
    )


def test_processes_that_do_not_belong_together() -> None:
    assert "Process 1 came twice" in str(meet_all(3, 0, 1, 1)[0])
    address = f"127.0.0.1:{free_port()}"
    with (
        socket.create_server(("127.0.0.1", int(address.split(":")[1]))),
        pytest.raises(ProcessError, match="cannot be used"),
    ):
        meet(Group(0, 2, address), 0.5)


def test_a_stranger_is_not_one_of_them() -> None:
    address, found = f"127.0.0.1:{free_port()}", list[Any]()
    first = threading.Thread(target=lambda: found.append(meet(Group(0, 2, address), 5.0)))
    first.start()
    while True:
        with contextlib.suppress(ConnectionRefusedError):
            other = socket.create_connection(("127.0.0.1", int(address[10:])))
            break
    with contextlib.suppress(ConnectionResetError), other:
        other.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert other.recv(1) == b""
    meet(Group(1, 2, address), 5.0)
    first.join()
    assert found[0].keys() == {1}


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[001-002],other3",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "PMIX_NAMESPACE": "job"}
GKE = {"TPU_WORKER_HOSTNAMES": "a-0.svc,a-1.svc", "TPU_WORKER_ID": "1"}


def brief(group: Group | None) -> tuple[Any, ...] | None:
    return (
        None if group is None else (group.index, group.count, group.address.partition(":")[0], group.devices)
    )


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, None),
        (SLURM, (1, 2, "node001", None)),
        (SLURM | {"SLURM_STEP_NODELIST": "n7,n9"}, (1, 2, "n7", None)),
        (SLURM | {"SLURM_STEP_NODELIST": "n[3,5]-ib"}, (1, 2, "n3-ib", None)),
        # A shell of salloc has its job's tasks, and a step of one.
        (SLURM | {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "1"}, None),
        # Several processes on a node share its GPUs, unless each was given one.
        (SLURM | {"SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}, (1, 4, "node001", (1,))),
        (
            SLURM | {"SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_GPUS_ON_NODE": "8"},
            (1, 4, "node001", (4, 5, 6, 7)),
        ),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "4", "CUDA_VISIBLE_DEVICES": "3"}, (1, 4, "node001", None)),
        (
            OPEN_MPI
            | {
                "OMPI_MCA_orte_hnp_uri": "15.0;tcp://10.96.0.1,10.148.0.1:34911",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
            },
            (3, 4, "10.96.0.1", (1,)),
        ),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, (3, 4, "127.0.0.1", (0,))),
        (GKE, (1, 2, "a-0.svc", None)),
        (GKE | {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
        (GKE | {"JAX_PLATFORMS": "cpu"}, None),
        (
            GKE
            | {
                "MEGASCALE_NUM_SLICES": "2",
                "MEGASCALE_SLICE_ID": "1",
                "MEGASCALE_COORDINATOR_ADDRESS": "b-0:8080",
            },
            (3, 4, "b-0", None),
        ),
    ],
)
def test_launchers_announce_themselves(env: dict[str, str], expected: tuple[Any, ...] | None) -> None:
    assert brief(announced({"TPU_SKIP_MDS_QUERY": "1", **env})) == expected


def test_a_slice_asks_its_metadata_and_nobody_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"agent-worker-number": "1", "worker-network-endpoints": "a:1:10.0.0.2,b:2:10.0.0.3"}
    questions: list[str] = []

    def metadata(name: str) -> str | None:
        questions.append(name)
        return found.get(name)

    assert announced({"TPU_SKIP_MDS_QUERY": "1"}, metadata) is None
    assert announced({"JAX_PLATFORMS": "cpu"}, metadata) is None
    assert not questions
    monkeypatch.setattr(launchers.importlib.util, "find_spec", lambda name: object())
    assert brief(announced({}, metadata)) == (1, 2, "10.0.0.2", None)
    found["worker-network-endpoints"] = "a:1:10.0.0.2"
    found["agent-worker-number"] = "0"
    assert announced({}, metadata) is None, "a single host"
    found["tpu-env"] = "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
    assert brief(announced({}, metadata)) == (1, 2, "10.0.0.2", None)


def test_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(None, None, None) is None
    assert brief(asked("host:99", 3, 1)) == (1, 3, "host", None)
    for flags, message in (
        (("host:99", None, None), "Nothing here says which processes there are. Add --coordinator=HOST:PORT"),
        ((None, 2, 0), "Nothing here says"),
        (("host", 2, 0), "--coordinator=host is no HOST:PORT"),
        (("host:99", 2, 2), "--process_id=2 must be at least 0 and less than --processes=2"),
    ):
        with pytest.raises(ProcessError, match=message):
            asked(*flags)
    for name, value in OPEN_MPI.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ProcessError, match="does not say where the first one is"):
        asked(None, None, None)
    assert brief(asked("host:99", None, None)) == (3, 4, "host", None)
    assert asked(None, 1, None) is None


def test_what_one_host_does_the_others_leave_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an import, of which they all would write the files."""
    monkeypatch.setattr(launchers, "announced", lambda *_, **__: Group(1, 2, "host:99"))
    with pytest.raises(SystemExit, match="^0$"):
        verbs.begin_alone()
