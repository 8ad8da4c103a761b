"""Trainings that are killed at random moments and run again: the result is the same bit for bit."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from pasta_jax.checkpoints.about import find_checkpoint, read_metadata
from pasta_jax.checkpoints.reading import restore_arrays, saved_shapes
from pasta_jax.training.metrics import read_metrics
from tests.fuzz.runner import HERE, Target
from tests.helpers import ONE_DEVICE

STEPS, SAVED, LOGGED = 40, 5, 4
ARGUMENTS = (
    "--config=configs/tiny.py:pasta",
    *(f"--config.steps={STEPS}", f"--config.checkpoint.every_steps={SAVED}", f"--config.log.every={LOGGED}"),
    *("--config.model.num_layers=1", "--config.model.model_dim=16", "--config.model.num_heads=2"),
    *("--config.model.num_kv_heads=1", "--config.model.head_dim=8", "--config.model.mlp_dim=16"),
    *("--config.data.rows=2", "--config.optimizer.warmup_steps=2"),
)
LATE = 120.0
"""Seconds after which a process is killed wherever it is."""


def draw(rng: random.Random) -> Any:
    """Signals, each so many seconds after that many lines of metrics."""
    kills = [
        [
            rng.choice(("SIGKILL", "SIGKILL", "SIGTERM", "SIGINT")),
            rng.randrange(STEPS // LOGGED),
            rng.choice((0, 0.05, 0.3)),
        ]
        for _ in range(rng.randint(1, 3))
    ]
    return {"kills": sorted(kills, key=lambda kill: kill[1])}


def check(case: Any) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        workdir = pathlib.Path(temporary, "run")
        for name, lines, seconds in case["kills"]:
            with started(workdir) as process:
                until = time.monotonic() + LATE
                while process.poll() is None and len(metrics(workdir)) <= lines and time.monotonic() < until:
                    time.sleep(0.02)
                time.sleep(seconds)
                process.send_signal(getattr(signal, name))
                process.wait(LATE)
                said = process.stderr.read() if process.stderr else ""
                assert name == "SIGKILL" or "Traceback" not in said, said[-3000:]
        with started(workdir) as process:
            _, said = process.communicate(timeout=LATE)
            assert process.returncode == 0, said[-3000:]
        assert_same(workdir, uninterrupted())


@contextlib.contextmanager
def started(workdir: pathlib.Path, arguments: Sequence[str] = ARGUMENTS) -> Any:
    line = [sys.executable, "-m", "pasta_jax.train", *arguments, f"--workdir={workdir}"]
    env = os.environ | {"XLA_FLAGS": ONE_DEVICE}
    with subprocess.Popen(line, cwd=HERE.parents[1], env=env, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    return read_metrics(str(workdir / "metrics.jsonl"))


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="pasta_jax_fuzz_")


@functools.cache
def uninterrupted() -> pathlib.Path:
    workdir = pathlib.Path(_temporary().name, "whole")
    with started(workdir) as process:
        _, said = process.communicate(timeout=LATE)
        assert process.returncode == 0, said[-3000:]
    return workdir


def assert_same(workdir: pathlib.Path, other: pathlib.Path, steps: int = STEPS) -> None:
    ours, theirs = find_checkpoint(workdir), find_checkpoint(other)
    assert [read_metadata(path).step for path in (ours, theirs)] == [steps, steps]
    assert read_metadata(ours).data_index == read_metadata(theirs).data_index
    for item in ("params", "optimizer"):
        a, b = (
            restore_arrays(path, item, saved_shapes(path, item), read_metadata(path))
            for path in (ours, theirs)
        )
        jax.tree.map(np.testing.assert_array_equal, a, b)
    timeless = [
        [{name: value for name, value in line.items() if name != "tokens_per_s"} for line in metrics(path)]
        for path in (workdir, other)
    ]
    assert json.dumps(timeless[0]) == json.dumps(timeless[1]), "metrics.jsonl differs"


TARGET = Target(draw, check, share=2.0, seconds=600.0, cases=0)
