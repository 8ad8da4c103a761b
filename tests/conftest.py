"""Shared by all tests: eight fake CPU devices, one compilation cache, no network, and seeds that are shown."""

import atexit
import importlib.metadata
import logging
import os
import pathlib
import random
import shutil
import socket
import tempfile
from collections.abc import Iterator
from typing import Any

# Before jax is imported anywhere: it reads these once. Subprocesses and the workers of xdist inherit them.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Compiling takes most of the time. So it is done with less care, except in tests that use `helpers.optimized`, and
# once for all processes of a run. A developer who sets JAX_COMPILATION_CACHE_DIR keeps the cache for the next run.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# XLA's older code generator takes less than half the time, and less again for a program in one piece: pieces are
# for cores that have nothing else to do. Later versions lack the generator, and refuse its flag.
os.environ["OLDER_GENERATOR"] = ""
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) <= (0, 10):
    os.environ["OLDER_GENERATOR"] = (
        "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    )
    os.environ["XLA_FLAGS"] += " " + os.environ["OLDER_GENERATOR"]
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="pasta_jax_compiled_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import pytest

from pasta_jax.decoding import cpu
from tests.helpers.widths import few_widths


def pytest_configure() -> None:
    """XLA reads its flags here; libtpu, which is loaded later, would refuse that of the older generator."""
    jax.devices()
    os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"].replace(os.environ["OLDER_GENERATOR"], "")


@pytest.fixture
def seed() -> int:
    """The same in every run. `PASTA_SEED=fresh` draws another for each test; `PASTA_SEED=123` repeats one."""
    given = os.environ.get("PASTA_SEED", "0")
    value = random.SystemRandom().randrange(2**31) if given == "fresh" else int(given)
    print(f"PASTA_SEED={value}")  # shown when a test fails
    return value


@pytest.fixture(autouse=True, scope="session")
def fewer_programs() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "widths_for", few_widths)
        yield


MAPPINGS = pathlib.Path("/proc/self/maps")
"""Of this process's memory, a line each. Linux allows 65,530; compiled programs take a few each, small ones too."""


@pytest.fixture(autouse=True, scope="module")
def room_for_programs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Frees compiled programs before there are so many that the next one would abort the process."""
    yield
    for value in vars(request.module).values():  # what the module keeps with `functools.cache`
        if getattr(value, "__module__", None) == request.module.__name__ and hasattr(value, "cache_clear"):
            value.cache_clear()
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def log_as_it_was() -> Iterator[None]:
    """A command that runs within a test shows the log on that test's stderr; the next test has another."""
    log = logging.getLogger("pasta_jax")
    before = [*log.handlers], log.level, log.propagate
    yield
    log.handlers[:], log.level, log.propagate = before


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connecting to another machine is an error; this machine and local sockets are allowed."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost", "0.0.0.0"):
            raise OSError(f"A test tried to reach {address}; tests use no network.")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)
