"""The independence audit: what each block of an annotated answer loses by not seeing its siblings.

A model reads the answer twice, with two masks (`tokens.views`): as its threads see it, and as sequential writing
would. The loss of a block is the log-probability of its text with sight of the earlier blocks less that without, in
nats. A block that needs none of them loses about nothing. One that repeats a name, number or decision of a sibling
loses several nats on the few tokens that say it. Per token of the block the loss can be compared between blocks. No
labels and no other model are needed.

Text of main that stands beside open branches, where a sync may be missing, is measured in the same way.

Two kinds of tokens are not counted. The first of a block is predicted from a tag, which the views hide. And what
names the topic of a block is known to its branch from the promise: in sight of the items before it the next name in
a list is likelier, but that is not what makes an item depend on them.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pasta_jax.arrays import ThreadedTokens
from pasta_jax.data.records import Prompt, encode_prompt
from pasta_jax.decoding.model import Model
from pasta_jax.lang.program import Program
from pasta_jax.lang.topics import with_short_topics
from pasta_jax.tokens.layout import LayoutError, layout
from pasta_jax.tokens.tokenizer import Vocabulary
from pasta_jax.tokens.views import is_text, with_siblings, without_siblings
from pasta_jax.training.logprobs import by_document, reference_pass
from pasta_jax.visibility import visible


@dataclasses.dataclass(frozen=True)
class Part:
    """A block, or the text of its parent that follows it, up to the next tag.

    Attributes:
      branch: the number of the promise in document order, from 1: its block, or the text after it.
      is_block: whether it is the block.
      topic: of the promise.
      unseen: tokens of text before it that it does not see. Without any it loses nothing.
      tokens: its own tokens that are counted.
      loss: nats that it loses in all.
      worst: the text of the token that loses most, with some before it; "" if none is counted.
    """

    branch: int
    is_block: bool
    topic: str
    unseen: int
    tokens: int
    loss: float
    worst: str

    @property
    def per_token(self) -> float:
        """Nats per counted token."""
        return self.loss / max(1, self.tokens)


@dataclasses.dataclass(frozen=True)
class Auditor:
    """Audits answers with one model, in batches of one shape: one program is compiled for both views.

    Attributes:
      model: any language model; it need not know tags.
      rows, length: of the batches. No answer with its prompt may be longer than a row.
      threads: T, for the widest answers.
    """

    model: Model
    rows: int = 4
    length: int = 2048
    threads: int = 64

    @functools.cached_property
    def _forward(self) -> Any:
        return reference_pass(self.model.config, self.model.mesh)

    def document(self, prompt: Prompt, program: Program) -> ThreadedTokens:
        """An answer to audit, with short topics.

        Raises:
          LayoutError: it is longer than a row, or has more threads.
          ValueError: the chat format cannot write the prompt.
        """
        tokenizer = self.model.tokenizer
        if any(promise.is_bare for promise in program.promises()):
            tokenizer = tokenizer.with_dialect("apar")
        document = layout(
            tokenizer,
            encode_prompt(tokenizer, prompt),
            with_short_topics(tokenizer, program),
            self.model.positions,
            self.threads,
        )
        if len(document) > self.length:
            problem = f"the answer with its prompt has more than the {self.length} tokens of a row"
            raise LayoutError(problem, "too long")
        return document

    def losses(self, documents: Sequence[ThreadedTokens]) -> list[np.ndarray]:
        """What each token's target loses by what the token does not see, in nats: float32 [L] for each document.

        Both views are packed alike, so where they are the same the difference is 0.
        """
        vocabulary = self.model.tokenizer.vocabulary
        found = [
            [*by_document(self._forward, self.model, views, self.rows, self.length)]
            for views in (
                [with_siblings(vocabulary, document) for document in documents],
                [without_siblings(vocabulary, document) for document in documents],
            )
        ]
        return [seen - unseen for seen, unseen in zip(*found, strict=True)]

    def audit(self, answers: Sequence[tuple[ThreadedTokens, Program]]) -> list[list[Part]]:
        """The parts of each answer, in document order; `document` gives the first of each pair."""
        losses = self.losses([document for document, _ in answers])
        vocabulary = self.model.tokenizer.vocabulary
        return [
            [*parts(vocabulary, document, program, loss)]
            for (document, program), loss in zip(answers, losses, strict=True)
        ]


def parts(
    vocabulary: Vocabulary, document: ThreadedTokens, program: Program, loss: np.ndarray
) -> Iterator[Part]:
    """The blocks of an answer, each with the text after it, and what they lose.

    Args:
      vocabulary: of the tokens.
      document: [L] fields, the program's layout.
      program: the answer.
      loss: nats of each token's target, float [L].
    """
    text = is_text(vocabulary, document)
    view = without_siblings(vocabulary, document)
    before = np.full(len(document), -1)  # the token before each in its thread
    by_thread = np.argsort(document.thread, kind="stable")
    follows = document.thread[by_thread[1:]] == document.thread[by_thread[:-1]]
    before[by_thread[1:][follows]] = by_thread[:-1][follows]

    def part(branch: int, topic: str, tokens: np.ndarray) -> Iterator[Part]:
        """Of the tokens [n] of a part, in their order."""
        own = tokens[text[tokens]]
        if not len(own):
            return
        is_block = bool(document.thread[own[0]] == branch)
        named = _names(vocabulary, document.token[own], topic) if is_block else np.zeros(len(own), bool)
        counted = own[text[before[own]] & ~named]
        if not is_block and not len(counted):
            return
        seen = visible(view[own[:1]], view)[0] & text
        each = loss[before[counted]]
        worst = ""
        if len(counted):
            at = int(np.flatnonzero(own == counted[np.argmax(each)])[0])
            worst = vocabulary.text(document.token[own[max(0, at - 3) : at + 1]].tolist())
        unseen = int(text[: own[0] + 1].sum() - seen.sum())
        yield Part(branch, is_block, topic, unseen, len(counted), float(each.sum()), worst)

    for branch, promise in enumerate(program.promises(), start=1):
        block = np.flatnonzero(document.thread == branch)
        # At a fork the parent's new segment is numbered right before its branch's.
        after = np.flatnonzero(document.segment == document.segment[block[0]] - 1)
        yield from part(branch, promise.topic, block)
        yield from part(branch, promise.topic, after)


def _names(vocabulary: Vocabulary, ids: np.ndarray, topic: str) -> np.ndarray:
    """Bool [n]: tokens of a block that spell a word of its topic where it first occurs."""
    pieces = [vocabulary.spelled([int(token)]) for token in ids]
    end = np.cumsum([len(piece) for piece in pieces])
    start = end - [len(piece) for piece in pieces]
    spelled = b"".join(pieces).lower().decode("latin-1")  # a character for each byte
    named = np.zeros(len(ids), bool)
    for word in topic.lower().encode().decode("latin-1").split():
        if match := re.search(rf"(?<!\w){re.escape(word)}(?!\w)", spelled):
            named |= (start < match.end()) & (end > match.start())
    return named
