"""Small Hugging Face folders, written without transformers or torch; by safetensors' own writer."""

from __future__ import annotations

import functools
import io
import json
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy
import sentencepiece

from pasta_jax.model import ModelConfig
from pasta_jax.model.config import RopeScaling
from pasta_jax.model.families import config_to_hf
from pasta_jax.model.weights import hf_tensors, tied_head

_SIZES: dict[str, Any] = dict(
    vocab_size=384, num_layers=3, model_dim=16, num_heads=4, num_kv_heads=2, head_dim=6, mlp_dim=24
)
_PLAIN: dict[str, Any] = dict(norm_offset=0.0, activation="silu", embed_scale=False, tie_embeddings=False)
_LOCAL: dict[str, Any] = dict(layer_kinds=("local", "global"), sliding_window=8, post_norms=True)

CONFIGS = {
    "gemma": ModelConfig(**_SIZES),
    "gemma2": ModelConfig(**_SIZES, **_LOCAL, attn_softcap=50.0, final_softcap=30.0, query_scale=8.0),
    "gemma3": ModelConfig(**_SIZES, **_LOCAL, qk_norm=True, rope_base=1e6, local_rope_base=1e4),
    "llama": ModelConfig(
        **_SIZES, **_PLAIN, rope_scaling=RopeScaling("llama3", 8.0, 64), norm_eps=1e-5, rope_base=5e5
    ),
    "qwen2": ModelConfig(**_SIZES, **_PLAIN, qkv_bias=True),
    "qwen3": ModelConfig(**_SIZES, **_PLAIN | dict(tie_embeddings=True), qk_norm=True),
    "mistral": ModelConfig(**_SIZES, **_PLAIN, layer_kinds=("local",), sliding_window=8),
}
"""A small model of each family."""


@functools.cache
def small_tokenizer(free_ids: int = 9) -> bytes:
    """A SentencePiece model of Gemma's kind, with so many ids that nothing uses."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(["the Nile is long, 0123456789 rivers. And so?"] * 30),
        model_writer=model,
        model_type="bpe",
        vocab_size=310 + free_ids,
        hard_vocab_limit=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        byte_fallback=True,
        user_defined_symbols=[f"<unused{n}>" for n in range(free_ids)],
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    return model.getvalue()


def random_tensors(config: ModelConfig, prefix: str = "model.", seed: int = 0) -> dict[str, np.ndarray]:
    """Float32, by the folder's names; of norms round one."""
    rng = np.random.default_rng(seed)
    made = {}
    for tensor in hf_tensors(config, prefix):
        values = rng.normal(
            size=tensor.shape, scale=tensor.shape[-1] ** -0.5 if len(tensor.shape) > 1 else 0.1
        )
        is_norm = tensor.path[-1] in ("scale", "q_norm", "k_norm")
        made[tensor.name] = (values + (1 - config.norm_offset) * is_norm).astype(np.float32)
    return made


def write_hf_folder(
    folder: pathlib.Path,
    config: ModelConfig,
    *,
    dtype: Any = ml_dtypes.bfloat16,
    shards: int = 2,
    prefix: str = "model.",
    head_again: bool = False,
    tokenizer: bytes | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    tree: dict[str, Any] | None = None,
) -> dict[str, np.ndarray]:
    """Writes a folder, and returns its tensors.

    Args:
      folder: is made.
      config: of the model.
      dtype: of the tensors.
      shards: how many files they are in; one has no index.
      prefix: of their names.
      head_again: a tied embedding stands there as the head, too.
      tokenizer: a SentencePiece model; by default of Gemma's kind, with free ids.
      tensors: by default random.
      tree: config.json, if it is another than that of `config`.
    """
    folder.mkdir(parents=True)
    tensors = random_tensors(config, prefix) if tensors is None else tensors
    tensors = {name: array.astype(dtype) for name, array in tensors.items()}
    if head_again:
        tensors[tied_head(config, prefix).name] = tensors[f"{prefix}embed_tokens.weight"]
    names = np.array_split(list(tensors), shards)
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    files = ["model.safetensors"] if shards == 1 else files
    for file, group in zip(files, names):
        stored = {str(name): np.ascontiguousarray(tensors[name]) for name in group}
        safetensors.numpy.save_file(stored, folder / file, metadata={"format": "pt"})
    if shards > 1:
        where = {str(name): file for file, group in zip(files, names) for name in group}
        total = sum(array.nbytes for array in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    tree = config_to_hf(config) | {"torch_dtype": np.dtype(dtype).name} if tree is None else tree
    (folder / "config.json").write_text(json.dumps(tree, indent=2))  # no newline, as some have none
    (folder / "tokenizer.model").write_bytes(small_tokenizer() if tokenizer is None else tokenizer)
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class":   "GemmaTokenizer", "add_bos_token": true}'
    )
    (folder / "generation_config.json").write_text('{"eos_token_id": 1}\n')
    return tensors
