"""Processes that a test starts, and waits for."""

from __future__ import annotations

import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Sequence

from tests.helpers import ONE_DEVICE, commands

ROOT = pathlib.Path(__file__).parents[2]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


FOUR_DEVICES = {"XLA_FLAGS": f"{ONE_DEVICE} --xla_force_host_platform_device_count=4"}


def fork(arguments: list[str], log: pathlib.Path, **env: str) -> commands.Fork:
    """As `start`, from a process that has imported jax: for tests that are not about how Python starts."""
    out = log.with_suffix(".out")
    for file in (out, log):
        file.write_bytes(b"")
    files = (os.devnull, out, log)
    return commands.started(tuple(arguments), files, ROOT, os.environ | FOUR_DEVICES | env)


def start(arguments: list[str], log: pathlib.Path, **env: str) -> subprocess.Popen[bytes]:
    environment = os.environ | FOUR_DEVICES | env
    with log.open("wb") as err, log.with_suffix(".out").open("wb") as out:
        return subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env=environment, stdout=out, stderr=err
        )


def wait(started: Sequence[subprocess.Popen[bytes] | commands.Fork], seconds: float) -> list[int]:
    """The statuses with which processes end. None of them is left."""
    try:
        return [process.wait(timeout=seconds) for process in started]
    finally:
        for process in started:
            process.kill()
