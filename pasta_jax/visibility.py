"""Who sees whom: one rule, and the numbering that makes it work (docs/design.md, section 5).

Training, decoding and the specification all call this file; the model receives only its result.

    visible(q, k) = same document, k is real, and ( k.segment == q.segment and k.order <= q.order
                                                    or k.segment in q.sees )

A *segment* is a run of one thread's tokens between visibility changes, so a token is told what it may see by
its own segment (the past) and a set of finished segments. Segments are numbered in the order in which they
begin, the prompt's is 0, and there are two ways for one to begin:

    fork    parent and child go on in new segments, both of which see what the parent could see until now
    join    the parent goes on in a new segment that sees, besides, all that the joined branches could see

Worked example. `a` `P` is text and a promise in main (segment 0), `[` `b` `]` its block (segment 2), `c` main
beside the block (segment 1), `S` the sync and `d` main after it (segment 3). A dot is "may not attend":

    segment   0 0 2 2 2 1 3 3
    sees      - - 0 0 0 0 * *      * = 0, 1 and 2

    query     key: a P [ b ] c S d
    a              1 . . . . . . .
    P              1 1 . . . . . .
    [              1 1 1 . . . . .
    b              1 1 1 1 . . . .
    ]              1 1 1 1 1 . . .
    c              1 1 . . . 1 . .
    S              1 1 1 1 1 1 1 .
    d              1 1 1 1 1 1 1 1

Every function works on NumPy and on JAX arrays alike.
"""

from __future__ import annotations

import functools
import operator
from typing import Any, Protocol

import numpy as np

from pasta_jax.arrays import NO_DOC, Array
from pasta_jax.rounding import ceil_div

WORD_BITS = 32


class Key(Protocol):
    """What the rule reads of a token: the fields of `ThreadedTokens`, or lanes, or pool entries."""

    @property
    def doc(self) -> Array: ...
    @property
    def segment(self) -> Array: ...
    @property
    def order(self) -> Array: ...


class Query(Key, Protocol):
    """What the rule reads of a query."""

    @property
    def sees(self) -> Array: ...


def visible(query: Query, key: Key) -> Array:
    """The rule.

    Args:
      query: fields [..., Q], `sees` [..., Q, W].
      key: fields [..., P].

    Returns:
      bool [..., Q, P], true where the query may attend to the key.
    """
    q_doc, q_segment, q_order = (x[..., :, None] for x in (query.doc, query.segment, query.order))
    k_doc, k_segment, k_order = (x[..., None, :] for x in (key.doc, key.segment, key.order))
    own_past = (k_segment == q_segment) & (k_order <= q_order)
    return (
        (k_doc == q_doc) & (k_doc != NO_DOC) & (own_past | contains(query.sees[..., :, None, :], k_segment))
    )


def contains(segments: Array, segment: Array) -> Array:
    """Whether the set `segments` (uint32 [..., W]) holds `segment` (int32 [...]); broadcasting; bool [...]."""
    bit = (segment % WORD_BITS).astype(np.uint32)
    word = segment // WORD_BITS
    words = range(segments.shape[-1])
    hits = [(word == w) & (((segments[..., w] >> bit) & np.uint32(1)) == 1) for w in words]
    return functools.reduce(operator.or_, hits)


def singleton(segment: Array, words: int, xp: Any = np) -> Array:
    """The set that holds just `segment`: int [...] -> uint32 [..., W]."""
    segment = xp.asarray(segment)[..., None]
    bit = xp.uint32(1) << (segment % WORD_BITS).astype(xp.uint32)
    return xp.where(segment // WORD_BITS == xp.arange(words), bit, xp.uint32(0))


def reach(sees: Array, segment: Array, xp: Any = np) -> Array:
    """All that a thread can see at the end of `segment`: uint32 [..., W] and int [...] -> uint32 [..., W].

    A fork gives it to parent and child as their `sees`; a join gives the parent its own together with those
    of the branches it joins.
    """
    return sees | singleton(segment, sees.shape[-1], xp)


def max_segments(threads: int) -> int:
    """How many segments `threads` threads can need: two at each fork, and no more joins than forks."""
    return 1 + 3 * (threads - 1)


def words_for(segments: int) -> int:
    """W, the number of words of 32 bits that hold a set of `segments` segments."""
    return ceil_div(segments, WORD_BITS)
