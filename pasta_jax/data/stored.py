"""The examples of a file by number, of which memory holds no more than their places."""

from __future__ import annotations

import array
import contextlib
import dataclasses
import hashlib
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any

import numpy as np

from pasta_jax.arrays import ThreadedTokens
from pasta_jax.data.fitting import Account, Fitter, fitting
from pasta_jax.data.reading import Entry, RecordError
from pasta_jax.data.records import Example, Problem
from pasta_jax.files import unwritten

_FIELDS = 6  # offset, bytes, checksum, line or number of the record, turn, cut


@dataclasses.dataclass(frozen=True)
class Stored(Sequence[ThreadedTokens]):
    """Documents of a file [L], laid out on demand from the records in it.

    Attributes:
      path: the file's name.
      fitter: makes documents of examples.
      file: the file itself if its records are plain lines, else a temporary copy of them.
      places: int64 [n, 6], where to find each example.
      asked: hash of what the user said first in each, to tell equal ones; none if not asked for.
    """

    path: str
    fitter: Fitter
    file: IO[bytes]
    places: np.ndarray
    asked: Sequence[int] = ()
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.of(range(len(self))[index])
        cut = int(self.places[index][-1])
        return self.fitter.document(self.fitter.at(self.example(index), cut))

    def example(self, index: int) -> Example:
        """An example, read again. Raises RecordError if its record is another one now."""
        offset, size, checksum, number, turn, _ = map(int, self.places[index])
        with self.lock:
            self.file.seek(offset)
            data = self.file.read(size)
        if zlib.crc32(data) != checksum:
            raise RecordError(
                f"{self.path} has changed while it is used (line {number}). Put it back, and run the same command "
                "again to go on."
            )
        examples = self.fitter.reader.examples(Entry(number, "line", data, offset))
        return next(example for example in examples if example.turn == turn)

    def examples(self) -> Iterator[Example]:
        """All examples, one after another."""
        return map(self.example, range(len(self)))

    def of(self, indices: Sequence[int]) -> Stored:
        """Some of the examples."""
        return dataclasses.replace(self, places=self.places[np.asarray(indices, np.int64)], asked=())


def store(
    path: str,
    found: Iterable[Entry],
    fitter: Fitter,
    account: Account,
    keep: Callable[[Problem], object],
    *,
    is_grouped: bool = False,
) -> Stored:
    """Reads a file once, and notes where the examples are that can be used.

    Args:
      path: of the file.
      found: its records (`reading.entries`); those that are no plain lines are copied to a temporary file.
      fitter, account, keep: as in `fitting`.
      is_grouped: whether `Stored.asked` is wanted.
    """
    copy = tempfile.TemporaryFile()  # noqa: SIM115
    rows, asked = array.array("q"), array.array("Q")
    for entry, fits in fitting(found, fitter, account, keep):
        if (offset := entry.offset) < 0:
            offset = copy.tell()
            with _writing(path):
                copy.write(entry.data)
        for fit in fits:
            example = fit.example
            place = offset, len(entry.data), zlib.crc32(entry.data), entry.number, example.turn, fit.cut
            rows.extend(place)
            if is_grouped:
                asked.append(hash_of(example.asked))
    with _writing(path):
        copy.flush()
    places = np.frombuffer(rows, np.int64).reshape(-1, _FIELDS)
    is_copied = bool(copy.tell()) or not len(places)
    file: IO[bytes] = copy if is_copied else open(path, "rb", buffering=0)  # noqa: SIM115
    return Stored(path, fitter, file, places, asked)


def hash_of(asked: str) -> int:
    """A number of 64 bits that tells apart what users asked."""
    return int.from_bytes(hashlib.blake2b(asked.encode(), digest_size=8).digest())


@contextlib.contextmanager
def _writing(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        copy = f"A copy of {path} in {tempfile.gettempdir()} (TMPDIR names another folder)"
        raise RecordError(unwritten(copy, error)) from error


@dataclasses.dataclass(frozen=True)
class Chained(Sequence[ThreadedTokens]):
    """Several sequences of documents as one."""

    parts: Sequence[Sequence[ThreadedTokens]]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        if not 0 <= index < len(self):
            raise IndexError(index)
        for part in self.parts:
            if index < len(part):
                break
            index -= len(part)
        return part[index]
