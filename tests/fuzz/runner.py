"""Targets, the check of one input within bounds, and what a finding is."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import json
import pathlib
import random
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

HERE = pathlib.Path(__file__).parent
PACKAGE = HERE.parents[1] / "pasta_jax"
CORPUS = HERE / "corpus"

NAMES = (
    *(
        "texts",
        "replies",
        "bodies",
        "tokenizers",
        "records",
        "prepared",
        "folders",
        "gguf",
        "checkpoints",
        "options",
        "overrides",
        "decoding",
    ),
    *("verbs", "kills"),
)
"""A module of this package each, which is imported when it is needed."""

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Target:
    """Something that takes input from outside.

    Attributes:
      draw: an input, as plain data.
      check: returns if the input is treated as it should be, and raises otherwise.
      share: of the time, beside the other targets.
      seconds, memory: what an input may take; memory in bytes, beyond what the process has.
      cases: random inputs in the ordinary tests.
    """

    draw: Callable[[random.Random], Any]
    check: Callable[[Any], None]
    share: float = 1.0
    seconds: float = 20.0
    memory: int = 2 * GIB
    cases: int = 40


def target(name: str) -> Target:
    """The target of a module of this package."""
    return importlib.import_module(f"tests.fuzz.{name}").TARGET


def draw(name: str, seed: int, number: int) -> Any:
    """One of a target's inputs: the same for the same seed and number, whatever was drawn before."""
    return target(name).draw(random.Random(f"{seed} {name} {number}"))


def nth(name: str, seed: int, number: int) -> Any:
    """An input of a run: those of the corpus come first."""
    kept = corpus(name)
    return kept[number].input if number < len(kept) else draw(name, seed, number)


@dataclasses.dataclass(frozen=True)
class Entry:
    """An input of the corpus, and what it is."""

    what: str
    input: Any


@functools.cache
def corpus(name: str) -> list[Entry]:
    """The kept inputs of a target: a line of JSON each."""
    file = CORPUS / f"{name}.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [Entry(**json.loads(line)) for line in lines]


# ----------------------------------------------------------------------------------------------- one input


class TooSlow(BaseException):
    """An input took longer than it may. No Exception: nobody may take it for a fault of a file."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """A check that failed.

    Attributes:
      fault: the exception's class and the first line of its message.
      place: the innermost line of the package that it came through, or of the check.
      trace: the traceback.
    """

    fault: str
    place: str
    trace: str

    @property
    def kind(self) -> tuple[str, str]:
        """What is the same for inputs that show the same fault."""
        return self.fault.partition(":")[0], self.place


def attempt(aim: Target, case: Any) -> Finding | None:
    """Checks an input, within the target's bounds."""
    try:
        with bounded(aim.seconds, aim.memory):
            aim.check(case)
    except (Exception, TooSlow, SystemExit) as error:
        return _finding(error)
    return None


def _finding(error: BaseException) -> Finding:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if pathlib.Path(frame.filename).is_relative_to(PACKAGE)] or frames
    place = f"{pathlib.Path(ours[-1].filename).name}:{ours[-1].lineno} {ours[-1].name}" if ours else "nowhere"
    fault = f"{type(error).__name__}: {error}".split("\n")[0]
    return Finding(fault[:500], place, "".join(traceback.format_exception(error))[-20_000:])


@contextlib.contextmanager
def bounded(seconds: float, memory: int) -> Iterator[None]:
    """Raises TooSlow after these seconds, and MemoryError beyond these bytes (where the system can: Linux)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: int | FrameType | None) -> None:
        raise TooSlow(f"not done after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with _limited(memory):
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _limited(memory: int) -> Iterator[None]:
    statm = pathlib.Path("/proc/self/statm")
    if not statm.exists():
        yield
        return
    import resource

    used = int(statm.read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    most = used + memory
    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]) if before[0] < 0 or most < before[0] else before)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


# ------------------------------------------------------------------------------------------------ messages

LONGEST = 10_000


def check_message(error: BaseException | str) -> None:
    """What a person reads about a mistake: some words in one line, or a line and a list below it."""
    first, *listed = str(error).split("\n")
    assert first.strip(), "it says nothing"
    assert all(line.startswith("  ") for line in listed), f"not one line: {str(error)[:300]!r}"
    assert len(str(error)) <= LONGEST, f"{len(str(error))} characters: {first[:200]}"
    assert "Traceback" not in first and "MemoryError" not in first and "RecursionError" not in first, first[
        :300
    ]


def outcome(
    errors: type[Exception] | tuple[type[Exception], ...],
    call: Callable[..., Any],
    *args: Any,
    **options: Any,
) -> tuple[Any, Exception | None]:
    """What a call returns, or the error with which it may refuse its input; its message is checked."""
    try:
        return call(*args, **options), None
    except errors as error:
        check_message(error)
        return None, error


# ------------------------------------------------------------------------------------------- smaller inputs


def minimised(aim: Target, case: Any, finding: Finding, seconds: float) -> Any:
    """The input without what it does not need to show the same finding, as far as the time goes."""
    until = time.monotonic() + seconds
    tried = True
    while tried and time.monotonic() < until:
        tried = False
        for smaller in _smaller(case):
            if time.monotonic() > until:
                break
            found = attempt(aim, smaller)
            if found is not None and found.kind == finding.kind:
                case, tried = smaller, True
                break
    return case


def _smaller(case: Any) -> Iterator[Any]:
    """Inputs with less in them, those that lack most first."""
    match case:
        case {"$repeat": [part, int(count)]} if count > 1:
            yield from ({"$repeat": [part, count // n]} for n in (10, 2))
        case dict():
            for key, inner in case.items():
                yield {name: other for name, other in case.items() if name != key}
                yield from ({**case, key: less} for less in _smaller(inner))
        case str():
            yield from ("".join(parts) for parts in _shorter([*case]))
        case list():
            yield from _shorter(case)
            for i, inner in enumerate(case):
                yield from ([*case[:i], less, *case[i + 1 :]] for less in _smaller(inner))


def _shorter(parts: list[Any]) -> Iterator[list[Any]]:
    """The list without its halves, quarters, ..., single parts."""
    size = (len(parts) + 1) // 2
    while size:
        yield from (parts[:i] + parts[i + size :] for i in range(0, len(parts), size))
        size //= 2
