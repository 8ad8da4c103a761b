"""The parts of the decoder: norm, rotary positions, attention, gated MLP.

Suffixes give shapes in the project's letters (`q_BxQxNxH`); P counts keys: the pool's, or Q without one.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from pasta_jax.arrays import Array
from pasta_jax.model.config import ModelConfig
from pasta_jax.model.pool import write

ACTIVATIONS = {"gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True), "silu": jax.nn.silu}

LOWEST = -1e30
"""Below every score, and finite: the peak of a query that may attend to nothing."""


class RMSNorm(nn.Module):
    """Divides by the root mean square, in float32, and multiplies by (offset + scale)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        one = nn.initializers.constant(1.0 - c.norm_offset)
        scale_D = self.param("scale", one, (x.shape[-1],), c.dtype)
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + c.norm_eps)
        return (x32 * (c.norm_offset + scale_D.astype(jnp.float32))).astype(x.dtype)


def rotary_angles(positions_BxQ: Array, head_dim: int, base: float) -> tuple[Array, Array]:
    """Cosine and sine of each position's H / 2 angles, float32 [B, Q, 1, H / 2]; once for all layers."""
    frequency = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle_BxQx1xH = positions_BxQ[..., None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle_BxQx1xH), jnp.sin(angle_BxQx1xH)


def rotate(x_BxQxNxH: Array, cos: Array, sin: Array) -> Array:
    """Rotary embedding of queries or keys: turns pairs (first half, second half) of H, in float32."""
    a, b = jnp.split(x_BxQxNxH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BxQxNxH.dtype)


def project(x: Array, weight: Array, inner: int = 1) -> Array:
    """Multiplies the last `inner` dims of x with the first of the weight, the other dims kept.

    As one plain matrix product: on CPU the gradient of an einsum over [B, Q, D] takes two and a half times as
    long.

    >>> project(jnp.ones((2, 5, 3)), jnp.ones((3, 4, 8))).shape
    (2, 5, 4, 8)
    """
    rows, columns = x.shape[:-inner], weight.shape[inner:]
    size = math.prod(weight.shape[:inner])
    return (x.reshape(-1, size) @ weight.reshape(size, -1)).reshape(*rows, *columns)


def attend(q_BxQxNxH: Array, k_BxPxKxH: Array, v_BxPxKxH: Array, may_attend_BxQxP: Array) -> Array:
    """Grouped-query attention, [B, Q, N, H]; softmax in float32.

    What a query may not attend to has weight exactly 0, and gets gradient exactly 0. A query that may attend
    to nothing (padding) gets zeros.
    """
    B, Q, N, H = q_BxQxNxH.shape
    P, K = k_BxPxKxH.shape[1:3]
    G = N // K
    # The R = G Q queries that share a kv head are rows of one matrix product: on CPU ten times as fast as a
    # batch of G.
    q_BxQxKxGxH = q_BxQxNxH.reshape(B, Q, K, G, H) / math.sqrt(H)
    q_BxKxGQxH = q_BxQxKxGxH.transpose(0, 2, 3, 1, 4).reshape(B, K, G * Q, H)
    scores_BxKxGQxP = jnp.einsum("BKRH,BPKH->BKRP", q_BxKxGQxH, k_BxPxKxH, preferred_element_type=jnp.float32)
    scores_BxKxGxQxP = scores_BxKxGQxP.reshape(B, K, G, Q, P)
    scores_BxKxGxQxP = jnp.where(may_attend_BxQxP[:, None, None], scores_BxKxGxQxP, -jnp.inf)
    peak = jax.lax.stop_gradient(jnp.max(scores_BxKxGxQxP, axis=-1, keepdims=True, initial=LOWEST))
    weight_BxKxGxQxP = jnp.exp(scores_BxKxGxQxP - peak)
    total_BxKxGxQ = jnp.sum(weight_BxKxGxQxP, axis=-1)
    weight_BxKxGQxP = weight_BxKxGxQxP.reshape(B, K, G * Q, P).astype(v_BxPxKxH.dtype)
    out_BxKxGQxH = jnp.einsum(
        "BKRP,BPKH->BKRH", weight_BxKxGQxP, v_BxPxKxH, preferred_element_type=jnp.float32
    )
    out_BxKxGxQxH = out_BxKxGQxH.reshape(B, K, G, Q, H)
    out_BxKxGxQxH /= jnp.where(total_BxKxGxQ > 0, total_BxKxGxQ, 1.0)[..., None]
    return out_BxKxGxQxH.transpose(0, 3, 1, 2, 4).reshape(B, Q, N, H).astype(v_BxPxKxH.dtype)


def attend_to_earlier(q_BxQxNxH: Array, k_BxQxKxH: Array, v_BxQxKxH: Array, may_attend_BxQxQ: Array) -> Array:
    """`attend` where no query may attend to a later key, so that almost half of the matrix need not be computed.

    Queries go in blocks, each with the keys up to its end: five blocks take two thirds of the time of one on CPU.
    """
    Q = q_BxQxNxH.shape[1]
    block = max(64, -(-Q // 8))
    blocks = [
        attend(
            q_BxQxNxH[:, start:end],
            k_BxQxKxH[:, :end],
            v_BxQxKxH[:, :end],
            may_attend_BxQxQ[:, start:end, :end],
        )
        for start in range(0, Q, block)
        for end in [min(start + block, Q)]
    ]
    return jnp.concatenate(blocks, axis=1)


class Attention(nn.Module):
    """Attention over this call's own tokens, or over a layer of the pool after writing them there."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x_BxQxD: Array,
        rotary: tuple[Array, Array],
        may_attend_BxQxP: Array,
        pool_kv: tuple[Array, Array] | None,
        start_B: Array | None,
    ) -> tuple[Array, tuple[Array, Array]]:
        """[B, Q, D] and the layer's keys and values, [B, P, K, H] each, this call's included."""
        c = self.config
        D, N, K, H = c.model_dim, c.num_heads, c.num_kv_heads, c.head_dim
        from_D = nn.initializers.normal(D**-0.5)
        to_residual = nn.initializers.normal((N * H * 2 * c.num_layers) ** -0.5)
        q_proj = self.param("q_proj", from_D, (D, N, H), c.dtype)
        k_proj = self.param("k_proj", from_D, (D, K, H), c.dtype)
        v_proj = self.param("v_proj", from_D, (D, K, H), c.dtype)
        o_proj = self.param("o_proj", to_residual, (N, H, D), c.dtype)

        q_BxQxNxH = rotate(project(x_BxQxD, q_proj), *rotary)
        k_BxPxKxH = rotate(project(x_BxQxD, k_proj), *rotary)
        v_BxPxKxH = project(x_BxQxD, v_proj)
        if pool_kv is None:
            out_BxQxNxH = attend_to_earlier(q_BxQxNxH, k_BxPxKxH, v_BxPxKxH, may_attend_BxQxP)
        else:
            k_BxPxKxH = write(pool_kv[0], k_BxPxKxH, start_B)
            v_BxPxKxH = write(pool_kv[1], v_BxPxKxH, start_B)
            used = may_attend_BxQxP.shape[-1]
            out_BxQxNxH = attend(q_BxQxNxH, k_BxPxKxH[:, :used], v_BxPxKxH[:, :used], may_attend_BxQxP)
        # Not an einsum: that contracts (H, N) in this order, and so copies o_proj at every step.
        return jnp.tensordot(out_BxQxNxH, o_proj, axes=2), (k_BxPxKxH, v_BxPxKxH)


class MLP(nn.Module):
    """The gated MLP: GeGLU or SwiGLU, by configuration."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BxQxD: Array) -> Array:
        c = self.config
        D, F = c.model_dim, c.mlp_dim
        from_D = nn.initializers.normal(D**-0.5)
        to_residual = nn.initializers.normal((F * 2 * c.num_layers) ** -0.5)
        gate_proj = self.param("gate_proj", from_D, (D, F), c.dtype)
        up_proj = self.param("up_proj", from_D, (D, F), c.dtype)
        down_proj = self.param("down_proj", to_residual, (F, D), c.dtype)
        gate_BxQxF = ACTIVATIONS[c.activation](project(x_BxQxD, gate_proj))
        up_BxQxF = project(x_BxQxD, up_proj)
        return project(gate_BxQxF * up_BxQxF, down_proj)


class Layer(nn.Module):
    """Attention and MLP, each on normalised input and added to the residual stream."""

    config: ModelConfig

    def setup(self) -> None:
        self.attn_norm, self.mlp_norm = RMSNorm(self.config), RMSNorm(self.config)
        self.attn, self.mlp = Attention(self.config), MLP(self.config)

    def __call__(
        self,
        x_BxQxD: Array,
        rotary: tuple[Array, Array],
        may_attend_BxQxP: Array,
        pool_kv: tuple[Array, Array] | None,
        start_B: Array | None,
    ) -> tuple[Array, tuple[Array, Array]]:
        out_BxQxD, pool_kv = self.attn(self.attn_norm(x_BxQxD), rotary, may_attend_BxQxP, pool_kv, start_B)
        x_BxQxD = x_BxQxD + out_BxQxD
        return x_BxQxD + self.mlp(self.mlp_norm(x_BxQxD)), pool_kv
