"""Drawing tokens.

A draw depends on the logits, the request's key, the thread and the token's index in the thread, and nothing else:
not on the number of lanes or threads, batch mates, chunk length or mesh (docs/design.md, decision 9).

The choice is narrowed in this order, each step working on what the one before left, as in transformers:
temperature, top-k, top-p, min-p. (vLLM has min-p before top-k, which differs only beside a top-p.)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from pasta_jax.arrays import Array

NEVER = -1e30
"""Logit of a token that may not be drawn; finite, so that a row with nothing legal stays a number."""

BLOCK = 256
"""Searches over V first look at blocks of this many ids: a search of one level is not vectorised on CPU."""


@struct.dataclass
class Draw:
    """How tokens are drawn: fields of one request, or [B] of many."""

    temperature: Array  # float32  0 takes the most likely token
    top_k: Array  # int32    draw among this many most likely tokens; 0 is all
    top_p: Array  # float32  draw among the fewest most likely tokens with this share of the probability; 1 is all
    min_p: Array  # float32  draw among tokens at least this many times as likely as the most likely one; 0 is all


def main_key(request_key: Array) -> Array:
    """The typed key of the main thread: uint32 [2] -> key [].

    Its generator is fixed: the same seed gives the same text whatever `jax_default_prng_impl` is.
    """
    return jax.random.wrap_key_data(request_key, impl="threefry2x32")


def branch_key(key: Array, fork_order: Array) -> Array:
    """The key of the branch that a thread starts with the promise whose ` />` has the order `fork_order`."""
    return jax.random.fold_in(key, 2 * fork_order + 1)


def draw_key(key: Array, index: Array) -> Array:
    """The key that draws the token at an index of a thread. Even numbers are for draws, odd ones for branches."""
    return jax.random.fold_in(key, 2 * index)


def sample(logits: Array, keys: Callable[[], Array], how: Draw) -> Array:
    """One token per row.

    Args:
      logits: float32 [B, V].
      keys: returns typed keys [B]. Only called if tokens are drawn, so greedy steps compute none.
      how: [B] fields.

    Returns:
      int32 [B].
    """
    greedy = argmax(logits)

    def draw() -> Array:
        scaled = logits / jnp.maximum(how.temperature, 1e-6)[:, None]
        weight = jnp.exp(scaled - jnp.max(scaled, axis=-1, keepdims=True))
        weight = jnp.where(logits > NEVER, weight, 0.0)  # whatever the temperature
        narrowed = (how.top_k > 0) | (how.top_p < 1) | (how.min_p > 0)
        weight = jax.lax.cond(jnp.any(narrowed), lambda: keep_likely(weight, how), lambda: weight)
        # One random number a token, by the inverse of the distribution: noise for every logit costs more.
        drawn = _draw(weight, jax.vmap(jax.random.uniform)(keys()), greedy)
        return jnp.where(how.temperature > 0, drawn, greedy)

    return jax.lax.cond(jnp.any(how.temperature > 0), draw, lambda: greedy)


def keep_likely(weight: Array, how: Draw) -> Array:
    """The weights with 0 for all but the top-k, then top-p, then min-p tokens.

    The most likely token always stays, and so do tokens exactly as likely as the last one kept.

    Args:
      weight: float32 [B, V], of each token; the greatest of a row is 1.
      how: [B] fields; the temperature is not read.
    """
    V, top_k, top_p = weight.shape[-1], how.top_k, how.top_p
    k = jnp.where(top_k > 0, jnp.minimum(top_k, V), V)
    kth = jax.lax.cond(
        jnp.any(top_k > 0),
        # Counted in float32, exact below 2**24: twice as fast as in int32 on CPU.
        lambda: _greatest(lambda low: jnp.sum(weight >= low, axis=-1, dtype=jnp.float32) >= k, k.shape),
        lambda: jnp.zeros(k.shape, jnp.float32),
    )
    weight = jnp.where(weight >= kth[:, None], weight, 0.0)
    share = top_p * jnp.sum(weight, axis=-1)

    def has_share(low: Array) -> Array:
        return jnp.sum(jnp.where(weight >= low, weight, 0.0), axis=-1) >= share

    pth = jax.lax.cond(
        jnp.any(top_p < 1), lambda: _greatest(has_share, k.shape), lambda: jnp.zeros(k.shape, jnp.float32)
    )
    low = jnp.maximum(
        jnp.where(top_p < 1, pth, 0.0), how.min_p
    )  # min-p is relative to 1, the greatest weight
    return jnp.where(weight >= jnp.minimum(low, 1.0)[:, None], weight, 0.0)


def _greatest(enough: Callable[[Array], Array], shape: tuple[int, ...]) -> Array:
    """The greatest float32 in [0, 1] for which `enough` holds: [B].

    The bits of a positive float are ordered as the float is, so they are searched from the highest. That takes 30
    passes over the weights; sorting them takes the time of hundreds on CPU.

    Args:
      enough: float32 [B, 1] -> bool [B]. It holds for 0, and for all numbers below one for which it holds.
      shape: [B].
    """

    def next_bit(i: Array, bits: Array) -> Array:
        more = bits | (1 << (29 - i))
        return jnp.where(enough(jax.lax.bitcast_convert_type(more, jnp.float32)[:, None]), more, bits)

    bits = jax.lax.fori_loop(0, 30, next_bit, jnp.zeros(shape, jnp.int32))
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def argmax(x: Array) -> Array:
    """The first index of the greatest value of each row: [B, V] -> int32 [B]."""
    blocks = _blocks(x)
    block = jnp.argmax(jnp.max(blocks, axis=-1), axis=-1)
    return _id(blocks, block, jnp.argmax(_take(blocks, block), axis=-1))


def _draw(weight: Array, point: Array, otherwise: Array) -> Array:
    """The id at which the running sum of weights passes the share `point` of their total: [B, V], [B] -> int32 [B].

    A running sum in floating point may vary where nothing is added. So ids without weight are excluded; if none is
    left, the result is `otherwise`.
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


def _id(blocks: Array, block: Array, index: Array) -> Array:
    return (block * blocks.shape[-1] + index).astype(jnp.int32)
