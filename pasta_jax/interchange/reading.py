"""A Hugging Face folder to parameters on a mesh, tensor by tensor.

`open_folder` reads configuration and headers and finds every fault; `read_params` then reads each tensor, the
largest first, in pieces, straight into the layout and dtype that the device wants. So the host never holds more
than the parameter on its way, and a CPU, whose device memory is the host's, never holds the model twice.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh

from pasta_jax.interchange import tensors
from pasta_jax.interchange.errors import InterchangeError
from pasta_jax.interchange.placing import Transform, aligned, place_params
from pasta_jax.interchange.tensors import Stored, TensorFile
from pasta_jax.model import ModelConfig
from pasta_jax.model.families import FamilyError, config_from_hf
from pasta_jax.model.weights import HfTensor, find_prefix, hf_tensors, tied_head

ADAPTERS = "adapter_config.json"
"""Of a folder of PEFT's."""

NOISE = 0.01
"""Of new vocabulary rows, in standard deviations of the old: enough to tell them apart, too little to matter."""


@dataclasses.dataclass(frozen=True)
class Folder:
    """A Hugging Face folder whose model we know how to read; its tensors are where and what they should be.

    Attributes:
      path: of the folder.
      source: as what it is known: "google/gemma-2b-it", or its absolute path.
      config: of the model, its dtype that of the tensors.
      files: headers of its safetensors files.
      prefix: of the tensors' names.
      stored: where each of the model's tensors is, by name.
      ignored: names of tensors of no text model.
    """

    path: str
    source: str
    config: ModelConfig
    files: tuple[TensorFile, ...]
    prefix: str
    stored: Mapping[str, Stored]
    ignored: tuple[str, ...]


def open_folder(path: str | os.PathLike[str], source: str = "") -> Folder:
    """Finds every fault of a folder; reads nothing but its configuration and headers.

    Args:
      path: with config.json and safetensors.
      source: as what it is known, by default its absolute path.

    Raises:
      InterchangeError: naming file and tensor, or the architecture that we do not have.
    """
    path = os.path.abspath(os.path.expanduser(path))
    file = os.path.join(path, "config.json")
    is_whole = any(os.path.exists(os.path.join(path, name)) for name in (tensors.SINGLE, tensors.INDEX))
    if os.path.exists(os.path.join(path, ADAPTERS)) and not is_whole:
        raise InterchangeError(
            f"{path} holds PEFT's adapters ({ADAPTERS}), which are not read, and no whole model. Merge them where "
            "peft is installed: PeftModel.from_pretrained(...).merge_and_unload().save_pretrained(FOLDER)."
        )
    try:
        with open(file, encoding="utf-8") as opened:
            tree = json.load(opened)
    except OSError as error:
        raise InterchangeError(
            f"{path} is no Hugging Face folder: cannot read its config.json ({error.strerror})."
        ) from error
    except ValueError as error:
        raise InterchangeError(f"{file} is not JSON: {error}") from error
    try:
        config = config_from_hf(tree, file)
    except FamilyError as error:
        raise InterchangeError(str(error)) from error
    files = tensors.read_files(path)
    prefix = find_prefix(tensor.name for stored in files for tensor in stored.tensors)
    again = [tied_head(config, prefix)] if config.tie_embeddings else []
    stored, ignored = tensors.match(files, hf_tensors(config, prefix), again)
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
        folder.config,
        dtype=dtype or own,
        vocab_size=max(vocab_size or 0, folder.config.vocab_size),
    )


def read_params(
    folder: Folder,
    config: ModelConfig,
    *,
    mesh: Mesh | None = None,
    transform: Transform | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """The parameters of a folder, on the mesh.

    Args:
      folder: from `open_folder`.
      config: from `model_config`. New vocabulary rows are the mean of the old, and a little noise.
      mesh: of `sharding.make_mesh`; by default the first device alone.
      transform: as in `placing.place_params`.
      seed: of the noise.

    Raises:
      InterchangeError: it does not fit, with the arithmetic, before anything is read; or the head that the folder
        has besides differs from the embedding to which it is tied.
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
    """One of our parameters, [tensor.ours]; rows beyond those stored are new ones."""
    out = aligned(tensor.ours, dtype)
    theirs = tensor.to_hf(out)  # a view: what is written there is in `out`
    total, squares = np.zeros(stored.shape[1:], np.float64), 0.0
    is_grown = tensor.shape[0] > stored.shape[0]
    for start, piece in tensors.rows(stored):
        _copy(piece, theirs[start : start + len(piece)])
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
        theirs[stored.shape[0] :] = new.astype(stored.numpy_dtype).astype(dtype)
    return out


def _check_tied(folder: Folder) -> None:
    """That a head beside a tied embedding is the embedding again."""
    if not folder.config.tie_embeddings:
        return
    head = folder.stored.get(tied_head(folder.config, folder.prefix).name)
    embedding = folder.stored[hf_tensors(folder.config, folder.prefix)[0].name]
    if head is not None and not tensors.equal(head, embedding):
        told = os.path.join(folder.path, "config.json")
        raise InterchangeError(
            f"{head.file}: {head.name} differs from {embedding.name}, and {told} says that they are tied. Which is "
            'meant? If the head is its own, set "tie_word_embeddings": false there.'
        )


def _copy(source: np.ndarray, target: np.ndarray) -> None:
    """Casts; by tiles where one of the two is transposed, since NumPy then jumps through memory."""
    if target.flags.c_contiguous or target.ndim != 2:
        target[...] = source
        return
    tile = 256
    for row in range(0, source.shape[0], tile):
        for column in range(0, source.shape[1], tile):
            here = np.s_[row : row + tile, column : column + tile]
            target[here] = source[here]


def _widest(stored: Mapping[str, Stored]) -> str:
    """The dtype that holds all of a model's tensors: the matrices', which here and there differ from norms'."""
    found = {tensor.numpy_dtype.name for tensor in stored.values()}
    return found.pop() if len(found) == 1 else "float32"
