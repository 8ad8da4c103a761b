"""Processes that a test starts, and waits for."""

from __future__ import annotations

import os
import pathlib
import socket
import subprocess
import sys

from tests.helpers import ONE_DEVICE

ROOT = pathlib.Path(__file__).parents[2]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def start(arguments: list[str], log: pathlib.Path, **env: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"XLA_FLAGS": f"{ONE_DEVICE} --xla_force_host_platform_device_count=4"} | env
    with log.open("wb") as err, log.with_suffix(".out").open("wb") as out:
        return subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env=environment, stdout=out, stderr=err
        )


def wait(started: list[subprocess.Popen[bytes]], seconds: float) -> list[int]:
    """The statuses with which processes end. None of them is left."""
    try:
        return [process.wait(timeout=seconds) for process in started]
    finally:
        for process in started:
            process.kill()
