"""Small GGUF files, written by the gguf package's own writer as llama.cpp's converter writes them."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from sentencepiece import sentencepiece_model_pb2

from pasta_jax.model import ModelConfig
from pasta_jax.model.weights import hf_tensors
from tests.helpers import hf_folders

ARCHITECTURE = {name: "llama" if name == "mistral" else name for name in hf_folders.CONFIGS}

NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    **{f"self_attn.{letter}_proj": f"attn_{letter}" for letter in "qkv"},
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
}
GEMMA = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
"""Names in GGUF files by those in folders, without layer, `model.` and `.weight`."""


def package() -> Any:
    return pytest.importorskip("gguf", reason="the gguf package is not installed")


def name_of(name: str, post_norms: bool) -> str:
    """The name in a GGUF file of a tensor of a folder."""
    *start, end = name.removeprefix("model.").split(".")
    layer = f"blk.{start[1]}." if start[0] == "layers" else ""
    inner = ".".join(start[2:] if layer else start)
    return f"{layer}{((NAMES | GEMMA) if post_norms else NAMES)[inner]}.{end}"


def as_stored(config: ModelConfig, architecture: str, name: str, array: np.ndarray) -> np.ndarray:
    """What llama.cpp's converter makes of a tensor: rows of queries and keys in pairs, 1 added to Gemma's norms."""
    if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
        halves = array.reshape(-1, 2, config.head_dim // 2, array.shape[-1])
        array = halves.swapaxes(1, 2).reshape(array.shape)
    return array + np.float32(config.norm_offset) if name.endswith("norm.weight") else array


def blocks(array: np.ndarray, kind: str, seed: int = 0) -> np.ndarray:
    """A matrix in a quantisation; random blocks of small scales where the package cannot quantise."""
    gguf = package()
    which = gguf.GGMLQuantizationType[kind]
    try:
        quantized: np.ndarray = gguf.quantize(array, which)
        return quantized
    except NotImplementedError:
        shape = gguf.quant_shape_to_byte_shape(array.shape, which)
        made = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
        size = gguf.GGML_QUANT_SIZES[which][1]
        scales = np.array([0.01, 0.02], np.float16).view(np.uint8)  # of Q4_K: two numbers at a block's start
        made.reshape(-1, size)[:, :4] = scales
        return made


def keys_of(config: ModelConfig, architecture: str) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "block_count": config.num_layers,
        "context_length": 512,
        "embedding_length": config.model_dim,
        "feed_forward_length": config.mlp_dim,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.freq_base": config.rope_base,
        "vocab_size": config.vocab_size,
    }
    if config.sliding_window:
        keys["attention.sliding_window"] = config.sliding_window
        if len(config.layer_kinds) > 1:
            keys["attention.sliding_window_pattern"] = [kind == "local" for kind in config.kinds]
    if config.rope_scaling.kind == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": config.rope_scaling.factor}
    if architecture == "gemma2":
        keys |= {
            "attn_logit_softcapping": config.attn_softcap,
            "final_logit_softcapping": config.final_softcap,
        }
    return {f"{architecture}.{name}": value for name, value in keys.items()}


def divisors(config: ModelConfig) -> np.ndarray:
    """What llama.cpp's converter stores of Llama 3.1's scaling: [H / 2]."""
    scaling, found = config.rope_scaling, []
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    for i in range(0, config.head_dim, 2):
        wave = 2 * math.pi * config.rope_base ** (i / config.head_dim)
        if wave < scaling.original_length / high:
            found.append(1.0)
        elif wave > scaling.original_length / low:
            found.append(scaling.factor)
        else:
            smooth = (scaling.original_length / wave - low) / (high - low)
            found.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return np.array(found, np.float32)


def sentencepiece_keys(model: bytes, template: str = "") -> dict[str, Any]:
    """The metadata of a SentencePiece model."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    kinds = [int(piece.type) for piece in proto.pieces]
    spelled = [p.piece.replace("\u2581", " ") if p.type == 4 else p.piece for p in proto.pieces]
    ids = {name: getattr(proto.trainer_spec, f"{name}_id") for name in ("bos", "eos", "unk", "pad")}
    named = {"bos": ids["bos"], "eos": ids["eos"], "unknown": ids["unk"], "padding": ids["pad"]}
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": spelled,
        "tokenizer.ggml.scores": [float(piece.score) for piece in proto.pieces],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.add_space_prefix": bool(proto.normalizer_spec.add_dummy_prefix),
        "tokenizer.ggml.add_bos_token": True,
        **{f"tokenizer.ggml.{role}_token_id": i for role, i in named.items() if i >= 0},
        **({"tokenizer.chat_template": template} if template else {}),
    }


def byte_level_keys(data: bytes, pre: str, template: str = "", rows: int = 0, **ids: str) -> dict[str, Any]:
    """The metadata of a tokenizer.json of byte-level BPE, filled with unused tokens up to so many rows."""
    tree = json.loads(data)
    names = {i: name for name, i in tree["model"]["vocab"].items()}
    kinds = dict.fromkeys(names, 1)
    for token in tree["added_tokens"]:
        names[token["id"]] = token["content"]
        kinds[token["id"]] = 3 if token["special"] else 4
    tokens = [names.get(i, f"[PAD{i}]") for i in range(max(max(names) + 1, rows))]
    merges = [m if isinstance(m, str) else " ".join(m) for m in tree["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [kinds.get(i, 5) for i in range(len(tokens))],
        "tokenizer.ggml.merges": merges,
        **{f"tokenizer.ggml.{role}_token_id": tokens.index(name) for role, name in ids.items()},
        **({"tokenizer.chat_template": template} if template else {}),
    }


def write_gguf(
    path: pathlib.Path,
    config: ModelConfig,
    architecture: str,
    tensors: Mapping[str, np.ndarray],
    *,
    kinds: Mapping[str, str] | str = "F32",
    keys: Mapping[str, Any] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    stored: Mapping[str, Any] | None = None,
    files: int = 1,
) -> dict[str, np.ndarray]:
    """Writes a file, or several, and returns what the tensors hold, in order, dequantised, by a folder's names.

    Args:
      path: of the file; of the first, if there are several.
      config: of the model.
      architecture: its name in GGUF files.
      tensors: float32, by a folder's names.
      kinds: quantisation of the matrices, by a part of the folder's names that ends them; vectors are float32.
      keys: more metadata, or other; None leaves a key out.
      tokenizer: the metadata of one; by default of `hf_folders.small_tokenizer`.
      stored: more tensors, or other, as they are stored, by their names there; None leaves one out.
      files: how many.
    """
    gguf = package()
    writer = gguf.GGUFWriter(path, architecture)
    metadata = keys_of(config, architecture)
    metadata |= sentencepiece_keys(hf_folders.small_tokenizer()) if tokenizer is None else tokenizer
    if files > 1:
        metadata |= {"split.no": 0, "split.count": files, "split.tensors.count": len(tensors)}
    _add_keys(writer, metadata | dict(keys or {}))
    held, written = dict[str, np.ndarray](), dict[str, tuple[np.ndarray, str]]()
    for number, tensor in enumerate(hf_tensors(config)):
        array = tensors[tensor.name]
        kind = (
            kinds
            if isinstance(kinds, str)
            else next((k for e, k in kinds.items() if e in tensor.name), "F32")
        )
        kind = kind if array.ndim > 1 else "F32"
        data = blocks(as_stored(config, architecture, tensor.name, array), kind, number)
        which = gguf.GGMLQuantizationType[kind]
        values = gguf.dequantize(data, which)
        if (
            architecture == "llama"
            and array.ndim > 1
            and ("q_proj" in tensor.name or "k_proj" in tensor.name)
        ):
            pairs = values.reshape(-1, config.head_dim // 2, 2, array.shape[-1])
            values = pairs.swapaxes(1, 2).reshape(array.shape)
        is_norm = tensor.name.endswith("norm.weight")
        held[tensor.name] = values - np.float32(config.norm_offset) if is_norm else values
        written[name_of(tensor.name, config.post_norms)] = (data, kind)
    if config.rope_scaling.kind == "llama3":
        written["rope_freqs.weight"] = (divisors(config), "F32")
    for name, other in (stored or {}).items():
        written.pop(name, None)
        if other is not None:
            written[name] = other
    parts = np.array_split(list(written), files)
    for number, part in enumerate(parts):
        if number:
            target = path.with_name(path.name.replace("-00001-", f"-{number + 1:05}-"))
            writer = gguf.GGUFWriter(target, architecture)
            _add_keys(writer, {"split.no": number, "split.count": files, "split.tensors.count": len(tensors)})
        for name in part:
            data, kind = written[name]
            writer.add_tensor(str(name), data, raw_dtype=gguf.GGMLQuantizationType[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return held


def _add_keys(writer: Any, keys: Mapping[str, Any]) -> None:
    for name, value in keys.items():
        if value is None or name == "general.architecture":
            continue
        match value:
            case bool():
                writer.add_bool(name, value)
            case int():
                writer.add_uint32(name, value)
            case float():
                writer.add_float32(name, value)
            case str():
                writer.add_string(name, value)
            case _:
                writer.add_array(name, value)
