"""Text for the base model, and the tokenizer trained on it.

The base model reads two kinds of document: facts as plain text, and plain instructions with plain answers.
Both respect the split: a plain text is about one entity or one step, never about a combination that a prompt could
ask for.
"""

from __future__ import annotations

import collections
import pathlib
import re
import tempfile
from collections.abc import Iterator

import numpy as np
from sentencepiece import sentencepiece_model_pb2

from pasta_jax.baselines import sot
from pasta_jax.data.almanac import facts
from pasta_jax.data.almanac.draw import short_comparison, training_task
from pasta_jax.data.almanac.facts import KIND_OF
from pasta_jax.data.almanac.families import plain, points, say_step
from pasta_jax.tokens.pieces import train_pieces

MOST_PIECES = 1536
"""An upper limit of the vocabulary, which is smaller."""

Document = tuple[str | None, str]
"""A prompt, or None for plain text, and the text that follows it."""


_ENTITIES = tuple(KIND_OF)


def profile(entity: str, rng: np.random.Generator) -> str:
    """Facts of one entity as plain text, at least half of them, in their fixed order.

    >>> profile("Mars", np.random.default_rng(1))
    'Consider Mars, a planet. It is planet 4 from the Sun. It is a rocky planet.'
    """
    nouns = KIND_OF[entity].nouns
    keep = rng.permutation(len(nouns)) < rng.integers((len(nouns) + 1) // 2, len(nouns) + 1)
    return " ".join([facts.introduce(entity), *(facts.say(entity, n) for n, k in zip(nouns, keep) if k)])


def base_document(rng: np.random.Generator, plain_text: float = 0.25) -> Document:
    """One document. `plain_text` is the share of documents (not of tokens) that are plain text.

    Of the others, one in ten is a skeleton or one of its points, and of the rest one in eight is a short
    comparison.
    """
    if rng.random() >= plain_text:
        if rng.random() < 0.1:
            return skeleton_document(rng)
        task = short_comparison(rng) if rng.random() < 1 / 8 else training_task(rng)
        return task.prompt, plain(task)
    entity = _ENTITIES[rng.integers(len(_ENTITIES))]
    following = facts.successor(entity)
    if following is not None and rng.random() < 0.2:
        return None, say_step(entity, following)
    return None, profile(entity, rng)


def skeleton_document(rng: np.random.Generator) -> Document:
    """A document of Skeleton-of-Thought: the points of an answer, or the text of one point."""
    task = training_task(rng)
    names, texts = zip(*points(task))
    if rng.random() < 0.5:
        return sot.skeleton_prompt(task.prompt), sot.skeleton(names)
    index = int(rng.integers(len(names)))
    return sot.point_prompt(task.prompt, names, index), texts[index]


def base_documents(rng: np.random.Generator, plain_text: float = 0.25) -> Iterator[Document]:
    """Documents without end."""
    while True:
        yield base_document(rng, plain_text)


def tokenizer_corpus(documents: int = 6000, seed: int = 0) -> Iterator[str]:
    """Training text of the tokenizer: base documents, and names alone, as in a topic."""
    rng = np.random.default_rng(seed)
    for (prompt, text), _ in zip(base_documents(rng), range(documents)):
        yield f"{prompt}\n{text}" if prompt else text
    for topic in [*KIND_OF, *(f"item {i}" for i in range(1, 7))]:
        yield from [topic] * 20


def train_tokenizer() -> bytes:
    """Trains a SentencePiece model on `tokenizer_corpus`, deterministically.

    A number is one piece. The language has fewer than a thousand words, and each is a candidate piece, so a name
    is one piece per word; the vocabulary has about 1200 pieces.
    """
    corpus = list(tokenizer_corpus())
    words = collections.Counter(word for text in corpus for word in re.findall(" ?[A-Za-z]+| ?[0-9]+", text))
    with tempfile.TemporaryDirectory() as folder:
        seeds = pathlib.Path(folder, "words.tsv")
        lines = [f"{word.replace(' ', '▁')}\t{count}\n" for word, count in sorted(words.items())]
        seeds.write_text("".join(lines), encoding="utf-8")
        model = train_pieces(
            corpus,
            MOST_PIECES,
            hard_vocab_limit=False,
            model_type="unigram",
            seed_sentencepieces_file=str(seeds),
            split_digits=False,
            character_coverage=1.0,
        )
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    proto.trainer_spec.ClearField("seed_sentencepieces_file")  # the model must not depend on that path
    trained: bytes = proto.SerializeToString(deterministic=True)
    return trained
