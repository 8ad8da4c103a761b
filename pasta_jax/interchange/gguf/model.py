"""Opens GGUF files, llama.cpp's format, as the Hugging Face folders that they would be.

The keys become the fields of a `config.json`, and the tensors those of a folder, which `reading.read_params` then
reads in pieces:

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
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pasta_jax.foreign import Fields
from pasta_jax.gguf import Entry, dequantized, is_readable, other_files, read_file
from pasta_jax.interchange.errors import InterchangeError, listed
from pasta_jax.interchange.gguf.keys import FAMILY, FREQUENCIES, config_fields
from pasta_jax.interchange.reading import Folder
from pasta_jax.interchange.tensors import CHUNK, Stored
from pasta_jax.messages import name_shown, shown
from pasta_jax.model import ModelConfig
from pasta_jax.model.families import FamilyError, config_from_hf, config_to_hf
from pasta_jax.model.weights import PREFIX, HfTensor, hf_tensors

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


@dataclasses.dataclass(frozen=True)
class GgufTensor(Stored):
    """A tensor in a GGUF file; its `dtype` is the name of a quantisation there.

    Attributes:
      type_id, block: as in `gguf.Entry`.
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
    tree, tensors = read_file(path, InterchangeError)
    for other in other_files(path, tree, InterchangeError):
        more = read_file(other, InterchangeError)[1]
        if both := sorted(tensors.keys() & more.keys()):
            raise InterchangeError(
                f"{both[0]} is in {other} and in a file before it. Download or copy them again."
            )
        tensors |= more
    architecture = tree.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in FAMILY:
        raise InterchangeError(
            f"{path}: general.architecture={shown(architecture)}: unknown architecture. We have "
            f"{', '.join(FAMILY)}."
        )
    keys = Fields(tree, path, error=InterchangeError)
    fields = config_fields(keys, architecture, tensors)
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


def _matched(
    path: str, config: ModelConfig, architecture: str, tensors: Mapping[str, Entry]
) -> dict[str, GgufTensor]:
    """Each tensor of the model by its name in a Hugging Face folder."""
    wanted = {name_of(tensor): tensor for tensor in hf_tensors(config)}
    faults = [
        f"{name} {list(tensor.shape)}: missing" for name, tensor in wanted.items() if name not in tensors
    ]
    readable = {kind: is_readable(example) for kind, example in {t.kind: t for t in tensors.values()}.items()}
    stored: dict[str, GgufTensor] = {}
    for name, found in tensors.items():
        if name == FREQUENCIES:
            continue
        if (tensor := wanted.get(name)) is None:
            faults.append(f"{name_shown(name)} {list(found.shape)}: there is no such tensor in this model")
            continue
        if found.shape != tensor.shape:
            faults.append(f"{name} is {list(found.shape)}, {list(tensor.shape)} by the metadata")
        if not readable[found.kind]:
            faults.append(f"{name} is {found.kind}, which the gguf package does not dequantise")
        elif len(found.shape) == 1 and found.block[0] > 1:
            faults.append(f"{name} is {found.kind}, but a vector is never quantised")
        is_paired = architecture == "llama" and tensor.path[-1] in ("q_proj", "k_proj")
        is_norm = tensor.path[-1] in ("scale", "q_norm", "k_norm")
        stored[tensor.name] = GgufTensor(
            *(found.file, name, found.kind, found.shape, found.offset, found.type_id, found.block),
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
