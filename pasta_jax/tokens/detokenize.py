"""The way back: threads of tokens as a program (the inverse of `layout`).

Every decode ends here, so it must make sense of anything: tags that were never completed, stray pieces,
promises that found no free thread and branches that were cut off are read as decision 7 of docs/design.md says, and
listed.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pasta_jax.arrays import NO_DOC, ThreadedTokens
from pasta_jax.lang import grammar
from pasta_jax.lang.grammar import Effect, Kind
from pasta_jax.lang.program import Node, Program, Promise, Sync, Text
from pasta_jax.lang.render import joined
from pasta_jax.tokens.tokenizer import Vocabulary

TOPIC_PREFIX = " "
"""A topic's words are the tokens that they are in running text, after a space; the text of the tag omits it."""


@dataclasses.dataclass(frozen=True)
class Threads:
    """The tokens of an answer by thread, in whatever order they were decoded.

    Attributes:
      tokens: for each thread its answer's ids, without the prompt; branches begin with `<async>`.
      branches: for each thread, the branch that each ` />` of it started: {index in `tokens`: thread}.
    """

    tokens: Sequence[Sequence[int]]
    branches: Sequence[Mapping[int, int]]


@dataclasses.dataclass(frozen=True)
class Reading:
    """What the tokens say.

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


def read(vocabulary: Vocabulary, threads: Threads) -> Reading:
    """The program that the threads spell; never raises on any ids of the vocabulary.

    An answer's tokens end with the end-of-answer id, a branch's with `</async>`; where they do not, the row
    was stopped before, and the branch is listed as unfinished.
    """
    reader = _Reader(vocabulary, threads)
    nodes = reader.read(0)
    promises = {branch: reader.promises[branch] for branch in reader.branches}
    return Reading(Program(nodes), promises, tuple(reader.text), tuple(reader.issues))


class _Reader:
    def __init__(self, vocabulary: Vocabulary, threads: Threads):
        self.vocabulary, self.threads = vocabulary, threads
        self.promises: dict[int, Promise] = {}
        self.branches: list[int] = []  # in document order
        self.issues: list[str] = []
        self.text: list[int] = []

    def read(self, thread: int) -> tuple[Node, ...]:
        """The nodes of one thread, those of its branches inside their promises."""
        tokens, branches = self.threads.tokens[thread], self.threads.branches[thread]
        pieces, place = scan(self.vocabulary, thread, tokens, branches, ended=True)
        nodes: list[Node] = []
        text: list[int] = []  # ordinary tokens not yet in `nodes`

        def flush() -> None:
            if spelled := self.vocabulary.text(text):
                nodes.append(Text(spelled))
            self.text += text
            text.clear()

        for piece in pieces:
            if piece.fault:
                self.note(thread, piece.fault)
            if piece.role == Role.TEXT:
                text.extend(piece.tokens)
            elif piece.role == Role.PROMISE:
                flush()
                self.branches.append(piece.branch)
                topic, number = promise_of(self.vocabulary, piece.tokens)
                promise = Promise(topic, number, self.read(piece.branch))
                self.promises[piece.branch] = promise
                nodes.append(promise)
            elif piece.role == Role.SYNC:
                flush()
                nodes.append(Sync())
        flush()
        if thread and not place.finished:
            self.note(thread, "stopped before its </async>")
        return joined(nodes)

    def note(self, thread: int, what: str) -> None:
        self.issues.append(f"{'main' if thread == 0 else f'branch {thread}'}: {what}.")


class Role(enum.Enum):
    """What a piece of a thread is to its reader."""

    TEXT = "text"  # ordinary, or what turned out to be
    PROMISE = "promise"  # the whole tag of a promise that a branch keeps
    SYNC = "sync"
    BEGIN = "begin"  # `<async>`
    END = "end"  # `</async>`, the end of the answer


@dataclasses.dataclass(frozen=True)
class Piece:
    """Tokens that are read as one.

    Attributes:
      role: how.
      tokens: their ids.
      branch: of a PROMISE, who keeps it.
      fault: why tokens that were to be a tag are text, if they are.
    """

    role: Role
    tokens: tuple[int, ...]
    branch: int = 0
    fault: str = ""


@dataclasses.dataclass(frozen=True)
class Place:
    """How far a thread has been scanned.

    Attributes:
      index: tokens of the thread that were looked at.
      state: of the tag grammar.
      tag: the ids of a tag that has begun; they are in no piece yet.
      finished: its last token was among them.
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
    place: Place = Place(),
    *,
    ended: bool,
) -> tuple[list[Piece], Place]:
    """The pieces of a thread from a place on, and the place after them.

    However a thread is cut into calls, the pieces are the same, but that a run of text may be in several.

    Args:
      vocabulary: of the tokens.
      thread: whose tokens they are; 0 is main.
      tokens: what follows the place.
      branches: the branch that each ` />` started, {index in the thread: branch}.
      place: where the call before ended.
      ended: nothing follows the tokens, so a tag that has begun is text.
    """
    pieces: list[Piece] = []
    run: list[int] = []  # ordinary tokens
    index, tag, state, finished = place.index - 1, [*place.tag], place.state, place.finished

    def put(role: Role, tokens: list[int], **more: Any) -> None:
        if run:
            pieces.append(Piece(Role.TEXT, (*run,)))
            run.clear()
        if tokens:
            pieces.append(Piece(role, (*tokens,), **more))

    def break_off() -> None:
        put(Role.TEXT, tag, fault=f"incomplete tag {vocabulary.text(tag)!r} kept as text")
        tag.clear()

    for index, token in enumerate(tokens, place.index):
        if thread and not index:
            put(Role.BEGIN, [token])  # the `<async>` that the interpreter wrote
            continue
        kind = vocabulary.kinds[token]
        effect = Effect(grammar.EFFECT[state][kind])
        if grammar.BREAKS[state][kind]:
            break_off()
        state = grammar.NEXT[state][kind]
        if effect == Effect.FORK:
            tag.append(token)
            if index in branches:
                put(Role.PROMISE, tag, branch=branches[index])
            else:
                put(Role.TEXT, tag, fault=f"no thread was free for {vocabulary.text(tag)!r}, kept as text")
            tag.clear()
        elif state != grammar.TEXT:
            tag.append(token)
        elif effect == Effect.SYNC:
            put(Role.SYNC, [token])
        elif effect == (Effect.FINISH if thread else Effect.END):
            put(Role.END, [token])
            finished = True
        elif effect in (Effect.STRAY, Effect.FINISH, Effect.END):
            put(Role.TEXT, [token], fault=f"{_spelling(vocabulary, token)} out of place, kept as text")
        else:
            run.append(token)
    if ended:
        break_off()
    put(Role.TEXT, [])
    return pieces, Place(index + 1, state, (*tag,), finished)


def promise_of(vocabulary: Vocabulary, tag: Sequence[int]) -> tuple[str, int]:
    """Topic and number of a whole promise tag, in tens of tokens; "" and 0 of a bare one."""
    kinds = [int(vocabulary.kinds[token]) for token in tag]
    if kinds == [Kind.FORK]:
        return "", 0
    middle = kinds.index(Kind.TOKENS)
    number = int("".join(str(vocabulary.digit_values[token]) for token in tag[middle + 1 : -1]))
    spelled = vocabulary.text(tag[1:middle])
    return spelled.removeprefix(TOPIC_PREFIX) or spelled, number


def _spelling(vocabulary: Vocabulary, token: int) -> str:
    return repr(vocabulary.text([token])) if vocabulary.text([token]) else f"control token {token}"


def threads_of(document: ThreadedTokens, prompt_length: int) -> Threads:
    """The threads of one document in layout order: [L] fields, of which the first are the prompt's.

    In a layout each block stands right after its promise, so the token before an `<async>` is its ` />`.
    """
    real = np.flatnonzero(document.doc != NO_DOC)[prompt_length:]
    count = int(document.thread[real].max(initial=0)) + 1
    tokens: list[list[int]] = [[] for _ in range(count)]
    branches: list[dict[int, int]] = [{} for _ in range(count)]
    for place in real:
        thread = int(document.thread[place])
        if thread and not tokens[thread]:
            parent = int(document.thread[place - 1])
            branches[parent][len(tokens[parent]) - 1] = thread
        tokens[thread].append(int(document.token[place]))
    return Threads(tokens, branches)
