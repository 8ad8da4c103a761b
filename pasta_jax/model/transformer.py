"""The decoder: one path for training, prefill and decode steps.

The model hears nothing of threads or promises: it gets tokens, rotary positions, and a boolean matrix that
says which key each query may attend to (`visibility.visible`).

Parameters are a plain nested dict. A new model's follow Gemma's scheme: unit variance in the residual stream.

    embed      embedding [V, D]
    layer_<z>  attn_norm scale [D]; attn q_proj [D, N, H], k_proj v_proj [D, K, H], o_proj [N, H, D]
               mlp_norm scale [D]; mlp gate_proj up_proj [D, F], down_proj [F, D]
    final_norm scale [D]
    head       [D, V], only if embeddings are not tied
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pasta_jax.arrays import Array
from pasta_jax.model.config import ModelConfig
from pasta_jax.model.layers import Layer, RMSNorm, rotary_angles
from pasta_jax.model.pool import Pool


class Embed(nn.Module):
    """The embedding table, for the way in and, when tied, for the way out."""

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        init = nn.initializers.normal(c.model_dim**-0.5)
        self.embedding = self.param("embedding", init, (c.vocab_size, c.model_dim), c.dtype)

    def __call__(self, tokens_BxQ: Array) -> Array:
        x_BxQxD = self.embedding[tokens_BxQ]
        return x_BxQxD * math.sqrt(self.config.model_dim) if self.config.embed_scale else x_BxQxD

    def logits(self, hidden: Array) -> Array:
        return jnp.einsum("...D,VD->...V", hidden, self.embedding, preferred_element_type=jnp.float32)


class Transformer(nn.Module):
    """A decoder-only transformer of the sizes in `config`."""

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        self.embed = Embed(c)
        self.layer = [Layer(c) for _ in range(c.num_layers)]
        self.final_norm = RMSNorm(c)
        if not c.tie_embeddings:
            init = nn.initializers.normal(c.model_dim**-0.5)
            self.head = self.param("head", init, (c.model_dim, c.vocab_size), c.dtype)

    def __call__(
        self,
        tokens_BxQ: Array,
        positions_BxQ: Array,
        may_attend_BxQxP: Array,
        pool: Pool | None = None,
        start_B: Array | None = None,
    ) -> tuple[Array, Pool | None]:
        """Hidden states of the tokens, and the pool with their keys and values.

        Args:
          tokens_BxQ: int32 [B, Q], vocabulary ids.
          positions_BxQ: int32 [B, Q], rotary positions.
          may_attend_BxQxP: bool [B, Q, P], true where the query may attend to the key. A query without
            any key is padding: its hidden state is finite and means nothing.
          pool: without one, the keys are this call's own tokens (P == Q), and none may attend to a later one,
            as in document order. With one, row b's keys are first
            written to its entries start_B[b] .. start_B[b] + Q - 1, and then every query attends to the
            pool's first P entries (P may be less than the pool holds).
          start_B: int32 [B], with a pool only.

        Returns:
          Hidden states [B, Q, D] after the last norm, for `logits`; and the pool, or None without one.

        Raises:
          ValueError: shapes that do not fit together.
        """
        return self.from_embedded(self.embed(tokens_BxQ), positions_BxQ, may_attend_BxQxP, pool, start_B)

    def from_embedded(
        self,
        x_BxQxD: Array,
        positions_BxQ: Array,
        may_attend_BxQxP: Array,
        pool: Pool | None = None,
        start_B: Array | None = None,
    ) -> tuple[Array, Pool | None]:
        """`__call__` on embedded tokens [B, Q, D]."""
        _check_shapes(x_BxQxD.shape, may_attend_BxQxP.shape, pool, start_B)
        rotary = rotary_angles(positions_BxQ, self.config.head_dim, self.config.rope_base)
        written = []
        for z, layer in enumerate(self.layer):
            pool_kv = None if pool is None else (pool.k[z], pool.v[z])
            x_BxQxD, kv = layer(x_BxQxD, rotary, may_attend_BxQxP, pool_kv, start_B)
            written.append(kv)
        hidden_BxQxD = self.final_norm(x_BxQxD)
        return hidden_BxQxD, None if pool is None else Pool(*map(tuple, zip(*written)))

    def logits(self, hidden: Array) -> Array:
        """Hidden states [..., D] to logits, float32 [..., V]."""
        if self.config.tie_embeddings:
            return self.embed.logits(hidden)
        return jnp.einsum("...D,DV->...V", hidden, self.head, preferred_element_type=jnp.float32)


def init_params(config: ModelConfig, key: Array) -> dict[str, Any]:
    """Parameters of a new model. Under `jax.eval_shape` it gives their shapes and costs nothing."""
    nothing = jnp.zeros((1, 1), jnp.int32)
    return Transformer(config).init(key, nothing, nothing, jnp.ones((1, 1, 1), bool))["params"]


def param_count(params: Any) -> int:
    """How many numbers a tree of arrays or shapes holds."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _check_shapes(x: tuple[int, ...], may_attend: tuple[int, ...], pool: Pool | None, start: Any) -> None:
    B, Q, _ = x
    if (pool is None) != (start is None):
        raise ValueError("`pool` and `start_B` go together: give both or neither.")
    most = Q if pool is None else pool.k[0].shape[1]
    least = Q if pool is None else 1
    if may_attend[:2] != (B, Q) or not least <= may_attend[2] <= most:
        keys = f"{Q} keys, its own tokens" if pool is None else f"at most the pool's {most} entries"
        raise ValueError(
            f"may_attend is {list(may_attend)}; {B} rows of {Q} queries need [{B}, {Q}, {keys}]."
        )
