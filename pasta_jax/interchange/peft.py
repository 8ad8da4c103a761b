"""Adapters in PEFT's layout: `adapter_config.json`, and `adapter_model.safetensors` under its names.

    ours                                 theirs
    layer_0/attn/q_proj_lora_a [D, R]    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight [R, D]
    layer_0/attn/q_proj_lora_b [R, N, H] base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight [N H, R]
    embed/embedding_rows [n, D]          base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta

Which module a matrix is follows from the table in `model.weights`. Names: peft, `LoraConfig` with
`trainable_token_indices` (0.15 and later).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict

from pasta_jax.config import Config
from pasta_jax.interchange.errors import InterchangeError
from pasta_jax.interchange.origin import Origin
from pasta_jax.interchange.writing import check_destination, unfinished
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
      destination: a folder that is not there, or is empty.
      adapters: of a checkpoint (`checkpoints.load_adapters`).
      config: what they were trained with.
      tokenizer: theirs.
      origin: of the base.
      base_step: updates that the base had had here.

    Raises:
      InterchangeError: the base is no published model as it was published, or something stands there.
    """
    check_destination(destination)
    advice = "Add --merge_lora, which writes a whole model."
    if origin is None:
        raise InterchangeError(
            f"PEFT's adapters name a published base; these stand beside weights without one. {advice}"
        )
    if base_step:
        raise InterchangeError(
            f"The weights beside these adapters had {base_step} steps of training here, so {origin.source} "
            f"is not their base. {advice}"
        )
    published = config_from_hf(origin.tree("config.json") or {}, "config.json")
    if published.vocab_size != config.model.vocab_size:
        raise InterchangeError(
            f"The base has {config.model.vocab_size} embedding rows here and {published.vocab_size} as published: "
            f"its tokenizer was extended. {advice}"
        )
    prefix = origin.prefix
    if prefix in MULTIMODAL_PREFIXES:  # the classes of transformers have one name for both
        prefix = "model.language_model."
    files = {
        name: content
        for name, content in origin.files.items()
        if name.startswith(_TOKENIZER_FILES) and "/" not in name
    }
    files[TAGS_FILE] = tags_json(tokenizer.vocabulary)
    files[CONFIG] = (
        json.dumps(peft_config(config.model, config.lora, origin.source, prefix), indent=2) + "\n"
    ).encode()
    tensors = peft_tensors(adapters, config.model, config.lora, prefix)
    with unfinished(destination) as folder:
        for name, content in files.items():
            with open(os.path.join(folder, name), "wb") as file:
                file.write(content)
        safetensors.numpy.save_file(tensors, os.path.join(folder, WEIGHTS), metadata={"format": "pt"})


def peft_tensors(
    adapters: Mapping[str, Any], config: ModelConfig, lora: Lora, prefix: str = "model."
) -> dict[str, np.ndarray]:
    """The adapters by PEFT's names, float32."""
    tensors: dict[str, np.ndarray] = {}
    flat = flatten_dict(adapters)

    def found(*path: str) -> np.ndarray:
        return np.asarray(flat[path]).astype(np.float32)

    for tensor in hf_tensors(config, prefix):
        *folder, name = tensor.path
        module = f"base_model.model.{tensor.name.removesuffix('.weight')}"
        if name in lora.targets:
            a, b = found(*folder, f"{name}_lora_a"), found(*folder, f"{name}_lora_b")
            tensors[f"{module}.lora_A.weight"] = np.ascontiguousarray(a.reshape(-1, lora.rank).T)
            tensors[f"{module}.lora_B.weight"] = np.ascontiguousarray(b.reshape(lora.rank, -1).T)
        elif name in ("embedding", "head") and lora.rows:
            rows = found(*folder, f"{name}_rows")
            rows = rows if name == "embedding" else rows.T
            tensors[f"{module}.token_adapter.trainable_tokens_delta"] = np.ascontiguousarray(rows)
    return tensors


def peft_config(config: ModelConfig, lora: Lora, base: str, prefix: str = "model.") -> dict[str, Any]:
    """adapter_config.json: beside which model, and what peft must put in its place."""
    targets: str | list[str] = list(lora.targets)
    if prefix != "model.":  # a vision model beside it has matrices of the same names
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
