"""The sizes and choices that define a decoder model. Without jax, so that tools read configurations cheaply."""

from __future__ import annotations

import dataclasses
from typing import Literal

from pasta_jax.fields import check_fields, field
from pasta_jax.messages import shown

LayerKind = Literal["global", "local"]

MOST_LAYERS = 1024
"""Eight times the deepest published model (Llama 3.1 405B has 126 layers); tables have entries for each layer."""

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies of global layers are stretched for longer texts."""

    kind: Literal["none", "linear", "llama3", "yarn"] = field("none", "how frequencies are scaled")
    factor: float = field(1.0, "by which texts are longer than in pretraining", above=0)
    original_length: int = field(8192, "of texts in pretraining (llama3, yarn)", least=1)
    low_freq_factor: float = field(
        1.0, "llama3: waves longer than original_length / this are stretched", above=0
    )
    high_freq_factor: float = field(4.0, "llama3: waves shorter than original_length / this stay", above=0)
    beta_fast: float = field(32.0, "yarn: frequencies with more turns in original_length stay", above=0)
    beta_slow: float = field(1.0, "yarn: frequencies with fewer turns are divided by factor", above=0)
    attention_factor: float = field(0.0, "yarn: of cosines and sines; 0 is 0.1 ln(factor) + 1", least=0)

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and choices of a decoder-only transformer. The default is a tiny Gemma; `model.presets` has others."""

    vocab_size: int = field(1536, "V", least=1)
    num_layers: int = field(4, "Z", least=1, most=MOST_LAYERS)
    model_dim: int = field(128, "D", least=1)
    num_heads: int = field(4, "N, query heads", least=1)
    num_kv_heads: int = field(1, "K, key and value heads; divides N", least=1)
    head_dim: int = field(32, "H, even", least=2)
    mlp_dim: int = field(512, "F", least=1)
    rope_base: float = field(10_000.0, "of rotary frequencies", above=0)
    rope_scaling: RopeScaling = RopeScaling()
    norm_eps: float = field(1e-6, "added to the mean square in norms", least=0)
    activation: Literal["gelu_tanh", "silu"] = field("gelu_tanh", "of the gated MLP: Gemma's, or Llama's")
    norm_offset: float = field(1.0, "Gemma's RMSNorm multiplies by (offset + scale)")
    post_norms: bool = field(False, "Gemma 2 and 3 also normalize what attention and MLP add to the residual")
    qk_norm: bool = field(False, "Gemma 3 and Qwen 3 normalize each head's queries and keys before rotary")
    qkv_bias: bool = field(False, "Qwen 2.5")
    query_scale: float = field(0.0, "scores are divided by its square root; 0 means head_dim", least=0)
    attn_softcap: float = field(0.0, "scores become cap * tanh(score / cap); 0 is off (Gemma 2: 50)", least=0)
    final_softcap: float = field(0.0, "likewise logits (Gemma 2: 30)", least=0)
    sliding_window: int = field(0, "local layers see keys fewer positions back than this; 0 is off", least=0)
    layer_kinds: tuple[LayerKind, ...] = field(("global",), "of layers 0, 1, ...; repeated up to the last")
    local_rope_base: float = field(0.0, "of local layers, without scaling; 0 means as global layers", least=0)
    embed_scale: bool = field(True, "Gemma multiplies embeddings by sqrt(D)")
    tie_embeddings: bool = field(True, "the output matrix is the embedding")
    dtype: str = field("float32", "of parameters and compute; softmax, norms and logits are always float32")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd. Rotary positions need an even one.")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is unknown. Use one of {', '.join(DTYPES)}.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}. "
                "Each kv head serves the same number of query heads; change one of them."
            )
        if self.activation not in ("gelu_tanh", "silu"):
            raise ValueError(f"activation={self.activation!r} is unknown. Use 'gelu_tanh' or 'silu'.")
        if not self.layer_kinds or not set(self.layer_kinds) <= {"global", "local"}:
            raise ValueError(f"layer_kinds={self.layer_kinds}: name each layer 'global' or 'local'.")
        if "local" in self.kinds and self.sliding_window < 1:
            raise ValueError("Local layers need sliding_window, how many positions they see. Set it above 0.")

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each of the Z layers."""
        return tuple(self.layer_kinds[z % len(self.layer_kinds)] for z in range(self.num_layers))


DENSE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The matrices of a layer."""


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters beside frozen weights: y = x w + (alpha / rank) (x a) b (Hu et al. 2021)."""

    rank: int = field(0, "R; 0 means no adapters", least=0)
    alpha: float = field(16.0, "adapters are scaled by alpha / rank")
    targets: tuple[str, ...] = field(DENSE, "the matrices that get adapters")
    rows: tuple[int, ...] = field((), "vocabulary ids whose embeddings are trained in full, as for tags")

    def __post_init__(self) -> None:
        check_fields(self)
        if unknown := set(self.targets) - set(DENSE):
            raise ValueError(
                f"targets: {', '.join(map(shown, sorted(unknown)))} unknown. Use some of {', '.join(DENSE)}."
            )

    @property
    def trains_rows(self) -> bool:
        """Whether some vocabulary ids have rows of their own, beside the frozen embedding and head."""
        return bool(self.rank and self.rows)
