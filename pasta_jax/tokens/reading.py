"""The way back: threads of tokens as a program (the inverse of `layout`).

Every decode ends here, so it must make sense of anything: tags that were never completed, stray pieces,
promises that found no free thread and branches that were cut off are read as DESIGN.md decision 7 says, and
listed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from pasta_jax.arrays import NO_DOC, ThreadedTokens
from pasta_jax.lang import grammar
from pasta_jax.lang.grammar import Event, Kind
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
      promises: the promise that each branch keeps, by thread.
      text_tokens: how many tokens are ordinary text; the others spell tags.
      issues: what was wrong with the tokens, one sentence each.
    """

    program: Program
    promises: Mapping[int, Promise]
    text_tokens: int
    issues: tuple[str, ...]


def read(vocabulary: Vocabulary, threads: Threads) -> Reading:
    """The program that the threads spell; never raises on any ids of the vocabulary.

    An answer's tokens end with the end-of-answer id, a branch's with `</async>`; where they do not, the row
    was stopped before, and the branch is listed as unfinished.
    """
    reader = _Reader(vocabulary, threads)
    nodes = reader.read(0)
    return Reading(Program(nodes), reader.promises, reader.text_tokens, tuple(reader.issues))


class _Reader:
    def __init__(self, vocabulary: Vocabulary, threads: Threads):
        self.vocabulary, self.threads = vocabulary, threads
        self.promises: dict[int, Promise] = {}
        self.issues: list[str] = []
        self.text_tokens = 0

    def read(self, thread: int) -> tuple[Node, ...]:
        """The nodes of one thread, those of its branches inside their promises."""
        tokens, branches = self.threads.tokens[thread], self.threads.branches[thread]
        nodes: list[Node] = []
        text: list[int] = []  # ordinary tokens not yet in `nodes`
        tag: list[int] = []  # pieces of a tag that has begun
        state, finished = grammar.TEXT, False

        def flush() -> None:
            if spelled := self.vocabulary.text(text):
                nodes.append(Text(spelled))
            self.text_tokens += len(text)
            text.clear()

        def break_off() -> None:
            if tag:
                self.note(thread, f"incomplete tag {self.vocabulary.text(tag)!r} kept as text")
            text.extend(tag)
            tag.clear()

        for index, token in enumerate(tokens):
            if thread and not index:
                continue  # the `<async>` that the interpreter wrote
            kind = self.vocabulary.kinds[token]
            event = Event(grammar.EVENT[state][kind])
            if grammar.BREAKS[state][kind]:
                break_off()
            state = grammar.NEXT[state][kind]
            if event == Event.FORK:
                tag.append(token)
                if index in branches:
                    flush()
                    nodes.append(self.promise(tag, branches[index]))
                    tag.clear()
                else:
                    self.note(thread, f"no thread was free for {self.vocabulary.text(tag)!r}, kept as text")
                    text.extend(tag)
                    tag.clear()
            elif state != grammar.TEXT:
                tag.append(token)
            elif event == Event.SYNC:
                flush()
                nodes.append(Sync())
            elif event == (Event.FINISH if thread else Event.END):
                finished = True
            else:
                if event in (Event.STRAY, Event.FINISH, Event.END):
                    self.note(thread, f"{self.spelling(token)} out of place, kept as text")
                text.append(token)
        break_off()
        flush()
        if thread and not finished:
            self.note(thread, "stopped before its </async>")
        return joined(nodes)

    def promise(self, tag: list[int], branch: int) -> Promise:
        kinds = [int(self.vocabulary.kinds[token]) for token in tag]
        topic, number = "", 0
        if kinds != [Kind.FORK]:
            middle = kinds.index(Kind.TOKENS)
            number = int("".join(str(self.vocabulary.digit_values[token]) for token in tag[middle + 1 : -1]))
            spelled = self.vocabulary.text(tag[1:middle])
            topic = spelled.removeprefix(TOPIC_PREFIX) or spelled
        promise = Promise(topic, number, self.read(branch))
        self.promises[branch] = promise
        return promise

    def spelling(self, token: int) -> str:
        return (
            repr(self.vocabulary.text([token])) if self.vocabulary.text([token]) else f"control token {token}"
        )

    def note(self, thread: int, what: str) -> None:
        self.issues.append(f"{'main' if thread == 0 else f'branch {thread}'}: {what}.")


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
