"""Grouped-query attention under a boolean matrix of who may attend to whom."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from pasta_jax.arrays import Array

LOWEST = -1e30
"""Below every score, and finite: the peak of a query that may attend to nothing."""


@jax.named_scope("attend")
def attend(
    q_BxQxNxH: Array,
    k_BxKxPxH: Array,
    v_BxKxPxH: Array,
    may_attend_BxQxP: Array,
    query_scale: float = 0.0,
    softcap: float = 0.0,
) -> Array:
    """Grouped-query attention, [B, Q, N, H]; softmax in float32.

    Scores are divided by the square root of `query_scale` (0 means H); with a softcap they become
    softcap * tanh(score / softcap). A key that a query may not attend to has weight exactly 0 and gets gradient
    exactly 0. A query that may attend to nothing (padding) gets zeros.
    """
    return attend_and_sum(q_BxQxNxH, k_BxKxPxH, v_BxKxPxH, may_attend_BxQxP, query_scale, softcap)[0]


def attend_and_sum(
    q_BxQxNxH: Array,
    k_BxKxPxH: Array,
    v_BxKxPxH: Array,
    may_attend_BxQxP: Array,
    query_scale: float = 0.0,
    softcap: float = 0.0,
) -> tuple[Array, Array]:
    """`attend`, and the logarithm of each softmax's sum: float32 [B, K, G, Q], infinite for padding."""
    B, Q = q_BxQxNxH.shape[:2]
    K = k_BxKxPxH.shape[1]
    scores_BxKxGQxP, _, _ = scores_of(
        grouped(q_BxQxNxH, K), k_BxKxPxH, may_attend_BxQxP, query_scale, softcap
    )
    peak = jax.lax.stop_gradient(jnp.max(scores_BxKxGQxP, axis=-1, keepdims=True, initial=LOWEST))
    weight_BxKxGQxP = jnp.exp(scores_BxKxGQxP - peak)
    total_BxKxGQ = jnp.sum(weight_BxKxGQxP, axis=-1)
    out_BxKxGQxH = jnp.einsum(
        "BKRP,BKPH->BKRH",
        weight_BxKxGQxP.astype(v_BxKxPxH.dtype),
        v_BxKxPxH,
        preferred_element_type=jnp.float32,
    )
    out_BxKxGQxH /= jnp.where(total_BxKxGQ > 0, total_BxKxGQ, 1.0)[..., None]
    log_total = jnp.where(total_BxKxGQ > 0, peak[..., 0] + jnp.log(total_BxKxGQ), jnp.inf)
    return ungrouped(out_BxKxGQxH, Q).astype(v_BxKxPxH.dtype), log_total.reshape(B, K, -1, Q)


def scores_of(
    q_BxKxGQxH: Array, k_BxKxPxH: Array, may_attend_BxQxP: Array, query_scale: float, softcap: float
) -> tuple[Array, Array | float, Array]:
    """Scores [B, K, G Q, P], -inf where a query may not attend; their slope under the softcap; scaled queries."""
    B, K, R, H = q_BxKxGQxH.shape
    Q, P = may_attend_BxQxP.shape[1:]
    scaled_BxKxGQxH = q_BxKxGQxH / math.sqrt(query_scale or H)
    scores = jnp.einsum("BKRH,BKPH->BKRP", scaled_BxKxGQxH, k_BxKxPxH, preferred_element_type=jnp.float32)
    slope: Array | float = 1.0
    if softcap:
        bent = jnp.tanh(scores / softcap)
        scores, slope = softcap * bent, 1.0 - jnp.square(bent)
    scores = jnp.where(may_attend_BxQxP[:, None, None], scores.reshape(B, K, R // Q, Q, P), -jnp.inf)
    return scores.reshape(B, K, R, P), slope, scaled_BxKxGQxH


def grouped(x_BxQxNxH: Array, K: int) -> Array:
    """[B, K, G Q, H]: the queries that share a kv head are rows of one product.

    On CPU that is ten times as fast as a batch of G products.
    """
    B, Q, N, H = x_BxQxNxH.shape
    return x_BxQxNxH.reshape(B, Q, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)


def ungrouped(x_BxKxGQxH: Array, Q: int) -> Array:
    """The inverse of `grouped`: [B, Q, N, H]."""
    B, K, _, H = x_BxKxGQxH.shape
    return x_BxKxGQxH.reshape(B, K, -1, Q, H).transpose(0, 3, 1, 2, 4).reshape(B, Q, -1, H)
