"""Reads GGUF files, llama.cpp's format, by the `gguf` package (the extra `[gguf]`).

The package parses the file and dequantises its blocks; here its keys become the fields of a `config.json`, and its
tensors those of a Hugging Face folder, which `reading.read_params` then reads in pieces:

    token_embd.weight [V, D], output_norm.weight [D], output.weight [V, D] unless it is the embedding
    blk.<z>.attn_norm.weight                       before attention
    blk.<z>.attn_{q,k,v}.weight, attn_output.weight and biases of Qwen 2.5
    blk.<z>.attn_{q,k}_norm.weight                 Gemma 3 and Qwen 3
    blk.<z>.ffn_norm.weight                        before the MLP
    blk.<z>.ffn_{gate,up,down}.weight
    blk.<z>.post_{attention,ffw}_norm.weight       Gemma 2 and 3

Three things differ from such a folder. In `llama` the rows of each head of queries and keys are in the order of
llama.cpp's rotary positions, which rotate neighbours; Gemma's norms are stored with their offset of 1 added; and
the scaled frequencies of Llama 3.1 are a tensor, rope_freqs.weight, of which the rule is found again.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pasta_jax.extras import optional
from pasta_jax.foreign import Fields
from pasta_jax.interchange.errors import InterchangeError, listed
from pasta_jax.interchange.reading import Folder
from pasta_jax.interchange.tensors import CHUNK, Stored
from pasta_jax.messages import message_of, name_shown, shown
from pasta_jax.model import ModelConfig
from pasta_jax.model.config import MOST_LAYERS
from pasta_jax.model.families import FamilyError, config_from_hf, config_to_hf
from pasta_jax.model.weights import PREFIX, HfTensor, hf_tensors

FAMILY = {
    "llama": "llama",  # Mistral and SmolLM2 too
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}
"""The `model_type` in a config.json for each `general.architecture`."""

_NAMES = {
    "embedding": "token_embd.weight",
    "final_norm/scale": "output_norm.weight",
    "head": "output.weight",
    "attn_norm/scale": "attn_norm.weight",
    **{f"{letter}_proj": f"attn_{letter}.weight" for letter in "qkv"},
    **{f"{letter}_proj_bias": f"attn_{letter}.bias" for letter in "qkv"},
    "o_proj": "attn_output.weight",
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
    "attn_post_norm/scale": "post_attention_norm.weight",
    "mlp_norm/scale": "ffn_norm.weight",
    **{f"{part}_proj": f"ffn_{part}.weight" for part in ("gate", "up", "down")},
    "mlp_post_norm/scale": "post_ffw_norm.weight",
}
"""The end of a tensor's name for the end of our parameter's path."""

_FREQUENCIES = "rope_freqs.weight"

_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")

_UNSUPPORTED = ("expert_count", "logit_scale", "embedding_scale", "residual_scale", "attention.clamp_kqv")
"""Keys of other models that share an architecture's name; 0 or absent here."""


@dataclasses.dataclass(frozen=True)
class GgufTensor(Stored):
    """A tensor in a GGUF file; its `dtype` is the name of a quantisation there.

    Attributes:
      type_id: of the quantisation.
      block: elements of a block, and its bytes.
      pairs: so many rows belong to a head, in llama.cpp's order; 0 if they are in order.
      offset_added: what was added to its values.
    """

    type_id: int
    block: tuple[int, int]
    pairs: int = 0
    offset_added: float = 0.0

    @property
    def nbytes(self) -> int:
        elements, size = self.block
        return math.prod(self.shape) // elements * size

    @property
    def numpy_dtype(self) -> np.dtype:
        return np.dtype(np.float32)

    @property
    def rows_at_once(self) -> int:
        # A quarter, since the package keeps intermediate results.
        rows = max(1, CHUNK // 4 // max(1, 4 * math.prod(self.shape[1:])))
        return max(1, rows // self.pairs) * self.pairs if self.pairs else rows

    def decoded(self, data: np.ndarray, count: int) -> np.ndarray:
        values = dequantized(data, self.type_id).reshape(count, *self.shape[1:])
        if self.pairs:
            values = values.reshape(-1, self.pairs // 2, 2, *self.shape[1:]).swapaxes(1, 2)
            values = values.reshape(count, *self.shape[1:])
        return values - np.float32(self.offset_added) if self.offset_added else values


@dataclasses.dataclass(frozen=True)
class GgufModel:
    """A GGUF file that passed all checks.

    Attributes:
      folder: it, as a Hugging Face folder whose path is the file; its config's dtype is `own_dtype`.
      keys: its metadata.
      context_length: the longest text that the model was trained for, in tokens.
    """

    folder: Folder
    keys: Fields
    context_length: int


def open_gguf(path: str | os.PathLike[str]) -> GgufModel:
    """Opens a GGUF file, or the first of the files that one was split into, and reports every fault.

    Reads metadata and the list of tensors only.

    Raises:
      InterchangeError: the package is not installed; it is no such file, or a damaged one; its architecture or a
        quantisation is not supported; a key or a tensor is missing, extra or of another shape.
    """
    path = os.path.abspath(os.path.expanduser(path))
    tree, tensors = _read(path)
    for other in _others(path, tree):
        tensors |= _read(other)[1]
    architecture = tree.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in FAMILY:
        raise InterchangeError(
            f"{path}: general.architecture={shown(architecture)}: unknown architecture. We have "
            f"{', '.join(FAMILY)}."
        )
    keys = Fields(tree, path, error=InterchangeError)
    fields = _config_fields(keys, architecture, tensors)
    try:
        config = config_from_hf(fields, path)
    except FamilyError as error:
        raise InterchangeError(str(error)) from error
    stored = _matched(path, config, architecture, tensors)
    config = dataclasses.replace(config, dtype=own_dtype([*stored.values()]))
    folder = Folder(path, path, config, (), PREFIX, stored, ())
    return GgufModel(folder, keys, fields["max_position_embeddings"])


def config_json(model: GgufModel, files: Mapping[str, bytes]) -> dict[str, Any]:
    """The config.json of a file's folder, with the special ids of its generation_config.json if there is one."""
    config = model.folder.config
    ids = json.loads(files.get("generation_config.json", b"{}"))
    return config_to_hf(config) | {"max_position_embeddings": model.context_length} | ids


def own_dtype(stored: Sequence[GgufTensor]) -> str:
    """The dtype of the model in a file: float32 if a matrix is float32 or float16, else bfloat16.

    Float16 has too small a range to compute in. Quantised matrices were bfloat16 once, and have fewer digits now.
    """
    return "float32" if {t.dtype for t in stored if len(t.shape) > 1} & {"F32", "F16"} else "bfloat16"


def dequantized(data: np.ndarray, type_id: int) -> np.ndarray:
    """Float32 values of some blocks, uint8: [n], by the package."""
    gguf = _package()
    # As one row: the package loops in Python over groups of rows.
    values: np.ndarray = gguf.dequantize(data.reshape(1, -1), gguf.GGMLQuantizationType(type_id))
    return values.reshape(-1)


# ------------------------------------------------------------------------------------------------------ the file


class _End(Exception):
    """The file is shorter than it says."""


def _package() -> Any:
    return optional("gguf", "gguf", "Reading GGUF files", InterchangeError)


def _read(path: str) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """Metadata by key, and tensors by name."""
    gguf = _package()
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            start = file.read(7)
    except OSError as error:
        raise InterchangeError(f"Cannot read {path}: {error.strerror}.") from error
    if start == b"version":
        raise InterchangeError(
            f"{path} is a pointer of Git LFS, not the file itself. Run git lfs pull in its folder."
        )
    if start[:4] != b"GGUF":
        raise InterchangeError(f"{path} is no GGUF file: it starts with {shown(start[:4])}.")
    place = ["its header"]

    class Reader(gguf.GGUFReader):  # type: ignore[name-defined]
        """The package's, which reads past the end of a file, and does not say where it found a fault."""

        data: Any
        tensors: Any

        def _get(self, offset: int, dtype: Any, count: Any = 1, *others: Any, **named: Any) -> Any:
            if type(self.data) is not np.ndarray:
                self.data = self.data.view(np.ndarray)  # slices of a memmap are slow
            if offset + np.dtype(dtype).itemsize * int(count) > self.data.size:
                raise _End
            return super()._get(offset, dtype, count, *others, **named)

        def _build_tensors(self, start: int, fields: Any) -> None:
            found = []
            for field in fields:
                place[0] = name_shown(field.name)
                super()._build_tensors(start, [field])
                found += self.tensors
            self.tensors = found

    try:
        reader = Reader(path)
        place[0] = "its metadata"
        tree = {name: _value(field) for name, field in reader.fields.items()}
        made = [_tensor(path, tensor, gguf) for tensor in reader.tensors]
        is_swapped = reader.byte_order != "I"
    except Exception as error:  # the package raises many kinds for damaged files
        fault = "it ends there" if isinstance(error, _End) else message_of(error)
        raise InterchangeError(
            f"{path} ({size} bytes) is truncated or damaged at {place[0]}: {fault}. Download or copy it again."
        ) from error
    if is_swapped:
        raise InterchangeError(f"{path} has another byte order than this machine.")
    tensors = {tensor.name: tensor for tensor in made}
    if len(tensors) < len(made):
        raise InterchangeError(f"{path} is damaged: a tensor stands twice in it.")
    return tree, tensors


def _value(field: Any) -> Any:
    """The value of a key; float32 as the shortest number that it is."""
    value = field.contents()
    if isinstance(value, float) and field.parts[-1].dtype.itemsize == 4:
        return float(str(np.float32(value)))
    return value


def _tensor(path: str, tensor: Any, gguf: Any) -> GgufTensor:
    kind = tensor.tensor_type
    shape = tuple(int(size) for size in reversed(tensor.shape))
    block = gguf.GGML_QUANT_SIZES[kind]
    return GgufTensor(path, str(tensor.name), kind.name, shape, int(tensor.data_offset), int(kind), block)


def _others(path: str, tree: Mapping[str, Any]) -> list[str]:
    """The other files of a model that was split."""
    count = tree.get("split.count", 0)
    if not isinstance(count, int) or count < 2:
        return []
    found = _SHARD.fullmatch(path)
    if found is None or int(found[3]) != count:
        raise InterchangeError(
            f"{path} is one of {count} files of a model, which must be called NAME-00001-of-{count:05}.gguf and so "
            "on."
        )
    names = [f"{found[1]}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
    if path != names[0]:
        raise InterchangeError(f"{path} is one of {count} files of a model. Name the first: {names[0]}.")
    if missing := [os.path.basename(name) for name in names if not os.path.isfile(name)]:
        raise InterchangeError(
            f"{path} is one of {count} files of a model; beside it are missing: {', '.join(missing[:6])}."
        )
    return names[1:]


# ------------------------------------------------------------------------------------------------ configuration


def _config_fields(keys: Fields, architecture: str, tensors: Mapping[str, GgufTensor]) -> dict[str, Any]:
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
    if _FREQUENCIES in tensors:
        if architecture != "llama" or fields["rope_scaling"] is not None:
            raise InterchangeError(
                f"{path}: {_FREQUENCIES} is supported in llama alone, without other scaling."
            )
        fields["rope_scaling"] = _llama3_scaling(tensors[_FREQUENCIES], H, fields["rope_theta"])
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


def _llama3_scaling(stored: GgufTensor, H: int, base: float) -> dict[str, Any]:
    """The rule of Llama 3.1 that gives the divisors of the frequencies, [H / 2], in a file."""
    wrong = InterchangeError(
        f"{stored.file}: {stored.name} are no divisors of {H // 2} frequencies by the rule of Llama 3.1."
    )
    if stored.shape != (H // 2,) or stored.dtype != "F32":
        raise wrong
    with open(stored.file, "rb") as file:
        file.seek(stored.offset)
        divisors = np.frombuffer(file.read(stored.nbytes), np.float32).astype(np.float64)
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


# ------------------------------------------------------------------------------------------------------ tensors


def _matched(
    path: str, config: ModelConfig, architecture: str, tensors: Mapping[str, GgufTensor]
) -> dict[str, GgufTensor]:
    """Each tensor of the model by its name in a Hugging Face folder."""
    wanted = {name_of(tensor): tensor for tensor in hf_tensors(config)}
    faults = [
        f"{name} {list(tensor.shape)}: missing" for name, tensor in wanted.items() if name not in tensors
    ]
    readable = {kind: _is_readable(kind, tensors) for kind in {stored.dtype for stored in tensors.values()}}
    stored: dict[str, GgufTensor] = {}
    for name, found in tensors.items():
        if name == _FREQUENCIES:
            continue
        if (tensor := wanted.get(name)) is None:
            faults.append(f"{name_shown(name)} {list(found.shape)}: there is no such tensor in this model")
            continue
        if found.shape != tensor.shape:
            faults.append(f"{name} is {list(found.shape)}, {list(tensor.shape)} by the metadata")
        if not readable[found.dtype]:
            faults.append(f"{name} is {found.dtype}, which the gguf package does not dequantise")
        elif len(found.shape) == 1 and found.block[0] > 1:
            faults.append(f"{name} is {found.dtype}, but a vector is never quantised")
        is_paired = architecture == "llama" and tensor.path[-1] in ("q_proj", "k_proj")
        is_norm = tensor.path[-1] in ("scale", "q_norm", "k_norm")
        stored[tensor.name] = dataclasses.replace(
            found,
            pairs=config.head_dim if is_paired else 0,
            offset_added=config.norm_offset if is_norm else 0.0,
        )
    if faults:
        raise InterchangeError(
            f"The tensors in {path} are not those of the model in its metadata:{listed(faults)}"
        )
    return stored


def name_of(tensor: HfTensor) -> str:
    """The name in a GGUF file of a tensor in a Hugging Face folder."""
    end = "/".join(tensor.path[-2:] if tensor.path[-1] == "scale" else tensor.path[-1:])
    layer = tensor.path[0].removeprefix("layer_")
    return f"blk.{layer}.{_NAMES[end]}" if layer.isdecimal() else _NAMES[end]


def _is_readable(kind: str, tensors: Mapping[str, GgufTensor]) -> bool:
    example = next(stored for stored in tensors.values() if stored.dtype == kind)
    try:
        dequantized(np.zeros(example.block[1], np.uint8), example.type_id)
    except Exception:  # NotImplementedError, and others for types that are no numbers of a model
        return False
    return True
