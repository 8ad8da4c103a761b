"""Who sees whom: one rule, and the numbering that makes it work (docs/design.md, section 5).

Training, decoding and the specification all call this file; the model receives only its result.

    visible(q, k) = same document, k is real, and ( k.segment == q.segment and k.order <= q.order
                                                    or k.segment in q.sees )

A *segment* is a run of one thread's tokens between visibility changes, so what a token may see is
the past of its own segment and a set of finished segments. Segments are numbered in the order in which they
begin. The first is 0, the prompt's, and two events begin others:

    fork    parent and child continue in new segments, which see all that the parent could see so far
    join    the parent continues in a new segment, which sees what all the joined branches could see as well

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

import numpy as np

from pasta_jax.arrays import NO_DOC, Array, Tokens
from pasta_jax.rounding import ceil_div

WORD_BITS = 32


def visible(query: Tokens, key: Tokens) -> Array:
    """The rule. It reads `doc`, `segment` and `order`, and `sees` of the query.

    Args:
      query: [..., Q] fields.
      key: [..., P] fields.

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


def singleton(segment: Array, words: int) -> Array:
    """The set that holds just `segment`: int [...] -> uint32 [..., W]."""
    segment = segment[..., None]
    bit = np.uint32(1) << (segment % WORD_BITS).astype(np.uint32)
    return (segment // WORD_BITS == np.arange(words, dtype=np.int32)) * bit


def reach(sees: Array, segment: Array) -> Array:
    """What a thread can see at the end of `segment`: uint32 [..., W] and int [...] -> uint32 [..., W].

    A fork gives it to parent and child as their `sees`; a join gives the parent its own together with those
    of the branches it joins.
    """
    return sees | singleton(segment, sees.shape[-1])


def max_segments(threads: int) -> int:
    """How many segments `threads` threads can need: two at each fork, and no more joins than forks."""
    return 1 + 3 * (threads - 1)


def words_for(segments: int) -> int:
    """W, the number of words of 32 bits that hold a set of `segments` segments."""
    return ceil_div(segments, WORD_BITS)
