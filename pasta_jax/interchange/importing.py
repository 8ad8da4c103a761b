"""A foreign model as one of ours: weights on the mesh, a tokenizer with ids for the tags, and where it came from.

Everything is looked at before a tensor is read: files, names, shapes, tokenizer, room for the tags, memory.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh

from pasta_jax.checkpoints.about import write_about
from pasta_jax.checkpoints.save import Checkpoints
from pasta_jax.config import CheckpointConfig, Config, DataConfig
from pasta_jax.interchange import gemma, hub
from pasta_jax.interchange.errors import InterchangeError
from pasta_jax.interchange.origin import Origin, origin_of, write_origin
from pasta_jax.interchange.placing import Path, aligned
from pasta_jax.interchange.reading import ADAPTERS, Folder, model_config, open_folder, read_params
from pasta_jax.interchange.tensors import CHUNK
from pasta_jax.model import ModelConfig
from pasta_jax.model.forms import Int8, contracted, quantize_leaf
from pasta_jax.model.presets import presets
from pasta_jax.tokens.load import load_tokenizer
from pasta_jax.tokens.tokenizer import Tokenizer, TokenizerError

Kind = Literal["folder", "hub", "orbax", "workdir"]
"""A Hugging Face folder, a repository on its hub, a checkpoint of Gemma's own, or what we wrote."""


@dataclasses.dataclass(frozen=True)
class Wanted:
    """How a foreign model is taken.

    Attributes:
      dtype: of its parameters; by default its own.
      tokenizer: file or folder of one, by default the model's own.
      chat: format of prompts, or "auto".
      extend_tokenizer: tags without a free id get new ones, and the embedding rows for them.
      preset: of an Orbax checkpoint, whose sizes it has; by default found by its shapes.
      int8: its matrices are quantised, each as soon as it is read; to decode with, not to be written.
    """

    dtype: str | None = None
    tokenizer: str | os.PathLike[str] | None = None
    chat: str = "auto"
    extend_tokenizer: bool = False
    preset: str | None = None
    int8: bool = False


@dataclasses.dataclass(frozen=True)
class Ready:
    """A foreign model that was found sound, and not read yet.

    Attributes:
      source: as what it is known.
      config: of the model that it becomes.
      tokenizer: with an id for each tag.
      tokenizer_path: where that came from.
      origin: what is kept of its folder; None of an Orbax checkpoint.
      folder: a Hugging Face folder to compare with; None likewise.
      new_rows: of the embedding, which the folder's does not have.
      read: reads the parameters onto a mesh.
    """

    source: str
    config: ModelConfig
    tokenizer: Tokenizer
    tokenizer_path: str
    origin: Origin | None
    folder: str | None
    new_rows: int
    read: Callable[[Mesh | None], Any]


def kind_of(source: str | os.PathLike[str]) -> tuple[Kind, str]:
    """What somebody means by a model: its kind, and the folder or the name on the hub.

    hf:DIRECTORY, orbax:DIRECTORY and hf:org/name say what they are. Else it is a folder, Hugging Face's if its
    config.json names an architecture or stands beside safetensors files, or if it holds PEFT's adapters, which
    `open_folder` refuses (our own workdirs have a config.json too); or the name of a published model
    (`model.presets`). Whatever is left is taken for a workdir, org/name too: it says nothing yet of whether
    that is there.

    Raises:
      InterchangeError: hf: or orbax: of what is neither there nor a name.
    """
    text = os.fspath(source)
    scheme, colon, rest = text.partition(":")
    if colon and scheme in ("hf", "orbax"):
        if os.path.isdir(os.path.expanduser(rest)):
            return ("folder" if scheme == "hf" else "orbax"), rest
        if scheme == "hf" and hub.NAME.fullmatch(rest):
            return "hub", rest
        raise InterchangeError(
            f"{text}: there is no folder {rest}" + ", and names on the hub are org/name." * (scheme == "hf")
        )
    folder = os.path.expanduser(text)
    if os.path.isdir(folder):
        return ("folder" if _is_hf(folder) else "workdir"), text
    if text.lower() in presets():
        return "hub", presets()[text.lower()].hub
    return "workdir", text


def _is_hf(folder: str) -> bool:
    names = os.listdir(folder)
    if ADAPTERS in names:
        return True
    if "config.json" not in names:
        return False
    if any(name.endswith(".safetensors") for name in names):
        return True
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            tree = json.load(file)
    except (OSError, ValueError):
        return False
    return isinstance(tree, dict) and not tree.keys().isdisjoint(("model_type", "architectures"))


def open_source(kind: Kind, where: str, wanted: Wanted = Wanted()) -> Ready:
    """Looks at a foreign model; reads headers only.

    Args:
      kind: "folder" (Hugging Face's), "hub" (org/name there), or "orbax" (Gemma's own checkpoint).
      where: the folder or name.
      wanted: how it is taken.

    Raises:
      InterchangeError: everything that is wrong with it.
      TokenizerError: its tokenizer cannot serve.
    """
    if kind == "orbax":
        return _open_orbax(where, wanted)
    if kind == "hub":
        return _open_folder(open_folder(hub.download(where), source=where), wanted)
    return _open_folder(open_folder(where), wanted)


def write_workdir(
    ready: Ready, params: Any, workdir: str | os.PathLike[str], wanted: Wanted = Wanted()
) -> None:
    """Writes config.json, env.json, origin/ and checkpoints/0: a workdir to decode from, or to start training."""
    data = DataConfig(
        tokenizer=ready.tokenizer_path,
        extend_tokenizer=wanted.extend_tokenizer,
        chat=wanted.chat,  # type: ignore[arg-type]
    )
    config = Config(model=ready.config, data=data, checkpoint=CheckpointConfig(keep=1))
    if ready.origin is not None:
        write_origin(ready.origin, workdir)
    with Checkpoints(workdir, config, ready.tokenizer) as checkpoints:
        checkpoints.save_weights(params)
    write_about(os.fspath(workdir), config)


def int8(path: Path, array: np.ndarray) -> Any:
    """A parameter quantised (`forms.quantize_leaf`); large ones by parts, whose columns are independent."""
    over = contracted(path[-1])
    if over is None:
        return array
    kept = [axis for axis in range(array.ndim) if axis not in over]
    axis, columns = kept[0], tuple(array.shape[axis] for axis in kept)
    quantized = Int8(aligned(array.shape, np.dtype(np.int8)), aligned(columns, np.dtype(np.float32)))
    done = 0
    for part in np.array_split(array, min(array.shape[axis], -(-array.nbytes // CHUNK)), axis):
        piece, some = quantize_leaf(path[-1], part), slice(done, done + part.shape[axis])
        quantized.values[(slice(None),) * axis + (some,)] = piece.values
        quantized.scale[some] = piece.scale
        done += part.shape[axis]
    return quantized


def _open_folder(folder: Folder, wanted: Wanted) -> Ready:
    if wanted.preset is not None:
        raise InterchangeError(
            f"preset={wanted.preset} is for Orbax checkpoints; {folder.source} says by its config.json what it is."
        )
    rows = folder.config.vocab_size
    path = os.fspath(wanted.tokenizer or folder.path)
    tokenizer = load_tokenizer(path, extend=wanted.extend_tokenizer, chat=wanted.chat, vocab_size=rows)
    new = _new_rows(tokenizer, rows, path, wanted.extend_tokenizer)
    config = model_config(folder, dtype=wanted.dtype, vocab_size=rows + new)

    def read(mesh: Mesh | None) -> Any:
        return read_params(folder, config, mesh=mesh, transform=int8 if wanted.int8 else None)

    return Ready(folder.source, config, tokenizer, path, origin_of(folder), folder.path, new, read)


def _open_orbax(where: str, wanted: Wanted) -> Ready:
    if wanted.extend_tokenizer:
        raise InterchangeError(
            f"extend_tokenizer is for Hugging Face folders; {where} is a checkpoint of Gemma, where ids are free."
        )
    checkpoint = gemma.open_gemma(where, wanted.preset)
    if wanted.tokenizer is None:
        raise InterchangeError(
            f"{checkpoint.path} holds no tokenizer. Add --tokenizer=FILE, Gemma's tokenizer.model, which is "
            "published beside it."
        )
    rows, path = checkpoint.config.vocab_size, os.fspath(wanted.tokenizer)
    tokenizer = load_tokenizer(path, chat=wanted.chat, vocab_size=rows)
    _new_rows(tokenizer, rows, path, False)
    config = dataclasses.replace(
        checkpoint.config,
        dtype=wanted.dtype or checkpoint.config.dtype,
    )

    def read(mesh: Mesh | None) -> Any:
        return gemma.read_gemma(checkpoint, config, mesh=mesh, transform=int8 if wanted.int8 else None)

    return Ready(checkpoint.path, config, tokenizer, path, None, None, 0, read)


def _new_rows(tokenizer: Tokenizer, rows: int, path: str, may_grow: bool) -> int:
    """How many rows the embedding lacks. Raises TokenizerError if it may not grow."""
    vocabulary = tokenizer.vocabulary
    missing = max(0, len(vocabulary) - rows)
    if missing and not may_grow:
        needs = " (those of tags)" if max(vocabulary.tag_ids.values()) >= rows else ""
        raise TokenizerError(
            f"{path}: the tokenizer has {len(vocabulary)} ids, the model's embedding {rows} rows: {missing} ids"
            f"{needs} have none. Add --extend_tokenizer, which gives them new rows, or the model's own --tokenizer."
        )
    return missing
