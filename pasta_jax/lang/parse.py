r"""Annotated text as a Program: strictly, or repairing what can be repaired.

>>> parse('Hi. <promise topic="rivers" tokens=2 /><async>The Nile.</async><sync/>').nodes
(Text(text='Hi. '), Promise(topic='rivers', tokens=2, block=(Text(text='The Nile.'),)), Sync())
>>> parse("one\ntwo</async>")
Traceback (most recent call last):
    ...
pasta_jax.lang.parse.ParseError: line 2, column 4: </async> without <async>. Remove it, or write its <async>.

A tag that is meant as ordinary text has a backslash after its `<`, which is removed here (see `render`):

>>> parse(r"Write <\sync/> to wait.").nodes
(Text(text='Write <sync/> to wait.'),)

Only the exact spelling is a tag: strictly read, `<sync />` is ordinary text (`validate` warns of it), unless
it claims to be a promise by starting with `<promise topic="` or by standing right before `<async>`. Lenient
reading takes every such near miss for the tag that was meant, and lists what it did:

>>> program, repairs = parse_lenient("<promise tokens='2' topic='rivers'/><async>The Nile.")
>>> program.nodes
(Promise(topic='rivers', tokens=2, block=(Text(text='The Nile.'),)),)
>>> for repair in repairs:
...     print(repair)
line 1, column 1: not the canonical spelling. Read as <promise topic="rivers" tokens=2 />.
line 1, column 37: <async> is never closed. Closed it at the end.

Reading has two steps. `Reader` turns text into events that are balanced whatever the text was, and reports
every fault it met; `build` turns events into a Program. `validate` uses the events too.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple, TypeAlias

from pasta_jax.lang import tags
from pasta_jax.lang.assemble import text_of
from pasta_jax.lang.program import MAX_TOKENS, MIN_TOKENS, Node, Program, Promise, Sync, Text
from pasta_jax.lang.render import BODY, joined, promise_problem

TOKENS_PER_WORD = 1.3
"""English text under the usual vocabularies; used only where a promise does not say its length."""


class ParseError(ValueError):
    """The text is not a program. Lines and columns count from 1."""

    def __init__(self, line: int, column: int, problem: str, advice: str):
        # All four go up, so that the error survives the pickling between processes.
        super().__init__(line, column, problem, advice)
        self.line, self.column, self.problem, self.advice = line, column, problem, advice

    def __str__(self) -> str:
        return f"line {self.line}, column {self.column}: {self.problem}. {self.advice}."


@dataclasses.dataclass(frozen=True)
class Repair:
    """What was wrong at a place, and what was done about it."""

    line: int
    column: int
    problem: str
    repair: str

    def __str__(self) -> str:
        return f"line {self.line}, column {self.column}: {self.problem}. {self.repair}."


class Fault(NamedTuple):
    """Something wrong at offset `at`: what a person should do, and what lenient reading does."""

    at: int
    problem: str
    advice: str
    repair: str


Kind: TypeAlias = Literal["text", "open", "close", "sync"]


class Event(NamedTuple):
    """A step through a program. `text` is the topic of an "open", whose `tokens` is None if not known."""

    at: int
    kind: Kind
    text: str = ""
    tokens: int | None = None


def parse(text: str, *, lenient: bool = False, max_depth: int | None = None) -> Program:
    """Reads annotated text.

    Args:
      text: the annotated text.
      lenient: repair instead of raising, as `parse_lenient` does.
      max_depth: how deep promises may nest; 1 is the paper's language, None means any depth.

    Raises:
      ParseError: the text is not a program, and `lenient` is False.
    """
    if lenient:
        return parse_lenient(text, max_depth=max_depth)[0]

    def fail(fault: Fault) -> None:
        raise ParseError(*position(text, fault.at), fault.problem, fault.advice)

    return build(Reader(text, fail, lenient=False, max_depth=max_depth).read())


def parse_lenient(text: str, *, max_depth: int | None = None) -> tuple[Program, list[Repair]]:
    """Reads any text at all, and lists what had to be repaired, in the order in which it was noticed."""
    faults: list[Fault] = []
    program = build(Reader(text, faults.append, lenient=True, max_depth=max_depth).read())
    return program, [Repair(*position(text, fault.at), fault.problem, fault.repair) for fault in faults]


def position(text: str, at: int) -> tuple[int, int]:
    r"""Line and column of an offset.

    >>> position("ab\ncd", 4)
    (2, 2)
    """
    return text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)


def build(events: Iterable[Event]) -> Program:
    """The program that balanced events walk through."""
    levels: list[list[Node]] = [[]]
    opened: list[Event] = []
    for event in events:
        match event.kind:
            case "text":
                levels[-1].append(Text(event.text))
            case "sync":
                levels[-1].append(Sync())
            case "open":
                opened.append(event)
                levels.append([])
            case "close":
                block, start = joined(levels.pop()), opened.pop()
                tokens = _estimate(block) if start.tokens is None else start.tokens
                levels[-1].append(Promise(start.text, tokens, block))
    return Program(joined(levels[0]))


# One row per kind of tag, the first that fits wins. A near miss holds no second `<`, so that whatever is done
# about it, no true tag is swallowed.
_EXACT_PROMISE = (
    rf"{re.escape(tags.PROMISE_OPEN)}(?P<topic>[^{re.escape(tags.TOPIC_FORBIDS)}]+)"
    rf"{re.escape(tags.PROMISE_TOKENS)}(?P<tokens>[1-9][0-9]?){re.escape(tags.PROMISE_CLOSE)}"
)
_TABLE = {
    "promise": _EXACT_PROMISE,
    "open": re.escape(tags.ASYNC_OPEN),
    "close": re.escape(tags.ASYNC_CLOSE),
    "sync": re.escape(tags.SYNC),
    "literal": rf"<\\+{BODY}",
    "near_promise": r"""<\s*promise(?=[\s/])(?:"[^"<]*"|'[^'<]*'|[^<>"'])*>""",
    "near_open": r"<\s*async\s*>",
    "near_close": r"<\s*/\s*async\s*>",
    "near_sync": r"<\s*sync\s*/?\s*>",
    "broken_promise": re.escape(tags.PROMISE_OPEN),
}
_TAG = re.compile("|".join(f"(?P<{kind}>{pattern})" for kind, pattern in _TABLE.items()))
_BLOCK_AHEAD = re.compile(rf"(?P<gap>\s*)(?P<open>{_TABLE['near_open']})")
_ATTRIBUTE = re.compile(r"""(?<![\w-])([\w-]+)\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s"'/>]+))""")
_INTEGER = re.compile(r"\s*([+-]?)0*([0-9]+)\s*")

_CANONICAL = f"{tags.PROMISE_OPEN}…{tags.PROMISE_TOKENS}N{tags.PROMISE_CLOSE}"
_WRITE_PROMISE = f"Write {_CANONICAL} with N from {MIN_TOKENS} to {MAX_TOKENS}"


Role: TypeAlias = Literal["block", "bare", "deep"]
"""What an `<async>` opens. Only a block keeps its tags; one without a promise, or too deep, is unwrapped."""


class Reader:
    """One pass over a text. A strict reader's `report` raises, so what follows a report is the repair."""

    def __init__(self, text: str, report: Callable[[Fault], None], *, lenient: bool, max_depth: int | None):
        self.text = text
        self.lenient = lenient
        self.max_depth = max_depth
        self._report = report
        self._events: list[Event] = []
        self._opened: list[tuple[int, Role]] = []
        self._roles: collections.Counter[Role] = collections.Counter()

    def read(self) -> list[Event]:
        at = 0
        while tag := _TAG.search(self.text, at):
            self._emit(at, "text", self.text[at : tag.start()])
            at = self._tag(tag)
        self._emit(at, "text", self.text[at:])
        while self._opened:
            problem = f"{tags.ASYNC_OPEN} is never closed"
            advice = f"Write {tags.ASYNC_CLOSE} where its block ends"
            self._fault(self._opened[-1][0], problem, advice, "Closed it at the end")
            self._close(len(self.text))
        return self._events

    def _tag(self, tag: re.Match[str]) -> int:
        """Reads one tag, exact or not; returns where the text goes on."""
        at, kind = tag.start(), tag.lastgroup or ""
        if kind == "literal":
            self._emit(at, "text", "<" + tag[0][2:])
        elif kind == "promise":
            return self._promise(tag, tag["topic"], int(tag["tokens"]))
        elif kind == "near_promise":
            return self._near_promise(tag)
        elif kind == "broken_promise":
            self._fault(at, _broken_problem(self.text, tag.end()), _WRITE_PROMISE, "Kept it as text")
            self._emit(at, "text", tag[0])
        elif kind.startswith("near_") and not self.lenient:
            self._emit(at, "text", tag[0])
        elif kind.endswith("open"):
            self._bare_open(tag)
        elif kind.endswith("close"):
            self._near(tag, tags.ASYNC_CLOSE)
            self._close(at)
        elif kind.endswith("sync"):
            self._near(tag, tags.SYNC)
            self._emit(at, "sync")
        return tag.end()

    def _promise(self, tag: re.Match[str], topic: str, tokens: int | None) -> int:
        """Reads a promise together with the `<async>` that must follow it at once."""
        at = tag.start()
        block = _BLOCK_AHEAD.match(self.text, tag.end())
        if not block:
            advice = f"Write {tags.ASYNC_OPEN}…{tags.ASYNC_CLOSE} right after it"
            self._fault(at, "a promise without its block", advice, "Dropped the promise")
            return tag.end()
        if block["gap"]:
            problem, advice = "space between a promise and its block", "Remove it"
            self._fault(tag.end(), problem, advice, "Moved it before the promise")
            self._emit(at, "text", block["gap"])
        self._near(block, tags.ASYNC_OPEN, group="open")
        if self.max_depth is not None and self._roles["block"] >= self.max_depth:
            problem = f"a promise nested deeper than max_depth={self.max_depth}"
            self._fault(at, problem, "Write the block as ordinary text", "Put its block in place as text")
            self._open(block.start("open"), "deep")
        else:
            self._emit(at, "open", topic, tokens)
            self._open(block.start("open"), "block")
        return block.end()

    def _near_promise(self, tag: re.Match[str]) -> int:
        """Reads what looks like a promise but is not spelled as one."""
        at = tag.start()
        claims = tag[0].startswith(tags.PROMISE_OPEN) or self.text.startswith(tags.ASYNC_OPEN, tag.end())
        if not self.lenient and not claims:
            self._emit(at, "text", tag[0])
            return tag.end()
        problem, topic, tokens = _near_problem(tag[0])
        if not topic:
            self._fault(at, problem, _WRITE_PROMISE, "Kept it as text")
            self._emit(at, "text", tag[0])
            return tag.end()
        if tokens is None:
            repair = "Took its tokens from the length of its block"
        else:
            repair = f"Read as {tags.PROMISE_OPEN}{topic}{tags.PROMISE_TOKENS}{tokens}{tags.PROMISE_CLOSE}"
        self._fault(at, problem, _WRITE_PROMISE, repair)
        return self._promise(tag, topic, tokens)

    def _bare_open(self, tag: re.Match[str]) -> None:
        self._near(tag, tags.ASYNC_OPEN)
        problem = f"{tags.ASYNC_OPEN} without a promise"
        repair = "Made its content part of the text around it"
        self._fault(tag.start(), problem, f"Write {_CANONICAL} right before it", repair)
        self._open(tag.start(), "bare")

    def _open(self, at: int, role: Role) -> None:
        self._opened.append((at, role))
        self._roles[role] += 1

    def _close(self, at: int) -> None:
        if not self._opened:
            problem = f"{tags.ASYNC_CLOSE} without {tags.ASYNC_OPEN}"
            self._fault(at, problem, f"Remove it, or write its {tags.ASYNC_OPEN}", "Dropped it")
            return
        _, role = self._opened.pop()
        self._roles[role] -= 1
        if role == "block":
            self._emit(at, "close")

    def _near(self, tag: re.Match[str], exact: str, group: str | int = 0) -> None:
        """Reports a tag that is not spelled exactly."""
        if tag[group] != exact:
            problem = f"{tag[group]!r} is not the canonical spelling"
            self._fault(tag.start(group), problem, f"Write {exact}", f"Read as {exact}")

    def _fault(self, at: int, problem: str, advice: str, repair: str) -> None:
        self._report(Fault(at, problem, advice, repair))

    def _emit(self, at: int, kind: Kind, text: str = "", tokens: int | None = None) -> None:
        # A block that is put in place as text has no thread of its own, so nothing in it waits.
        if kind == "sync" and self._roles["deep"]:
            return
        self._events.append(Event(at, kind, text, tokens))


def _near_problem(tag: str) -> tuple[str, str, int | None]:
    """What is wrong with a loosely spelled promise, and the topic ("" if none) and tokens to take from it."""
    values: dict[str, str] = {}
    for name, double, single, bare in _ATTRIBUTE.findall(tag):
        values.setdefault(name, double or single or bare)
    if "topic" not in values:
        return "the promise has no topic", "", None
    raw = values["topic"]
    clean = "".join(" " if character in tags.TOPIC_FORBIDS else character for character in raw)
    topic = " ".join(clean.split())
    number = _INTEGER.fullmatch(values.get("tokens", ""))
    if number is None:
        wrong = "tokens is not a whole number" if "tokens" in values else "the promise has no tokens"
        return promise_problem(raw, MIN_TOKENS) or wrong, topic, None
    # Four digits are enough to see that it is too many, and `int` refuses to read thousands.
    tokens = int(number[1] + number[2][:4])
    problem = promise_problem(raw, tokens) or "not the canonical spelling"
    return problem, topic, min(max(tokens, MIN_TOKENS), MAX_TOKENS)


def _broken_problem(text: str, at: int) -> str:
    """Why the tag whose topic begins at `at` is no promise, if it does not even look like a whole tag."""
    end = text.find('"', at)
    if end < 0:
        return "the topic has no closing quote"
    return promise_problem(text[at:end], MIN_TOKENS) or "the promise is not finished"


def _estimate(block: tuple[Node, ...]) -> int:
    """How many tens of tokens a block holds, from its words."""
    tens = round(len(text_of(block).split()) * TOKENS_PER_WORD / 10)
    return min(max(tens, MIN_TOKENS), MAX_TOKENS)
