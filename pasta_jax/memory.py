"""Does it fit: bytes needed and bytes free, on each device and on the host."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import math
import os
import resource
import sys
from typing import Any

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Shortage:
    """Too little memory: bytes needed and free, and where."""

    need: int
    free: int
    place: str

    def __str__(self) -> str:
        return f"{gib(self.need)} GiB are needed {self.place}, and {gib(self.free)} GiB are free"


def shortage(leaves: Any, *, staging: int = 0, host_free: int | None = None) -> Shortage | None:
    """What memory arrays would lack; None if they fit, or where it is unknown how much is free.

    Args:
      leaves: shapes with dtypes and shardings.
      staging: additional bytes that the host needs.
      host_free: bytes free on the host; by default `host_memory()`.
    """
    on_host = staging
    for device, need in bytes_by_device(leaves).items():
        if device.platform == "cpu":
            on_host += need
            continue
        stats = device.memory_stats() or {}
        if "bytes_limit" in stats and need > (free := stats["bytes_limit"] - stats.get("bytes_in_use", 0)):
            return Shortage(need, free, f"on {device}")
    free_on_host = host_memory() if host_free is None else host_free
    if free_on_host is not None and on_host > free_on_host:
        return Shortage(on_host, free_on_host, "in this machine's memory")
    return None


def bytes_by_device(leaves: Any) -> dict[Any, int]:
    """Bytes of these arrays on each of this process's devices."""
    need: dict[Any, int] = {}
    for leaf in leaves:
        size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for device in leaf.sharding.addressable_devices:
            need[device] = need.get(device, 0) + size
    return need


def predicted(compiled: Any, device: Any) -> str:
    """In words, what a compiled program will take of a device, as its compiler counts.

    Args:
      compiled: with `memory_analysis`.
      device: one of those it runs on.
    """
    sizes = compiled.memory_analysis()
    if sizes is None:
        return "Memory: the compiler does not say what an update takes."
    held, temporary = sizes.argument_size_in_bytes, sizes.temp_size_in_bytes
    new = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    limit = (device.memory_stats() or {}).get("bytes_limit")
    of = f" of {gib(limit)}" if limit else ""
    return (
        f"Memory of each device, predicted: {gib(held + temporary + new)}{of} GiB: {gib(held)} for weights, "
        f"optimizer and batch, {gib(temporary + new)} while an update is computed."
    )


def measured(devices: Any) -> str:
    """In words, the memory that has been taken so far: of the fullest device, or on a CPU of this process."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in devices]
    if all(peaks):
        return f"Memory after the first step, measured: at most {gib(max(peaks))} GiB of a device."
    return (
        f"Memory after the first step, measured: at most {gib(peak_of_process())} GiB of this process, with all "
        "that it has loaded and compiled."
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, or XLA for a device, found no memory."""
    jax = sys.modules.get("jax")
    is_of_xla = jax is not None and isinstance(error, jax.errors.JaxRuntimeError)
    return isinstance(error, MemoryError) or (is_of_xla and "RESOURCE_EXHAUSTED" in str(error))


def peak_of_process() -> int:
    """The most bytes of memory that this process has held at once."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def return_freed() -> None:
    """Returns memory that is free to the system, where the C library (glibc) would keep it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


TUNABLES = "GLIBC_TUNABLES"


def with_large_pages() -> None:
    """Starts this process anew, in its place, with a C library that asks for large pages; else does nothing.

    XLA on a CPU allocates the memory of each update anew, and the kernel clears it in pages of 4 KiB: a quarter of
    the time. The library reads its options only when a process starts. Where somebody has set some, they stay.
    """
    if sys.platform.startswith("linux") and TUNABLES not in os.environ:
        os.environ[TUNABLES] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def host_memory(root: str = "/") -> int | None:
    """Bytes that this process may still allocate: the least of the machine's and its control groups'.

    Args:
      root: the folder that has /proc and /sys; another one in tests.

    Returns:
      None if it is unknown (not Linux).
    """
    sizes = [_meminfo(root, "MemAvailable"), *(left for _, left in _group_limits(root))]
    return min((size for size in sizes if size is not None), default=None)


def host_size(root: str = "/") -> int | None:
    """Bytes that this process could allocate if nobody else had any; as `host_memory`."""
    sizes = [_meminfo(root, "MemTotal"), *(limit for limit, _ in _group_limits(root))]
    return min((size for size in sizes if size is not None), default=None)


def gib(size: float) -> str:
    """Bytes as GiB, with two significant digits below 1: "4.7", "0.03"."""
    return f"{size / GIB:.1f}" if size >= GIB else f"{size / GIB:.2g}"


def _meminfo(root: str, name: str) -> int | None:
    for line in (_read(os.path.join(root, "proc/meminfo")) or "").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None


_GROUPS = {
    "": ("sys/fs/cgroup", "memory.max", "memory.current"),
    "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
}
"""Controller, as /proc/self/cgroup names it: its folder, and its files with limit and use. Versions 2 and 1."""


def _group_limits(root: str) -> list[tuple[int, int]]:
    """The limit of each control group of this process and of their parents, and what is left of it, in bytes."""
    limits = []
    for line in (_read(os.path.join(root, "proc/self/cgroup")) or "").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        controller = "memory" if "memory" in controllers.split(",") else controllers
        if controller not in _GROUPS:
            continue
        base, *names = _GROUPS[controller]
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            folder = os.path.join(root, base, *parts[:depth])
            limit, used = (_number(os.path.join(folder, name)) for name in names)
            if limit is not None and used is not None and limit < 2**60:  # a huge one is none
                limits.append((limit, max(0, limit - used + _reclaimable(folder))))
    return limits


def _reclaimable(folder: str) -> int:
    """Bytes of cached files, which count as used and are given back on demand."""
    stat = dict(
        line.split(" ", 1) for line in (_read(f"{folder}/memory.stat") or "").splitlines() if " " in line
    )
    return int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))


def _number(path: str) -> int | None:
    text = (_read(path) or "").strip()
    return int(text) if text.isdigit() else None  # "max" is no limit


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError:
        return None
