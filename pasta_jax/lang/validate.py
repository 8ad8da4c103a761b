"""Everything that is wrong or doubtful in an annotation, for the one who wrote it or generated it.

>>> text = '<promise topic="the longest river anywhere" tokens=1 /><async>Nile</async><sync />'
>>> for problem in validate(text):
...     print(problem)
line 1, column 1: warning: the topic has more than 3 words. Shorten it.
line 1, column 1: warning: the block has fewer than 5 words. Write it as ordinary text.
line 1, column 75: warning: '<sync />' is not the canonical spelling. Write <sync/>.
line 1, column 75: warning: <sync/> with nothing after it. Remove it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Literal, TypeAlias

from pasta_jax.lang import tags
from pasta_jax.lang.parse import Event, Fault, ParseError, Reader, parse, position

Severity: TypeAlias = Literal["error", "warning"]

MAX_TOPIC_WORDS = 3
MIN_BLOCK_WORDS = 5
"""Both limits are rules of the paper's annotation prompt (appendix A)."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something wrong ("error": `parse` refuses the text) or doubtful ("warning") at a place."""

    line: int
    column: int
    severity: Severity
    problem: str
    advice: str

    def __str__(self) -> str:
        return f"line {self.line}, column {self.column}: {self.severity}: {self.problem}. {self.advice}."


def validate(text: str, *, max_depth: int = 1) -> list[Problem]:
    """Every problem of an annotation, in the order of the text; never raises.

    There is an error among them exactly when `parse` raises. Near misses of tags are errors too if the text
    does not parse; if it does, they were read as ordinary text and are warnings. What is doubtful is judged
    on the text as lenient reading repairs it.
    """
    faults: list[Fault] = []
    events = Reader(text, faults.append, lenient=True, max_depth=max_depth).read()
    severity: Severity = "warning" if _parses(text, max_depth) else "error"

    def at_offset(at: int, severity: Severity, problem: str, advice: str) -> Problem:
        return Problem(*position(text, at), severity, problem, advice)

    found = [at_offset(fault.at, severity, fault.problem, fault.advice) for fault in faults]
    found += [at_offset(at, "warning", doubt, advice) for at, doubt, advice in _doubts(events)]
    return sorted(found, key=lambda problem: (problem.line, problem.column))


@dataclasses.dataclass
class _Thread:
    """What has been read of one thread."""

    promise: Event | None = None
    text: list[str] = dataclasses.field(default_factory=list)
    open_branches: int = 0
    last_sync: Event | None = None


def _doubts(events: Iterable[Event]) -> Iterator[tuple[int, str, str]]:
    threads = [_Thread()]
    for event in events:
        thread = threads[-1]
        if event.kind == "text":
            thread.text.append(event.text)
            if event.text.strip():
                thread.last_sync = None
        elif event.kind == "sync":
            if not thread.open_branches:
                yield event.at, f"{tags.SYNC} with no branch open in this thread", "Remove it"
            thread.open_branches, thread.last_sync = 0, event
        elif event.kind == "open":
            thread.open_branches, thread.last_sync = thread.open_branches + 1, None
            threads.append(_Thread(promise=event))
        elif event.kind == "close":
            yield from _thread_doubts(threads.pop())
            threads[-1].text += thread.text
    yield from _thread_doubts(threads[0])


def _thread_doubts(thread: _Thread) -> Iterator[tuple[int, str, str]]:
    if thread.last_sync:
        yield thread.last_sync.at, f"{tags.SYNC} with nothing after it", "Remove it"
    if thread.promise is None:
        return
    at, topic_words = thread.promise.at, len(thread.promise.text.split())
    if topic_words > MAX_TOPIC_WORDS:
        yield at, f"the topic has more than {MAX_TOPIC_WORDS} words", "Shorten it"
    if not topic_words:
        yield at, "the topic is blank", "Say what the block is about"
    if len("".join(thread.text).split()) < MIN_BLOCK_WORDS:
        yield at, f"the block has fewer than {MIN_BLOCK_WORDS} words", "Write it as ordinary text"


def _parses(text: str, max_depth: int) -> bool:
    try:
        parse(text, max_depth=max_depth)
    except ParseError:
        return False
    return True
