"""The keys of a GGUF file as the fields of a `config.json`; llama.cpp (src/llama-model.cpp) says what they mean."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from pasta_jax.foreign import Fields
from pasta_jax.gguf import Entry
from pasta_jax.interchange.errors import InterchangeError
from pasta_jax.model.config import MOST_LAYERS

FAMILY = {
    "llama": "llama",  # Mistral and SmolLM2 too
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}
"""The `model_type` in a config.json for each `general.architecture`."""

FREQUENCIES = "rope_freqs.weight"
"""The tensor of the divisors of rotary frequencies, of Llama 3.1 and later."""

_UNSUPPORTED = ("expert_count", "logit_scale", "embedding_scale", "residual_scale", "attention.clamp_kqv")
"""Keys of other models that share an architecture's name; 0 or absent here."""


def config_fields(keys: Fields, architecture: str, tensors: Mapping[str, Entry]) -> dict[str, Any]:
    """The fields of a config.json, as far as they are not the family's own."""
    path, family = keys.path, FAMILY[architecture]

    def key(name: str) -> str:
        return f"{architecture}.{name}"

    def size(name: str, default: int | None = None) -> int:
        return keys.size(key(name), default)

    needed = (
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
    )
    lacks = [key(name) for name in (*needed, "attention.layer_norm_rms_epsilon") if keys[key(name)] is None]
    if lacks:
        raise InterchangeError(f"{path} has no {', '.join(lacks)}: it holds no whole model.")
    for name in _UNSUPPORTED:
        if keys[key(name)]:
            raise keys.fault(key(name), "not supported")
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise InterchangeError(f"{path} has no token_embd.weight [V, D]: it holds no whole model.")
    layers = keys.size(key("block_count"), most=MOST_LAYERS)
    D, N = size("embedding_length"), size("attention.head_count")
    H = size("attention.key_length", default=max(1, D // N))
    for name in ("attention.value_length", "rope.dimension_count"):
        if size(name, default=H) != H:
            raise keys.fault(key(name), f"must be the size of a head, {H}")
    fields: dict[str, Any] = {
        "model_type": family,
        "vocab_size": embedding.shape[0],
        "hidden_size": D,
        "intermediate_size": size("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": N,
        "num_key_value_heads": size("attention.head_count_kv", default=N),
        "head_dim": H,
        "max_position_embeddings": size("context_length"),
        "rms_norm_eps": keys.number(key("attention.layer_norm_rms_epsilon")),
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_theta": keys.number(key("rope.freq_base"), default=1e4),
        "rope_scaling": _scaling(keys, architecture),
    }
    if family == "gemma2":
        caps = ("attn_logit_softcapping", "final_logit_softcapping")
        fields |= {cap: keys.number(key(cap)) for cap in caps if keys[key(cap)] is not None}
    if family == "gemma3_text":
        fields["rope_local_base_freq"] = keys.number(key("rope.freq_base_swa"), default=1e4)
    if family in ("gemma2", "gemma3_text"):
        fields["sliding_window"] = size("attention.sliding_window")
        # llama.cpp knows the two largest models, of other scales, by their layers.
        largest = layers == (46 if family == "gemma2" else 62)
        fields["query_pre_attn_scalar"] = D // N if largest else H
        if (kinds := _layer_types(keys, key("attention.sliding_window_pattern"), layers)) is not None:
            fields["layer_types"] = kinds
    elif family == "llama" and keys[key("attention.sliding_window")]:
        fields |= {"model_type": "mistral", "sliding_window": size("attention.sliding_window")}
    if FREQUENCIES in tensors:
        if architecture != "llama" or fields["rope_scaling"] is not None:
            raise InterchangeError(
                f"{path}: {FREQUENCIES} is supported in llama alone, without other scaling."
            )
        fields["rope_scaling"] = _llama3_scaling(tensors[FREQUENCIES], H, fields["rope_theta"])
    return fields


def _scaling(keys: Fields, architecture: str) -> dict[str, Any] | None:
    """The `rope_scaling` of a config.json."""
    prefix = f"{architecture}.rope.scaling."
    kind = keys[f"{prefix}type"]
    if kind is None and keys[f"{architecture}.rope.scale_linear"]:  # of 2023
        return {"rope_type": "linear", "factor": keys.number(f"{architecture}.rope.scale_linear")}
    if kind in (None, "none"):
        return None
    keys.choice(f"{prefix}type", ("none", "linear", "yarn"), "unknown")
    found: dict[str, Any] = {"rope_type": kind, "factor": keys.number(f"{prefix}factor")}
    if kind == "yarn":
        names = {
            "original_context_length": "original_max_position_embeddings",
            "yarn_beta_fast": "beta_fast",
            "yarn_beta_slow": "beta_slow",
        }
        found |= {
            ours: keys[prefix + name] for name, ours in names.items() if keys[prefix + name] is not None
        }
        for name in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor"):
            if keys[prefix + name] not in (None, 1.0):
                raise keys.fault(prefix + name, "not supported")
    return found


def _llama3_scaling(stored: Entry, H: int, base: float) -> dict[str, Any]:
    """The rule of Llama 3.1 that gives the divisors of the frequencies, [H / 2], in a file."""
    wrong = InterchangeError(
        f"{stored.file}: {stored.name} are no divisors of {H // 2} frequencies by the rule of Llama 3.1."
    )
    if stored.shape != (H // 2,) or stored.kind != "F32":
        raise wrong
    with open(stored.file, "rb") as file:
        file.seek(stored.offset)
        divisors = np.frombuffer(file.read(2 * H), np.float32).astype(np.float64)
    if divisors.shape != stored.shape or not np.isfinite(divisors).all() or divisors.min() < 1:
        raise wrong
    factor, waves = float(divisors.max()), 2 * math.pi * base ** (np.arange(0, H, 2) / H)
    for original in (8192, *(2**n for n in range(5, 21))):  # the published models' first
        smooth = np.clip((original / waves - 1) / 3, 0, 1)
        if np.allclose(divisors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
            rule = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
            return {
                "rope_type": "llama3",
                "factor": factor,
                "original_max_position_embeddings": original,
            } | rule
    raise wrong


def _layer_types(keys: Fields, key: str, layers: int) -> list[str] | None:
    """The kinds of layers, of a period or a flag for each; None if the family has its own."""
    pattern = keys[key]
    if pattern is None:
        return None
    if isinstance(pattern, list):
        local = [bool(is_local) for is_local in pattern[:layers]]
    else:
        period = keys.size(key)
        local = [(z + 1) % period > 0 for z in range(layers)]
    return ["sliding_attention" if is_local else "full_attention" for is_local in local]
