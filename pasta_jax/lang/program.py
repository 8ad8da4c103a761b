"""A PASTA-LANG program: the structure of an annotated answer, apart from its spelling.

An annotated answer is text in which some parts are *promised*: the main thread leaves a promise, and a
branch keeps it (paper section 3). The spelling lives in `tags`, reading in `parse`, writing in `render`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TypeAlias

MIN_TOKENS, MAX_TOKENS = 1, 99


def length_in_tens(tokens: float) -> int:
    """The number in the promise of a block of tokens (docs/design.md, decision 1: nearest ten, 1 to 99)."""
    return min(max(MIN_TOKENS, round(tokens / 10)), MAX_TOKENS)


@dataclasses.dataclass(frozen=True)
class Text:
    """Ordinary text, decoded by the thread that it belongs to."""

    text: str


@dataclasses.dataclass(frozen=True)
class Promise:
    """A promise and the block that keeps it.

    Attributes:
      topic: what the block is about, 1 to 3 words; no quotes, angle brackets, backslashes or newlines.
      tokens: the estimated length of the block, in tens of tokens, 1 to 99 (paper section 6.2, Pred-10X).
      block: the content of the block, decoded by a thread of its own.
    """

    topic: str
    tokens: int
    block: tuple[Node, ...]

    @property
    def is_bare(self) -> bool:
        """Whether topic ("") and length (0) are missing: a fork of the apar dialect, written `<promise/>`."""
        return not self.topic and not self.tokens


@dataclasses.dataclass(frozen=True)
class Sync:
    """The thread waits for every branch that it has promised, and sees their text from then on."""


Node: TypeAlias = Text | Promise | Sync


@dataclasses.dataclass(frozen=True)
class Program:
    """An annotated answer."""

    nodes: tuple[Node, ...]

    def promises(self) -> Iterator[Promise]:
        """Every promise in document order, nested ones after the one that holds them."""
        todo = [*reversed(self.nodes)]
        while todo:
            node = todo.pop()
            if isinstance(node, Promise):
                yield node
                todo += reversed(node.block)
