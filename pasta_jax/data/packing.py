"""Packing: several documents to a row, none cut, none seeing another (their `doc` numbers differ)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pasta_jax.arrays import NO_DOC, NO_TARGET, ThreadedTokens

PADDING = {"doc": NO_DOC, "target": NO_TARGET}  # of the other fields it is 0


def first_fit(lengths: Sequence[int], rows: int, length: int) -> list[int] | None:
    """The row of each document by first-fit-decreasing, or None if they do not fit.

    >>> first_fit([3, 6, 4, 7], rows=2, length=10)
    [0, 1, 1, 0]
    >>> first_fit([6, 6, 6], rows=2, length=10) is None
    True
    """
    room, place = [length] * rows, [0] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((row for row in range(rows) if room[row] >= lengths[i]), None)
        if row is None:
            return None
        place[i] = row
        room[row] -= lengths[i]
    return place


class Packer:
    """Takes documents for as long as they fit in B rows of L tokens."""

    def __init__(self, rows: int, length: int):
        self.rows, self.length = rows, length
        self.documents: list[ThreadedTokens] = []
        self._place: list[int] = []
        self._room = [length] * rows

    def add(self, *documents: ThreadedTokens) -> bool:
        """Takes documents, all of them, or leaves all as it was and says False."""
        before = len(self.documents), [*self._place], [*self._room]
        for document in documents:
            if not self._add(document):
                del self.documents[before[0] :]
                _, self._place, self._room = before
                return False
        return True

    def _add(self, document: ThreadedTokens) -> bool:
        size = len(document)
        row = next((row for row in range(self.rows) if self._room[row] >= size), None)
        if row is not None:
            self._place.append(row)
            self._room[row] -= size
        elif size > sum(self._room):
            return False
        else:  # no row has room, all together have: place them anew, the longest first
            lengths = [len(d) for d in [*self.documents, document]]
            place = first_fit(lengths, self.rows, self.length)
            if place is None:
                return False
            self._place = place
            self._room = [self.length] * self.rows
            for row, used in zip(place, lengths):
                self._room[row] -= used
        self.documents.append(document)
        return True

    def spans(self) -> list[tuple[int, slice]]:
        """Where `pack` puts each document: its row, and its places there."""
        return spans([len(document) for document in self.documents], self._place, self.rows)

    def pack(self) -> Any:
        """All that was taken, a record of its kind: [B, L] fields."""
        return pack(self.documents, self._place, self.rows, self.length)


def spans(lengths: Sequence[int], place: Sequence[int], rows: int) -> list[tuple[int, slice]]:
    """One document behind the other in each row: the row and the places of each.

    >>> spans([3, 2, 4], [0, 1, 0], rows=2)
    [(0, slice(0, 3, None)), (1, slice(0, 2, None)), (0, slice(3, 7, None))]
    """
    used, found = [0] * rows, []
    for length, row in zip(lengths, place):
        found.append((row, slice(used[row], used[row] + length)))
        used[row] += length
    return found


def pack(documents: Sequence[ThreadedTokens], place: Sequence[int], rows: int, length: int) -> Any:
    """Documents [L_i], each in the row that `place` says: [B, L] fields, documents numbered from 1."""
    columns = {
        name: np.full((rows, length, *value.shape[1:]), PADDING.get(name, 0), value.dtype)
        for name, value in documents[0].fields().items()
    }
    count = [0] * rows
    for document, (row, here) in zip(documents, spans([len(d) for d in documents], place, rows)):
        count[row] += 1
        for name, value in document.fields().items():
            columns[name][row, here] = count[row] if name == "doc" else value
    return type(documents[0])(**columns)


def real_fraction(batch: ThreadedTokens) -> float:
    """How much of a batch is tokens rather than padding."""
    return float(np.mean(np.asarray(batch.doc) != NO_DOC))
