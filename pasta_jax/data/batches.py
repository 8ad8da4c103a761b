"""From documents to batches, in an order that one integer describes.

A `Source` is finite. `Shuffled` and `Mixture` turn sources into a `Stream`: endless, seeded and indexed, so that a
run resumes from the index alone. A batch takes documents from the stream while they fit; the first that does not
fit starts the next batch. No document is lost or cut.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import queue
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent import futures
from typing import Any, Protocol, TypeVar

import numpy as np

from pasta_jax.arrays import ThreadedTokens
from pasta_jax.data.packing import Packer

T = TypeVar("T")


class Stream(Protocol):
    """Documents [L] by index 0, 1, 2, ... without end; an index always gives the same document."""

    def __getitem__(self, index: int, /) -> ThreadedTokens: ...


class Source(Stream, Protocol):
    """Documents [L] by index, `len` of them; a source that generates its documents may have any length."""

    def __len__(self) -> int: ...


# ------------------------------------------------------------------------------------------------- order


@dataclasses.dataclass(frozen=True)
class Shuffled:
    """A source as a stream: every document once per epoch, in a new order each epoch."""

    source: Source
    seed: int

    def __len__(self) -> int:
        """Number of documents in an epoch."""
        return len(self.source)

    def __getitem__(self, index: int) -> ThreadedTokens:
        return self.source[self.place(index)]

    def place(self, index: int) -> int:
        """Where in the source a document is."""
        epoch, i = divmod(index, len(self.source))
        return permuted(i, len(self.source), self.seed + epoch * 0x9E37)


class Mixture:
    """Several streams as one, by weight: each has its share of every hundred or so documents.

    Weights count documents, not tokens. They are rounded to thousandths, but never to zero.
    """

    PERIOD = 1000

    def __init__(self, streams: Sequence[Stream], weights: Sequence[float]):
        if len(streams) != len(weights) or not streams or min(weights) <= 0:
            raise ValueError(f"A mixture needs a positive weight for each stream, got {list(weights)}.")
        self.streams = list(streams)
        shares = [max(1, round(self.PERIOD * weight / sum(weights))) for weight in weights]
        # The stream that is furthest behind its share is next.
        # For each turn of a period the stream, and how many of its documents came before.
        self._turns: list[tuple[int, int]] = []
        self._counts = [0] * len(shares)
        for turn in range(1, sum(shares) + 1):
            lag = [turn * share / sum(shares) - n for share, n in zip(shares, self._counts)]
            i = lag.index(max(lag))
            self._turns.append((i, self._counts[i]))
            self._counts[i] += 1

    def __getitem__(self, index: int) -> ThreadedTokens:
        period, turn = divmod(index, len(self._turns))
        i, before = self._turns[turn]
        return self.streams[i][period * self._counts[i] + before]


def permuted(i: int, n: int, seed: int) -> int:
    """The `i`th element of a random permutation of range(n), without storing the permutation.

    A Feistel network permutes the numbers of an even number of bits; applying it again to a result outside
    the range until one is inside makes it a permutation of range(n).

    >>> sorted(permuted(i, 10, seed=1) for i in range(10)) == list(range(10))
    True
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = i >> half, i & mask
        for round_ in range(4):
            left, right = right, left ^ (_hash(right, seed * 4 + round_) & mask)
        i = left << half | right
        if i < n:
            return i


def _hash(x: int, seed: int) -> int:
    """SplitMix64."""
    x = (x + (seed + 1) * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ x >> 31


# ----------------------------------------------------------------------------------------------- batches


def next_batch(
    stream: Stream, index: int, rows: int, length: int, end: float = math.inf
) -> tuple[ThreadedTokens, int]:
    """The batch that starts with document `index`.

    Args:
      stream: the documents.
      index: the whole state of the order.
      rows: B.
      length: L.
      end: the document before which the batch ends, full or not.

    Returns:
      [B, L] fields, and the index of the first document of the next batch.

    Raises:
      ValueError: a document is longer than L.
    """
    packer, index = _filled(stream.__getitem__, index, rows, length, end)
    return packer.pack(), index


def _filled(
    document_at: Callable[[int], Any], index: int, rows: int, length: int, end: float
) -> tuple[Packer, int]:
    packer = Packer(rows, length)
    while index < end:
        document = document_at(index)
        if len(document) > length:
            raise ValueError(
                f"Document {index} has {len(document)} tokens; a row holds {length}. "
                f"Set --config.data.length={len(document)} or more."
            )
        if not packer.add(document):
            break
        index += 1
    return packer, index


def batches(
    stream: Stream, index: int, rows: int, length: int, *, end: float = math.inf
) -> Iterator[tuple[ThreadedTokens, int]]:
    """Batches of the documents before `end`, by default without end; each with the index of the next batch."""
    while index < end:
        batch, index = next_batch(stream, index, rows, length, end)
        yield batch, index


def held_out(prompts: Sequence[Hashable], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Which examples are trained on, and which are held out: a share, at least one, drawn by the seed.

    Examples with the same prompt are all on one side. Those with an empty one have nothing in common.

    >>> held_out("abcde", 0.4, seed=0)
    ([0, 3, 4], [1, 2])
    >>> held_out("abcbe", 0.4, seed=0)
    ([0, 4], [1, 2, 3])
    """
    count = max(1, round(share * len(prompts))) if share else 0
    # Hashes in order instead of a dict: there may be millions of prompts.
    hashes = (hash(prompt or ("empty", i)) for i, prompt in enumerate(prompts))
    keys = np.fromiter(hashes, np.int64, len(prompts))
    order = np.argsort(keys, kind="stable")
    ranked = keys[order]
    held = set[int]()
    for drawn in (permuted(i, len(prompts), seed) for i in range(len(prompts))):
        if len(held) >= count:
            break
        first, end = (np.searchsorted(ranked, keys[drawn], side) for side in ("left", "right"))
        held.update(order[first:end].tolist())
    return [i for i in range(len(prompts)) if i not in held], sorted(held)


def steps_until(batches: Iterator[tuple[ThreadedTokens, int]], documents: int) -> tuple[int, int]:
    """The number of batches that hold at least this many documents, and how many they hold."""
    return next((step, index) for step, (_, index) in enumerate(batches, start=1) if index >= documents)


def steps_of_sizes(size_at: Callable[[int], int], rows: int, length: int, documents: int) -> tuple[int, int]:
    """As `steps_until` for a stream from its start, by the sizes of its documents alone."""
    step = index = 0
    while index < documents:
        # A packer looks at nothing but the length of what it packs.
        _, index = _filled(lambda i: range(size_at(i)), index, rows, length, math.inf)
        step += 1
    return step, index


@contextlib.contextmanager
def prefetch(items: Iterator[T], ahead: int = 2) -> Iterator[Iterator[T]]:
    """The same items, computed by another thread while the caller is busy; its exceptions are raised here.

    The thread ends with the `with` block, however the block is left.
    """
    ready: queue.Queue[futures.Future[T]] = queue.Queue(maxsize=ahead)
    abandoned = threading.Event()

    def work() -> None:
        source = iter(items)
        more = True
        while more and not abandoned.is_set():
            item: futures.Future[T] = futures.Future()
            try:
                item.set_result(next(source))
            except BaseException as error:  # the end, or an error for the caller
                item.set_exception(error)
                more = False
            put(item)

    def put(item: futures.Future[T]) -> None:
        while not abandoned.is_set():
            with contextlib.suppress(queue.Full):
                return ready.put(item, timeout=0.1)

    def take() -> Iterator[T]:
        while True:
            try:
                item = ready.get().result()
            except StopIteration:
                return
            yield item

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        yield take()
    finally:
        abandoned.set()
        thread.join()
