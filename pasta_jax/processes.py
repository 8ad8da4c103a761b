"""Processes that compute together, one on each host of a pod or cluster: how they find each other, agree, and end.

    announced   which processes there are, as the environment or the flags say
    start       meets the others, then initialises `jax.distributed`
    Agreement   what any of them asks for, known to all at the same step
    report, end a failure of one is said by the first, and ends all

They meet at the address that `jax.distributed` takes later: its own wait ends in an abort that does not say who is
missing. The connections to the first process stay open, so that one that dies is noticed at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import logging
import os
import re
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

LOG = logging.getLogger("pasta_jax")

TIMEOUT_S = 60.0
"""How long a process waits for the others to come."""

AGREED = (0, 128 + signal.SIGTERM, 128 + signal.SIGINT)
"""Statuses with which all processes end together: done, or asked to stop."""

GRACE_S = 2.0
"""How long a process may take to end by itself after another has failed: it often fails in the same way."""

GPUS = ("CUDA_VISIBLE_DEVICES", "SLURM_GPUS_ON_NODE")
"""Environment variables that tell of a host's GPUs."""

TPU_PORT = 8482
"""As `jax.distributed` has it on TPUs."""


class ProcessError(ValueError):
    """The processes did not come together; the message says what to do."""


class SaidElsewhere(ProcessError):
    """The first process said it."""


@dataclasses.dataclass(frozen=True)
class Group:
    """The processes of a run, as one of them sees it.

    Attributes:
      index: of this process; 0 is the first, which writes and prints.
      count: how many there are.
      address: host:port, where the first one is met.
      devices: those of this host's GPUs that are this process's, by number; None is all.
      advice: how the others are started.
    """

    index: int
    count: int
    address: str
    devices: tuple[int, ...] | None = None
    advice: str = "Start the same command on every host."


# ------------------------------------------------------------------------------------------ which there are


def asked(coordinator: str | None, processes: int | None, process_id: int | None) -> Group | None:
    """The processes by the flags, and what these leave open by the environment; None is a single one.

    Raises:
      ProcessError: some flags are missing, or contradict each other.
    """
    if processes == 1:
        return None
    group = None
    if processes is None or process_id is None:
        try:
            group = announced()
        except ProcessError:
            if coordinator is None:
                raise
            group = announced(address=coordinator)
        if group is None and (coordinator, processes, process_id) == (None, None, None):
            return None
    if group is None and None in (coordinator, processes, process_id):
        raise ProcessError(
            "Nothing here says which processes there are. Add --coordinator=HOST:PORT of the first, "
            "--processes=N and --process_id=0, 1, ... N-1 on the hosts in turn."
        )
    address = coordinator or (group.address if group else "")
    count = processes if processes is not None else group.count if group else 0
    index = process_id if process_id is not None else group.index if group else 0
    if not re.fullmatch(r".+:\d{1,5}", address):
        raise ProcessError(f"--coordinator={address} is no HOST:PORT, as in 10.0.0.2:8482.")
    if not 0 <= index < count:
        raise ProcessError(f"--process_id={index} must be at least 0 and less than --processes={count}.")
    if group is None:
        others = " or ".join(str(i) for i in range(count) if i != index)
        flags = f"--coordinator={address} --processes={count} --process_id={others}"
        return Group(index, count, address, advice=f"Start the same command there, with {flags}.")
    return dataclasses.replace(group, index=index, count=count, address=address)


def announced(
    env: Mapping[str, str] = os.environ,
    metadata: Callable[[str], str | None] | None = None,
    address: str | None = None,
) -> Group | None:
    """The processes as a launcher announces them: Open MPI, SLURM, GKE, a Cloud TPU slice; None is a single one.

    Args:
      env: environment variables.
      metadata: the value of an attribute of this virtual machine, if there is one; by default the metadata server
        is asked, and only on a machine with TPU chips.
      address: of the first process, if the launcher does not tell.

    Raises:
      ProcessError: there are several, and it is not known where the first one is.
    """
    for find in (_open_mpi, _slurm):
        if (group := find(env, address)) is not None:
            return group
    platforms = env.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms:
        return None
    return _gke(env) or _cloud_tpu(env, metadata or _metadata)


def _open_mpi(env: Mapping[str, str], address: str | None) -> Group | None:
    count = int(env.get("OMPI_COMM_WORLD_SIZE", "1"))
    if count == 1:
        return None
    local, here = (int(env.get(f"OMPI_COMM_WORLD_LOCAL_{name}", "0")) for name in ("RANK", "SIZE"))
    uri = env.get("OMPI_MCA_orte_hnp_uri", "")
    job = env.get("PMIX_NAMESPACE") or env.get("OMPI_MCA_ess_base_jobid") or uri.partition(".")[0]
    if here == count:
        host = "127.0.0.1"
    elif found := re.search(r"tcp6?://\[?([^,\]]+?)(?:[,\]]|:\d+(?:;|$))", uri):
        host = found[1]
    elif address is None:
        raise ProcessError(
            f"Open MPI started {count} processes and does not say where the first one is. Add "
            "--coordinator=HOST:PORT, the name of its host and any free port."
        )
    else:
        host = ""
    return Group(
        int(env["OMPI_COMM_WORLD_RANK"]),
        count,
        address or f"{host}:{_port(job)}",
        _own_devices(local, here, env),
        f"mpirun was to start {count}; if the first is on another host than mpirun, add --coordinator=HOST:PORT.",
    )


def _slurm(env: Mapping[str, str], address: str | None) -> Group | None:
    """By the variables of the step: those of the job are set in a shell of `salloc` too, where one process runs."""
    needed = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    count = int(env.get("SLURM_STEP_NUM_TASKS", "1"))
    if count == 1 or not all(name in env for name in needed):
        return None
    found = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", env["SLURM_STEP_NODELIST"])
    host = "".join(part or "" for part in found.groups()) if found else "127.0.0.1"
    nodes = int(env.get("SLURM_STEP_NUM_NODES", "1"))
    return Group(
        int(env["SLURM_PROCID"]),
        count,
        address or f"{host}:{_port(env['SLURM_JOB_ID'] + '.' + env.get('SLURM_STEP_ID', '0'))}",
        _own_devices(int(env["SLURM_LOCALID"]), -(-count // nodes), env),
        f"srun was to start {count}; --processes=1 runs this one alone.",
    )


def _port(job: str) -> int:
    """A port for each job, of those that are handed out to nobody else for long."""
    return 61440 + zlib.crc32(job.encode()) % 4096


def _own_devices(local: int, processes: int, env: Mapping[str, str]) -> tuple[int, ...] | None:
    """A process's share of its host's GPUs: all if it is alone there, or was given one."""
    visible = [name for name in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if processes <= 1 or len(visible) == 1:
        return None
    gpus = len(visible) or int(env.get("SLURM_GPUS_ON_NODE", "0"))
    if 0 < gpus < processes and env.get("JAX_PLATFORMS") != "cpu":
        raise ProcessError(
            f"{processes} processes were started on a host with {gpus} GPUs. Start at most {gpus}."
        )
    share = max(1, gpus // processes)
    return tuple(range(local * share, (local + 1) * share))


_EVERY_WORKER = (
    "Start the command on every worker of the slice: launch/tpu_run.sh does so, or gcloud compute tpus tpu-vm ssh "
    "NAME --worker=all --command=..."
)


def _gke(env: Mapping[str, str]) -> Group | None:
    names = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES") or ""
    advice = "The job needs as many pods as the slice has hosts (parallelism and completions)."
    return _slices(names.split(","), env.get("TPU_WORKER_ID", "0"), env, advice) if names else None


def _cloud_tpu(env: Mapping[str, str], metadata: Callable[[str], str | None]) -> Group | None:
    # On import jax sets TPU_SKIP_MDS_QUERY where it finds no chips.
    if "TPU_SKIP_MDS_QUERY" in env or importlib.util.find_spec("libtpu") is None:
        return None
    number, endpoints = metadata("agent-worker-number"), metadata("worker-network-endpoints")
    if number is None or endpoints is None:
        return None
    more = dict(re.findall(r"^(\w+): *'?([^'\n]*)'?$", metadata("tpu-env") or "", re.MULTILINE))
    # A worker is a host name, or name:id:address.
    workers = [worker.split(":")[-1] for worker in endpoints.split(",")]
    return _slices(workers, number, {**more, **env}, _EVERY_WORKER)


def _slices(workers: list[str], number: str, env: Mapping[str, str], advice: str) -> Group | None:
    """The workers of a slice, and of others like it where there are several."""
    slices, mine = int(env.get("MEGASCALE_NUM_SLICES") or 1), int(env.get("MEGASCALE_SLICE_ID") or 0)
    count = len(workers) * slices
    first = (env.get("MEGASCALE_COORDINATOR_ADDRESS") or workers[0]).partition(":")[0]
    index = int(number) + mine * len(workers)
    return Group(index, count, f"{first}:{TPU_PORT}", None, advice) if count > 1 else None


def _metadata(name: str) -> str | None:
    """An attribute of this virtual machine, as its metadata server knows it; None without one."""
    host = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{host}/computeMetadata/v1/instance/attributes/{name}"
    for attempt in range(3):
        try:
            request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
            with urllib.request.urlopen(request, timeout=3) as answer:
                return str(answer.read().decode())
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            time.sleep(attempt)
        except OSError:
            return None
    return None


# ----------------------------------------------------------------------------------------------- coming together


class Line:
    """The connections between the first process and each of the others, open until they end.

    Args:
      group: the processes.
      peers: sockets by the number of the process at the other end.
    """

    def __init__(self, group: Group, peers: dict[int, socket.socket]):
        self.group, self._peers = group, peers
        self._done, self.has_reported = set[int](), False
        self._failed = threading.Event()
        self._failure = ""
        self._gone = threading.Event()
        self._lock = threading.Lock()
        threading.Thread(target=self._watch, name="processes", daemon=True).start()

    def say(self, line: str) -> None:
        """Sends a line to all at the other ends."""
        with self._lock:
            for peer in self._peers.values():
                with contextlib.suppress(OSError):
                    peer.sendall(f"{line}\n".encode())

    def report(self, message: str) -> None:
        """The first process prints it; the others have it printed there."""
        line = " ".join(message.splitlines())
        if self.group.index == 0:
            print(message, file=sys.stderr, flush=True)
        self.has_reported = True
        self.say(f"failed {line}")

    def has_failed(self, wait_s: float = 0.0) -> bool:
        """Whether another process failed, as far as is known within this time."""
        return self._failed.wait(wait_s)

    def done(self) -> None:
        """Tells the others that this process ends well."""
        self.say("done")

    def leave(self, status: int) -> NoReturn:
        """Ends this process at once: at its end jax would wait for those that are gone.

        The first waits a little for the others to end before, because they abort without it.
        """
        if not self.has_reported:
            if self.has_failed():
                self._say_failure()
            else:
                self.report(f"Process {self.group.index} of {self.group.count} ended with status {status}.")
        if self.group.index == 0:
            self._gone.wait(GRACE_S + 3)
            time.sleep(0.1)
        _exit(status)

    def _say_failure(self) -> None:
        if self.group.index == 0 or not self._failure.startswith("told: "):
            print(self._failure.removeprefix("told: "), file=sys.stderr, flush=True)

    def _watch(self) -> None:
        """Reads what the others say, and ends this process when one has failed."""
        selector = selectors.DefaultSelector()
        for index, peer in self._peers.items():
            peer.settimeout(None)
            selector.register(peer, selectors.EVENT_READ, index)
        unread = dict.fromkeys(self._peers, b"")
        while selector.get_map():
            for key, _ in selector.select():
                try:
                    received = key.fileobj.recv(65536)  # type: ignore[union-attr]
                except OSError:
                    received = b""
                *lines, unread[key.data] = (unread[key.data] + received).split(b"\n")
                for line in lines:
                    verb, _, text = line.decode(errors="replace").partition(" ")
                    if verb == "done":
                        self._done.add(key.data)
                    elif verb == "failed":
                        self._done.add(key.data)
                        self._fail(key.data, text)
                if not received:
                    selector.unregister(key.fileobj)
                    if key.data not in self._done:
                        self._fail(key.data, "")
        self._gone.set()

    def _fail(self, index: int, text: str) -> None:
        """Another process failed: this one has a moment to end by itself, and is ended then."""
        if self._failed.is_set():
            return
        name = f"Process {index} of {self.group.count}"
        lost = f"{name} was lost, and with it the run. Run the same command again to go on."
        if self.group.index == 0:
            self._failure = f"{name}: {text}" if text else lost
            self.say(f"failed {self._failure}")
        else:
            self._failure = f"told: {text}" if text else lost
        self._failed.set()
        threading.Thread(target=self._end_soon, daemon=True).start()

    def _end_soon(self) -> None:
        time.sleep(GRACE_S)
        if not self.has_reported:
            self.has_reported = True
            self._say_failure()
            self.leave(1)


def _exit(status: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status)


def meet(group: Group, timeout_s: float = TIMEOUT_S) -> dict[int, socket.socket]:
    """Waits until all processes are there.

    Returns:
      at the first process a connection to each of the others, at these one to the first.

    Raises:
      ProcessError: not all came in time; it says who did not, as far as that is known, and what to do.
    """
    return _receive(group, timeout_s) if group.index == 0 else {0: _join(group, timeout_s)}


def _receive(group: Group, timeout_s: float) -> dict[int, socket.socket]:
    """The first process: waits for the others."""
    port, deadline = int(group.address.rpartition(":")[2]), time.monotonic() + timeout_s
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        listener = socket.create_server(("", port), family=family, backlog=group.count, dualstack_ipv6=dual)
    except OSError as error:
        raise ProcessError(
            f"Port {port}, where the processes meet, cannot be used ({error.strerror}): does another run have it? "
            "End that one, or choose another with --coordinator=HOST:PORT."
        ) from error
    peers: dict[int, socket.socket] = {}
    came = list[socket.socket]()
    problem = ""
    with listener:
        while len(peers) < group.count - 1 and not problem:
            try:
                listener.settimeout(max(0.01, deadline - time.monotonic()))
                peer, _ = listener.accept()
            except TimeoutError:
                missing = [str(i) for i in range(1, group.count) if i not in peers]
                names = ", ".join(missing[:16]) + ", ..." * (len(missing) > 16)
                problem = (
                    f"{1 + len(peers)} of {group.count} processes came within {timeout_s:.0f} s; "
                    f"missing: {names}. {group.advice}"
                )
                break
            hello = re.fullmatch(r"pasta_jax (\d+) (\d+)", _read_line(peer, 5.0) or "")
            if hello is None:  # a stranger
                peer.close()
                continue
            came.append(peer)
            index, count = map(int, hello.groups())
            if count != group.count or not 0 < index < count:
                problem = f"Process {index} of {count} came, but there are {group.count} here. {group.advice}"
            elif index in peers:
                problem = f"Process {index} came twice: each needs a number of its own. {group.advice}"
            peers.setdefault(index, peer)
    for peer in came:
        with contextlib.suppress(OSError):
            peer.sendall(f"failed {problem}\n".encode() if problem else b"go\n")
    if problem:
        raise ProcessError(problem)
    return peers


def _join(group: Group, timeout_s: float) -> socket.socket:
    """Another process: comes to the first, and waits until all are there."""
    host, _, port = group.address.rpartition(":")
    deadline, reason = time.monotonic() + timeout_s, "no answer"
    while time.monotonic() < deadline:
        try:
            peer = socket.create_connection((host.strip("[]"), int(port)), timeout=5.0)
        except OSError as error:
            reason = error.strerror or str(error)
        else:
            with contextlib.suppress(OSError):
                peer.sendall(f"pasta_jax {group.index} {group.count}\n".encode())
            # The first process answers in the time that it waits itself.
            answer = _read_line(peer, timeout_s + 5) or ""
            if answer == "go":
                return peer
            peer.close()
            if answer.startswith("failed "):
                raise SaidElsewhere(answer.removeprefix("failed "))
        time.sleep(0.2)
    raise ProcessError(
        f"The first of {group.count} processes was not met at {group.address} within {timeout_s:.0f} s ({reason}); "
        f"this is process {group.index}. {group.advice}"
    )


def _read_line(peer: socket.socket, timeout_s: float) -> str | None:
    """The next line from a connection; None if there is none in time."""
    peer.settimeout(timeout_s)
    received = b""
    try:
        while not received.endswith(b"\n") and len(received) < 4096:
            byte = peer.recv(1)
            if not byte:
                return None
            received += byte
    except OSError:
        return None
    return received.decode(errors="replace").strip()


_line: Line | None = None
"""Of this process; only `start` sets it."""


def start(group: Group | None, timeout_s: float = TIMEOUT_S) -> None:
    """Brings the processes together: afterwards `jax.devices()` are those of all. Nothing for a single one.

    Raises:
      ProcessError: as `meet`.
    """
    global _line
    if group is None:
        return
    peers = meet(group, timeout_s)
    import jax

    # jax would take SIGTERM for itself, and only say at a later step that it came: older versions always do.
    with contextlib.suppress(AttributeError):
        jax.config.update("jax_enable_preemption_service", False)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    if jax.config.values.get("jax_cpu_collectives_implementation") is None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        group.address,
        group.count,
        group.index,
        group.devices,
        cluster_detection_method="deactivate",
        initialization_timeout=int(TIMEOUT_S),
    )
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)
    _line = Line(group, peers)


def several() -> bool:
    """Whether there are other processes."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


# ------------------------------------------------------------------------------------------------------- ending


def report(message: str) -> None:
    """Says on stderr why this process ends; of several the first says it for all."""
    if _line is None:
        print(message, file=sys.stderr)
    elif not _line.has_failed():
        _line.report(message)


def end(status: int) -> None:
    """Ends the part of this process in the run, with this status; returns if it is the only one, or all end so."""
    if _line is not None:
        if status not in AGREED or _line.has_reported:
            _line.leave(status)
        _line.done()


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Of several processes none waits for one that has failed."""
    try:
        yield
    except SystemExit as leaving:
        end(leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None))
        raise
    except Exception:
        if _line is None:
            raise
        if not _line.has_failed(wait_s=1.0):  # else this only follows from that
            traceback.print_exc()
        end(1)
    else:
        end(0)


# ---------------------------------------------------------------------------------------------------- agreeing


class Agreement:
    """The largest number that any process asks for, known to all at the same call.

    The result is one call late: waiting for this call's result would stall the device.
    """

    def __init__(self) -> None:
        self._before: Any = None

    def __call__(self, *asked: int, now: bool = False) -> tuple[int, ...]:
        """What any process asked for in the call before, or nothing: zeros. With `now` in this call.

        Args:
          asked: as many numbers in each call.
          now: waits for the others.
        """
        if not several():
            return asked
        before, self._before = self._before, _largest(asked)
        known = self._before if now else before
        if known is None:
            return (0,) * len(asked)
        import numpy as np

        return tuple(map(int, np.asarray(known)))

    def forget(self) -> None:
        """Drops what was asked and is not known yet: it was done."""
        self._before = None


def agreed(*asked: int) -> tuple[int, ...]:
    """The largest that any process asks for; waits for all of them."""
    return Agreement()(*asked, now=True)


def least(size: int) -> int:
    """The smallest of all processes' sizes, in bytes, to the MiB below; waits for all of them."""
    return size if not several() else -agreed(-(size >> 20))[0] << 20


def check_shared(folder: str | os.PathLike[str], wait_s: float = 10.0) -> None:
    """Refuses a folder that is not the same one in all processes.

    Args:
      folder: there is one of this name in each process.
      wait_s: how long it may take until what one host writes is seen by another.

    Raises:
      ProcessError: in all processes; it says which ones have another folder.
    """
    if not several():
        return
    import jax

    own, mark = jax.process_index(), os.path.join(folder, ".shared")
    (token,) = agreed(0 if own else 1 + secrets.randbelow(2**30))
    if own == 0:
        with open(mark, "w", encoding="utf-8") as file:
            file.write(str(token))
    agreed(0)  # now it is there
    deadline, seen = time.monotonic() + wait_s, False
    while not seen and time.monotonic() < deadline:
        with contextlib.suppress(OSError), open(mark, encoding="utf-8") as file:
            seen = file.read() == str(token)
        time.sleep(0 if seen else 0.1)
    lacking = agreed(*(int(i == own and not seen) for i in range(jax.process_count())))
    if own == 0:
        os.remove(mark)
    if any(lacking):
        others = ", ".join(str(i) for i, lacks in enumerate(lacking) if lacks)
        raise ProcessError(
            f"{os.fspath(folder)} of process {others} is not that of the first. The workdir must be on a file "
            "system that all hosts share, such as a bucket (--bucket of launch/tpu_run.sh)."
        )


def _largest(asked: tuple[int, ...]) -> Any:
    """The largest of all processes, being computed: int32, replicated."""
    import jax
    import numpy as np

    sharding, largest = _reduction()
    shape = (jax.process_count(), len(asked))
    own = np.array([asked], np.int32)
    return largest(jax.make_array_from_callback(shape, sharding, lambda index: own))


@functools.cache
def _reduction() -> tuple[Any, Any]:
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    # One device of each process.
    first: dict[int, Any] = {}
    for device in jax.devices():
        first.setdefault(device.process_index, device)
    mesh = Mesh(np.array([first[i] for i in sorted(first)]), ("process",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    largest = jax.jit(lambda numbers: numbers.max(0), out_shardings=everywhere)
    return NamedSharding(mesh, PartitionSpec("process")), largest
