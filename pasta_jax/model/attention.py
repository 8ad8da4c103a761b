"""Grouped-query attention under a boolean matrix of who may attend to whom."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from pasta_jax.arrays import Array
from pasta_jax.rounding import ceil_div

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
    B, Q, N, H = q_BxQxNxH.shape
    K, P = k_BxKxPxH.shape[1:3]
    G = N // K
    # The R = G Q queries that share a kv head are rows of one product: on CPU ten times as fast as a batch of G.
    q_BxQxKxGxH = q_BxQxNxH.reshape(B, Q, K, G, H) / math.sqrt(query_scale or H)
    q_BxKxGQxH = q_BxQxKxGxH.transpose(0, 2, 3, 1, 4).reshape(B, K, G * Q, H)
    scores_BxKxGQxP = jnp.einsum("BKRH,BKPH->BKRP", q_BxKxGQxH, k_BxKxPxH, preferred_element_type=jnp.float32)
    if softcap:
        scores_BxKxGQxP = softcap * jnp.tanh(scores_BxKxGQxP / softcap)
    scores_BxKxGxQxP = scores_BxKxGQxP.reshape(B, K, G, Q, P)
    scores_BxKxGxQxP = jnp.where(may_attend_BxQxP[:, None, None], scores_BxKxGxQxP, -jnp.inf)
    peak = jax.lax.stop_gradient(jnp.max(scores_BxKxGxQxP, axis=-1, keepdims=True, initial=LOWEST))
    weight_BxKxGxQxP = jnp.exp(scores_BxKxGxQxP - peak)
    total_BxKxGxQ = jnp.sum(weight_BxKxGxQxP, axis=-1)
    weight_BxKxGQxP = weight_BxKxGxQxP.reshape(B, K, G * Q, P).astype(v_BxKxPxH.dtype)
    out_BxKxGQxH = jnp.einsum(
        "BKRP,BKPH->BKRH", weight_BxKxGQxP, v_BxKxPxH, preferred_element_type=jnp.float32
    )
    out_BxKxGxQxH = out_BxKxGQxH.reshape(B, K, G, Q, H)
    out_BxKxGxQxH /= jnp.where(total_BxKxGxQ > 0, total_BxKxGxQ, 1.0)[..., None]
    return out_BxKxGxQxH.transpose(0, 3, 1, 2, 4).reshape(B, Q, N, H).astype(v_BxKxPxH.dtype)


def attend_to_earlier(
    q_BxQxNxH: Array,
    k_BxKxQxH: Array,
    v_BxKxQxH: Array,
    may_attend_BxQxQ: Array,
    query_scale: float = 0.0,
    softcap: float = 0.0,
) -> Array:
    """`attend` where no query may attend to a later key, so that almost half of the scores need not be computed.

    It goes by blocks of queries, each with the keys up to its end. On CPU five blocks take two thirds of the time
    of one.
    """
    Q = q_BxQxNxH.shape[1]
    block = max(64, ceil_div(Q, 8))
    blocks = [
        attend(
            q_BxQxNxH[:, start:end],
            k_BxKxQxH[:, :, :end],
            v_BxKxQxH[:, :, :end],
            may_attend_BxQxQ[:, start:end, :end],
            query_scale,
            softcap,
        )
        for start, end in zip(range(0, Q, block), range(block, Q + block, block))
    ]
    return jnp.concatenate(blocks, axis=1)
