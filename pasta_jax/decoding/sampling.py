"""Drawing tokens.

A draw depends on the request's key, the thread and the index in the thread, on nothing else: the same text for
any number of lanes, batch mates, chunk length or mesh (docs/design.md, decision 9).

What may be drawn is narrowed in this order, each step on what the one before left, as in transformers:
temperature, top-k, top-p, min-p. (vLLM has min-p before top-k, which differs only beside a top-p.)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pasta_jax.arrays import Array

NEVER = -1e30
"""Logit of a token that may not be drawn; finite, so that a row with nothing legal stays a number."""

BLOCK = 256
"""Searches over V look at blocks of so many ids first: a search of one level is not vectorised on CPU."""


def draw_key(key: Array, path: Array, index: Array) -> Array:
    """fold_in(fold_in(request key, thread), index in thread): uint32 [2]. `path` names the thread."""
    return jax.random.fold_in(jax.random.fold_in(key, path), index)


def sample(
    logits: Array,
    keys: Callable[[], Array],
    temperature: Array,
    top_k: Array,
    top_p: Array,
    min_p: Array,
) -> Array:
    """One token a row.

    Args:
      logits: float32 [B, V].
      keys: makes uint32 [B, 2]. Called where tokens are drawn: greedy steps do without.
      temperature: float32 [B]; 0 takes the most likely token.
      top_k: int32 [B]; draw among so many most likely ones; 0 is all.
      top_p: float32 [B]; draw among the fewest most likely ones that have this share of the probability; 1 is
        all.
      min_p: float32 [B]; draw among those that are at least this many times as likely as the likeliest; 0 is all.

    Returns:
      int32 [B].
    """
    greedy = argmax(logits)

    def draw() -> Array:
        scaled = logits / jnp.maximum(temperature, 1e-6)[:, None]
        weight = jnp.exp(scaled - jnp.max(scaled, axis=-1, keepdims=True))
        weight = jnp.where(logits > NEVER, weight, 0.0)  # whatever the temperature
        narrowed = (top_k > 0) | (top_p < 1) | (min_p > 0)
        weight = jax.lax.cond(
            jnp.any(narrowed), lambda: keep_likely(weight, top_k, top_p, min_p), lambda: weight
        )
        # One random number a token, by the inverse of the distribution: noise for every logit costs more.
        drawn = _draw(weight, jax.vmap(jax.random.uniform)(keys()), greedy)
        return jnp.where(temperature > 0, drawn, greedy)

    return jax.lax.cond(jnp.any(temperature > 0), draw, lambda: greedy)


def keep_likely(weight: Array, top_k: Array, top_p: Array, min_p: Array) -> Array:
    """The weights with 0 for all but the top-k, then top-p, then min-p tokens.

    The most likely token always stays, and so does what is exactly as likely as the last one kept.

    Args:
      weight: float32 [B, V], of each token; the greatest of a row is 1.
      top_k, top_p, min_p: as `sample` has them.
    """
    V = weight.shape[-1]
    k = jnp.where(top_k > 0, jnp.minimum(top_k, V), V)
    kth = jax.lax.cond(
        jnp.any(top_k > 0),
        # Counted in float32, exact below 2**24: twice as fast as in int32 on CPU.
        lambda: _greatest(lambda least: jnp.sum(weight >= least, axis=-1, dtype=jnp.float32) >= k, k.shape),
        lambda: jnp.zeros(k.shape, jnp.float32),
    )
    weight = jnp.where(weight >= kth[:, None], weight, 0.0)
    share = top_p * jnp.sum(weight, axis=-1)
    pth = jax.lax.cond(
        jnp.any(top_p < 1),
        lambda: _greatest(
            lambda least: jnp.sum(jnp.where(weight >= least, weight, 0.0), axis=-1) >= share, k.shape
        ),
        lambda: jnp.zeros(k.shape, jnp.float32),
    )
    least = jnp.maximum(jnp.where(top_p < 1, pth, 0.0), min_p)  # min-p is of 1, the greatest weight
    return jnp.where(weight >= jnp.minimum(least, 1.0)[:, None], weight, 0.0)


def _greatest(enough: Callable[[Array], Array], shape: tuple[int, ...]) -> Array:
    """The greatest float32 in [0, 1] that is `enough`, where all below it are too; 0 must be.

    By its bits, from the highest: as integers they are in the order of the numbers. It takes 30 looks at the
    weights; on CPU sorting them takes the time of hundreds.

    Args:
      enough: float32 [B, 1] -> bool [B].
      shape: [B].
    """

    def next_bit(i: Array, bits: Array) -> Array:
        more = bits | (1 << (29 - i))
        return jnp.where(enough(jax.lax.bitcast_convert_type(more, jnp.float32)[:, None]), more, bits)

    bits = jax.lax.fori_loop(0, 30, next_bit, jnp.zeros(shape, jnp.int32))
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def argmax(x: Array) -> Array:
    """The first place of the greatest of each row: [B, V] -> int32 [B]."""
    blocks = _blocks(x)
    block = jnp.argmax(jnp.max(blocks, axis=-1), axis=-1)
    return _id(blocks, block, jnp.argmax(_take(blocks, block), axis=-1))


def _draw(weight: Array, point: Array, otherwise: Array) -> Array:
    """Where the sum of the weights before reaches the share `point` of their total: [B, V], [B] -> int32 [B].

    A sum in floating point may waver where nothing is added, so a token without weight is never drawn; where
    the wavering leaves none, it is `otherwise`.
    """
    blocks = _blocks(weight)
    mass = jnp.sum(blocks, axis=-1)
    upto = jnp.cumsum(mass, axis=-1)
    point = point[:, None] * upto[:, -1:]
    block = jnp.argmax((upto > point) & (mass > 0), axis=-1)
    inner = _take(blocks, block)
    before = jnp.take_along_axis(upto - mass, block[:, None], axis=-1)
    reached = (before + jnp.cumsum(inner, axis=-1) > point) & (inner > 0)
    drawn = _id(blocks, block, jnp.argmax(reached, axis=-1))
    return jnp.where(jnp.any(reached, axis=-1), drawn, otherwise)


def _blocks(x: Array) -> Array:
    """[B, V] -> [B, blocks, ids of a block]."""
    V = x.shape[-1]
    size = math.gcd(V, BLOCK)
    return x.reshape(-1, V // size, size)


def _take(blocks: Array, block: Array) -> Array:
    """One block of each row."""
    return jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]


def _id(blocks: Array, block: Array, place: Array) -> Array:
    return (block * blocks.shape[-1] + place).astype(jnp.int32)
