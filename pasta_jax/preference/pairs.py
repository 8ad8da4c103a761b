"""Pairs: of each prompt's samples the best and the worst, as documents to learn from."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from pasta_jax.arrays import Array, PairedTokens, ThreadedTokens
from pasta_jax.config import ConfigError
from pasta_jax.data.batches import permuted, steps_until
from pasta_jax.data.packing import Packer
from pasta_jax.decoding.engine import Model
from pasta_jax.files import replacing
from pasta_jax.model.transformer import Transformer
from pasta_jax.preference.sample import Record
from pasta_jax.training.losses import token_logprobs
from pasta_jax.training.update import logits_of


class Choice(NamedTuple):
    """The best and the worst sample of a prompt, by number, and their scores."""

    better: int
    worse: int
    best_score: float
    worst_score: float


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two answers to one prompt; [n] fields each, `pair` +1 and -1."""

    better: PairedTokens
    worse: PairedTokens


def choose(values: Sequence[float]) -> Choice | None:
    """Best and worst, the first of equals; None if all are equal: there is nothing to learn from them.

    >>> choose([1.0, 3.0, 0.5, 3.0])
    Choice(better=1, worse=2, best_score=3.0, worst_score=0.5)
    >>> choose([2.0, 2.0]) is None
    True
    """
    better, worse = int(np.argmax(values)), int(np.argmin(values))
    if values[better] - values[worse] < 1e-9:
        return None
    return Choice(better, worse, values[better], values[worse])


def choose_all(
    records: Sequence[Record], scored: Sequence[Sequence[float]], length: int
) -> list[Choice | None]:
    """Of each record, by its samples' scores; a pair of which an answer is longer than `length` is none."""
    choices = [choose(values) for values in scored]

    def fits(record: Record, choice: Choice) -> bool:
        return all(len(record.samples[i].document) <= length for i in choice[:2])

    return [
        choice if choice and fits(record, choice) else None
        for record, choice in zip(records, choices, strict=True)
    ]


def make_pairs(
    records: Sequence[Record],
    choices: Sequence[Choice | None],
    reference: Model,
    *,
    rows: int,
    length: int,
    path: str,
) -> list[Pair]:
    """The chosen answers with their log-probabilities under the reference, which `path` keeps (NPZ).

    Args:
      records: one a prompt.
      choices: of each record.
      reference: the model that drew the samples.
      rows, length: of the batches in which it reads them.
      path: read if it is there and of the same tokens, else written.
    """
    documents = [
        record.samples[i].document
        for record, choice in zip(records, choices, strict=True)
        if choice
        for i in choice[:2]
    ]
    if not documents:
        return []
    token = np.concatenate([document.token for document in documents])
    logprob = _kept(path, token)
    if logprob is None:
        logprob = np.concatenate(reference_logprobs(reference, documents, rows, length))
        with replacing(path, "wb") as file:
            np.savez(file, token=token, logprob=logprob)
    logprobs = np.split(logprob, np.cumsum([len(document) for document in documents])[:-1])
    paired = [
        PairedTokens(**document.fields(), pair=np.full(len(document), sign, np.int32), reference=logprob)
        for document, logprob, sign in zip(documents, logprobs, [1, -1] * (len(documents) // 2), strict=True)
    ]
    return [Pair(*both) for both in zip(paired[::2], paired[1::2], strict=True)]


def _kept(path: str, token: np.ndarray) -> np.ndarray | None:
    """Log-probabilities that an earlier run left for the same tokens."""
    if os.path.exists(path):
        with np.load(path) as file:
            if "token" in file and np.array_equal(file["token"], token):
                return np.asarray(file["logprob"])
    return None


def reference_logprobs(
    model: Model, documents: Sequence[ThreadedTokens], rows: int, length: int
) -> list[np.ndarray]:
    """Log-probability of each token's target, 0 without one: float32 [n] a document, in one forward pass each."""
    transformer = Transformer(model.config)

    @jax.jit
    def forward(params: Array, fields: dict[str, Array]) -> Array:
        batch = ThreadedTokens(**fields)
        return token_logprobs(logits_of(transformer, params, batch), batch.target)

    found: list[np.ndarray] = []
    start = 0
    while start < len(documents):
        packer, end = Packer(rows, length), start
        while end < len(documents) and packer.add(documents[end]):
            end += 1
        batch, places = packer.pack(), packer.spans()
        logprob_BxL = np.asarray(forward(model.params, batch.fields()))
        found += [logprob_BxL[row, here] for row, here in places]
        start = end
    return found


def pair_batches(
    pairs: Sequence[Pair], index: int, rows: int, length: int, *, seed: int = 0
) -> Iterator[tuple[PairedTokens, int]]:
    """Batches of whole pairs, every pair once an epoch, each epoch in another order; without end.

    Yields:
      [B, L] fields, the pairs numbered from 1, and the index with which the next batch begins.
    """
    while True:
        packer, number = Packer(rows, length), 1
        while True:
            epoch, i = divmod(index, len(pairs))
            pair = pairs[permuted(i, len(pairs), seed + epoch)]
            if not packer.add(*(_numbered(each, number) for each in (pair.better, pair.worse))):
                break
            index, number = index + 1, number + 1
        if number == 1:
            raise ConfigError(
                f"A pair of {len(pair.better)} and {len(pair.worse)} tokens does not fit into {rows} rows of "
                f"{length}. Raise --config.data.rows or --config.data.length."
            )
        yield packer.pack(), index


def _numbered(document: PairedTokens, number: int) -> PairedTokens:
    return dataclasses.replace(document, pair=document.pair * number)


def steps_for(pairs: Sequence[Pair], epochs: float, rows: int, length: int, seed: int) -> int:
    """Batches that hold so many passes over the pairs."""
    return steps_until(pair_batches(pairs, 0, rows, length, seed=seed), math.ceil(epochs * len(pairs)))
