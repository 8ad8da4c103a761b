"""Tries random and hostile inputs for a while, and says in a line what it tried.

    python -m tests.fuzz [--minutes=30] [--seed=N] [--only=NAME,...] [--processes=2]
    python -m tests.fuzz --input=fuzz-findings/NAME-SEED-NUMBER.json    # one finding again

Status 1 if anything was found. Each finding is a file in fuzz-findings/: target, seed, number, traceback and the
input, made smaller. A seed and a number make the same input in any run. Ctrl-C or SIGTERM ends a run early; it says
what it tried until then.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import multiprocessing
import pathlib
import queue
import random
import sys
import time
from typing import Any

from tests.fuzz.runner import NAMES, Finding, attempt, nth, target
from tests.fuzz.worker import GRACE, stoppable, work

FINDINGS = pathlib.Path("fuzz-findings")

OVERTIME = 600.0
"""Seconds after the end at which processes are killed; what they were at is a finding. A verb may take as long."""


def options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, help="by default a fresh one, which is printed")
    parser.add_argument("--only", default=",".join(NAMES), help=f"some of {', '.join(NAMES)}")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--input", type=pathlib.Path, help="the file of a finding: checks its input alone")
    given = parser.parse_args(arguments)
    given.only = given.only.split(",")
    if unknown := set(given.only) - set(NAMES):
        parser.error(f"--only: {', '.join(sorted(unknown))} unknown. Use some of {', '.join(NAMES)}.")
    return given


# --------------------------------------------------------------------------------------------------- a run


class Run:
    """Processes at work, what they have done and found."""

    def __init__(self, given: argparse.Namespace, seed: int):
        self.given, self.seed, self.start = given, seed, time.time()
        self.until = self.start + 60 * given.minutes
        self.context = multiprocessing.get_context("spawn")
        self.found = self.context.Queue()
        self.counts: collections.Counter[str] = collections.Counter()
        self.kinds: collections.Counter[tuple[str, str, str]] = collections.Counter()
        self.workers: list[tuple[Any, Any, list[int]]] = []

    def _started(self, first: list[int]) -> tuple[Any, Any, list[int]]:
        shared = self.context.Array("q", len(self.given.only) + 2, lock=False)
        arguments = self.given.only, self.seed, first, self.given.processes, self.until, shared, self.found
        process = self.context.Process(target=work, args=arguments, daemon=True)
        process.start()
        return process, shared, first

    def watch(self) -> None:
        """Until the time is over, and all processes have ended; one that dies is a finding and has a successor."""
        names, every = self.given.only, self.given.processes
        self.workers = [self._started([k] * len(names)) for k in range(every)]
        while self.workers:
            self._take()
            if time.time() > self.until + OVERTIME:
                for process, _, _ in self.workers:
                    process.kill()
            ended = [worker for worker in self.workers if worker[0].exitcode is not None]
            self.workers = [worker for worker in self.workers if worker not in ended]
            for process, shared, first in ended:
                self._count(shared)
                if not process.exitcode:
                    continue
                index, number = shared[-2:]
                fault = f"Died: the process ended with status {process.exitcode}"
                self.keep(names[index], number, Finding(fault, "", ""), nth(names[index], self.seed, number))
                shared[index] += 1
                if time.time() < self.until:
                    self.workers.append(self._started([k + every * n for k, n in zip(first, shared)]))
        self._take()

    def stop(self) -> None:
        """Ends the processes early, and takes what they have done and found."""
        for process, _, _ in self.workers:
            process.terminate()
        until = time.time() + GRACE
        while time.time() < until and any(process.exitcode is None for process, _, _ in self.workers):
            self._take()
        self._take()
        for process, shared, _ in self.workers:
            process.kill()
            self._count(shared)

    def _count(self, shared: Any) -> None:
        self.counts.update(dict(zip(self.given.only, shared)))

    def _take(self) -> None:
        with contextlib.suppress(queue.Empty):
            self.keep(*self.found.get(timeout=0.5))

    def keep(self, name: str, number: int, finding: Finding, case: Any) -> None:
        """Writes a finding, unless one of its kind was written, and says where it is."""
        self.kinds[kind := (name, *finding.kind)] += 1
        if self.kinds[kind] > 1:
            return
        FINDINGS.mkdir(exist_ok=True)
        file = FINDINGS / f"{name}-{self.seed}-{number}.json"
        kept = {
            "target": name,
            "seed": self.seed,
            "number": number,
            "fault": finding.fault,
            "place": finding.place,
            "input": case,
            "trace": finding.trace.splitlines(),
        }
        file.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {finding.fault[:200]!r} at {finding.place}; see {file}", flush=True)

    def summary(self) -> str:
        minutes = (time.time() - self.start) / 60
        found = f"{len(self.kinds)} finding{'s' * (len(self.kinds) != 1)}"
        each = ", ".join(f"{name} {self.counts[name]:,}" for name in self.given.only)
        return (
            f"fuzz: {self.counts.total():,} inputs in {minutes:.0f} min ({each}), {found}, seed {self.seed}"
        )


def again(file: pathlib.Path) -> int:
    """Checks the input of a finding."""
    from tests import conftest  # noqa: F401

    kept = json.loads(file.read_text(encoding="utf-8"))
    finding = attempt(target(kept["target"]), kept["input"])
    print(finding.trace if finding else f"{file}: nothing is wrong any more.")
    return int(finding is not None)


def main() -> int:
    given = options(sys.argv[1:])
    if given.input:
        return again(given.input)
    seed = random.SystemRandom().randrange(2**31) if given.seed is None else given.seed
    print(f"fuzz: {', '.join(given.only)} for {given.minutes:g} min, seed {seed}", flush=True)
    run = Run(given, seed)
    stoppable()
    try:
        run.watch()
    except KeyboardInterrupt:
        run.stop()
    print(run.summary())
    return int(bool(run.kinds))


if __name__ == "__main__":
    sys.exit(main())
