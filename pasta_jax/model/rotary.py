"""Rotary positions: the angles of each position, computed once for all layers, and the rotation by them."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from pasta_jax.arrays import Array
from pasta_jax.model.config import ModelConfig, RopeScaling

Rotary = tuple[Array, Array]
"""Cosine and sine of each position's H / 2 angles, float32 [B, Q, 1, H / 2]."""


def rotary_of(config: ModelConfig, positions_BxQ: Array) -> dict[str, Rotary]:
    """The angles for each kind of layer in the model."""
    H, kinds = config.head_dim, set(config.kinds)
    bases = dict.fromkeys(("global", "local"), (config.rope_base, config.rope_scaling))
    if config.local_rope_base:  # Gemma 3's have their own, and no scaling
        bases["local"] = config.local_rope_base, RopeScaling()
    return {kind: rotary_angles(positions_BxQ, H, *base) for kind, base in bases.items() if kind in kinds}


def rotary_angles(
    positions_BxQ: Array, head_dim: int, base: float, scaling: RopeScaling = RopeScaling()
) -> Rotary:
    """Cosine and sine, each float32 [B, Q, 1, H / 2]."""
    frequency = jnp.asarray(frequencies(head_dim, base, scaling), jnp.float32)
    angle_BxQx1xH = positions_BxQ[..., None, None].astype(jnp.float32) * frequency
    amplitude = _amplitude(scaling)
    return jnp.cos(angle_BxQx1xH) * amplitude, jnp.sin(angle_BxQx1xH) * amplitude


def frequencies(head_dim: int, base: float, scaling: RopeScaling = RopeScaling()) -> np.ndarray:
    """Radians per position, fastest first: float64 [H / 2].

    >>> frequencies(4, 100.0).tolist()
    [1.0, 0.1]
    >>> frequencies(4, 100.0, RopeScaling("linear", factor=8.0)).tolist()
    [0.125, 0.0125]
    """
    plain = base ** (-np.arange(0, head_dim, 2) / head_dim)
    slow = plain / scaling.factor
    if scaling.kind == "none":
        return plain
    if scaling.kind == "linear":
        return slow
    if scaling.kind == "llama3":  # Llama 3.1: fast waves stay, slow ones stretch, blended in between
        turns = scaling.original_length * plain / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        stay = np.clip((turns - low) / (high - low), 0.0, 1.0)
    else:  # YaRN (Peng et al. 2023): the same by dimension

        def dimension(turns: float) -> float:
            """The dimension that makes so many turns in the original length."""
            wave = scaling.original_length / (2 * math.pi * turns)
            return head_dim * math.log(wave) / (2 * math.log(base))

        first = max(math.floor(dimension(scaling.beta_fast)), 0)
        last = min(math.ceil(dimension(scaling.beta_slow)), head_dim - 1)
        stay = 1 - np.clip((np.arange(head_dim // 2) - first) / max(last - first, 1e-3), 0.0, 1.0)
    return stay * plain + (1 - stay) * slow


def _amplitude(scaling: RopeScaling) -> float:
    if scaling.kind != "yarn":
        return 1.0
    return scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1


@jax.named_scope("rotate")
def rotate(x_BxQxNxH: Array, rotary: Rotary) -> Array:
    """Rotary embedding of queries or keys: rotates pairs (first half, second half) of H, in float32."""
    cos, sin = rotary
    a, b = jnp.split(x_BxQxNxH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BxQxNxH.dtype)
