r"""Reads annotated text as a Program, strictly or with repairs.

>>> parse('Hi. <promise topic="rivers" tokens=2 /><async>The Nile.</async><sync/>').nodes
(Text(text='Hi. '), Promise(topic='rivers', tokens=2, block=(Text(text='The Nile.'),)), Sync())
>>> parse("one\ntwo</async>")
Traceback (most recent call last):
    ...
pasta_jax.lang.parse.ParseError: line 2, column 4: </async> without <async>. Remove it, or write its <async>.

A tag meant as ordinary text has a backslash after its `<`, which reading removes (see `render`):

>>> parse(r"Write <\sync/> to wait.").nodes
(Text(text='Write <sync/> to wait.'),)

Only the exact spelling is a tag. To the strict reader `<sync />` is ordinary text (`validate` warns of it); what
starts with `<promise topic="` or stands right before `<async>` must be a promise. The lenient reader takes every
near miss for the tag that was meant, and lists its repairs:

>>> program, repairs = parse_lenient("<promise tokens='2' topic='rivers'/><async>The Nile.")
>>> program.nodes
(Promise(topic='rivers', tokens=2, block=(Text(text='The Nile.'),)),)
>>> for repair in repairs:
...     print(repair)
line 1, column 1: not the canonical spelling. Read as <promise topic="rivers" tokens=2 />.
line 1, column 37: <async> is never closed. Closed it at the end.

Reading has two steps. `Reader` turns any text into balanced lexemes and reports every fault; `build` turns lexemes
into a Program. `validate` uses the lexemes too.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple, TypeAlias

from pasta_jax.lang import tags
from pasta_jax.lang.assemble import text_of
from pasta_jax.lang.program import MAX_TOKENS, MIN_TOKENS, Node, Program, Promise, Sync, Text, length_in_tens
from pasta_jax.lang.render import BODY, joined, promise_problem

TOKENS_PER_WORD = 1.3
"""Of English text with common vocabularies; used only for a promise that does not state its length."""

SHOWN_DIGITS = 20
"""Of a number in a message; a longer one is cut there."""


class ParseError(ValueError):
    """The text is not a program. Lines and columns count from 1."""

    def __init__(self, line: int, column: int, problem: str, advice: str):
        # All four are passed on, so that the error can be pickled.
        super().__init__(line, column, problem, advice)
        self.line, self.column, self.problem, self.advice = line, column, problem, advice

    def __str__(self) -> str:
        return f"line {self.line}, column {self.column}: {self.problem}. {self.advice}."


@dataclasses.dataclass(frozen=True)
class Repair:
    """A problem in the text, and how lenient parsing repaired it."""

    line: int
    column: int
    problem: str
    repair: str

    def __str__(self) -> str:
        return f"line {self.line}, column {self.column}: {self.problem}. {self.repair}."


class Fault(NamedTuple):
    """A problem at `offset`: what a person should do, and what lenient parsing does."""

    offset: int
    problem: str
    advice: str
    repair: str


LexemeKind: TypeAlias = Literal["text", "open", "close", "sync"]


class Lexeme(NamedTuple):
    """A run of text or a tag, at `offset`. `text` is the topic of an "open", whose `tokens` is None if unknown."""

    offset: int
    kind: LexemeKind
    text: str = ""
    tokens: int | None = None


def parse(
    text: str, *, lenient: bool = False, max_depth: int | None = None, dialect: tags.Dialect = "pasta"
) -> Program:
    """Reads annotated text.

    Args:
      text: the annotated text.
      lenient: repair instead of raising, as `parse_lenient` does.
      max_depth: how deep promises may nest; 1 is the paper's language, None means any depth.
      dialect: "apar" reads `<promise/>` before a block as the bare promise that it is there; `lenient` never does.

    Raises:
      ParseError: the text is not a program, and `lenient` is False.
    """
    if lenient:
        return parse_lenient(text, max_depth=max_depth)[0]

    def fail(fault: Fault) -> None:
        raise ParseError(*position(text, fault.offset), fault.problem, fault.advice)

    return build(Reader(text, fail, lenient=False, max_depth=max_depth, dialect=dialect).read())


def parse_lenient(text: str, *, max_depth: int | None = None) -> tuple[Program, list[Repair]]:
    """Reads any text, and lists the repairs in the order in which the problems were noticed."""
    faults: list[Fault] = []
    program = build(Reader(text, faults.append, lenient=True, max_depth=max_depth).read())
    return program, [Repair(*position(text, fault.offset), fault.problem, fault.repair) for fault in faults]


def position(text: str, offset: int) -> tuple[int, int]:
    r"""Line and column of an offset.

    >>> position("ab\ncd", 4)
    (2, 2)
    """
    return text.count("\n", 0, offset) + 1, offset - text.rfind("\n", 0, offset)


def build(lexemes: Iterable[Lexeme]) -> Program:
    """The program that balanced lexemes spell."""
    levels: list[list[Node]] = [[]]
    opened: list[Lexeme] = []
    for lexeme in lexemes:
        match lexeme.kind:
            case "text":
                levels[-1].append(Text(lexeme.text))
            case "sync":
                levels[-1].append(Sync())
            case "open":
                opened.append(lexeme)
                levels.append([])
            case "close":
                block, start = joined(levels.pop()), opened.pop()
                tokens = _estimate(block) if start.tokens is None else start.tokens
                levels[-1].append(Promise(start.text, tokens, block))
    return Program(joined(levels[0]))


# One row per kind of tag; the first that matches wins. A near miss holds no second `<`, so no real tag is ever
# swallowed with it.
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


BlockKind: TypeAlias = Literal["block", "bare", "deep"]
"""What an `<async>` opens: a promise's "block"; without a promise ("bare") or too "deep" its tags are dropped."""


class Reader:
    """One pass over a text. A strict reader's `report` raises, so the code after a report is the repair."""

    def __init__(
        self,
        text: str,
        report: Callable[[Fault], None],
        *,
        lenient: bool,
        max_depth: int | None,
        dialect: tags.Dialect = "pasta",
    ):
        self.text, self.dialect = text, dialect
        self.lenient = lenient
        self.max_depth = max_depth
        self._report = report
        self._lexemes: list[Lexeme] = []
        self._opened: list[tuple[int, BlockKind]] = []
        self._open_blocks: collections.Counter[BlockKind] = collections.Counter()

    def read(self) -> list[Lexeme]:
        offset = 0
        while tag := _TAG.search(self.text, offset):
            self._emit(offset, "text", self.text[offset : tag.start()])
            offset = self._tag(tag)
        self._emit(offset, "text", self.text[offset:])
        while self._opened:
            problem = f"{tags.ASYNC_OPEN} is never closed"
            advice = f"Write {tags.ASYNC_CLOSE} where its block ends"
            self._fault(self._opened[-1][0], problem, advice, "Closed it at the end")
            self._close(len(self.text))
        return self._lexemes

    def _tag(self, tag: re.Match[str]) -> int:
        """Reads one tag, exact or not; returns the offset after it."""
        offset, kind = tag.start(), tag.lastgroup or ""
        if kind == "literal":
            self._emit(offset, "text", "<" + tag[0][2:])
        elif kind == "promise":
            return self._promise(tag, tag["topic"], int(tag["tokens"]))
        elif kind == "near_promise":
            return self._near_promise(tag)
        elif kind == "broken_promise":
            self._fault(offset, _broken_problem(self.text, tag.end()), _WRITE_PROMISE, "Kept it as text")
            self._emit(offset, "text", tag[0])
        elif kind.startswith("near_") and not self.lenient:
            self._emit(offset, "text", tag[0])
        elif kind.endswith("open"):
            self._bare_open(tag)
        elif kind.endswith("close"):
            self._near(tag, tags.ASYNC_CLOSE)
            self._close(offset)
        elif kind.endswith("sync"):
            self._near(tag, tags.SYNC)
            self._emit(offset, "sync")
        return tag.end()

    def _promise(self, tag: re.Match[str], topic: str, tokens: int | None) -> int:
        """Reads a promise and the `<async>` that must follow it."""
        offset = tag.start()
        block = _BLOCK_AHEAD.match(self.text, tag.end())
        if not block:
            advice = f"Write {tags.ASYNC_OPEN}…{tags.ASYNC_CLOSE} right after it"
            self._fault(offset, "a promise without its block", advice, "Dropped the promise")
            return tag.end()
        if block["gap"]:
            problem, advice = "space between a promise and its block", "Remove it"
            self._fault(tag.end(), problem, advice, "Moved it before the promise")
            self._emit(offset, "text", block["gap"])
        self._near(block, tags.ASYNC_OPEN, group="open")
        if self.max_depth is not None and self._open_blocks["block"] >= self.max_depth:
            problem = f"a promise nested deeper than max_depth={self.max_depth}"
            self._fault(offset, problem, "Write the block as ordinary text", "Put its block in place as text")
            self._open(block.start("open"), "deep")
        else:
            self._emit(offset, "open", topic, tokens)
            self._open(block.start("open"), "block")
        return block.end()

    def _near_promise(self, tag: re.Match[str]) -> int:
        """Reads what looks like a promise but is not spelled exactly."""
        offset = tag.start()
        if (
            self.dialect == "apar"
            and tag[0] == tags.FORK
            and self.text.startswith(tags.ASYNC_OPEN, tag.end())
        ):
            return self._promise(tag, "", 0)
        claims = tag[0].startswith(tags.PROMISE_OPEN) or self.text.startswith(tags.ASYNC_OPEN, tag.end())
        if not self.lenient and not claims:
            self._emit(offset, "text", tag[0])
            return tag.end()
        problem, topic, tokens = _near_problem(tag[0])
        if not topic:
            self._fault(offset, problem, _WRITE_PROMISE, "Kept it as text")
            self._emit(offset, "text", tag[0])
            return tag.end()
        if tokens is None:
            repair = "Took its tokens from the length of its block"
        else:
            repair = f"Read as {tags.PROMISE_OPEN}{topic}{tags.PROMISE_TOKENS}{tokens}{tags.PROMISE_CLOSE}"
        self._fault(offset, problem, _WRITE_PROMISE, repair)
        return self._promise(tag, topic, tokens)

    def _bare_open(self, tag: re.Match[str]) -> None:
        self._near(tag, tags.ASYNC_OPEN)
        problem = f"{tags.ASYNC_OPEN} without a promise"
        repair = "Made its content part of the text around it"
        self._fault(tag.start(), problem, f"Write {_CANONICAL} right before it", repair)
        self._open(tag.start(), "bare")

    def _open(self, offset: int, block: BlockKind) -> None:
        self._opened.append((offset, block))
        self._open_blocks[block] += 1

    def _close(self, offset: int) -> None:
        if not self._opened:
            problem = f"{tags.ASYNC_CLOSE} without {tags.ASYNC_OPEN}"
            self._fault(offset, problem, f"Remove it, or write its {tags.ASYNC_OPEN}", "Dropped it")
            return
        _, block = self._opened.pop()
        self._open_blocks[block] -= 1
        if block == "block":
            self._emit(offset, "close")

    def _near(self, tag: re.Match[str], exact: str, group: str | int = 0) -> None:
        """Reports a tag that is not spelled exactly."""
        if tag[group] != exact:
            problem = f"{tag[group]!r} is not the canonical spelling"
            self._fault(tag.start(group), problem, f"Write {exact}", f"Read as {exact}")

    def _fault(self, offset: int, problem: str, advice: str, repair: str) -> None:
        self._report(Fault(offset, problem, advice, repair))

    def _emit(self, offset: int, kind: LexemeKind, text: str = "", tokens: int | None = None) -> None:
        # A block that becomes text of its parent has no thread of its own, so nothing in it waits.
        if kind == "sync" and self._open_blocks["deep"]:
            return
        self._lexemes.append(Lexeme(offset, kind, text, tokens))


def _near_problem(tag: str) -> tuple[str, str, int | None]:
    """What is wrong with a loosely spelled promise, and its topic ("" if none) and tokens."""
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
    # Four digits suffice to see that the number is too large, and `int` refuses strings of thousands of digits.
    tokens = int(number[1] + number[2][:4])
    written = number[1].strip("+") + number[2][:SHOWN_DIGITS] + "…" * (len(number[2]) > SHOWN_DIGITS)
    problem = promise_problem(raw, tokens, written) or "not the canonical spelling"
    return problem, topic, min(max(tokens, MIN_TOKENS), MAX_TOKENS)


def _broken_problem(text: str, offset: int) -> str:
    """Why the tag whose topic begins at `offset` is no promise, if it does not even look like a whole tag."""
    end = text.find('"', offset)
    if end < 0:
        return "the topic has no closing quote"
    return promise_problem(text[offset:end], MIN_TOKENS) or "the promise is not finished"


def _estimate(block: tuple[Node, ...]) -> int:
    """How many tens of tokens a block holds, from its words."""
    return length_in_tens(len(text_of(block).split()) * TOKENS_PER_WORD)
