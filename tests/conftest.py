"""Shared by all tests: eight fake CPU devices, one compilation cache, no network, and seeds that are shown."""

import atexit
import os
import random
import shutil
import socket
import tempfile
from typing import Any

# Before jax is imported anywhere: it reads these once. Subprocesses and the workers of xdist inherit them.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Compiling takes most of the time. So it is done with less care, except in tests that use `helpers.optimized`, and
# once for all processes of a run. A developer who sets JAX_COMPILATION_CACHE_DIR keeps the cache for the next run.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="pasta_jax_compiled_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import pytest


@pytest.fixture
def seed() -> int:
    """The same in every run. `PASTA_SEED=fresh` draws another for each test; `PASTA_SEED=123` repeats one."""
    given = os.environ.get("PASTA_SEED", "0")
    value = random.SystemRandom().randrange(2**31) if given == "fresh" else int(given)
    print(f"PASTA_SEED={value}")  # shown when a test fails
    return value


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connecting to another machine is an error; this machine and local sockets are allowed."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost", "0.0.0.0"):
            raise OSError(f"A test tried to reach {address}; tests use no network.")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)
