r"""`rule:structure`: promises by the structure of an answer, and only where they pay.

The structure is what `markdown.read` finds. A part becomes a block if nothing in it refers back (`references`).
What siblings must agree on, the mark, number, bold head or first sentence, stays in main, before the promise. Main
waits before what refers back or sums up.

Tags cost a dozen tokens, so every choice is weighed by the critical path, token by token: sections are promised
whole, or split into their items where that is clearly shorter; where the answer would not be faster, promises are
taken back, those that gain least first, and without any it stays plain.

>>> from pasta_jax.lang.render import render
>>> from pasta_jax.testing import WordTokenizer
>>> answer = '''Two rivers:
... - **Nile**: It flows north through ten dry countries.
...   Ever since the old kingdoms its floods have fed the fields of Egypt,
...   and for a long time it was thought to be the longest river of all.
... - **Rhine**: It rises in the Swiss Alps.
...   Below Basel ships can use it, and today it carries more of them
...   than any other river of Europe, down to the largest harbour there is.
... Both are long.'''
>>> print(render(Structure(WordTokenizer(answer))("", answer).program))
Two rivers:
- **Nile**:<promise topic="Nile" tokens=4 /><async> It flows north through ten dry countries.
  Ever since the old kingdoms its floods have fed the fields of Egypt,
  and for a long time it was thought to be the longest river of all.</async>
- **Rhine**:<promise topic="Rhine" tokens=4 /><async> It rises in the Swiss Alps.
  Below Basel ships can use it, and today it carries more of them
  than any other river of Europe, down to the largest harbour there is.</async>
<sync/>Both are long.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Literal, TypeAlias

from pasta_jax.annotate import references
from pasta_jax.annotate.annotators import Options
from pasta_jax.annotate.naming import topics
from pasta_jax.annotate.protocol import Annotated, Declined, Messages
from pasta_jax.data.records import encode_prompt
from pasta_jax.lang import markdown
from pasta_jax.lang.markdown import Part
from pasta_jax.lang.parse import parse_lenient
from pasta_jax.lang.program import Node, Program, Promise, Sync, Text, length_in_tens
from pasta_jax.lang.render import joined
from pasta_jax.lang.validate import MAX_BRANCHES, MIN_BLOCK_WORDS, count_words
from pasta_jax.tokens.cost import critical_path, threads_of_program
from pasta_jax.tokens.tokenizer import Tokenizer

SPLIT_GAIN = 0.9
"""Sections are split into their items where that takes the critical path to this share or less."""

AS_LONG = 0.7
"""Blocks of this share of the longest one are split together with it."""

Parts: TypeAlias = tuple[Part, ...]


@dataclasses.dataclass(frozen=True)
class Structure:
    """The annotator (`protocol.Annotator`).

    Attributes:
      tokenizer: of the model; it counts lengths and costs.
      marker: where marks, numbers, bold heads and first sentences go: to "main", or into the "block".
      min_block: blocks of fewer tokens stay in main.
      max_branches: the most promises of an answer, `data.threads` less 1 in training.
      length: the most tokens of a prompt and its annotated answer, `data.length` in training; 0 for any number.
      min_speedup: an answer whose theoretical speedup is lower stays plain; at least 1.
    """

    tokenizer: Tokenizer
    marker: Literal["main", "block"] = "main"
    min_block: int = 16
    max_branches: int = MAX_BRANCHES
    length: int = 0
    min_speedup: float = 1.1

    def __call__(self, prompt: str | Messages, answer: str) -> Annotated:
        if parse_lenient(answer) != (Program((Text(answer),) if answer else ()), []):
            raise Declined("the text looks as if it had tags")
        parts = with_closing_apart(answer, markdown.read(answer))
        draft = _Draft(self, answer, parts)
        promised = draft.split(draft.longest(draft.cover(parts)))
        try:
            room = self.length - len(encode_prompt(self.tokenizer, prompt)) if self.length else math.inf
        except ValueError as error:  # the chat format cannot write it
            raise Declined(str(error)) from None
        enough = draft.steps(()) / self.min_speedup
        while promised and not (draft.steps(promised) <= enough and draft.tokens(promised) <= room):
            promised = draft.without_the_least(promised)
        return Annotated(draft.program(promised), tuple(draft.notes(parts, promised)))


class _Draft:
    """An answer with its parts, and what promising some of them would make of it."""

    def __init__(self, rules: Structure, answer: str, parts: Parts):
        self.rules, self.answer, self.parts = rules, answer, parts
        self.tokenizer = _Remembering(rules.tokenizer)
        self.kept = dict(self._judged(parts))
        """Why each part cannot be a block; "" if it can."""

    def block(self, part: Part) -> str:
        return self.answer[self._cut(part) : part.end]

    def _cut(self, part: Part) -> int:
        return part.head if self.rules.marker == "main" else part.start

    def _judged(self, siblings: Parts, heading: str = "") -> Iterator[tuple[Part, str]]:
        in_chain = {part for chain in chains(self.answer, siblings, heading) for part in chain}
        reasons = {
            part: CHAIN if part in in_chain else self._reason_to_keep(part, siblings[:index])
            for index, part in enumerate(siblings)
        }
        for run in runs(siblings):
            if 2 * sum(not reasons[part] for part in run) < len(run):
                reasons |= {part: reasons[part] or "most of its list are short" for part in run}
        for part, reason in reasons.items():
            yield part, reason
            if reason != CHAIN and (reason != REFERS or part.kind == "section"):
                yield from self._judged(part.children, part.name(self.answer))

    def _reason_to_keep(self, part: Part, before: Parts) -> str:
        """Why a part cannot be a block, or "". `before`: its siblings before it."""
        name, details, block = part.name(self.answer), part.details(self.answer), self.block(part)
        if part.kind in ("code", "rule", "verse"):
            return part.kind
        if part.kind == "row" and not any(sibling.kind == "rule" for sibling in before):
            return "the head of a table"
        if part.kind == "paragraph" and not before:
            return FIRST
        if needs_earlier(self.answer, part) or references.builds_on(name, details):
            return REFERS
        if part.kind == "paragraph" and references.is_told_in_order(self.answer):
            return "a paragraph of a story or a letter"
        if 0 < details.count(FENCE) < self.answer.count(FENCE):
            return "its code may build on code elsewhere"
        if count_words(block) < MIN_BLOCK_WORDS or len(self.tokenizer.encode(block)) < self.rules.min_block:
            return f"shorter than {self.rules.min_block} tokens"
        return ""

    # ------------------------------------------------------------------------------------------- choices

    def cover(self, parts: Parts) -> Parts:
        """The outermost parts that can be blocks."""
        return tuple(
            block
            for part in parts
            for block in ([part] if self.kept.get(part) == "" else self.cover(part.children))
        )

    def longest(self, promised: Parts) -> Parts:
        """As many as an answer may promise, in their order."""
        by_length = sorted(
            promised, key=lambda part: len(self.tokenizer.encode(self.block(part))), reverse=True
        )
        return _in_order(by_length[: self.rules.max_branches])

    def split(self, promised: Parts) -> Parts:
        """The same with long blocks split into smaller ones, as long as that makes the answer clearly faster."""
        while promised:
            lengths = {part: len(self.tokenizer.encode(self.block(part))) for part in promised}
            long = [part for part in promised if lengths[part] >= AS_LONG * max(lengths.values())]
            finer = {part: finer for part in long if (finer := self.cover(part.children))}
            rest = (part for part in promised if part not in finer)
            trial = self.longest(_in_order([*rest, *itertools.chain(*finer.values())]))
            if not finer or self.steps(trial) > SPLIT_GAIN * self.steps(promised):
                break
            promised = trial
        return promised

    def without_the_least(self, promised: Parts) -> Parts:
        """Without the promise that gains least."""
        fewer = [promised[:i] + promised[i + 1 :] for i in range(len(promised))]
        return min(fewer, key=self.steps)

    # ------------------------------------------------------------------------------------------ outcomes

    def program(self, promised: Parts) -> Program:
        """The answer with these parts as blocks, and a sync before what needs them."""
        blocks = set(promised)
        named = topics(
            self.tokenizer, [(part.name(self.answer), part.details(self.answer)) for part in promised]
        )
        topic_of = dict(zip(promised, named))
        nodes: list[Node] = []
        written, is_open = 0, False

        def write(until: int) -> None:
            nonlocal written
            nodes.append(Text(self.answer[written:until]))
            written = until

        def visit(part: Part) -> None:
            nonlocal is_open, written
            if part in blocks:
                block = self.block(part)
                write(self._cut(part))
                tens = length_in_tens(len(self.tokenizer.encode(block)))
                nodes.append(Promise(topic_of[part], tens, (Text(block),)))
                written, is_open = part.end, True
                return
            if is_open and needs_earlier(self.answer, part):
                write(part.start)
                nodes.append(Sync())
                is_open = False
            for child in part.children:
                visit(child)

        for part in self.parts:
            visit(part)
        write(len(self.answer))
        return Program(joined(nodes))

    def steps(self, promised: Parts) -> int:
        """The critical path; without promises, the tokens of the plain answer."""
        threads = threads_of_program(self.tokenizer, self.program(promised))
        return critical_path(threads, self.tokenizer.vocabulary)

    def tokens(self, promised: Parts) -> int:
        """The tokens in all threads."""
        threads = threads_of_program(self.tokenizer, self.program(promised))
        return sum(len(tokens) for tokens in threads.tokens)

    def notes(self, parts: Parts, promised: Parts) -> Iterator[str]:
        """Why each other part that could be thought a block stays in main."""
        for part in parts:
            if part in promised:
                continue
            if any(part.start <= block.start and block.end <= part.end for block in promised):
                yield from self.notes(part.children, promised)
            elif part.kind in ("section", "item", "paragraph", "verse") and self.kept.get(part) != FIRST:
                yield self.kept.get(part) or "would not pay"


class _Remembering:
    """A tokenizer that encodes each text of an answer once."""

    def __init__(self, tokenizer: Tokenizer):
        self.vocabulary = tokenizer.vocabulary
        self._ids = functools.cache(tokenizer.encode)

    def encode(self, text: str) -> list[int]:
        return self._ids(text)


# ---------------------------------------------------------------------------------------- what needs what

FENCE = "```"
FIRST = "the first paragraph, on which others build"
REFERS = "refers back"
CHAIN = "each builds on the one before"


def needs_earlier(answer: str, part: Part) -> bool:
    """Whether main should have read the blocks before it writes this part."""
    name = part.name(answer)
    if part.kind in ("paragraph", "verse"):
        return references.refers_back(name, answer[part.start : part.end])
    if part.kind == "section":
        return references.refers_back(name, "")
    return part.kind == "item" and references.builds_on(name, part.details(answer))


def runs(siblings: Parts) -> Iterator[list[Part]]:
    """The lists among some parts: items of a kind that follow one another, or sections."""

    def style(part: Part) -> tuple[str, bool]:
        return part.kind, has_number(part)

    for (kind, _), group in itertools.groupby(siblings, key=style):
        run = list(group)
        if kind in ("item", "section") and len(run) > 1:
            yield run


def chains(answer: str, siblings: Parts, heading: str) -> Iterator[list[Part]]:
    """The lists of which each part needs the one before: steps, several that refer back, or that hold code.

    Args:
      answer: the text.
      siblings: the parts among which the lists are.
      heading: the name of what they are in.
    """
    for run in runs(siblings):
        details = [part.details(answer) for part in run]
        above = siblings[siblings.index(run[0]) - 1 : siblings.index(run[0])]
        headings = " ".join(
            [heading, *(answer[part.start : part.end] for part in above if part.kind == "paragraph")]
        )
        is_named = sum(any(letter.isalpha() for letter in part.name(answer)) for part in run) > len(run) / 2
        back = sum(part.kind == "item" and needs_earlier(answer, part) for part in run)
        following = sum(map(references.follows, details))
        if (
            sum(FENCE in text for text in details) > 1
            or back > max(1, len(run) // 4)
            or (has_number(run[0]) and 3 * following >= len(run))
            or (has_number(run[0]) and not is_named and references.gives_steps(headings))
        ):
            yield run


def has_number(part: Part) -> bool:
    return any(letter.isdigit() for letter in part.marker)


def with_closing_apart(answer: str, parts: Parts) -> Parts:
    """The parts, with a last paragraph that sums up the answer taken out of the last section."""
    closing: list[Part] = []
    *before, last = parts or (None,)
    while last is not None and last.kind == "section" and len(last.children) > 1:
        child = last.children[-1]
        if child.kind != "paragraph" or not needs_earlier(answer, child):
            break
        closing.insert(0, child)
        kept = last.children[:-1]
        last = dataclasses.replace(last, end=kept[-1].end, children=kept)
    return (*before, *filter(None, [last]), *closing)


def _in_order(parts: Iterable[Part]) -> Parts:
    return tuple(sorted(parts, key=lambda part: part.start))


def make(options: Options) -> Structure:
    """The annotator of these options."""
    return Structure(
        options.tokenizer,
        marker=options.marker,
        min_block=options.min_block,
        max_branches=options.max_branches,
        length=options.length,
        min_speedup=options.min_speedup,
    )
