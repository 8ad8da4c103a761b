"""Packing: several whole documents per row; their `doc` numbers keep them from seeing each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pasta_jax.arrays import NO_DOC, NO_TARGET, ThreadedTokens

PADDING = {"doc": NO_DOC, "target": NO_TARGET}  # 0 for the other fields


def first_fit(lengths: Sequence[int], rows: int, length: int) -> list[int] | None:
    """The row of each document by first-fit-decreasing, or None if they do not fit.

    >>> first_fit([3, 6, 4, 7], rows=2, length=10)
    [0, 1, 1, 0]
    >>> first_fit([6, 6, 6], rows=2, length=10) is None
    True
    """
    room, rows_of = [length] * rows, [0] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((row for row in range(rows) if room[row] >= lengths[i]), None)
        if row is None:
            return None
        rows_of[i] = row
        room[row] -= lengths[i]
    return rows_of


class Packer:
    """Takes documents while they fit into B rows of L tokens."""

    def __init__(self, rows: int, length: int):
        self.rows, self.length = rows, length
        self.documents: list[ThreadedTokens] = []
        self._rows: list[int] = []
        self._room = [length] * rows

    def add(self, *documents: ThreadedTokens) -> bool:
        """Takes all of the documents, or none and returns False."""
        before = len(self.documents), [*self._rows], [*self._room]
        for document in documents:
            if not self._add(document):
                del self.documents[before[0] :]
                _, self._rows, self._room = before
                return False
        return True

    def _add(self, document: ThreadedTokens) -> bool:
        size = len(document)
        row = next((row for row in range(self.rows) if self._room[row] >= size), None)
        if row is not None:
            self._rows.append(row)
            self._room[row] -= size
        elif size > sum(self._room):
            return False
        else:  # no row has room but all together have: pack again, the longest first
            lengths = [len(d) for d in [*self.documents, document]]
            rows = first_fit(lengths, self.rows, self.length)
            if rows is None:
                return False
            self._rows = rows
            self._room = [self.length] * self.rows
            for row, used in zip(rows, lengths):
                self._room[row] -= used
        self.documents.append(document)
        return True

    def spans(self) -> list[tuple[int, slice]]:
        """The row and the columns in which `pack` puts each document."""
        return spans([len(document) for document in self.documents], self._rows, self.rows)

    def pack(self, like: ThreadedTokens | None = None) -> Any:
        """The documents as one record of their type, or if there are none of that of `like`; [B, L] fields."""
        return pack(self.documents, self._rows, self.rows, self.length, like)


def spans(lengths: Sequence[int], rows_of: Sequence[int], rows: int) -> list[tuple[int, slice]]:
    """The row and the columns of each document, with documents side by side in each row.

    >>> spans([3, 2, 4], [0, 1, 0], rows=2)
    [(0, slice(0, 3, None)), (1, slice(0, 2, None)), (0, slice(3, 7, None))]
    """
    used, result = [0] * rows, []
    for length, row in zip(lengths, rows_of):
        result.append((row, slice(used[row], used[row] + length)))
        used[row] += length
    return result


def pack(
    documents: Sequence[ThreadedTokens],
    rows_of: Sequence[int],
    rows: int,
    length: int,
    like: ThreadedTokens | None = None,
) -> Any:
    """Documents [L_i] in the given rows, as [B, L] fields; documents are numbered from 1 in each row."""
    first = documents[0] if like is None else like
    fields = {
        name: np.full((rows, length, *value.shape[1:]), PADDING.get(name, 0), value.dtype)
        for name, value in first.fields().items()
    }
    count = [0] * rows
    for document, (row, columns) in zip(documents, spans([len(d) for d in documents], rows_of, rows)):
        count[row] += 1
        for name, value in document.fields().items():
            fields[name][row, columns] = count[row] if name == "doc" else value
    return type(first)(**fields)


def real_fraction(batch: ThreadedTokens) -> float:
    """The share of a batch that is not padding."""
    return float(np.mean(np.asarray(batch.doc) != NO_DOC))
