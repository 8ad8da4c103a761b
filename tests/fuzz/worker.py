"""One of the processes that check inputs: not in `__main__`, which a new process cannot import."""

from __future__ import annotations

import faulthandler
import logging
import time
from typing import Any

from tests.fuzz.runner import attempt, minimised, nth, target

HANGS = 5
"""Times as long as it may, and an input that does not let Python stop it ends the process."""

MINIMISING = 20.0
"""Seconds for making an input smaller; the last try may take as long as any input."""


def work(
    names: list[str], seed: int, first: list[int], every: int, until: float, shared: Any, found: Any
) -> None:
    """Checks the inputs first, first + every, ... of each target, each in its share of the time.

    Args:
      names: of the targets.
      seed: of the run.
      first, every: which inputs; `first` for each target.
      until: seconds of the machine's clock.
      shared: for each target, inputs done; then index and number of the one being checked.
      found: a queue of findings.
    """
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
