"""The parts of a decoder layer: norms, attention, gated MLP.

Suffixes give shapes in the project's letters (`q_BxQxNxH`); P counts keys: the pool's, or Q without one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pasta_jax.arrays import Array
from pasta_jax.model.attention import attend
from pasta_jax.model.blocks import attend_to_earlier
from pasta_jax.model.config import Lora, ModelConfig
from pasta_jax.model.forms import Int8, OutputsFirst, project, project_fused
from pasta_jax.model.initial import initial
from pasta_jax.model.pool import write
from pasta_jax.model.rotary import Rotary, rotate

ACTIVATIONS = {"gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True), "silu": jax.nn.silu}


def rms_norm(x: Array, scale: Array, config: ModelConfig) -> Array:
    """Divides x by the root mean square of its last dimension, times (offset + scale); computed in float32."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + config.norm_eps)
    return (x32 * (config.norm_offset + scale.astype(jnp.float32))).astype(x.dtype)


def param(module: Any, name: str, shape: tuple[int, ...]) -> Array:
    """The parameter `name`; a new one starts as `initial` says."""
    c = module.config
    return module.param(name, initial(c, name, shape), shape, c.dtype)


class RMSNorm(nn.Module):
    """`rms_norm` with its own scale [D]."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return rms_norm(x, param(self, "scale", (x.shape[-1],)), self.config)


def weight(module: nn.Module, name: str, shape: tuple[int, ...]) -> Any:
    """The parameter `name` in the form in which it is held (`forms.Weight`); a new one is plain."""
    held: Any = module.get_variable("params", name)
    return held if isinstance(held, Int8 | OutputsFirst) else param(module, name, shape)


def dense(module: Attention | MLP, name: str, x: Array, shape: tuple[int, ...], inner: int = 1) -> Array:
    """The product of x and the matrix `name`; plus that of its adapters, if the module's `lora` has some for it.

    Args:
      module: whose parameters `name`, `name_lora_a` and `name_lora_b` are.
      name: of the matrix.
      x: its last `inner` dimensions are contracted.
      shape: of the matrix, the contracted dimensions first.
      inner: how many those are.
    """
    lora = module.lora
    rows, columns = shape[:inner], shape[inner:]
    with jax.named_scope(name):
        y = project(x, weight(module, name, shape), inner)
        if lora.rank and name in lora.targets:
            a = param(module, f"{name}_lora_a", (*rows, lora.rank))
            b = param(module, f"{name}_lora_b", (lora.rank, *columns))
            y = y + project(project(x, a, inner), b) * (lora.alpha / lora.rank)
        return y


class Attention(nn.Module):
    """Attention to this call's own tokens, or to a layer of the pool once their keys and values are there.

    Attributes:
      attend_to_own: how tokens attend to themselves.
    """

    config: ModelConfig
    lora: Lora
    attend_to_own: Callable[..., Array] = attend_to_earlier

    @nn.compact
    def __call__(
        self,
        x_BxQxD: Array,
        rotary: Rotary,
        may_attend: Any,
        pool_kv: tuple[Array, Array] | None,
        start_B: Array | None,
    ) -> tuple[Array, tuple[Array, Array]]:
        """[B, Q, D], and the layer's keys and values [B, K, P, H], including those of this call.

        `may_attend` is bool [B, Q, P] over a pool, and without one a `blocks.MayAttend`.
        """
        c = self.config
        D, N, H = c.model_dim, c.num_heads, c.head_dim
        q_BxQxNxH, k_BxQxKxH, v_BxQxKxH = self._heads(x_BxQxD)
        q_BxQxNxH = rotate(q_BxQxNxH, rotary)
        k_BxKxPxH = rotate(k_BxQxKxH, rotary).swapaxes(1, 2)
        v_BxKxPxH = v_BxQxKxH.swapaxes(1, 2)
        attention, keys, values = self.attend_to_own, k_BxKxPxH, v_BxKxPxH
        if pool_kv is not None:
            k_BxKxPxH = write(pool_kv[0], k_BxKxPxH, start_B)
            v_BxKxPxH = write(pool_kv[1], v_BxKxPxH, start_B)
            used = may_attend.shape[-1]
            attention, keys, values = attend, k_BxKxPxH[:, :, :used], v_BxKxPxH[:, :, :used]
        out_BxQxNxH = attention(q_BxQxNxH, keys, values, may_attend, c.query_scale, c.attn_softcap)
        return dense(self, "o_proj", out_BxQxNxH, (N, H, D), inner=2), (k_BxKxPxH, v_BxKxPxH)

    def _heads(self, x_BxQxD: Array) -> tuple[Array, Array, Array]:
        """Queries, keys and values before rotary positions: [B, Q, N or K, H]."""
        c = self.config
        D, N, K, H = c.model_dim, c.num_heads, c.num_kv_heads, c.head_dim
        fused: Any = self.get_variable("params", "qkv_proj")
        if fused is not None:
            q, k, v = project_fused(x_BxQxD, fused, (N, K, K))
        else:
            heads = zip("qkv", (N, K, K))
            q, k, v = (dense(self, f"{letter}_proj", x_BxQxD, (D, n, H)) for letter, n in heads)
        return self._bias_and_norm("q", q), self._bias_and_norm("k", k), self._bias_and_norm("v", v)

    def _bias_and_norm(self, letter: str, y_BxQxNxH: Array) -> Array:
        """Queries, keys or values ("q", "k", "v") with the bias and the norm that some models have."""
        c = self.config
        if c.qkv_bias:
            bias = param(self, f"{letter}_proj_bias", y_BxQxNxH.shape[2:])
            y_BxQxNxH += bias.astype(y_BxQxNxH.dtype)
        if c.qk_norm and letter != "v":
            scale_H = param(self, f"{letter}_norm", (c.head_dim,))
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
    attend_to_own: Callable[..., Array] = attend_to_earlier

    def setup(self) -> None:
        c = self.config
        self.attn_norm, self.mlp_norm = RMSNorm(c), RMSNorm(c)
        self.attn, self.mlp = Attention(c, self.lora, self.attend_to_own), MLP(c, self.lora)
        if c.post_norms:
            self.attn_post_norm, self.mlp_post_norm = RMSNorm(c), RMSNorm(c)

    def __call__(
        self,
        x_BxQxD: Array,
        rotary: Rotary,
        may_attend: Any,
        pool_kv: tuple[Array, Array] | None,
        start_B: Array | None,
    ) -> tuple[Array, tuple[Array, Array]]:
        out_BxQxD, pool_kv = self.attn(self.attn_norm(x_BxQxD), rotary, may_attend, pool_kv, start_B)
        x_BxQxD = x_BxQxD + (self.attn_post_norm(out_BxQxD) if self.config.post_norms else out_BxQxD)
        out_BxQxD = self.mlp(self.mlp_norm(x_BxQxD))
        return x_BxQxD + (self.mlp_post_norm(out_BxQxD) if self.config.post_norms else out_BxQxD), pool_kv
