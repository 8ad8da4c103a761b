"""The decoder: prefill and decode steps; `scan` runs the same layers over whole documents to train.

The model knows nothing of threads or promises: it gets tokens, rotary positions, and a boolean matrix that says
which keys each query may attend to (`visibility.visible`).

Parameters are a nested dict of arrays. A new model's follow Gemma's scheme: unit variance in the residual stream.

    embed      embedding [V, D]
    layer_<z>  attn_norm scale [D]; attn q_proj [D, N, H], k_proj v_proj [D, K, H], o_proj [N, H, D]
               mlp_norm scale [D]; mlp gate_proj up_proj [D, F], down_proj [F, D]
    final_norm scale [D]
    head       [D, V], only if embeddings are not tied

Some configurations also have, in each layer, attn_post_norm and mlp_post_norm scale [D]; attn q_norm k_norm [H];
attn q_proj_bias [N, H], k_proj_bias v_proj_bias [K, H]. Adapters are further leaves beside the matrices
(`name_lora_a`, `name_lora_b`; `embedding_rows` [R, D] and `head_rows` [D, R]). To decode, a leaf may have another
form (`model.forms`).
"""

from __future__ import annotations

import collections
import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from pasta_jax.arrays import Array
from pasta_jax.model.blocks import Matrix
from pasta_jax.model.config import Lora, ModelConfig
from pasta_jax.model.forms import Params, look_up, unembed
from pasta_jax.model.initial import fold_of, initial, new_leaf
from pasta_jax.model.layers import Layer, RMSNorm, param, weight
from pasta_jax.model.pool import Pool
from pasta_jax.model.rotary import rotary_of


class Embed(nn.Module):
    """The embedding table, and with tied embeddings the way from hidden states to logits."""

    config: ModelConfig
    lora: Lora

    def setup(self) -> None:
        c = self.config
        self.embedding = weight(self, "embedding", (c.vocab_size, c.model_dim))
        if self.lora.trains_rows:
            self.embedding_rows = param(self, "embedding_rows", (len(self.lora.rows), c.model_dim))

    def __call__(self, tokens_BxQ: Array) -> Array:
        c = self.config
        x_BxQxD = look_up(self.embedding, tokens_BxQ, c.dtype)
        if self.lora.trains_rows:
            is_row_BxQxR = tokens_BxQ[..., None] == jnp.array(self.lora.rows)
            row_BxQ = jnp.argmax(is_row_BxQxR, axis=-1)
            x_BxQxD = jnp.where(is_row_BxQxR.any(-1)[..., None], self.embedding_rows[row_BxQ], x_BxQxD)
        return x_BxQxD * math.sqrt(c.model_dim) if c.embed_scale else x_BxQxD

    def logits(self, hidden: Array) -> Array:
        logits = unembed(hidden, self.embedding, "VD")
        if self.lora.trains_rows:
            logits = logits.at[..., jnp.array(self.lora.rows)].set(unembed(hidden, self.embedding_rows, "VD"))
        return logits


class Transformer(nn.Module):
    """A decoder-only transformer of the sizes in `config`.

    Attributes:
      lora: adapters, which are parameters beside the others (`model.lora`).
    """

    config: ModelConfig
    lora: Lora = Lora()

    def setup(self) -> None:
        c = self.config
        self.embed = Embed(c, self.lora)
        self.layer = [Layer(c, self.lora) for _ in range(c.num_layers)]
        self.final_norm = RMSNorm(c)
        if not c.tie_embeddings:
            self.head = weight(self, "head", (c.model_dim, c.vocab_size))
            if self.lora.trains_rows:
                self.head_rows = param(self, "head_rows", (c.model_dim, len(self.lora.rows)))

    def __call__(
        self,
        tokens_BxQ: Array,
        positions_BxQ: Array,
        may_attend_BxQxP: Array,
        pool: Pool | None = None,
        start_B: Array | None = None,
        key_positions_BxP: Array | None = None,
    ) -> tuple[Array, Pool]:
        """Hidden states of the tokens, and the pool with their keys and values; without a pool those alone.

        Args:
          tokens_BxQ: int32 [B, Q], vocabulary ids.
          positions_BxQ: int32 [B, Q], rotary positions.
          may_attend_BxQxP: bool [B, Q, P], true where the query may attend to the key. A query without
            any key is padding: its hidden state is finite and means nothing.
          pool: without one, the keys are this call's own tokens (P == Q), and none may attend to a later one,
            as in document order. With one, row b's keys and values are first written to its entries
            start_B[b] .. start_B[b] + Q - 1, and then its queries attend to the pool's first P entries (P may be
            less than the pool holds).
          start_B: int32 [B], with a pool only.
          key_positions_BxP: int32 [B, P], rotary positions of the keys, with a pool and for local layers only:
            these see no key that is `sliding_window` or more positions before the query.

        Returns:
          Hidden states [B, Q, D] after the last norm, for `logits`; and the pool, or without one the keys and
          values of this call's own tokens, [B, K, Q, H] in each layer.

        Raises:
          ValueError: shapes that do not fit together.
        """
        x_BxQxD = self.embed(tokens_BxQ)
        _check_shapes(x_BxQxD.shape, may_attend_BxQxP.shape, pool, start_B)
        rotary = rotary_of(self.config, positions_BxQ)
        may_attend: dict[str, Any] = {"global": may_attend_BxQxP}
        if "local" in rotary:
            key_positions_BxP = positions_BxQ if pool is None else key_positions_BxP
            if key_positions_BxP is None:
                raise ValueError("Local layers over a pool need `key_positions_BxP`, those of its keys.")
            distance_BxQxP = positions_BxQ[:, :, None] - key_positions_BxP[:, None, :]
            may_attend["local"] = may_attend_BxQxP & (distance_BxQxP < self.config.sliding_window)
        if pool is None:
            may_attend = {kind: Matrix(matrix) for kind, matrix in may_attend.items()}
        written = []
        for z, (kind, layer) in enumerate(zip(self.config.kinds, self.layer, strict=True)):
            pool_kv = None if pool is None else (pool.k[z], pool.v[z])
            x_BxQxD, kv = layer(x_BxQxD, rotary[kind], may_attend[kind], pool_kv, start_B)
            written.append(kv)
        hidden_BxQxD = self.final_norm(x_BxQxD)
        return hidden_BxQxD, Pool(*map(tuple, zip(*written)))

    def logits(self, hidden: Array) -> Array:
        """Hidden states [..., D] to logits, float32 [..., V]."""
        return softcapped(self.uncapped(hidden), self.config.final_softcap)

    @jax.named_scope("logits")
    def uncapped(self, hidden: Array) -> Array:
        """Logits before the softcap: linear in the hidden states and in each table."""
        if self.config.tie_embeddings:
            return self.embed.logits(hidden)
        logits = unembed(hidden, self.head, "DV")
        if self.lora.trains_rows:
            logits = logits.at[..., jnp.array(self.lora.rows)].set(unembed(hidden, self.head_rows, "DV"))
        return logits


@jax.named_scope("softcap")
def softcapped(logits: Array, cap: float) -> Array:
    """The logits bent to cap * tanh(logits / cap), or as they are if the cap is 0."""
    return cap * jnp.tanh(logits / cap) if cap else logits


def forward(model: Transformer, params: Params, *inputs: Array | Pool | None) -> tuple[Array, Pool]:
    """Hidden states and the pool: `Transformer.__call__` with these parameters."""
    outputs: Any = model.apply({"params": params}, *inputs)
    return outputs


def logits(model: Transformer, params: Params, hidden: Array) -> Array:
    """Float32 logits [..., V] of hidden states [..., D]: `Transformer.logits` with these parameters."""
    outputs: Any = model.apply({"params": params}, hidden, method="logits")
    return outputs


def uncapped(model: Transformer, params: Params, hidden: Array) -> Array:
    """Logits before the softcap: `Transformer.uncapped` with these parameters."""
    outputs: Any = model.apply({"params": params}, hidden, method="uncapped")
    return outputs


def init_params(
    config: ModelConfig, key: Array, lora: Lora = Lora(), shardings: Any = None
) -> dict[str, Any]:
    """Parameters of a new model, all plain: those of `Transformer.init`, made leaf by leaf (`model.initial`).

    Args:
      config, lora: of the model.
      key: typed; a leaf depends on this key and its own path alone.
      shardings: the tree of where each leaf is made; by default all are on the default device.
    """
    places, leaves, numbers = flatten_dict(shardings or {}), {}, collections.Counter[tuple[str, ...]]()
    for path, leaf in _shapes(config, lora).items():
        numbers[path[:-1]] += 1
        how, fold = initial(config, path[-1], leaf.shape), fold_of(path, numbers[path[:-1]])
        leaves[path] = new_leaf(how, key, fold, leaf.shape, leaf.dtype, places.get(path))
    return unflatten_dict(leaves)


def param_shapes(config: ModelConfig, lora: Lora = Lora()) -> dict[str, Any]:
    """Shapes and dtypes of `init_params`; nothing is computed."""
    return unflatten_dict(_shapes(config, lora))


def _shapes(config: ModelConfig, lora: Lora) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    """Shape and dtype of each parameter by path, in the order in which its module declares it.

    One layer is traced for all: their parameters are alike.
    """
    shapes: dict[tuple[str, ...], jax.ShapeDtypeStruct] = {}

    def declare() -> None:
        token = jnp.zeros((1, 1), jnp.int32)
        model = Transformer(dataclasses.replace(config, num_layers=1), lora)
        new = model.init(jax.random.key(0), token, token, jnp.ones((1, 1, 1), bool))
        for (first, *rest), leaf in flatten_dict(new["params"]).items():
            parts = [f"layer_{z}" for z in range(config.num_layers)] if first == "layer_0" else [first]
            for part in parts:
                shapes[part, *rest] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)

    jax.eval_shape(declare)
    return shapes


def param_count(params: Any) -> int:
    """The number of numbers in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _check_shapes(x: tuple[int, ...], may_attend: tuple[int, ...], pool: Pool | None, start: Any) -> None:
    B, Q, _ = x
    if (pool is None) != (start is None):
        raise ValueError("`pool` and `start_B` go together: give both or neither.")
    min_keys, max_keys = (Q, Q) if pool is None else (1, pool.k[0].shape[2])
    if may_attend[:2] != (B, Q) or not min_keys <= may_attend[2] <= max_keys:
        keys = f"{Q} keys, its own tokens" if pool is None else f"at most the pool's {max_keys} entries"
        raise ValueError(
            f"may_attend is {list(may_attend)}; {B} rows of {Q} queries need [{B}, {Q}, {keys}]."
        )
