"""Reads the parameters of a Hugging Face folder onto a mesh, tensor by tensor.

`open_folder` reads configuration and headers and reports every fault. `read_params` then reads each tensor, the
largest first, in pieces, straight into the layout and dtype of the device. So the host never holds more than one
parameter, and a CPU, whose device memory is the host's, never holds the model twice.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh

from pasta_jax.foreign import parse_object, read_bytes
from pasta_jax.interchange import tensors
from pasta_jax.interchange.errors import InterchangeError
from pasta_jax.interchange.placing import Transform, aligned, place_params
from pasta_jax.interchange.tensors import Stored, TensorFile
from pasta_jax.model import ModelConfig
from pasta_jax.model.families import FamilyError, config_from_hf
from pasta_jax.model.weights import HfTensor, find_prefix, hf_tensors, tied_head

ADAPTERS = "adapter_config.json"
"""The configuration in a folder of PEFT adapters."""

NOISE = 0.01
"""Noise of new vocabulary rows, in standard deviations of the old ones: enough to make the rows differ."""


@dataclasses.dataclass(frozen=True)
class Folder:
    """A Hugging Face folder that passed all checks.

    Attributes:
      path: absolute path of the folder.
      source: its name, such as "google/gemma-2b-it", or its absolute path.
      config: of the model, with the dtype of the tensors.
      files: headers of its safetensors files.
      prefix: of the tensors' names.
      stored: file and offset of each of the model's tensors, by name.
      ignored: names of tensors that belong to no text model.
    """

    path: str
    source: str
    config: ModelConfig
    files: tuple[TensorFile, ...]
    prefix: str
    stored: Mapping[str, Stored]
    ignored: tuple[str, ...]


def open_folder(path: str | os.PathLike[str], source: str = "") -> Folder:
    """Opens a folder and reports every fault. Reads its configuration and headers only.

    Args:
      path: a folder with config.json and safetensors files.
      source: the model's name; by default the absolute path.

    Raises:
      InterchangeError: with file and tensor of each fault, or the architecture that is not supported.
    """
    path = os.path.abspath(os.path.expanduser(path))
    file = os.path.join(path, "config.json")
    is_whole = any(os.path.exists(os.path.join(path, name)) for name in (tensors.SINGLE, tensors.INDEX))
    if os.path.exists(os.path.join(path, ADAPTERS)) and not is_whole:
        raise InterchangeError(
            f"{path} holds PEFT's adapters ({ADAPTERS}) and no whole model. They go beside their base: give "
            f"peft:{path} with --base=WORKDIR. Or merge them where peft is installed: "
            "PeftModel.from_pretrained(...).merge_and_unload().save_pretrained(FOLDER)."
        )
    if not os.path.exists(file):
        raise InterchangeError(f"{path} is not a Hugging Face folder: it has no config.json.")
    tree = parse_object(read_bytes(file, InterchangeError), file, InterchangeError)
    try:
        config = config_from_hf(tree, file)
    except FamilyError as error:
        raise InterchangeError(str(error)) from error
    files = tensors.read_files(path)
    prefix = find_prefix(tensor.name for stored in files for tensor in stored.tensors)
    optional = [tied_head(config, prefix)] if config.tie_embeddings else []
    stored, ignored = tensors.match(files, hf_tensors(config, prefix), optional)
    config = dataclasses.replace(config, dtype=_widest(stored))
    return Folder(path, source or path, config, files, prefix, stored, ignored)


def model_config(folder: Folder, *, dtype: str | None = None, vocab_size: int | None = None) -> ModelConfig:
    """The model that the folder's becomes here.

    Args:
      folder: what is read.
      dtype: of the parameters; by default the folder's, float32 for float16 (whose range is too small to
        compute in; in bfloat16 digits would be lost).
      vocab_size: rows of the embedding, the folder's or more.
    """
    own = "float32" if folder.config.dtype == "float16" else folder.config.dtype
    return dataclasses.replace(
        folder.config, dtype=dtype or own, vocab_size=max(vocab_size or 0, folder.config.vocab_size)
    )


def read_params(
    folder: Folder,
    config: ModelConfig,
    *,
    mesh: Mesh | None = None,
    transform: Transform | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Reads the parameters of a folder onto a mesh.

    Args:
      folder: from `open_folder`.
      config: from `model_config`. New vocabulary rows are the mean of the old, and a little noise.
      mesh: of `sharding.make_mesh`; by default the first device alone.
      transform: as in `placing.place_params`.
      seed: of the noise.

    Raises:
      InterchangeError: it does not fit, with the arithmetic, before anything is read; or the folder also stores the
        head of a tied embedding, and the two differ.
    """
    readers = {
        tensor.path: functools.partial(
            read_tensor, tensor, folder.stored[tensor.name], np.dtype(config.dtype), seed
        )
        for tensor in hf_tensors(config, folder.prefix)
    }
    piece = 4 * tensors.CHUNK
    check = functools.partial(_check_tied, folder)
    what = folder.source
    return place_params(readers, config, what=what, piece=piece, mesh=mesh, transform=transform, check=check)


def read_tensor(tensor: HfTensor, stored: Stored, dtype: np.dtype, seed: int = 0) -> np.ndarray:
    """Reads one parameter, of shape `tensor.ours`. Rows beyond the stored ones are new."""
    out = aligned(tensor.ours, dtype)
    hf = tensor.to_hf(out)  # a view of `out`
    total, squares = np.zeros(stored.shape[1:], np.float64), 0.0
    is_grown = tensor.shape[0] > stored.shape[0]
    for start, piece in tensors.rows(stored):
        _copy(piece, hf[start : start + len(piece)])
        if is_grown:
            wide = piece.astype(np.float32)
            total += wide.sum(0, dtype=np.float64)
            squares += float(np.square(wide, out=wide).sum(dtype=np.float64))
    if is_grown:
        mean, count = total / stored.shape[0], math.prod(stored.shape)
        deviation = math.sqrt(max(0.0, squares / count - float(np.square(mean).mean())))
        noise = np.random.default_rng(seed).normal(size=(tensor.shape[0] - stored.shape[0], *mean.shape))
        new = mean + NOISE * deviation * noise
        # Rounded as the old ones are, so that an export in the folder's dtype loses nothing.
        hf[stored.shape[0] :] = new.astype(stored.numpy_dtype).astype(dtype)
    return out


def _check_tied(folder: Folder) -> None:
    """Checks that the stored head of a tied embedding equals the embedding."""
    if not folder.config.tie_embeddings:
        return
    head = folder.stored.get(tied_head(folder.config, folder.prefix).name)
    embedding = folder.stored[hf_tensors(folder.config, folder.prefix)[0].name]
    if head is not None and not tensors.equal(head, embedding):
        file = os.path.join(folder.path, "config.json")
        raise InterchangeError(
            f"{head.file}: {head.name} differs from {embedding.name}, and {file} says that they are tied. If the "
            'head has weights of its own, set "tie_word_embeddings": false there.'
        )


def _copy(source: np.ndarray, target: np.ndarray) -> None:
    """Copies and casts, by tiles if one of the two is transposed: NumPy would jump through memory."""
    if target.flags.c_contiguous or target.ndim != 2:
        target[...] = source
        return
    tile = 256
    for row in range(0, source.shape[0], tile):
        for column in range(0, source.shape[1], tile):
            index = np.s_[row : row + tile, column : column + tile]
            target[index] = source[index]


def _widest(stored: Mapping[str, Stored]) -> str:
    """A dtype that holds every tensor of a model: norms may have another one than matrices."""
    names = {tensor.numpy_dtype.name for tensor in stored.values()}
    return names.pop() if len(names) == 1 else "float32"
