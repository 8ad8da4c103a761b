"""The decoder: one path for training, prefill and decode steps.

The model hears nothing of threads or promises: it gets tokens, rotary positions, and a boolean matrix that
says which key each query may attend to (`visibility.visible`).

Parameters are a plain nested dict. A new model's follow Gemma's scheme: unit variance in the residual stream.

    embed      embedding [V, D]
    layer_<z>  attn_norm scale [D]; attn q_proj [D, N, H], k_proj v_proj [D, K, H], o_proj [N, H, D]
               mlp_norm scale [D]; mlp gate_proj up_proj [D, F], down_proj [F, D]
    final_norm scale [D]
    head       [D, V], only if embeddings are not tied

By configuration also, per layer: attn_post_norm and mlp_post_norm scale [D]; attn q_norm k_norm [H]; attn
q_proj_bias [N, H], k_proj_bias v_proj_bias [K, H]. Beside matrices there may stand int8's scales (`name_scale`)
and adapters (`name_lora_a`, `name_lora_b`; `embedding_rows` [R, D] and `head_rows` [D, R]).
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pasta_jax.arrays import Array
from pasta_jax.model.config import Lora, ModelConfig
from pasta_jax.model.layers import Layer, RMSNorm, project_transposed
from pasta_jax.model.pool import Pool
from pasta_jax.model.rotary import rotary_of


class Embed(nn.Module):
    """The embedding table, for the way in and, when tied, for the way out."""

    config: ModelConfig
    lora: Lora

    def setup(self) -> None:
        c = self.config
        self.embedding, self.scale_V = _table(self, "embedding", (c.vocab_size, c.model_dim), (c.vocab_size,))
        if self.lora.rank and self.lora.rows:  # they take the place of the table's own
            self.embedding_rows = self.param(
                "embedding_rows", nn.initializers.zeros, (len(self.lora.rows), c.model_dim), c.dtype
            )

    def __call__(self, tokens_BxQ: Array) -> Array:
        c = self.config
        x_BxQxD = self.embedding[tokens_BxQ]
        if self.scale_V is not None:
            x_BxQxD = (x_BxQxD * self.scale_V[tokens_BxQ][..., None]).astype(c.dtype)
        if self.lora.rank and self.lora.rows:
            is_row_BxQxR = tokens_BxQ[..., None] == jnp.array(self.lora.rows)
            row_BxQ = jnp.argmax(is_row_BxQxR, axis=-1)
            x_BxQxD = jnp.where(is_row_BxQxR.any(-1)[..., None], self.embedding_rows[row_BxQ], x_BxQxD)
        return x_BxQxD * math.sqrt(c.model_dim) if c.embed_scale else x_BxQxD

    def logits(self, hidden: Array) -> Array:
        rows = self.embedding_rows if self.lora.rank and self.lora.rows else None
        return _logits("VD", hidden, self.embedding, self.scale_V, rows, self.config, self.lora)


def _table(
    module: nn.Module, name: str, shape: tuple[int, int], scales: tuple[int]
) -> tuple[Array, Array | None]:
    """The parameter `name` of an embedding or a head, and with int8 the scale of each vocabulary id."""
    c = module.config
    if c.weights == "int8":
        table = module.param(name, nn.initializers.zeros, shape, jnp.int8)
        return table, module.param(f"{name}_scale", nn.initializers.ones, scales, jnp.float32)
    return module.param(name, nn.initializers.normal(c.model_dim**-0.5), shape, c.dtype), None


def _logits(
    spec: str,
    hidden: Array,
    table: Array,
    scale_V: Array | None,
    rows: Array | None,
    config: ModelConfig,
    lora: Lora,
) -> Array:
    """Float32 [..., V], from an embedding ("VD") or a head; `rows` take the place of the ids in `lora.rows`."""
    if config.weights == "transposed":
        if rows is not None:
            raise ValueError("Transposed weights have no adapters: merge them first.")
        return project_transposed(hidden, table, dtype=jnp.float32)
    table = table.astype(hidden.dtype)
    logits = jnp.einsum(f"...D,{spec}->...V", hidden, table, preferred_element_type=jnp.float32)
    if scale_V is not None:
        logits = logits * scale_V
    if rows is not None:
        own = jnp.einsum(f"...D,{spec}->...V", hidden, rows, preferred_element_type=jnp.float32)
        logits = logits.at[..., jnp.array(lora.rows)].set(own)
    return logits


class Transformer(nn.Module):
    """A decoder-only transformer of the sizes in `config`.

    Attributes:
      lora: adapters, which are parameters beside the others (`model.lora`).
      remat: in the backward pass a layer is computed again, instead of kept: a third more time, and memory for
        one layer's activations instead of all.
    """

    config: ModelConfig
    lora: Lora = Lora()
    remat: bool = False

    def setup(self) -> None:
        c = self.config
        self.embed = Embed(c, self.lora)
        layer = nn.remat(Layer) if self.remat else Layer
        self.layer = [layer(c, self.lora) for _ in range(c.num_layers)]
        self.final_norm = RMSNorm(c)
        if not c.tie_embeddings:
            shape = (c.model_dim, c.vocab_size)
            shape = shape[::-1] if c.weights == "transposed" else shape
            self.head, self.head_scale_V = _table(self, "head", shape, (c.vocab_size,))
            if self.lora.rank and self.lora.rows:
                self.head_rows = self.param(
                    "head_rows", nn.initializers.zeros, (c.model_dim, len(self.lora.rows)), c.dtype
                )

    def __call__(
        self,
        tokens_BxQ: Array,
        positions_BxQ: Array,
        may_attend_BxQxP: Array,
        pool: Pool | None = None,
        start_B: Array | None = None,
        key_positions_BxP: Array | None = None,
    ) -> tuple[Array, Pool]:
        """Hidden states of the tokens, and the pool with their keys and values, or those alone.

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
          key_positions_BxP: int32 [B, P], rotary positions of the keys, with a pool and for local layers only:
            those see no key at `sliding_window` or more positions before the query.

        Returns:
          Hidden states [B, Q, D] after the last norm, for `logits`; and the pool, or without one the keys and
          values of this call's own tokens, [B, K, Q, H] a layer.

        Raises:
          ValueError: shapes that do not fit together.
        """
        return self.from_embedded(
            self.embed(tokens_BxQ), positions_BxQ, may_attend_BxQxP, pool, start_B, key_positions_BxP
        )

    def from_embedded(
        self,
        x_BxQxD: Array,
        positions_BxQ: Array,
        may_attend_BxQxP: Array,
        pool: Pool | None = None,
        start_B: Array | None = None,
        key_positions_BxP: Array | None = None,
    ) -> tuple[Array, Pool]:
        """`__call__` on embedded tokens [B, Q, D]."""
        _check_shapes(x_BxQxD.shape, may_attend_BxQxP.shape, pool, start_B)
        rotary = rotary_of(self.config, positions_BxQ)
        may_attend = {"global": may_attend_BxQxP}
        if "local" in rotary:
            key_positions_BxP = positions_BxQ if pool is None else key_positions_BxP
            if key_positions_BxP is None:
                raise ValueError("Local layers over a pool need `key_positions_BxP`, where its keys stand.")
            behind_BxQxP = positions_BxQ[:, :, None] - key_positions_BxP[:, None, :]
            may_attend["local"] = may_attend_BxQxP & (behind_BxQxP < self.config.sliding_window)
        written = []
        for z, (kind, layer) in enumerate(zip(self.config.kinds, self.layer, strict=True)):
            pool_kv = None if pool is None else (pool.k[z], pool.v[z])
            x_BxQxD, kv = layer(x_BxQxD, rotary[kind], may_attend[kind], pool_kv, start_B)
            written.append(kv)
        hidden_BxQxD = self.final_norm(x_BxQxD)
        return hidden_BxQxD, Pool(*map(tuple, zip(*written)))

    def logits(self, hidden: Array) -> Array:
        """Hidden states [..., D] to logits, float32 [..., V]."""
        c = self.config
        if c.tie_embeddings:
            logits = self.embed.logits(hidden)
        else:
            rows = self.head_rows if self.lora.rank and self.lora.rows else None
            spec = "VD" if c.weights == "transposed" else "DV"
            logits = _logits(spec, hidden, self.head, self.head_scale_V, rows, c, self.lora)
        return c.final_softcap * jnp.tanh(logits / c.final_softcap) if c.final_softcap else logits


def init_params(config: ModelConfig, key: Array, lora: Lora = Lora()) -> dict[str, Any]:
    """Parameters of a new model. Under `jax.eval_shape` it gives their shapes and costs nothing."""
    nothing = jnp.zeros((1, 1), jnp.int32)
    return Transformer(config, lora).init(key, nothing, nothing, jnp.ones((1, 1, 1), bool))["params"]


def param_count(params: Any) -> int:
    """How many numbers a tree of arrays or shapes holds."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _check_shapes(x: tuple[int, ...], may_attend: tuple[int, ...], pool: Pool | None, start: Any) -> None:
    B, Q, _ = x
    if (pool is None) != (start is None):
        raise ValueError("`pool` and `start_B` go together: give both or neither.")
    most = Q if pool is None else pool.k[0].shape[2]
    least = Q if pool is None else 1
    if may_attend[:2] != (B, Q) or not least <= may_attend[2] <= most:
        keys = f"{Q} keys, its own tokens" if pool is None else f"at most the pool's {most} entries"
        raise ValueError(
            f"may_attend is {list(may_attend)}; {B} rows of {Q} queries need [{B}, {Q}, {keys}]."
        )
