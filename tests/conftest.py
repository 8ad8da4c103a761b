"""Shared by all tests: eight fake CPU devices, no network, and seeds that are printed and can be set."""

import contextlib
import os
import random
import socket
import sys
from collections.abc import Iterator
from typing import Any

# Before jax is imported anywhere: the number of devices is read once.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import pytest


@pytest.fixture
def seed() -> int:
    """A fresh seed for each run, shown when a test fails; `PASTA_SEED=123 pytest ...` repeats a run."""
    value = int(os.environ.get("PASTA_SEED") or random.SystemRandom().randrange(2**31))
    print(f"PASTA_SEED={value}")
    return value


@pytest.fixture(autouse=True, scope="session")
def in_a_hurry() -> Iterator[None]:
    """Decoders compile with less care: compiling is what takes time here, and no arithmetic changes."""
    compiled = sys.modules.get("pasta_jax.decoding.compiled")
    options = {"xla_backend_optimization_level": 0}
    with compiled.default_xla_options(options) if compiled else contextlib.nullcontext():
        yield


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connecting to another machine is an error; this machine and local sockets are allowed."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost", "0.0.0.0"):
            raise OSError(f"A test tried to reach {address}; tests use no network.")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)
