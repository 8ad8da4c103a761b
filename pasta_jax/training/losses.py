"""Losses. They take arrays, not models, and return a scalar with what is worth writing down."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pasta_jax.arrays import NO_TARGET, Array, PairedTokens


def sft_loss(logits_BxLxV: Array, target_BxL: Array) -> tuple[Array, dict[str, Array]]:
    """Mean cross-entropy over the tokens that have a target, all of a batch weighing the same.

    Args:
      logits_BxLxV: float32.
      target_BxL: int32; the token to predict, or NO_TARGET.

    Returns:
      the loss in nats, and measurements: loss, accuracy (no token is likelier than the target), targets (how many).
    """
    has_target_BxL = target_BxL != NO_TARGET
    targets = has_target_BxL.sum()
    # Not argmax: on CPU that takes ten times as long as the rest of the loss.
    correct_BxL = (_at_target(logits_BxLxV, target_BxL) >= logits_BxLxV.max(-1)) & has_target_BxL
    share = 1.0 / jnp.maximum(targets, 1)
    loss = -token_logprobs(logits_BxLxV, target_BxL).sum() * share
    return loss, {"loss": loss, "accuracy": correct_BxL.sum() * share, "targets": targets}


def preference_loss(
    logits_BxLxV: Array,
    batch: PairedTokens,
    *,
    kind: str = "bonbon",
    alpha: float = 0.005,
    margin: float = 1.0,
    beta: float = 0.1,
) -> tuple[Array, dict[str, Array]]:
    """Loss on pairs of answers, a mean over pairs; log-probabilities are summed over an answer's tokens.

        h       = log p(better) / p(worse) - log ref(better) / ref(worse)
        bonbon    alpha * -log p(better) + (1 - alpha) * (h - margin)^2     PASTA section 4; BoNBoN (2406.00832)
        ipo       (h - margin)^2                                            Azar et al. (2310.12036), eq. 17
        dpo       -log sigmoid(beta * h)                                    Rafailov et al. (2305.18290), eq. 7

    The paper writes `1 / beta` for the margin, IPO `1 / (2 beta)`; `bonbon_margin` is what best-of-n implies.

    Args:
      logits_BxLxV: float32.
      batch: [B, L] fields; both answers of a pair are in it.
      kind: "bonbon", "ipo" or "dpo".
      alpha: weight of the likelihood of the better answer.
      margin: nats by which the better answer should gain on the worse.
      beta: steepness of the dpo loss, per nat.

    Returns:
      the loss, and measurements: loss, margin (mean h, nats), accuracy (share of pairs with h > 0),
      better (mean log-probability of the better answers), pairs.
    """
    logprob_BxL = token_logprobs(logits_BxLxV, batch.target)
    most = batch.token.size // 2  # pairs a batch can hold at all: two tokens each

    def by_pair(value_BxL: Array, sign: int) -> Array:
        """Sums over the better (+1) or the worse (-1) answer of each pair: [pairs]."""
        pair_BxL = jnp.maximum(sign * batch.pair, 0)
        return jax.ops.segment_sum(value_BxL.ravel(), pair_BxL.ravel(), most + 1)[1:]

    better, worse = by_pair(logprob_BxL, +1), by_pair(logprob_BxL, -1)
    h = (better - worse) - (by_pair(batch.reference, +1) - by_pair(batch.reference, -1))
    losses = {
        "bonbon": lambda: alpha * -better + (1 - alpha) * (h - margin) ** 2,
        "ipo": lambda: (h - margin) ** 2,
        "dpo": lambda: -jax.nn.log_sigmoid(beta * h),
    }[kind]()
    real = by_pair(jnp.ones_like(logprob_BxL), +1) > 0
    pairs = real.sum()
    share = 1.0 / jnp.maximum(pairs, 1)

    def mean(values: Array) -> Array:
        return jnp.where(real, values, 0.0).sum() * share

    loss = mean(losses)
    return loss, {
        "loss": loss,
        "margin": mean(h),
        "accuracy": mean((h > 0).astype(h.dtype)),
        "better": mean(better),
        "pairs": pairs,
    }


def bonbon_margin(samples: int) -> float:
    """(n-1) H_(n-1): how much better-than-worst the best of n samples is, in nats (PAPER.md section 2).

    >>> round(bonbon_margin(8), 2), round(bonbon_margin(10), 4)
    (18.15, 25.4607)
    """
    return (samples - 1) * sum(1 / m for m in range(1, samples))


def token_logprobs(logits_BxLxV: Array, target_BxL: Array) -> Array:
    """Log-probability of each target, 0 where there is none: float32 [B, L]."""
    logprob_BxL = _at_target(logits_BxLxV, target_BxL) - jax.nn.logsumexp(logits_BxLxV, axis=-1)
    return jnp.where(target_BxL != NO_TARGET, logprob_BxL, 0.0)


def _at_target(logits_BxLxV: Array, target_BxL: Array) -> Array:
    """The logit of each target; of some token where there is none."""
    some_target_BxLx1 = jnp.where(target_BxL != NO_TARGET, target_BxL, 0)[..., None]
    return jnp.take_along_axis(logits_BxLxV, some_target_BxLx1, axis=-1)[..., 0]
