"""An annotated answer as plain text, in two views: as its threads see it, and as sequential writing would.

Both have the same tokens, positions and targets; they differ in who sees whom alone, so what a model predicts in
one and not in the other is due to that. `annotate.audit` compares them.

Tags are out of view in both, the promises' topics too: no token of the text sees them, and positions count the text
alone. So the views mean the same to a model that has learnt tags and to one that has never seen any.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from pasta_jax.arrays import ThreadedTokens
from pasta_jax.lang import tags
from pasta_jax.tokens.tokenizer import Vocabulary
from pasta_jax.visibility import WORD_BITS


def is_text(vocabulary: Vocabulary, document: ThreadedTokens) -> np.ndarray:
    """Bool [L]: tokens of the prompt, and those of the answer that are neither part of a tag nor its end.

    Takes one document, [L] fields, as `tokens.layout` writes it.
    """
    ids = vocabulary.tag_ids
    opened = np.cumsum(document.token == ids[tags.PROMISE_OPEN])
    closed = np.cumsum(document.token == ids[tags.PROMISE_CLOSE])
    is_tag = np.isin(document.token, [*ids.values(), *vocabulary.stops]) | (opened > closed)
    return ~is_tag | (document.order < 0)


def without_siblings(vocabulary: Vocabulary, document: ThreadedTokens) -> ThreadedTokens:
    """The view in which the answer is decoded: a block sees no block that its thread has not joined."""
    return _hidden(document, is_text(vocabulary, document))


def with_siblings(vocabulary: Vocabulary, document: ThreadedTokens) -> ThreadedTokens:
    """The view in which it is written without promises: each token sees all text before it."""
    first = int(document.order[0])
    sequential = dataclasses.replace(
        document,
        segment=np.zeros_like(document.segment),
        order=np.arange(first, first + len(document), dtype=np.int32),
        sees=np.zeros_like(document.sees),
    )
    return _hidden(sequential, is_text(vocabulary, document))


def _hidden(document: ThreadedTokens, shown: np.ndarray) -> ThreadedTokens:
    """The other tokens in a segment that no set can hold, so that none of the `shown` ones sees them."""
    nowhere = WORD_BITS * document.sees.shape[-1]
    return dataclasses.replace(
        document,
        segment=np.where(shown, document.segment, nowhere).astype(np.int32),
        position=np.maximum(np.cumsum(shown) - 1, 0).astype(np.int32),
    )
