"""From hidden states to the scores of targets, keeping one array of logits for the backward pass and no other.

What autodiff would keep of the softcap and the softmax are further arrays of that size: a CPU has to write them to
memory. Compilers for TPUs and GPUs compute them where they are used, so there `losses.score` serves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from pasta_jax.arrays import NO_TARGET, Array
from pasta_jax.model.forms import Params
from pasta_jax.model.transformer import softcapped
from pasta_jax.training.losses import Scores, score_and_total

Product: TypeAlias = Callable[[Params, Array], Array]
"""Tables and hidden states [..., D] to float32 logits [..., V] without a softcap; linear in both."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def score_hidden(product: Product, softcap: float, tables: Params, hidden: Array, target: Array) -> Scores:
    """The scores of targets [B, L], or of parts of them one after another: [C, B, S].

    Args:
      product: from `tables` and hidden states to logits.
      softcap: of these; 0 is none.
      tables: embedding or head.
      hidden: [B, L, D], or [C, B, S, D].
      target: int32, or NO_TARGET.
    """
    return _forward(product, softcap, tables, hidden, target)[0]


def _forward(
    product: Product, softcap: float, tables: Params, hidden: Array, target: Array
) -> tuple[Scores, tuple[Any, ...]]:
    def score_part(part: tuple[Array, Array]) -> tuple[Scores, Array, Array]:
        hidden_BxSxD, target_BxS = part
        logits = softcapped(product(tables, hidden_BxSxD), softcap)
        return *score_and_total(logits, target_BxS), logits

    parts = hidden, target
    scores, total, logits = score_part(parts) if hidden.ndim == 3 else jax.lax.map(score_part, parts)
    return scores, (tables, hidden, target, total, logits)


def _backward(product: Product, softcap: float, kept: tuple[Any, ...], cotangent: Scores) -> tuple[Any, ...]:
    tables, hidden, target, total, logits = kept
    with jax.named_scope("loss"):
        of_logprob = jnp.where(target == NO_TARGET, 0.0, cotangent.logprob)[..., None]
        is_target = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == target[..., None]
        of_logits = of_logprob * (is_target - jnp.exp(logits - total[..., None]))
        if softcap:
            of_logits *= 1.0 - jnp.square(logits / softcap)
    _, pull = jax.vjp(product, tables, hidden)
    return *pull(of_logits), np.zeros(target.shape, jax.dtypes.float0)


score_hidden.defvjp(_forward, _backward)
