"""Pairs: the best and the worst of each prompt's samples, as documents to train on."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pasta_jax.arrays import NO_TARGET, PairedTokens
from pasta_jax.config import ConfigError
from pasta_jax.data.batches import permuted, steps_until
from pasta_jax.data.packing import Packer
from pasta_jax.decoding.model import Model
from pasta_jax.files import replacing
from pasta_jax.preference.sample import Record
from pasta_jax.training.logprobs import reference_logprobs


class Choice(NamedTuple):
    """The best and the worst sample of a prompt, by number."""

    better: int
    worse: int


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two answers to one prompt; [n] fields each, `pair` +1 and -1."""

    better: PairedTokens
    worse: PairedTokens

    @property
    def prompt(self) -> bytes:
        """The tokens up to the first that is learnt, to tell whether two pairs have the same prompt."""
        first = int(np.argmax(self.better.target != NO_TARGET))
        return self.better.token[: first + 1].tobytes()


def choose_pair(values: Sequence[float]) -> Choice | None:
    """Best and worst, the first of equals; None if all are equal: there is nothing to learn from them.

    >>> choose_pair([1.0, 3.0, 0.5, 3.0])
    Choice(better=1, worse=2)
    >>> choose_pair([2.0, 2.0]) is None
    True
    """
    better, worse = int(np.argmax(values)), int(np.argmin(values))
    if values[better] - values[worse] < 1e-9:
        return None
    return Choice(better, worse)


def choose_all(
    records: Sequence[Record], scores: Sequence[Sequence[float]], length: int
) -> list[Choice | None]:
    """The choice of each record by its samples' scores; None if an answer of the pair is longer than `length`."""
    choices = [choose_pair(values) for values in scores]
    for i, (record, choice) in enumerate(zip(records, choices, strict=True)):
        if choice and any(len(record.samples[j].document) > length for j in choice):
            choices[i] = None
    return choices


def make_pairs(
    records: Sequence[Record],
    choices: Sequence[Choice | None],
    reference: Model,
    *,
    rows: int,
    length: int,
    path: str,
    parts: int = 1,
) -> list[Pair]:
    """The chosen answers with their log-probabilities under the reference, cached in `path` (NPZ).

    Args:
      records: one for each prompt.
      choices: of each record.
      reference: the model that drew the samples.
      rows, length, parts: of the batches of the forward pass, and their number of microbatches.
      path: read if it exists and has the same tokens, else written.
    """
    chosen = zip(records, choices, strict=True)
    documents = [record.samples[i].document for record, choice in chosen for i in choice or ()]
    if not documents:
        return []
    token = np.concatenate([document.token for document in documents])
    logprob = _cached(path, token)
    if logprob is None:
        logprob = np.concatenate(reference_logprobs(reference, documents, rows, length, parts))
        with replacing(path, "wb") as file:
            np.savez(file, token=token, logprob=logprob)
    logprobs = np.split(logprob, np.cumsum([len(document) for document in documents])[:-1])
    paired = [
        PairedTokens(**document.fields(), pair=np.full(len(document), sign, np.int32), reference=logprob)
        for document, logprob, sign in zip(documents, logprobs, [1, -1] * (len(documents) // 2), strict=True)
    ]
    return [Pair(better, worse) for better, worse in zip(paired[::2], paired[1::2], strict=True)]


def _cached(path: str, token: np.ndarray) -> np.ndarray | None:
    """Log-probabilities that an earlier run cached for the same tokens."""
    if os.path.exists(path):
        with np.load(path) as file:
            if "token" in file and np.array_equal(file["token"], token):
                return np.asarray(file["logprob"])
    return None


def pair_batches(
    pairs: Sequence[Pair],
    index: int,
    rows: int,
    length: int,
    *,
    seed: int = 0,
    parts: int = 1,
    end: float = math.inf,
) -> Iterator[tuple[PairedTokens, int]]:
    """Batches of whole pairs, every pair once an epoch, each epoch in another order; endless without an `end`.

    With microbatches both answers of a pair are in the same one; each has rows / parts rows of a batch.

    Yields:
      [B, L] fields, the pairs of each microbatch numbered from 1, and the index at which the next batch begins.
    """
    while index < end:
        packers = [Packer(rows // parts, length) for _ in range(parts)]
        while index < end:
            epoch, i = divmod(index, len(pairs))
            pair = pairs[permuted(i, len(pairs), seed + epoch)]
            if not any(_add(packer, pair) for packer in packers):
                break
            index += 1
        if not packers[0].documents or (index < end and not packers[-1].documents):  # it fits into none
            raise ConfigError(
                f"A pair of {len(pair.better)} and {len(pair.worse)} tokens does not fit into {rows // parts} rows "
                f"of {length}{f', one of {parts} microbatches' * (parts > 1)}. Raise --config.data.rows or "
                "--config.data.length."
            )
        packed = [packer.pack(like=pairs[0].better).fields() for packer in packers]
        fields = {name: np.concatenate([part[name] for part in packed]) for name in packed[0]}
        yield PairedTokens(**fields), index


def _add(packer: Packer, pair: Pair) -> bool:
    """Adds both answers of a pair, and says whether there was room."""
    number = 1 + len(packer.documents) // 2
    return packer.add(_numbered(pair.better, number), _numbered(pair.worse, number))


def _numbered(document: PairedTokens, number: int) -> PairedTokens:
    return dataclasses.replace(document, pair=document.pair * number)


def steps_for(pairs: Sequence[Pair], epochs: float, rows: int, length: int, seed: int, parts: int = 1) -> int:
    """The number of batches that hold `epochs` passes over the pairs."""
    batches = pair_batches(pairs, 0, rows, length, seed=seed, parts=parts)
    return steps_until(batches, math.ceil(epochs * len(pairs)))[0]
