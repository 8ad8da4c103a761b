"""The alphabet, and the records that travel through the system.

One letter for one dimension, the same in code, comments and docs:

    B rows         L layout tokens   Q queries   S lanes      P pool      T threads
    N query heads  K kv heads        G = N / K   H head dim   D model     F mlp       V vocabulary
    Z layers       W words of 32 bits that hold a set of segments
    R, C           lines of a script, and tokens of a line; adapters have a rank R instead

A letter that is used in one function only is declared there.

`Tokens` is what a token is and what it may see, wherever it is: in a document, in the lanes of a step, in the pool.
`ThreadedTokens` is the document that both producers yield: the layout of an annotated text and the interpreter
(its trace). So a decoded answer *is* a training row. `PairedTokens` adds what preference optimization needs.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Self

Array = Any
"""A NumPy or a JAX array. Shapes and dtypes are given beside the fields and arguments."""

LARGEST_INT = 2**31 - 1
"""The largest size or count: what an int32 holds, as JAX counts."""

NO_TARGET = -1
"""In `target`: nothing is predicted from this token."""

NO_DOC = 0
"""In `doc`: padding, not a token. Real documents are numbered from 1."""


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Tokens, where they are, and what each may see.

    Every field is an integer array over the same leading dimensions: [L] for one document, [B, L] in a batch.
    `order`, `thread` and `position` are counted within a document.
    """

    token: Array  # int32 [..., L]     vocabulary id
    position: Array  # int32 [..., L]     rotary position; visibility never reads it
    doc: Array  # int32 [..., L]     document in the row, from 1; NO_DOC is padding
    segment: Array  # int32 [..., L]     the run of one thread between visibility changes that the token is in
    order: Array  # int32 [..., L]     index of the token in its thread; main's first after the prompt is 0
    sees: Array  # uint32 [..., L, W]  the set of segments that the token may read in full
    thread: Array  # int32 [..., L]     0 = main; 1, 2, ... = branches in order of promise

    def __len__(self) -> int:
        return self.token.shape[-1]

    def __getitem__(self, index: Any) -> Self:
        """Some of the tokens, as NumPy indexes the first dimension."""
        return dataclasses.replace(self, **{name: array[index] for name, array in self.fields().items()})

    def fields(self) -> dict[str, Array]:
        """The arrays by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def is_real(self) -> Array:
        """Bool [..., L]: there is a token, not padding."""
        return self.doc != NO_DOC

    @property
    def in_answer(self) -> Array:
        """Bool [..., L]: a token of the answer, not of the prompt or padding."""
        return self.is_real & (self.order >= 0)


@dataclasses.dataclass(frozen=True)
class ThreadedTokens(Tokens):
    """One or several documents, and what is to be predicted in them."""

    target: Array  # int32 [..., L]     the next token of the same thread, or NO_TARGET


@dataclasses.dataclass(frozen=True)
class PairedTokens(ThreadedTokens):
    """Answers to learn from in pairs, a better and a worse one to the same prompt; both are in the same batch."""

    pair: Array  # int32 [..., L]     +i in the better answer of the batch's pair i, from 1; -i in the worse
    reference: Array  # float32 [..., L]  log-probability of `target` under the reference; 0 without one
