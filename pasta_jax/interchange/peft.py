"""Writes adapters in PEFT's layout: `adapter_config.json`, and `adapter_model.safetensors` with PEFT's names.

    pasta_jax                            PEFT
    layer_0/attn/q_proj_lora_a [D, R]    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight [R, D]
    layer_0/attn/q_proj_lora_b [R, N, H] base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight [N H, R]
    embed/embedding_rows [n, D]          base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta

The table in `model.weights` gives the module of each matrix. The layout is that of peft 0.15 and later, with
`trainable_token_indices` in `LoraConfig`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict

from pasta_jax.config import Config
from pasta_jax.files import json_bytes
from pasta_jax.interchange.errors import InterchangeError
from pasta_jax.interchange.origin import Origin
from pasta_jax.interchange.writing import check_destination, unfinished, write_files
from pasta_jax.model import Lora, ModelConfig
from pasta_jax.model.families import config_from_hf
from pasta_jax.model.weights import MULTIMODAL_PREFIXES, hf_tensors
from pasta_jax.tokens.base import TextTokenizer
from pasta_jax.tokens.export import tags_json
from pasta_jax.tokens.load import TAGS_FILE

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_TOKENIZER_FILES = ("tokenizer", "special_tokens_map", "added_tokens", "chat_template", "vocab.", "merges.")


def write_adapters(
    destination: str | os.PathLike[str],
    adapters: Mapping[str, Any],
    config: Config,
    tokenizer: TextTokenizer,
    origin: Origin | None,
    *,
    base_step: int,
) -> None:
    """Writes a folder that `peft.PeftModel.from_pretrained` loads beside the published base.

    Args:
      destination: a folder that does not exist or is empty.
      adapters: from a checkpoint (`load_adapters`).
      config: that they were trained with.
      tokenizer: of the trained model.
      origin: of the base.
      base_step: number of training steps that the base has had here.

    Raises:
      InterchangeError: the base is not exactly a published model, or the destination is not empty.
    """
    check_destination(destination)
    advice = "Add --merge_lora, which writes a whole model."
    if origin is None:
        raise InterchangeError(
            f"PEFT's adapters name a published base; the base of these was not imported. {advice}"
        )
    if base_step:
        raise InterchangeError(
            f"The base of these adapters was itself trained for {base_step} steps, so {origin.source} is not "
            f"their base. {advice}"
        )
    published = config_from_hf(origin.tree("config.json") or {}, "config.json")
    if published.vocab_size != config.model.vocab_size:
        raise InterchangeError(
            f"The base has {config.model.vocab_size} embedding rows here and {published.vocab_size} as published: "
            f"its tokenizer was extended. {advice}"
        )
    prefix = origin.prefix
    if prefix in MULTIMODAL_PREFIXES:  # transformers has one name for both
        prefix = "model.language_model."
    files = {
        name: content
        for name, content in origin.files.items()
        if name.startswith(_TOKENIZER_FILES) and "/" not in name
    }
    files[TAGS_FILE] = tags_json(tokenizer.vocabulary)
    files[CONFIG] = json_bytes(peft_config(config.model, config.lora, origin.source, prefix))
    tensors = peft_tensors(adapters, config.model, config.lora, prefix)
    with unfinished(destination) as folder:
        write_files(folder, files)
        safetensors.numpy.save_file(tensors, os.path.join(folder, WEIGHTS), metadata={"format": "pt"})


def peft_tensors(
    adapters: Mapping[str, Any], config: ModelConfig, lora: Lora, prefix: str = "model."
) -> dict[str, np.ndarray]:
    """The adapters under PEFT's names, in float32."""
    tensors: dict[str, np.ndarray] = {}
    flat = flatten_dict(adapters)

    def leaf(*path: str) -> np.ndarray:
        return np.asarray(flat[path]).astype(np.float32)

    for tensor in hf_tensors(config, prefix):
        *folder, name = tensor.path
        module = f"base_model.model.{tensor.name.removesuffix('.weight')}"
        if name in lora.targets:
            a, b = leaf(*folder, f"{name}_lora_a"), leaf(*folder, f"{name}_lora_b")
            tensors[f"{module}.lora_A.weight"] = np.ascontiguousarray(a.reshape(-1, lora.rank).T)
            tensors[f"{module}.lora_B.weight"] = np.ascontiguousarray(b.reshape(lora.rank, -1).T)
        elif name in ("embedding", "head") and lora.rows:
            rows = leaf(*folder, f"{name}_rows")
            rows = rows if name == "embedding" else rows.T
            tensors[f"{module}.token_adapter.trainable_tokens_delta"] = np.ascontiguousarray(rows)
    return tensors


def peft_config(config: ModelConfig, lora: Lora, base: str, prefix: str = "model.") -> dict[str, Any]:
    """The content of adapter_config.json: the base, and the modules that have adapters."""
    targets: str | list[str] = list(lora.targets)
    if prefix != "model.":  # the vision model has matrices of the same names
        targets = rf"{prefix.replace('.', chr(92) + '.')}.*\.({'|'.join(lora.targets)})"
    rows: Any = list(lora.rows) or None
    if rows and not config.tie_embeddings:
        rows = {"embed_tokens": rows, "lm_head": rows}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": targets,
        "trainable_token_indices": rows,
        "inference_mode": True,
    }
