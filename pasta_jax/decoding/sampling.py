"""Drawing tokens.

A draw depends on the request's key, the thread and the index in the thread, on nothing else: the same text for
any number of lanes, batch mates, chunk length or mesh (DESIGN.md decision 9).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pasta_jax.arrays import Array

NEVER = -1e30
"""Logit of a token that may not be drawn; finite, so that a row with nothing legal stays a number."""


def draw_key(key: Array, path: Array, index: Array) -> Array:
    """fold_in(fold_in(request key, thread), index in thread): uint32 [2]. `path` names the thread."""
    return jax.random.fold_in(jax.random.fold_in(key, path), index)


def sample(logits: Array, keys: Array, temperature: Array, top_k: Array, top_p: Array) -> Array:
    """One token a row.

    Args:
      logits: float32 [B, V].
      keys: uint32 [B, 2].
      temperature: float32 [B]; 0 takes the most likely token.
      top_k: int32 [B]; draw among so many most likely ones; 0 is all.
      top_p: float32 [B]; draw among the fewest most likely ones that have this probability together; 1 is all.

    Returns:
      int32 [B].
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw() -> Array:
        scaled = logits / jnp.maximum(temperature, 1e-6)[:, None]
        kept = jax.lax.cond(
            jnp.any((top_k > 0) | (top_p < 1)), lambda: _keep_likely(scaled, top_k, top_p), lambda: scaled
        )
        # One random number a token, by the inverse of the distribution: noise for every logit costs more.
        weight = jnp.exp(kept - jnp.max(kept, axis=-1, keepdims=True))
        mass = jnp.cumsum(weight, axis=-1)
        point = jax.vmap(jax.random.uniform)(keys)[:, None] * mass[:, -1:]
        # A sum in floating point may waver where nothing is added: a token without weight is never drawn.
        reached = (mass > point) & (weight > 0)
        drawn = jnp.where(jnp.any(reached, axis=-1), jnp.argmax(reached, axis=-1), greedy).astype(jnp.int32)
        return jnp.where(temperature > 0, drawn, greedy)

    return jax.lax.cond(jnp.any(temperature > 0), draw, lambda: greedy)


def _keep_likely(logits: Array, top_k: Array, top_p: Array) -> Array:
    """Logits with all but the top-k and top-p tokens at NEVER; the most likely token always stays."""
    descending = jnp.sort(logits, axis=-1, descending=True)
    probability = jax.nn.softmax(descending, axis=-1)
    rank = jnp.arange(logits.shape[-1])
    in_k = (top_k[:, None] <= 0) | (rank < top_k[:, None])
    in_p = jnp.cumsum(probability, axis=-1) - probability < top_p[:, None]
    least = jnp.min(jnp.where((in_k & in_p) | (rank == 0), descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, NEVER)
