"""What a decoder model is, as numbers. No jax import, so that tools can read configurations cheaply."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and choices of one decoder-only transformer; the default is the tiny Gemma-style model."""

    vocab_size: int = 1536  # V
    num_layers: int = 4  # Z
    model_dim: int = 128  # D
    num_heads: int = 4  # N, query heads
    num_kv_heads: int = 1  # K, key and value heads; divides N
    head_dim: int = 32  # H
    mlp_dim: int = 512  # F
    rope_base: float = 10_000.0
    norm_eps: float = 1e-6
    activation: str = "gelu_tanh"  # of the gated MLP: gelu_tanh (Gemma) or silu (Llama)
    norm_offset: float = 1.0  # Gemma's RMSNorm multiplies by (offset + scale)
    embed_scale: bool = True  # Gemma multiplies embeddings by sqrt(D)
    tie_embeddings: bool = True
    dtype: str = "float32"  # of parameters and compute; softmax, norms and logits are float32 always

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}. "
                "Each kv head serves the same number of query heads; change one of them."
            )
        if self.activation not in ("gelu_tanh", "silu"):
            raise ValueError(f"activation={self.activation!r} is unknown. Use 'gelu_tanh' or 'silu'.")
