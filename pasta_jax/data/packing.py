"""Packing: several documents to a row, none cut, none seeing another (their `doc` numbers differ)."""

from __future__ import annotations

from collections.abc import Sequence

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

    def add(self, document: ThreadedTokens) -> bool:
        """Takes a document, or leaves all as it was and says False."""
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

    def pack(self) -> ThreadedTokens:
        """All that was taken: [B, L] fields."""
        return pack(self.documents, self._place, self.rows, self.length)


def pack(documents: Sequence[ThreadedTokens], place: Sequence[int], rows: int, length: int) -> ThreadedTokens:
    """Documents [L_i], each in the row that `place` says: [B, L] fields, documents numbered from 1."""
    columns = {
        name: np.full((rows, length, *value.shape[1:]), PADDING.get(name, 0), value.dtype)
        for name, value in documents[0].fields().items()
    }
    used, count = [0] * rows, [0] * rows
    for document, row in zip(documents, place):
        here = slice(used[row], used[row] + len(document))
        count[row] += 1
        for name, value in document.fields().items():
            columns[name][row, here] = count[row] if name == "doc" else value
        used[row] = here.stop
    return ThreadedTokens(**columns)


def real_fraction(batch: ThreadedTokens) -> float:
    """How much of a batch is tokens rather than padding."""
    return float(np.mean(np.asarray(batch.doc) != NO_DOC))
