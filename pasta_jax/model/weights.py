"""The one table between our parameters and the tensors of a Hugging Face folder.

Both hold the same numbers: one of their tensors is one of our parameters with its dimensions merged and, if it is
a matrix of a layer, transposed. So both directions are exact, whatever the dtype. Norm scales are the same in both;
what some families add to them (`norm_offset`) is up to the model.

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
from collections.abc import Iterable, Iterator

import numpy as np

from pasta_jax.model.config import ModelConfig

PREFIX = "model."
"""Of the tensor names of a text model."""

MULTIMODAL_PREFIXES = ("language_model.model.", "model.language_model.")
"""Prefixes of Gemma 3's text model beside a vision model: as published, and as transformers 5 writes it."""

_VISION = ("vision_tower.", "multi_modal_projector.")
NOT_TEXT = (*_VISION, *(PREFIX + name for name in _VISION))
"""Prefixes of tensors that do not belong to the text model of a multi-modal folder; they are never read."""

HEAD = "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class HfTensor:
    """One tensor of a Hugging Face folder, and the parameter of ours that it becomes.

    Attributes:
      name: in the folder, such as "model.layers.0.self_attn.q_proj.weight".
      shape: in the folder.
      path: of our parameter, such as ("layer_0", "attn", "q_proj").
      ours: shape of our parameter.
      transposed: theirs is [out, in], ours has the contracted dimensions first.
    """

    name: str
    shape: tuple[int, ...]
    path: tuple[str, ...]
    ours: tuple[int, ...]
    transposed: bool = False

    @property
    def parameter(self) -> str:
        """The path as one name: "layer_0/attn/q_proj"."""
        return "/".join(self.path)

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """Our parameter [ours] from their tensor [shape]; always a view. Raises ValueError on other shapes."""
        self._check(array, self.shape)
        return (array.T if self.transposed else array).reshape(self.ours)

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """Their tensor [shape] from our parameter [ours]; a view if the layout allows it. Raises ValueError."""
        self._check(array, self.ours)
        return array.reshape(self.shape[::-1]).T if self.transposed else array.reshape(self.shape)

    def _check(self, array: np.ndarray, shape: tuple[int, ...]) -> None:
        if tuple(array.shape) != shape:
            raise ValueError(
                f"{self.name} ({self.parameter}) must be {list(shape)}, not {list(array.shape)}."
            )


def hf_tensors(config: ModelConfig, prefix: str = PREFIX) -> tuple[HfTensor, ...]:
    """Every tensor of a model, in the order in which its layers are computed: one for each of our parameters.

    Args:
      config: sizes and choices.
      prefix: of the names of the text model, except the head's.
    """
    return tuple(_tensors(config, prefix))


def tied_head(config: ModelConfig, prefix: str = PREFIX) -> HfTensor:
    """The head in a folder of a model with tied embeddings, if there is one: the embedding once more."""
    shape = (config.vocab_size, config.model_dim)
    return HfTensor(head_name(prefix), shape, ("embed", "embedding"), shape)


def head_name(prefix: str = PREFIX) -> str:
    """The name of the head beside a text model with this prefix."""
    return f"language_model.{HEAD}" if prefix == "language_model.model." else HEAD


def find_prefix(names: Iterable[str]) -> str:
    """The prefix of the tensor names in a folder; PREFIX if none fits."""
    known = set(names)
    for prefix in (*MULTIMODAL_PREFIXES, PREFIX):
        if f"{prefix}embed_tokens.weight" in known:
            return prefix
    return PREFIX


def is_ignored(name: str) -> bool:
    """Whether a tensor may be in a folder although the text model does not need it.

    These are the tensors of a vision model (NOT_TEXT), and the rotary frequencies in old folders of Llama, which
    follow from the configuration.
    """
    return name.startswith(NOT_TEXT) or name.endswith(".rotary_emb.inv_freq")


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
