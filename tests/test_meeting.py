"""Several processes: how they find each other, from what a launcher announces to the go-ahead of the first."""

from __future__ import annotations

import contextlib
import pathlib
import re
import socket
import threading
import time
from typing import Any

import pytest

from pasta_jax import verbs
from pasta_jax.processes import launchers, meeting
from pasta_jax.processes.launchers import Group, ProcessError, announced, asked
from pasta_jax.processes.meeting import SaidElsewhere, meet
from tests.helpers.started import free_port, start, wait


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


def test_a_stranger_holds_up_nobody() -> None:
    """Neither one that comes and says nothing, nor one that never ends its line."""
    address, began, found = f"127.0.0.1:{free_port()}", time.monotonic(), list[Any]()
    first = threading.Thread(target=lambda: found.append(meet(Group(0, 2, address), 10.0)))
    first.start()
    while True:
        with contextlib.suppress(ConnectionRefusedError):
            silent = socket.create_connection(("127.0.0.1", int(address[10:])))
            break
    with silent:
        silent.sendall(b"pasta_jax 1")
        meet(Group(1, 2, address), 5.0)
        first.join()
        assert found[0].keys() == {1}
    near, far = socket.socketpair()
    with near, far:

        def drip() -> None:
            with contextlib.suppress(OSError):
                for _ in range(400):
                    far.sendall(b".")
                    time.sleep(0.05)

        threading.Thread(target=drip).start()
        assert meeting._read_line(near, 0.3) is None
    assert time.monotonic() - began < 10  # of the 20 that the last stranger takes


WAITING = """
import pathlib, sys, time
from pasta_jax.processes import meeting
from pasta_jax.processes.launchers import Group
group, how, done = Group(int(sys.argv[1]), 2, sys.argv[2]), sys.argv[3], pathlib.Path(sys.argv[4])
meeting._connections = meeting.Connections(group, meeting.meet(group, 30.0))
with meeting.ending_together():
    try:
        if how == "interrupted" and group.index:
            raise KeyboardInterrupt
        meeting.wait_for_first()
    except KeyboardInterrupt:
        meeting.report("Interrupted.")
        sys.exit(130)
    finally:
        if group.index:
            print(done.exists())
    time.sleep(0.3 if how != "interrupted" else 30)
    done.touch()
    if how == "refused":
        meeting.report("No model is there.")
        sys.exit(2)
"""


@pytest.mark.parametrize(
    ("how", "statuses", "says"),
    [
        ("done", [0, 0], ""),
        ("refused", [2, 1], "No model is there.\n"),
        ("interrupted", [1, 130], "Process 1 of 2: Interrupted.\n"),
    ],
)
def test_the_others_wait_for_the_first_and_end_with_it(
    tmp_path: pathlib.Path, how: str, statuses: list[int], says: str
) -> None:
    logs, rest = (
        [tmp_path / f"log-{i}" for i in range(2)],
        [f"127.0.0.1:{free_port()}", how, str(tmp_path / "done")],
    )
    assert wait([start(["-c", WAITING, str(i), *rest], log) for i, log in enumerate(logs)], 60) == statuses
    assert [log.read_text() for log in logs] == [says, ""]
    assert logs[1].with_suffix(".out").read_text() == f"{how != 'interrupted'}\n"


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
        (("host:0", 2, 0), "--coordinator=host:0 is no HOST:PORT"),
        (("host:65536", 2, 0), "--coordinator=host:65536 is no HOST:PORT"),
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
