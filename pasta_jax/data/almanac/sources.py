"""Almanac documents as endless training sources; seed and index determine the document."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from pasta_jax.arrays import ThreadedTokens
from pasta_jax.baselines import apar
from pasta_jax.data.almanac.annotator import Rates, annotate
from pasta_jax.data.almanac.draw import short_comparison, training_task
from pasta_jax.data.almanac.families import Task, plain
from pasta_jax.data.almanac.text import base_document, skeleton_document, train_tokenizer
from pasta_jax.lang.program import Program, Text
from pasta_jax.tokens.layout import LayoutError, layout_example, layout_text
from pasta_jax.tokens.positions import Positions
from pasta_jax.tokens.sentence_piece import SentencePieceTokenizer
from pasta_jax.tokens.tokenizer import Tokenizer

SOURCES = ("base", "plain", "annotated", "apar", "skeletons")
"""Text for the base model, plain answers, annotated answers, answers with the forks of APAR, and the documents of
Skeleton-of-Thought."""

_ENDLESS = 2**31
"""The length of a source; its documents are generated on demand."""


@functools.cache
def load_tokenizer() -> SentencePieceTokenizer:
    """The almanac's own tokenizer. The first call trains it, in about a second."""
    return SentencePieceTokenizer(train_tokenizer())


def source(
    which: str,
    tokenizer: Tokenizer,
    *,
    seed: int = 0,
    length: int = 512,
    threads: int = 16,
    positions: Positions = Positions(),
    rates: Rates = Rates(),
) -> AlmanacSource:
    """Documents of one of SOURCES, none longer than `length` tokens.

    Raises:
      ValueError: there is no such source.
    """
    if which not in SOURCES:
        raise ValueError(f"The almanac has no {which!r}; it has {', '.join(SOURCES)}.")
    return AlmanacSource(which, tokenizer, seed, length, threads, positions, rates)


@dataclasses.dataclass(frozen=True)
class AlmanacSource:
    """Laid-out documents by index."""

    which: str
    tokenizer: Tokenizer
    seed: int
    length: int
    threads: int
    positions: Positions
    rates: Rates

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> ThreadedTokens:
        rng = np.random.default_rng([self.seed, index])
        for _ in range(100):  # the longest answers may not fit a short row
            if len(document := self._document(rng)) <= self.length:
                return document
        raise LayoutError(
            f"Almanac documents need more than the {self.length} tokens of a row. "
            "Set --config.data.length=512, which holds them all.",
            "longer than a row",
        )

    def _document(self, rng: np.random.Generator) -> ThreadedTokens:
        if self.which in ("base", "skeletons"):
            prompt, text = (base_document if self.which == "base" else skeleton_document)(rng)
            if prompt is None:
                return layout_text(self.tokenizer, text, threads=self.threads)
            return self._layout(prompt, Program((Text(text),)))
        task = short_comparison(rng) if rng.random() < 1 / 8 else training_task(rng)
        return self._layout(task.prompt, self._program(task, rng))

    def _program(self, task: Task, rng: np.random.Generator) -> Program:
        if self.which == "plain":
            return Program((Text(plain(task)),))
        if self.which == "apar":
            return apar.annotate(plain(task))
        return annotate(task, rng, lambda text: len(self.tokenizer.encode(text)), self.rates)

    def _layout(self, prompt: str, program: Program) -> ThreadedTokens:
        return layout_example(self.tokenizer, prompt, program, positions=self.positions, threads=self.threads)
