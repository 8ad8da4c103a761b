"""The package's commands as a person runs them: `python -m MODULE ARGUMENTS`, each in a process of its own.

Starting Python and importing jax takes longer than most of them. So one process imports what the commands need, and
each command is a fork of it that has parsed no flag and opened no device. What a start itself does (its imports,
the end of Python) only a real one shows: `real=True`.
"""

from __future__ import annotations

import atexit
import codecs
import contextlib
import fcntl
import multiprocessing.util
import os
import pathlib
import re
import runpy
import select
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

from pasta_jax.decoding import cpu
from pasta_jax.memory import TUNABLES
from tests.helpers import FULL, ONE_DEVICE
from tests.helpers.widths import few_widths

ROOT = pathlib.Path(__file__).parents[2]

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [__name__, "pasta_jax.preference.rounds", "pasta_jax.evaluate.compare", "grain", "tests.helpers.warm"]
)


def python(
    *words: str,
    cwd: pathlib.Path = ROOT,
    env: Mapping[str, str | None] = {},
    stdin: str = "",
    seconds: float = 300,
    real: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Runs `-m MODULE ...` or `-c CODE ...` as `python` would, on one device.

    Args:
      words: all that follows `python`.
      cwd: where it runs.
      env: what else its environment has; with None, what it lacks. Settings of jax have been read before.
      stdin: what comes on it.
      seconds: it may take, or it is killed.
      real: start Python.
    """
    left = _settings(env)
    if real:
        options: dict[str, Any] = dict(cwd=cwd, env=left, input=stdin, timeout=seconds)
        return subprocess.run(
            [sys.executable, *words], **options, capture_output=True, text=True, check=False
        )
    with tempfile.TemporaryDirectory() as folder:
        files = given, out, err = [pathlib.Path(folder, name) for name in ("in", "out", "err")]
        given.write_text(stdin, encoding="utf-8")
        status = started(words, files, cwd, left).wait(seconds)
        return subprocess.CompletedProcess(words, status, _read(out), _read(err))


class Fork:
    """A command that was started; of `subprocess.Popen`, what tests use."""

    def __init__(self, process: BaseProcess):
        self._process, self.pid = process, process.pid

    def poll(self) -> int | None:
        """Its status, None as long as it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Its status. If it takes longer, in seconds, it is killed, and `subprocess.TimeoutExpired` raised."""
        self._process.join(timeout)
        if (status := self.poll()) is None:
            self.kill()
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0)
        return status

    def send_signal(self, number: int) -> None:
        if self.pid is not None and self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


def started(
    words: tuple[str, ...], files: Sequence[pathlib.Path | str], cwd: pathlib.Path, env: Mapping[str, str]
) -> Fork:
    """Starts `python WORDS`. Files are its stdin, stdout and stderr; `env` is all of its environment."""
    process = FORKS.Process(target=_run, args=(words, str(cwd), dict(env), [*map(str, files)]))
    process.start()
    return Fork(process)


@contextlib.contextmanager
def on_terminal(*words: str, env: Mapping[str, str | None] = {}) -> Iterator[Typing]:
    """The same command on a terminal of 60 columns, at which somebody types."""
    ours, its = os.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("4H", 24, 60, 0, 0))
    settings = _settings({"TERM": "xterm", "INPUTRC": os.devnull, **env})
    fork = started(words, [os.ttyname(its)] * 3, ROOT, settings)
    try:
        yield Typing(ours, fork)
    finally:
        fork.kill()
        fork.wait()
        os.close(ours)
        os.close(its)


class Typing:
    """Who types at a terminal and reads what it shows.

    Attributes:
      shown: all that was written to it.
    """

    def __init__(self, terminal: int, fork: Fork):
        self._terminal, self._fork, self.shown = terminal, fork, ""
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def until(self, pattern: str, seconds: float = 120) -> re.Match[str]:
        """Finds a pattern in what is shown from now on, as soon as it is there."""
        start, end = len(self.shown), time.monotonic() + seconds
        while (found := re.search(pattern, self.shown[start:])) is None:
            assert self._read(end - time.monotonic()), self.shown[start:]
        return found

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def status(self, seconds: float = 60) -> int | None:
        """Of the command, None if it goes on; what it shows meanwhile is read."""
        end = time.monotonic() + seconds
        while self._fork.poll() is None and time.monotonic() < end:
            self._read(0.1)
        while self._read(0):
            pass
        return self._fork.poll()

    def _read(self, seconds: float) -> bool:
        """Waits for something that is shown, and reads it."""
        is_there = bool(select.select([self._terminal], [], [], seconds)[0])
        if is_there:
            self.shown += self._decoder.decode(os.read(self._terminal, 4096))
        return is_there


def _settings(env: Mapping[str, str | None]) -> dict[str, str]:
    settings = {**os.environ, "XLA_FLAGS": ONE_DEVICE, "PYTHONPATH": str(ROOT), **env}
    return {name: value for name, value in settings.items() if value is not None}


def _read(file: pathlib.Path) -> str:
    return file.read_text(encoding="utf-8")


def _run(words: tuple[str, ...], cwd: str, env: Mapping[str, str], files: list[str]) -> None:
    os.setsid()  # a terminal that it opens is its own: Ctrl-C comes to it
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # what a shell starts in the background ignores it
    for number, file in enumerate(files):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), number)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    os.environ.clear()
    os.environ.update(env)
    os.environ.setdefault(TUNABLES, "")  # else `train` would start this process anew, as what it is not
    os.chdir(cwd)
    if not FULL:
        cpu.widths_for = few_widths
    # What Python runs at its end, and a fork does not.
    multiprocessing.util.Finalize(None, atexit._run_exitfuncs, exitpriority=0)
    kind, what, *arguments = words
    sys.argv = [kind, *arguments]
    if kind == "-c":
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    else:
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")  # it is imported already
        runpy.run_module(what, run_name="__main__", alter_sys=True)
