"""Losses take arrays, not models, and return sums: the sums of a batch's parts add up to the batch's.

A loss needs two numbers per target (`score`), not its logits, so the logits of a large vocabulary are never held
for all tokens at once.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from pasta_jax.arrays import NO_TARGET, Array, PairedTokens


@struct.dataclass
class Scores:
    """How a model rates the target of each token."""

    logprob: Array  # float32 [B, L]  its log-probability, 0 where there is no target
    is_likeliest: Array  # bool [B, L]  no token is likelier; false where there is no target


def score(logits_BxLxV: Array, target_BxL: Array) -> Scores:
    """From float32 logits, and int32 targets or NO_TARGET."""
    return score_and_total(logits_BxLxV, target_BxL)[0]


@jax.named_scope("loss")
def score_and_total(logits_BxLxV: Array, target_BxL: Array) -> tuple[Scores, Array]:
    """`score`, and the logarithm of each softmax's sum, float32 [B, L]."""
    has_target_BxL = target_BxL != NO_TARGET
    is_target_BxLxV = jax.lax.broadcasted_iota(jnp.int32, logits_BxLxV.shape, 2) == target_BxL[..., None]
    # Not by index: the gradient of that scatters into zeros, as large as the logits.
    at_target_BxL = jnp.sum(jnp.where(is_target_BxLxV, logits_BxLxV, 0.0), axis=-1)
    total_BxL = jax.nn.logsumexp(logits_BxLxV, axis=-1)
    logprob_BxL = at_target_BxL - total_BxL
    # Not argmax: on CPU that takes ten times as long as the rest of the loss.
    is_likeliest_BxL = (at_target_BxL >= logits_BxLxV.max(-1)) & has_target_BxL
    return Scores(jnp.where(has_target_BxL, logprob_BxL, 0.0), is_likeliest_BxL), total_BxL


@struct.dataclass
class Sums:
    """Sums whose means are a loss and its measurements.

    Attributes:
      values: float32 sums by name, "loss" among them, over targets or pairs.
      count: int32, their number.
      counted: its name among the measurements.
    """

    values: dict[str, Array]
    count: Array
    counted: str = struct.field(pytree_node=False)

    def mean(self) -> tuple[Array, dict[str, Array]]:
        """The loss, and the measurements: all means, and the count. The means are zero if nothing was counted."""
        means = {name: value * self.share for name, value in self.values.items()}
        return means["loss"], means | {self.counted: self.count}

    @property
    def share(self) -> Array:
        """The weight of one target or pair in the mean."""
        return 1.0 / jnp.maximum(self.count, 1)


def sft_loss(scores: Scores, target_BxL: Array) -> Sums:
    """Cross-entropy over the tokens that have a target, all of a batch with the same weight.

    Args:
      scores: of the targets, [B, L] fields.
      target_BxL: int32; the token to predict, or NO_TARGET.

    Returns:
      sums over targets: loss (nats), accuracy (no token is likelier than the target).
    """
    accuracy = scores.is_likeliest.sum().astype(jnp.float32)
    return Sums(
        {"loss": -scores.logprob.sum(), "accuracy": accuracy}, (target_BxL != NO_TARGET).sum(), "targets"
    )


def preference_loss(
    scores: Scores,
    batch: PairedTokens,
    *,
    kind: str = "bonbon",
    alpha: float = 0.005,
    margin: float = 1.0,
    beta: float = 0.1,
) -> Sums:
    """Loss on pairs of answers; its mean is over pairs, and log-probabilities are summed over an answer's tokens.

        h       = log p(better) / p(worse) - log ref(better) / ref(worse)
        bonbon    alpha * -log p(better) + (1 - alpha) * (h - margin)^2     PASTA section 4; BoNBoN (2406.00832)
        ipo       (h - margin)^2                                            Azar et al. (2310.12036), eq. 17
        dpo       -log sigmoid(beta * h)                                    Rafailov et al. (2305.18290), eq. 7

    The paper writes `1 / beta` for the margin, IPO `1 / (2 beta)`; `bonbon_margin` is what best-of-n implies.

    Args:
      scores: of the targets, [B, L] fields.
      batch: [B, L] fields; both answers of a pair are in it.
      kind: "bonbon", "ipo" or "dpo".
      alpha: weight of the likelihood of the better answer.
      margin: nats by which the better answer should gain on the worse.
      beta: steepness of the dpo loss, per nat.

    Returns:
      sums over pairs: loss, margin (h, nats), accuracy (h > 0), better (log-probability of the better answer).
    """
    max_pairs = batch.token.size // 2  # two tokens each

    def by_pair(value_BxL: Array, sign: int) -> Array:
        """Sums over the better (+1) or the worse (-1) answer of each pair: [pairs]."""
        pair_BxL = jnp.maximum(sign * batch.pair, 0)
        return jax.ops.segment_sum(value_BxL.ravel(), pair_BxL.ravel(), max_pairs + 1)[1:]

    better, worse = by_pair(scores.logprob, +1), by_pair(scores.logprob, -1)
    h = (better - worse) - (by_pair(batch.reference, +1) - by_pair(batch.reference, -1))
    losses = {
        "bonbon": lambda: alpha * -better + (1 - alpha) * (h - margin) ** 2,
        "ipo": lambda: (h - margin) ** 2,
        "dpo": lambda: -jax.nn.log_sigmoid(beta * h),
    }[kind]()
    real = by_pair(jnp.ones_like(scores.logprob), +1) > 0

    def total(values: Array) -> Array:
        return jnp.where(real, values, 0.0).sum()

    values = {"loss": losses, "margin": h, "accuracy": (h > 0).astype(h.dtype), "better": better}
    return Sums({name: total(value) for name, value in values.items()}, real.sum(), "pairs")


def bonbon_margin(samples: int) -> float:
    """(n-1) H_(n-1): how much better-than-worst the best of n samples is, in nats (BoNBoN, arXiv 2406.00832).

    >>> round(bonbon_margin(8), 2), round(bonbon_margin(10), 4)
    (18.15, 25.4607)
    """
    return (samples - 1) * sum(1 / m for m in range(1, samples))
