"""One of the processes that check inputs: not in `__main__`, which a new process cannot import."""

from __future__ import annotations

import faulthandler
import functools
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from pasta_jax.verbs import set_unraisable_hook
from tests.fuzz.runner import attempt, minimised, nth, target

HANGS = 5
"""Times as long as it may, and an input that does not let Python stop it ends the process."""

MINIMISING = 20.0
"""Seconds for making an input smaller; the last try may take as long as any input."""

GRACE = 5.0
"""Seconds that a process has to end the commands that it started, and to remove what it wrote."""


def stoppable() -> None:
    """From now on the first SIGTERM or Ctrl-C raises KeyboardInterrupt; others have no effect."""
    both = signal.SIGTERM, signal.SIGINT

    def stop(*_: int | FrameType | None) -> None:
        for number in both:
            signal.signal(number, lambda *_: None)
        raise KeyboardInterrupt

    for number in both:
        signal.signal(number, stop)


def _end_if_it_was_lost(report: Callable[[Any], Any], fault: Any) -> None:
    """An exception that is raised while Python frees objects stops nothing."""
    if isinstance(fault.exc_value, KeyboardInterrupt):
        os._exit(1)
    report(fault)


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(1)


def work(
    names: list[str], seed: int, first: list[int], every: int, until: float, shared: Any, found: Any
) -> None:
    """Checks the inputs first, first + every, ... of each target, each in its share of the time.

    It ends with the process that started it, whatever ended that.

    Args:
      names: of the targets.
      seed: of the run.
      first, every: which inputs; `first` for each target.
      until: seconds of the machine's clock.
      shared: for each target, inputs done; then index and number of the one being checked.
      found: a queue of findings.
    """
    stoppable()
    set_unraisable_hook()
    sys.unraisablehook = functools.partial(_end_if_it_was_lost, sys.unraisablehook)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    try:
        _work(names, seed, first, every, until, shared, found)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGTERM)


def _work(
    names: list[str], seed: int, first: list[int], every: int, until: float, shared: Any, found: Any
) -> None:
    from tests import conftest  # noqa: F401  (the tests' environment: before jax is loaded)

    logging.disable()

    spent, number = dict.fromkeys(names, 0.0), dict(zip(names, first))
    seen = set[tuple[str, str, str]]()
    while (start := time.time()) < until:
        name = min(names, key=lambda name: spent[name] / target(name).share)
        aim, index = target(name), names.index(name)
        shared[-2], shared[-1] = index, number[name]
        case = nth(name, seed, number[name])
        faulthandler.dump_traceback_later(HANGS * aim.seconds, exit=True)
        finding = attempt(aim, case)
        if finding is not None and (name, *finding.kind) not in seen:
            seen.add((name, *finding.kind))
            faulthandler.dump_traceback_later(MINIMISING + HANGS * aim.seconds, exit=True)
            found.put((name, number[name], finding, minimised(aim, case, finding, MINIMISING)))
        faulthandler.cancel_dump_traceback_later()
        shared[index] += 1
        number[name] += every
        spent[name] += time.time() - start
