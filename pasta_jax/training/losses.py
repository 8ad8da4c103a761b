"""Losses. They take arrays, not models, and return a scalar with what is worth writing down."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pasta_jax.arrays import NO_TARGET, Array


def sft_loss(logits_BxLxV: Array, target_BxL: Array) -> tuple[Array, dict[str, Array]]:
    """Mean cross-entropy over the tokens that have a target, all of a batch weighing the same.

    Args:
      logits_BxLxV: float32.
      target_BxL: int32; the token to predict, or NO_TARGET.

    Returns:
      the loss in nats, and measurements: loss, accuracy (of the likeliest token), targets (how many).
    """
    has_target_BxL = target_BxL != NO_TARGET
    targets = has_target_BxL.sum()
    correct_BxL = (logits_BxLxV.argmax(-1) == target_BxL) & has_target_BxL
    share = 1.0 / jnp.maximum(targets, 1)
    loss = -token_logprobs(logits_BxLxV, target_BxL).sum() * share
    return loss, {"loss": loss, "accuracy": correct_BxL.sum() * share, "targets": targets}


def token_logprobs(logits_BxLxV: Array, target_BxL: Array) -> Array:
    """Log-probability of each target, 0 where there is none: float32 [B, L]."""
    has_target_BxL = target_BxL != NO_TARGET
    some_target_BxLx1 = jnp.where(has_target_BxL, target_BxL, 0)[..., None]
    chosen_BxL = jnp.take_along_axis(logits_BxLxV, some_target_BxLx1, axis=-1)[..., 0]
    return jnp.where(has_target_BxL, chosen_BxL - jax.nn.logsumexp(logits_BxLxV, axis=-1), 0.0)
