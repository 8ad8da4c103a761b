"""From threads of tokens back to a program and to text (the inverse of `layout`).

Every decode ends here, so any ids must be read (docs/design.md, decision 7). A tag within which its thread ended is
left out; branches that were cut off become unfinished blocks; pieces of tags that other tokens broke, stray pieces
and promises that got no thread become text. All are listed.

An answer is walked in document order, span by span (`walk`); the tokens of a span are read as text and tags
(`scan`); text is decoded from UTF-8 run by run, and a tag ends a run (`Speller`).
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from pasta_jax.arrays import Tokens
from pasta_jax.lang import grammar
from pasta_jax.lang.grammar import Effect, Kind
from pasta_jax.lang.program import Node, Program, Promise, Sync, Text
from pasta_jax.lang.render import joined
from pasta_jax.lang.tags import TOPIC_PREFIX
from pasta_jax.tokens.tokenizer import Vocabulary, whole_characters

INCOMPLETE, LEFT_OUT, STOPPED = "incomplete tag", "left out", "stopped before its </async>"
"""In what is listed of an answer."""


def comes_of_a_limit(issue: str) -> bool:
    """Whether what is listed is no fault where a limit ended the answer: a thread ends within a tag or a block.

    >>> comes_of_a_limit("branch 1: stopped before its </async>.")
    True
    >>> [comes_of_a_limit(f"main: incomplete tag '<sync' {what}.") for what in ("left out", "kept as text")]
    [True, False]
    """
    return issue.endswith(f"{STOPPED}.") or (INCOMPLETE in issue and issue.endswith(f"{LEFT_OUT}."))


@dataclasses.dataclass(frozen=True)
class Threads:
    """The tokens of an answer by thread, in whatever order they were decoded.

    Attributes:
      tokens: for each thread its answer's ids, without the prompt; branches begin with `<async>`.
      branches: for each thread, the branch that each ` />` of it started: {index in `tokens`: thread}. A branch has
        a greater number than the thread that promised it.
    """

    tokens: Sequence[Sequence[int]]
    branches: Sequence[Mapping[int, int]]


class Span(NamedTuple):
    """Tokens of one thread that stand next to each other in the document: `tokens[thread][start:stop]`.

    `branch` is the branch that the last of them starts, whose text follows; 0: the thread ends after them.
    """

    thread: int
    start: int
    stop: int
    branch: int


def walk(lengths: Sequence[int], branches: Sequence[Mapping[int, int]]) -> Iterator[Span]:
    """An answer's spans in document order, every branch right after its promise.

    Args:
      lengths: tokens of each thread.
      branches: as in `Threads`; those that start after a thread's last token are left out.

    >>> for span in walk([4, 3], [{1: 1}, {}]):  # main's second token starts branch 1
    ...     print(span)
    Span(thread=0, start=0, stop=2, branch=1)
    Span(thread=1, start=0, stop=3, branch=0)
    Span(thread=0, start=2, stop=4, branch=0)
    """
    # A stack instead of recursion: an answer may nest deeper than Python does.
    stack = [(0, 0, iter(sorted(branches[0].items())))]
    while stack:
        thread, start, forks = stack.pop()
        index, branch = next(forks, (lengths[thread], 0))
        if index >= lengths[thread]:
            yield Span(thread, start, lengths[thread], 0)
        else:
            yield Span(thread, start, index + 1, branch)
            stack += (thread, index + 1, forks), (branch, 0, iter(sorted(branches[branch].items())))


class Speller:
    """The text of one thread's ordinary tokens as they come, in whole characters.

    Attributes:
      pending: bytes at the end that begin a character.
    """

    def __init__(self, vocabulary: Vocabulary, pending: bytes = b""):
        self.vocabulary, self.pending = vocabulary, pending

    def feed(self, ids: Sequence[int]) -> str:
        """The characters that these tokens complete; broken UTF-8 becomes U+FFFD."""
        text, self.pending = whole_characters(self.pending + self.vocabulary.spelled(ids), ended=False)
        return text

    def end_run(self) -> str:
        """What is pending at the end of a run of ordinary tokens, which is broken UTF-8."""
        text, self.pending = whole_characters(self.pending, ended=True)
        return text


class Role(enum.Enum):
    """What a piece of a thread is to its reader."""

    TEXT = "text"  # ordinary, or a tag that is not one after all
    PROMISE = "promise"  # the whole tag of a promise that a branch keeps
    SYNC = "sync"
    BEGIN = "begin"  # `<async>`
    END = "end"  # `</async>`, the end of the answer
    UNFINISHED = "unfinished"  # a tag within which the thread ended: nothing to read


@dataclasses.dataclass(frozen=True)
class Piece:
    """Tokens that are read as one.

    Attributes:
      role: what they are read as.
      tokens: their ids.
      fault: for what looked like a tag, why it is none.
    """

    role: Role
    tokens: tuple[int, ...]
    fault: str = ""


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a thread has been read.

    Attributes:
      index: tokens read.
      state: the state of the tag grammar.
      tag: the ids of a tag that has started; they are in no piece yet.
      finished: the thread's last token was read.
    """

    index: int = 0
    state: int = grammar.TEXT
    tag: tuple[int, ...] = ()
    finished: bool = False


def scan(
    vocabulary: Vocabulary,
    thread: int,
    tokens: Iterable[int],
    branches: Mapping[int, int],
    progress: Progress = Progress(),
    *,
    unfinished: Role | None,
) -> tuple[list[Piece], Progress]:
    """Reads more tokens of a thread: their pieces, and how far it is read now.

    However a thread is cut into calls, the pieces are the same, except that a run of text may be in several.

    Args:
      vocabulary: of the tokens.
      thread: the thread's number; 0 is main.
      tokens: the next ones.
      branches: the branch that each ` />` started, {index in the thread: branch}.
      progress: what the call before returned.
      unfinished: what a tag is that has started, if nothing follows the tokens; None if something does.
    """
    pieces: list[Piece] = []
    text: list[int] = []  # ordinary tokens that are in no piece yet
    index, tag, state, finished = progress.index, [*progress.tag], progress.state, progress.finished

    def put(role: Role, tokens: Sequence[int], fault: str = "") -> None:
        if text:
            pieces.append(Piece(Role.TEXT, (*text,)))
            text.clear()
        if tokens:
            pieces.append(Piece(role, (*tokens,), fault))

    def break_off(role: Role) -> None:
        kept = "kept as text" if role == Role.TEXT else LEFT_OUT
        put(role, tag, f"{INCOMPLETE} {vocabulary.text(tag)!r} {kept}")
        tag.clear()

    for index, token in enumerate(tokens, progress.index + 1):
        if thread and index == 1:
            put(Role.BEGIN, [token])  # the `<async>` that the interpreter wrote
            continue
        kind = vocabulary.kinds[token]
        effect = Effect(grammar.EFFECT[state][kind])
        ends = effect == (Effect.FINISH if thread else Effect.END)
        if grammar.BREAKS[state][kind]:
            break_off(Role.UNFINISHED if ends else Role.TEXT)
        state = grammar.NEXT[state][kind]
        if effect == Effect.FORK:
            tag.append(token)
            if index - 1 in branches:
                put(Role.PROMISE, tag)
            else:
                put(Role.TEXT, tag, f"no thread was free for {vocabulary.text(tag)!r}, kept as text")
            tag.clear()
        elif state != grammar.TEXT:
            tag.append(token)
        elif effect == Effect.SYNC:
            put(Role.SYNC, [token])
        elif ends:
            put(Role.END, [token])
            finished = True
        elif effect in (Effect.STRAY, Effect.FINISH, Effect.END):
            put(Role.TEXT, [token], f"{_spelling(vocabulary, token)} out of place, kept as text")
        else:
            text.append(token)
    if unfinished:
        break_off(unfinished)
    put(Role.TEXT, [])
    return pieces, Progress(index, state, (*tag,), finished)


def scan_all(
    vocabulary: Vocabulary, threads: Threads, *, shortened: bool = False
) -> Iterator[tuple[Span, list[Piece], Progress]]:
    """A whole answer in document order: its spans, their pieces, and how far their threads are read then.

    `shortened` is as in `read`.
    """
    progress = [Progress() for _ in threads.tokens]
    spans = [*walk([*map(len, threads.tokens)], threads.branches)]
    last = max((i for i, span in enumerate(spans) if span.stop > span.start), default=0)
    for i, span in enumerate(spans):
        thread, start, stop, branch = span
        unfinished = Role.TEXT if shortened and i == last else Role.UNFINISHED
        pieces, progress[thread] = scan(
            vocabulary, thread, threads.tokens[thread][start:stop], threads.branches[thread], progress[thread],
            unfinished=None if branch else unfinished,
        )  # fmt: skip
        yield span, pieces, progress[thread]


def promise_of(vocabulary: Vocabulary, tag: Sequence[int]) -> tuple[str, int]:
    """Topic and number of a whole promise tag, in tens of tokens; "" and 0 of a bare one."""
    kinds = [int(vocabulary.kinds[token]) for token in tag]
    if kinds == [Kind.FORK]:
        return "", 0
    middle = kinds.index(Kind.TOKENS)
    number = int("".join(str(vocabulary.digit_values[token]) for token in tag[middle + 1 : -1]))
    topic = vocabulary.text(tag[1:middle])
    return topic.strip() or topic.removeprefix(TOPIC_PREFIX) or topic, number


def _spelling(vocabulary: Vocabulary, token: int) -> str:
    return repr(vocabulary.text([token])) if vocabulary.text([token]) else f"control token {token}"


@dataclasses.dataclass(frozen=True)
class Reading:
    """An answer's tokens as a program.

    Attributes:
      program: the answer.
      promises: the promise that each branch keeps, by thread, in document order.
      text: the ids that are ordinary text, in document order; the others spell tags.
      issues: what was wrong with the tokens, one sentence each.
    """

    program: Program
    promises: Mapping[int, Promise]
    text: tuple[int, ...]
    issues: tuple[str, ...]

    @property
    def text_tokens(self) -> int:
        """How many tokens are ordinary text."""
        return len(self.text)


def read(vocabulary: Vocabulary, threads: Threads, *, shortened: bool = False) -> Reading:
    """The program that the threads spell; never raises on any ids of the vocabulary.

    An answer's tokens end with the end-of-answer id, a branch's with `</async>`; where they do not, the row
    was stopped before, and the branch is listed as unfinished.

    Args:
      vocabulary: of the tokens.
      threads: the answer.
      shortened: it was cut off within its text (`decoding.stops.cut`): a tag at its end is one that is text.
    """
    nodes: list[list[Node]] = [[] for _ in threads.tokens]
    tags: dict[int, tuple[int, str, int]] = {}  # of each promise, by branch: its thread, topic and number
    promises: dict[int, Promise] = {}
    text: list[int] = []
    issues: list[str] = []
    for (thread, _, _, branch), pieces, progress in scan_all(vocabulary, threads, shortened=shortened):
        speller, name = Speller(vocabulary), f"branch {thread}" if thread else "main"
        for piece in pieces:
            if piece.fault:
                issues.append(f"{name}: {piece.fault}.")
            if piece.role == Role.TEXT:
                text += piece.tokens
                nodes[thread].append(Text(speller.feed(piece.tokens)))
                continue
            nodes[thread].append(Text(speller.end_run()))
            if piece.role == Role.SYNC:
                nodes[thread].append(Sync())
            elif piece.role == Role.PROMISE:
                tags[branch] = thread, *promise_of(vocabulary, piece.tokens)
        nodes[thread].append(Text(speller.end_run()))
        if thread and not branch:
            parent, topic, number = tags[thread]
            promises[thread] = Promise(topic, number, joined(nodes[thread]))
            nodes[parent].append(promises[thread])
            if not progress.finished:
                issues.append(f"{name}: {STOPPED}.")
    in_order = {branch: promises[branch] for branch in tags}
    return Reading(Program(joined(nodes[0])), in_order, tuple(text), tuple(issues))


def threads_of(document: Tokens) -> Threads:
    """The threads of one document's answer: [L] fields in layout order.

    In a layout each block stands right after its promise, so the token before an `<async>` is its ` />`.
    """
    real = np.flatnonzero(document.in_answer)
    count = int(document.thread[real].max(initial=0)) + 1
    tokens: list[list[int]] = [[] for _ in range(count)]
    branches: list[dict[int, int]] = [{} for _ in range(count)]
    for index in real:
        thread = int(document.thread[index])
        if thread and not tokens[thread]:
            parent = int(document.thread[index - 1])
            branches[parent][len(tokens[parent]) - 1] = thread
        tokens[thread].append(int(document.token[index]))
    return Threads(tokens, branches)
