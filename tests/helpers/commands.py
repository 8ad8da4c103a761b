"""The package's commands as a person runs them: `python -m MODULE ARGUMENTS`, each in a process of its own.

Starting Python and importing jax takes longer than most of them. So one process imports what the commands need, and
each command is a fork of it that has parsed no flag and opened no device. What a start itself does (its imports,
the end of Python) only a real one shows: `real=True`.
"""

from __future__ import annotations

import multiprocessing
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from typing import Any

from pasta_jax.memory import TUNABLES
from tests.helpers import ONE_DEVICE

ROOT = pathlib.Path(__file__).parents[2]

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [__name__, "pasta_jax.preference.rounds", "pasta_jax.evaluate.compare", "grain", "tests.helpers.warm"]
)


def python(
    *words: str,
    cwd: pathlib.Path = ROOT,
    env: Mapping[str, str | None] = {},
    seconds: float = 300,
    real: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Runs `-m MODULE ...` or `-c CODE ...` as `python` would, on one device.

    Args:
      words: all that follows `python`.
      cwd: where it runs.
      env: what else its environment has; with None, what it lacks. Settings of jax have been read before.
      seconds: it may take, or it is killed.
      real: start Python.
    """
    settings = {**os.environ, "XLA_FLAGS": ONE_DEVICE, "PYTHONPATH": str(ROOT), **env}
    left = {name: value for name, value in settings.items() if value is not None}
    if real:
        options: dict[str, Any] = dict(cwd=cwd, env=left, timeout=seconds)
        return subprocess.run(
            [sys.executable, *words], **options, capture_output=True, text=True, check=False
        )
    with tempfile.TemporaryDirectory() as folder:
        out, err = (pathlib.Path(folder, name) for name in ("out", "err"))
        process = FORKS.Process(target=_run, args=(words, str(cwd), left, str(out), str(err)))
        process.start()
        process.join(seconds)
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired(words, seconds)
        assert process.exitcode is not None
        return subprocess.CompletedProcess(words, process.exitcode, _read(out), _read(err))


def _read(file: pathlib.Path) -> str:
    return file.read_text(encoding="utf-8")


def _run(words: tuple[str, ...], cwd: str, env: Mapping[str, str], out: str, err: str) -> None:
    for file, number in ((out, 1), (err, 2)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(env)
    os.environ.setdefault(TUNABLES, "")  # else `train` would start this process anew, as what it is not
    os.chdir(cwd)
    kind, what, *arguments = words
    sys.argv = [kind, *arguments]
    if kind == "-c":
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    else:
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")  # it is imported already
        runpy.run_module(what, run_name="__main__", alter_sys=True)
