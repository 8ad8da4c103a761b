"""The parts of the decoder: norm, matrices, attention, gated MLP.

Suffixes give shapes in the project's letters (`q_BxQxNxH`); P counts keys: the pool's, or Q without one.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pasta_jax.arrays import Array
from pasta_jax.model.config import Lora, ModelConfig
from pasta_jax.model.pool import write
from pasta_jax.model.rotary import Rotary, rotate
from pasta_jax.rounding import ceil_div

ACTIVATIONS = {"gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True), "silu": jax.nn.silu}

LOWEST = -1e30
"""Below every score, and finite: the peak of a query that may attend to nothing."""


def rms_norm(x: Array, scale: Array, config: ModelConfig) -> Array:
    """Divided by the root mean square of the last dim, in float32, and multiplied by (offset + scale)."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + config.norm_eps)
    return (x32 * (config.norm_offset + scale.astype(jnp.float32))).astype(x.dtype)


def unit_scale(config: ModelConfig) -> Any:
    """Initialises a norm's scale so that it multiplies by one."""
    return nn.initializers.constant(1.0 - config.norm_offset)


class RMSNorm(nn.Module):
    """`rms_norm` with a scale of its own."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        return rms_norm(x, self.param("scale", unit_scale(c), (x.shape[-1],), c.dtype), c)


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


FEW_ROWS = 64
"""With more, the weight is as good a right operand: docs/lab-log.md."""


def project_transposed(x: Array, weight: Array, inner: int = 1, dtype: Any = None) -> Array:
    """`project` with a weight whose outputs come first, as `weights="transposed"` keeps them.

    For few rows the weight is the left operand, its rows the outputs: so XLA's CPU products of 2 to 8 rows take
    little longer than that of one, where in the other order they take twice as long. The barrier keeps XLA from
    turning the product round again.

    Args:
      x: [..., contracted].
      weight: [outputs..., contracted...].
      inner: how many dims are contracted.
      dtype: of the result; None is x's.

    >>> project_transposed(jnp.ones((2, 5, 3)), jnp.ones((4, 8, 3))).shape
    (2, 5, 4, 8)
    """
    outputs = weight.shape[: weight.ndim - inner]
    size = math.prod(weight.shape[weight.ndim - inner :])
    x_MxD, weight_FxD = x.reshape(-1, size), weight.reshape(-1, size)
    if len(x_MxD) > FEW_ROWS:
        y = jnp.einsum("MD,FD->MF", x_MxD, weight_FxD, preferred_element_type=dtype or x.dtype)
        return y.reshape(*x.shape[: x.ndim - inner], *outputs)
    y = jnp.einsum("FD,MD->FM", weight_FxD, x_MxD, preferred_element_type=dtype or x.dtype)
    return jax.lax.optimization_barrier(y).T.reshape(*x.shape[: x.ndim - inner], *outputs)


def dense(module: Attention | MLP, name: str, x: Array, shape: tuple[int, ...], inner: int = 1) -> Array:
    """The product of x and the matrix `name`, with what may stand beside that: a scale of int8, or adapters.

    Args:
      module: whose parameter it is; its config and lora say what there is.
      name: of the matrix. Beside it `name_scale` (int8: one for each column, float32), `name_lora_a` and
        `name_lora_b`.
      x: its last `inner` dims are contracted.
      shape: of the matrix, the contracted dims first.
      inner: how many those are.
    """
    c, lora = module.config, module.lora
    rows, columns = shape[:inner], shape[inner:]
    # What adds to the residual stream starts so small that 2 Z such sums leave its variance as it is.
    fan_in = math.prod(rows) * (2 * c.num_layers if name in ("o_proj", "down_proj") else 1)
    if c.weights == "int8":
        matrix = module.param(name, nn.initializers.zeros, shape, jnp.int8)
        scale = module.param(f"{name}_scale", nn.initializers.ones, columns, jnp.float32)
        y = (project(x, matrix.astype(x.dtype), inner) * scale).astype(x.dtype)
    elif c.weights == "transposed":
        matrix = module.param(name, nn.initializers.normal(fan_in**-0.5), (*columns, *rows), c.dtype)
        y = project_transposed(x, matrix, inner)
    else:
        y = project(x, module.param(name, nn.initializers.normal(fan_in**-0.5), shape, c.dtype), inner)
    if lora.rank and name in lora.targets:
        from_x = nn.initializers.normal(math.prod(rows) ** -0.5)
        a = module.param(f"{name}_lora_a", from_x, (*rows, lora.rank), c.dtype)
        b = module.param(f"{name}_lora_b", nn.initializers.zeros, (lora.rank, *columns), c.dtype)
        y = y + project(project(x, a, inner), b) * (lora.alpha / lora.rank)
    return y


def attend(
    q_BxQxNxH: Array,
    k_BxKxPxH: Array,
    v_BxKxPxH: Array,
    may_attend_BxQxP: Array,
    query_scale: float = 0.0,
    softcap: float = 0.0,
) -> Array:
    """Grouped-query attention, [B, Q, N, H]; softmax in float32.

    Scores are divided by the root of `query_scale` (0: H) and, with a softcap, bent to stay below it. What a
    query may not attend to has weight exactly 0, and gets gradient exactly 0. A query that may attend to
    nothing (padding) gets zeros.
    """
    B, Q, N, H = q_BxQxNxH.shape
    K, P = k_BxKxPxH.shape[1:3]
    G = N // K
    # The R = G Q queries that share a kv head are rows of one matrix product: on CPU ten times as fast as a
    # batch of G.
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
    """`attend` where no query may attend to a later key, so that almost half of the matrix need not be computed.

    Queries go in blocks, each with the keys up to its end: five blocks take two thirds of the time of one on CPU.
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
        for start in range(0, Q, block)
        for end in [min(start + block, Q)]
    ]
    return jnp.concatenate(blocks, axis=1)


class Attention(nn.Module):
    """Attention over this call's own tokens, or over a layer of the pool after writing them there."""

    config: ModelConfig
    lora: Lora

    @nn.compact
    def __call__(
        self,
        x_BxQxD: Array,
        rotary: Rotary,
        may_attend_BxQxP: Array,
        pool_kv: tuple[Array, Array] | None,
        start_B: Array | None,
    ) -> tuple[Array, tuple[Array, Array]]:
        """[B, Q, D] and the layer's keys and values, [B, K, P, H] each, this call's included."""
        c = self.config
        D, N, H = c.model_dim, c.num_heads, c.head_dim
        q_BxQxNxH, k_BxQxKxH, v_BxQxKxH = self._heads(x_BxQxD)
        q_BxQxNxH = rotate(q_BxQxNxH, rotary)
        k_BxKxPxH = rotate(k_BxQxKxH, rotary).swapaxes(1, 2)
        v_BxKxPxH = v_BxQxKxH.swapaxes(1, 2)
        if pool_kv is None:
            out_BxQxNxH = attend_to_earlier(
                q_BxQxNxH, k_BxKxPxH, v_BxKxPxH, may_attend_BxQxP, c.query_scale, c.attn_softcap
            )
        else:
            k_BxKxPxH = write(pool_kv[0], k_BxKxPxH, start_B)
            v_BxKxPxH = write(pool_kv[1], v_BxKxPxH, start_B)
            used = may_attend_BxQxP.shape[-1]
            out_BxQxNxH = attend(
                q_BxQxNxH,
                k_BxKxPxH[:, :, :used],
                v_BxKxPxH[:, :, :used],
                may_attend_BxQxP,
                c.query_scale,
                c.attn_softcap,
            )
        return dense(self, "o_proj", out_BxQxNxH, (N, H, D), inner=2), (k_BxKxPxH, v_BxKxPxH)

    def _heads(self, x_BxQxD: Array) -> tuple[Array, Array, Array]:
        """Queries, keys and values before rotary positions: [B, Q, N or K, H]."""
        c = self.config
        D, N, K, H = c.model_dim, c.num_heads, c.num_kv_heads, c.head_dim
        if c.fused_qkv:
            y = dense(self, "qkv_proj", x_BxQxD, (D, (N + 2 * K) * H))
            # Else XLA multiplies by parts of the matrix, and lays each out anew.
            y_BxQxJxH = jax.lax.optimization_barrier(y).reshape(*y.shape[:2], N + 2 * K, H)
            q, k, v = jnp.split(y_BxQxJxH, (N, N + K), axis=2)
        else:
            q, k, v = (
                dense(self, f"{letter}_proj", x_BxQxD, (D, n, H)) for letter, n in zip("qkv", (N, K, K))
            )
        return self._finished("q", q), self._finished("k", k), self._finished("v", v)

    def _finished(self, letter: str, y_BxQxNxH: Array) -> Array:
        """Queries, keys or values ("q", "k", "v") with what follows their matrix: bias and norm."""
        c = self.config
        if c.qkv_bias:
            y_BxQxNxH += self.param(
                f"{letter}_proj_bias", nn.initializers.zeros, y_BxQxNxH.shape[2:], c.dtype
            ).astype(y_BxQxNxH.dtype)
        if c.qk_norm and letter != "v":
            scale_H = self.param(f"{letter}_norm", unit_scale(c), (c.head_dim,), c.dtype)
            y_BxQxNxH = rms_norm(y_BxQxNxH, scale_H, c)
        return y_BxQxNxH


class MLP(nn.Module):
    """The gated MLP: GeGLU or SwiGLU, by configuration."""

    config: ModelConfig
    lora: Lora

    @nn.compact
    def __call__(self, x_BxQxD: Array) -> Array:
        c = self.config
        D, F = c.model_dim, c.mlp_dim
        gate_BxQxF = ACTIVATIONS[c.activation](dense(self, "gate_proj", x_BxQxD, (D, F)))
        up_BxQxF = dense(self, "up_proj", x_BxQxD, (D, F))
        return dense(self, "down_proj", gate_BxQxF * up_BxQxF, (F, D))


class Layer(nn.Module):
    """Attention and MLP, each on normalised input and added to the residual stream."""

    config: ModelConfig
    lora: Lora

    def setup(self) -> None:
        c = self.config
        self.attn_norm, self.mlp_norm = RMSNorm(c), RMSNorm(c)
        self.attn, self.mlp = Attention(c, self.lora), MLP(c, self.lora)
        if c.post_norms:
            self.attn_post_norm, self.mlp_post_norm = RMSNorm(c), RMSNorm(c)

    def __call__(
        self,
        x_BxQxD: Array,
        rotary: Rotary,
        may_attend_BxQxP: Array,
        pool_kv: tuple[Array, Array] | None,
        start_B: Array | None,
    ) -> tuple[Array, tuple[Array, Array]]:
        out_BxQxD, pool_kv = self.attn(self.attn_norm(x_BxQxD), rotary, may_attend_BxQxP, pool_kv, start_B)
        x_BxQxD = x_BxQxD + (self.attn_post_norm(out_BxQxD) if self.config.post_norms else out_BxQxD)
        out_BxQxD = self.mlp(self.mlp_norm(x_BxQxD))
        return x_BxQxD + (self.mlp_post_norm(out_BxQxD) if self.config.post_norms else out_BxQxD), pool_kv
