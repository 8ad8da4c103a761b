"""A run that is killed at random moments, again and again, ends as one that nobody disturbed."""

import pathlib
import random
import shutil
import signal
import time

import pytest

from pasta_jax.checkpoints.about import checkpoints_in, read_metadata
from pasta_jax.checkpoints.reading import restore_arrays, saved_shapes
from pasta_jax.files import LOCK
from tests.fuzz.kills import LATE, assert_same
from tests.helpers import FULL, ONE_DEVICE
from tests.helpers.started import fork

pytestmark = pytest.mark.skipif(not FULL, reason="one of .ci/run's full counts; make fuzz kills runs too")

KILLS = 20
FILES = ("round.json", "samples.jsonl", "pairs.jsonl")
"""Of a round, beside its checkpoint and its metrics."""
ARGUMENTS = (
    *("--config=configs/tiny.py:both", "--config.init_from=", "--config.preference.baseline="),
    # It is saving all the time.
    *("--config.steps=12", "--config.checkpoint.every_steps=1", "--config.log.every=4"),
    *("--config.model.num_layers=1", "--config.model.model_dim=16", "--config.model.num_heads=2"),
    *("--config.model.num_kv_heads=1", "--config.model.head_dim=8", "--config.model.mlp_dim=16"),
    *("--config.data.rows=2", "--config.data.length=256", "--config.optimizer.warmup_steps=2"),
    *("--config.preference.rounds=1", "--config.preference.prompts_per_round=4"),
    *("--config.preference.samples=4", "--config.preference.sampling_rows=8"),
    *("--config.preference.sampling_lanes=2", "--config.preference.epochs_per_round=4"),
)


def ran(workdir: pathlib.Path, seconds: float | None = None) -> float | None:
    """Runs the command in both stages; kills it so many seconds after it began its work.

    Returns the seconds that the work took, or None if it was killed.
    """
    log = workdir.with_name("log")
    line = ["-m", "pasta_jax.train", *ARGUMENTS, f"--workdir={workdir}"]
    process = fork(line, log, XLA_FLAGS=ONE_DEVICE)
    try:
        lock, until = workdir / LOCK, time.monotonic() + LATE
        while not (lock.exists() and lock.read_text().startswith(f"{process.pid} ")):
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.01)
        began = time.monotonic()
        if seconds is not None:
            while process.poll() is None and time.monotonic() < began + seconds:
                time.sleep(0.01)
            process.kill()
        status = process.wait(LATE)
        if status == -signal.SIGKILL:
            return None
        assert status == 0, log.read_text()[-3000:]
        return time.monotonic() - began
    finally:
        process.kill()


def check_whole(workdir: pathlib.Path) -> int:
    """Every checkpoint can be read, to the last bit. Returns their number."""
    found = [each for folder in workdir.rglob("checkpoints") for each in checkpoints_in(folder)]
    for path in found:
        for item in ("params", "optimizer"):
            restore_arrays(path, item, saved_shapes(path, item), read_metadata(path))
    return len(found)


def test_kills_at_random_moments(seed: int, tmp_path: pathlib.Path) -> None:
    rng, workdir, whole = random.Random(seed), tmp_path / "killed", tmp_path / "whole"
    took = ran(whole)
    assert took is not None
    lasts = min(took, 8.0)  # the others find its programs compiled
    kills, ends = 0, 0
    while kills < KILLS or ends == 0:
        seconds = rng.uniform(0, 0.8 * lasts) if kills < KILLS else None
        if ran(workdir, seconds) is None:
            kills += 1
            print(f"killed after {seconds:.2f} s, with {check_whole(workdir)} checkpoints")
            continue
        ends += 1
        assert_same(workdir / "sft", whole / "sft", steps=12)
        rounds = [path / "preference" / "round-1" for path in (workdir, whole)]
        assert_same(rounds[0], rounds[1], steps=16)
        for name in FILES:
            ours, theirs = ((path / name).read_text() for path in rounds)
            assert ours.replace(str(workdir), "W") == theirs.replace(str(whole), "W"), name
        if kills < KILLS:
            shutil.rmtree(workdir)  # it was done before it could be killed again
    print(f"seed {seed}: {kills} kills, {ends} runs that ended, each as the undisturbed one")
