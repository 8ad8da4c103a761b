"""From records to examples as bytes, by several processes."""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import NamedTuple

import numpy as np

from pasta_jax.config import DataConfig
from pasta_jax.data.fitting import Account, Fit, Fitter, fitting
from pasta_jax.data.prepared import ROW
from pasta_jax.data.reading import Entry, RecordError, entries
from pasta_jax.data.records import Problem
from pasta_jax.data.shards import Encoded, serialized
from pasta_jax.data.stored import hash_of
from pasta_jax.tokens.layout import threads_in
from pasta_jax.tokens.load import tokenizer_from_bytes

BATCH = 256
"""Records that a worker takes at a time."""

FEW = 16
"""Batches for which no workers are started."""


class Batch(NamedTuple):
    """Records of one file, not read yet."""

    source: int
    entries: list[Entry]


class EncodedBatch(NamedTuple):
    """What became of a batch: examples as bytes with their rows of the index, and records that cannot be used."""

    source: int
    examples: list[bytes]
    rows: np.ndarray
    account: Account
    problems: list[Problem]


def encode(batch: Batch, fitter: Fitter, names: Sequence[str]) -> EncodedBatch:
    """The examples of some records."""
    account, problems = Account(names[batch.source]), list[Problem]()
    examples: list[bytes] = []
    rows: list[tuple[int, int, int]] = []
    vocabulary = fitter.tokenizer.vocabulary
    for entry, fits in fitting(batch.entries, fitter, account, problems.append):
        for fit in fits:
            examples.append(serialized(_encoded(fit, batch.source, entry)))
            size = len(fit.prompt) + len(fit.answer)
            rows.append((hash_of(fit.example.asked), size, threads_in(vocabulary, fit.answer)))
    account.first.clear()  # its problems are counted again, in order
    return EncodedBatch(batch.source, examples, np.array(rows, ROW), account, problems)


def _encoded(fit: Fit, source: int, entry: Entry) -> Encoded:
    return Encoded(fit.prompt, fit.answer, source, entry.number, fit.example.turn)


def read_batches(names: Sequence[str], skip: int) -> Iterator[Batch]:
    """All records in batches, without the first batches. Raises RecordError."""
    done = 0
    for source, name in enumerate(names):
        found = entries(name)
        while some := list(itertools.islice(found, BATCH)):
            done += 1
            if done > skip:
                yield Batch(source, some)


@contextlib.contextmanager
def encoding(
    batches: Iterator[Batch], fitter: Fitter, names: Sequence[str], workers: int
) -> Iterator[Iterator[EncodedBatch]]:
    """What becomes of batches, in their order, by several processes if there are many."""
    head = list(itertools.islice(batches, FEW))
    every = itertools.chain(head, batches)
    if workers == 1 or len(head) < FEW:
        yield (encode(batch, fitter, names) for batch in every)
        return
    arguments = fitter.config, fitter.tokenizer.to_bytes(), list(names)
    pool = futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_begin_worker, initargs=arguments
    )
    try:
        yield _in_order(pool, every, ahead=3 * workers)
    except futures.BrokenExecutor as error:
        raise RecordError(
            "A worker was killed, perhaps since memory is short. Run the same command again to go on, with fewer "
            "--workers."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(pool: futures.Executor, batches: Iterator[Batch], ahead: int) -> Iterator[EncodedBatch]:
    waiting: collections.deque[futures.Future[EncodedBatch]] = collections.deque()
    for batch in batches:
        waiting.append(pool.submit(_work, batch))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


_worker: Callable[[Batch], EncodedBatch] | None = None
"""In a worker: encodes a batch."""


def _begin_worker(config: DataConfig, tokenizer: bytes, names: list[str]) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command ends its workers itself
    threading.Thread(target=_end_with_parent, daemon=True).start()
    fitter = Fitter(config, tokenizer_from_bytes(tokenizer).with_dialect(config.dialect))
    _worker = functools.partial(encode, fitter=fitter, names=names)


def _end_with_parent() -> None:
    """A worker would wait for ever for a command that was killed."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _work(batch: Batch) -> EncodedBatch:
    assert _worker is not None
    return _worker(batch)
