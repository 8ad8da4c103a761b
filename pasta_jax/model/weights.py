"""The one table between our parameters and the tensors of a Hugging Face folder.

Both hold the same numbers: a tensor of theirs is one of ours with its dimensions merged and, where it is a
matrix of a layer, transposed. So both ways are exact, whatever the dtype. Norm scales are stored as they are
there; what some families add to them (`norm_offset`) is the model's business.

    ours                            theirs, below the prefix
    embed/embedding [V, D]          embed_tokens.weight [V, D]
    layer_<z>/attn/q_proj [D, N, H] layers.<z>.self_attn.q_proj.weight [N H, D]
    layer_<z>/attn/o_proj [N, H, D] layers.<z>.self_attn.o_proj.weight [D, N H]
    layer_<z>/mlp/up_proj [D, F]    layers.<z>.mlp.up_proj.weight [F, D]
    head [D, V]                     lm_head.weight [V, D], not below the prefix

Names and layouts: the classes *ForCausalLM of transformers, models gemma, gemma2, gemma3, llama, qwen2, qwen3
and mistral. No jax import: tools read and write files with it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from pasta_jax.model.config import ModelConfig

PREFIX = "model."
"""Of a text model."""

MULTIMODAL_PREFIXES = ("language_model.model.", "model.language_model.")
"""Where Gemma 3's text model stands in a folder that has a vision model too: as published, and as transformers
5 writes it."""

NOT_TEXT = (
    "vision_tower.",
    "multi_modal_projector.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
)
"""What tensors of a multi-modal folder begin with that are not of its text model: they are never read."""

HEAD = "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class HfTensor:
    """One tensor of a Hugging Face folder, and the parameter of ours that it is.

    Attributes:
      name: as in the folder, such as "model.layers.0.self_attn.q_proj.weight".
      shape: there.
      path: of our parameter, such as ("layer_0", "attn", "q_proj").
      ours: shape of our parameter.
      transposed: theirs is [out, in], ours has the dims that it contracts first.
    """

    name: str
    shape: tuple[int, ...]
    path: tuple[str, ...]
    ours: tuple[int, ...]
    transposed: bool = False

    @property
    def parameter(self) -> str:
        """Our name, "layer_0/attn/q_proj"."""
        return "/".join(self.path)

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """Theirs [shape] to ours [ours]; a view, never a copy. Raises ValueError on another shape."""
        self._check(array, self.shape)
        return (array.T if self.transposed else array).reshape(self.ours)

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """Ours [ours] to theirs [shape]; a view where the layout allows it. Raises ValueError."""
        self._check(array, self.ours)
        return array.reshape(self.shape[::-1]).T if self.transposed else array.reshape(self.shape)

    def _check(self, array: np.ndarray, shape: tuple[int, ...]) -> None:
        if tuple(array.shape) != shape:
            raise ValueError(
                f"{self.name} ({self.parameter}) must be {list(shape)}, not {list(array.shape)}."
            )


def hf_tensors(config: ModelConfig, prefix: str = PREFIX) -> tuple[HfTensor, ...]:
    """Every tensor of a model, in the order in which its layers are computed; all our parameters are there.

    Args:
      config: sizes and choices; `weights` must be "plain", since a folder holds no int8.
      prefix: what the names of the text model begin with, the head's excepted.
    """
    if config.weights != "plain":
        raise ValueError("A Hugging Face folder holds plain weights; int8 is made when a model is loaded.")
    return tuple(_tensors(config, prefix))


def tied_head(config: ModelConfig, prefix: str = PREFIX) -> HfTensor:
    """The head that a folder of a model with tied embeddings may hold all the same: the embedding once more."""
    shape = (config.vocab_size, config.model_dim)
    return HfTensor(head_name(prefix), shape, ("embed", "embedding"), shape)


def head_name(prefix: str = PREFIX) -> str:
    """What the head is called beside a text model with this prefix."""
    return f"language_model.{HEAD}" if prefix == "language_model.model." else HEAD


def find_prefix(names: Iterable[str]) -> str:
    """The prefix that the tensor names of a folder have; PREFIX if none fits."""
    known = set(names)
    for prefix in (*MULTIMODAL_PREFIXES, PREFIX):
        if f"{prefix}embed_tokens.weight" in known:
            return prefix
    return PREFIX


def is_ignored(name: str) -> bool:
    """Whether a tensor of a folder is none of the text model's, and no fault for being there.

    That is what belongs to the vision model (NOT_TEXT), and the rotary frequencies that old folders of Llama
    hold, which follow from the configuration.
    """
    return name.startswith(NOT_TEXT) or name.endswith(".rotary_emb.inv_freq")


def nested(leaves: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """Leaves by path as the nested dict that `Transformer` takes."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        at = tree
        for name in path[:-1]:
            at = at.setdefault(name, {})
        at[path[-1]] = leaf
    return tree


def leaf_at(params: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """The parameter at a path. Raises KeyError with the whole of it."""
    at: Any = params
    for name in path:
        if not isinstance(at, Mapping) or name not in at:
            raise KeyError("/".join(path))
        at = at[name]
    return at


def _tensors(c: ModelConfig, prefix: str) -> Iterator[HfTensor]:
    D, F = c.model_dim, c.mlp_dim

    def same(name: str, path: tuple[str, ...], *shape: int) -> HfTensor:
        return HfTensor(prefix + name, shape, path, shape)

    def matrix(name: str, path: tuple[str, ...], rows: tuple[int, ...], columns: tuple[int, ...]) -> HfTensor:
        shape = (math.prod(columns), math.prod(rows))
        return HfTensor(prefix + name, shape, path, rows + columns, transposed=True)

    yield same("embed_tokens.weight", ("embed", "embedding"), c.vocab_size, D)
    for z in range(c.num_layers):
        theirs, ours = f"layers.{z}.", f"layer_{z}"
        yield same(f"{theirs}input_layernorm.weight", (ours, "attn_norm", "scale"), D)
        heads = {"q": c.num_heads, "k": c.num_kv_heads, "v": c.num_kv_heads}
        for letter, count in heads.items():
            columns, name = (count, c.head_dim), f"{letter}_proj"
            yield matrix(f"{theirs}self_attn.{name}.weight", (ours, "attn", name), (D,), columns)
            if c.qkv_bias:
                bias = (ours, "attn", f"{name}_bias")
                yield HfTensor(f"{prefix}{theirs}self_attn.{name}.bias", (math.prod(columns),), bias, columns)
        yield matrix(
            f"{theirs}self_attn.o_proj.weight", (ours, "attn", "o_proj"), (c.num_heads, c.head_dim), (D,)
        )
        if c.qk_norm:
            for name in ("q_norm", "k_norm"):
                yield same(f"{theirs}self_attn.{name}.weight", (ours, "attn", name), c.head_dim)
        # Gemma 2 and 3 use the name for what follows attention, the others for what precedes the MLP.
        if c.post_norms:
            yield same(f"{theirs}post_attention_layernorm.weight", (ours, "attn_post_norm", "scale"), D)
            yield same(f"{theirs}pre_feedforward_layernorm.weight", (ours, "mlp_norm", "scale"), D)
        else:
            yield same(f"{theirs}post_attention_layernorm.weight", (ours, "mlp_norm", "scale"), D)
        for name, rows, out in (("gate_proj", D, F), ("up_proj", D, F), ("down_proj", F, D)):
            yield matrix(f"{theirs}mlp.{name}.weight", (ours, "mlp", name), (rows,), (out,))
        if c.post_norms:
            yield same(f"{theirs}post_feedforward_layernorm.weight", (ours, "mlp_post_norm", "scale"), D)
    yield same("norm.weight", ("final_norm", "scale"), D)
    if not c.tie_embeddings:
        yield HfTensor(head_name(prefix), (c.vocab_size, D), ("head",), (D, c.vocab_size), transposed=True)
