"""Which processes there are, as the flags say, or Open MPI, SLURM, GKE or a Cloud TPU slice announces it."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Mapping

GPUS = ("CUDA_VISIBLE_DEVICES", "SLURM_GPUS_ON_NODE")
"""Environment variables that tell of a host's GPUs."""

TPU_PORT = 8482
"""As `jax.distributed` has it on TPUs."""


class ProcessError(ValueError):
    """The processes did not come together; the message says what to do."""


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
    port = re.fullmatch(r".+:(\d{1,5})", address)
    if port is None or not 0 < int(port[1]) < 65536:
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
