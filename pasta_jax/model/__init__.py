"""The decoder model: tokens, positions and a boolean matrix in; hidden states, logits and the pool out."""

from pasta_jax.model.config import Lora, ModelConfig, RopeScaling
from pasta_jax.model.pool import Pool, empty_pool, pool_bytes
from pasta_jax.model.transformer import Transformer, forward, init_params, logits, param_count, param_shapes

__all__ = [
    "Lora",
    "ModelConfig",
    "Pool",
    "RopeScaling",
    "Transformer",
    "empty_pool",
    "forward",
    "init_params",
    "logits",
    "param_count",
    "param_shapes",
    "pool_bytes",
]
