"""The alphabet, and the records that travel through the system.

One letter a dimension, the same in code, comments and docs:

    B rows         L layout tokens   Q queries   S lanes      P pool      T threads   M segments
    N query heads  K kv heads        G = N / K   H head dim   D model     F mlp       V vocabulary
    Z layers       W words of 32 bits that hold a set of segments

`ThreadedTokens` is the one record that both producers yield: the layout of an annotated text (NumPy) and the
interpreter (its trace). So a decoded answer *is* a training row.

`PairedTokens` adds what preference optimisation needs to know of each token.
"""

from __future__ import annotations

import dataclasses
from typing import Any

Array = Any
"""A NumPy or a JAX array. Shapes and dtypes stand beside the fields and arguments."""

NO_TARGET = -1
"""In `target`: nothing is predicted from this token."""

NO_DOC = 0
"""In `doc`: padding, not a token. Real documents are numbered from 1."""


@dataclasses.dataclass(frozen=True)
class ThreadedTokens:
    """Tokens of one or several documents with all that says what each may see.

    Every field is an integer array over the same leading dimensions: [L] for one document, [B, L] in a batch.
    `order`, `thread` and `position` are counted within a document.
    """

    token: Array  # int32 [..., L]     vocabulary id
    position: Array  # int32 [..., L]     rotary position; visibility never reads it
    doc: Array  # int32 [..., L]     document in the row, from 1; NO_DOC is padding
    segment: Array  # int32 [..., L]     the run of one thread between visibility changes that the token is in
    order: Array  # int32 [..., L]     index of the token in its thread (the prompt belongs to main)
    sees: Array  # uint32 [..., L, W]  the set of segments that the token may read in full
    thread: Array  # int32 [..., L]     0 = main; 1, 2, ... = branches in order of promise
    target: Array  # int32 [..., L]     the token to predict from here, or NO_TARGET

    def __len__(self) -> int:
        return self.token.shape[-1]

    def fields(self) -> dict[str, Array]:
        """The arrays by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@dataclasses.dataclass(frozen=True)
class PairedTokens(ThreadedTokens):
    """Answers to learn from in pairs, a better and a worse one to the same prompt; both lie in the same batch."""

    pair: (
        Array  # int32 [..., L]     +i in the better answer of the batch's pair i = 1, 2, ...; -i in the worse
    )
    reference: Array  # float32 [..., L]  log-probability of `target` under the reference; 0 without one
