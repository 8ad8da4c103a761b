"""Imports published models: weights on a mesh, a tokenizer with ids for the tags, and a record of their origin.

Files, names, shapes, the tokenizer, free ids for the tags and memory are all checked before a tensor is read.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh

from pasta_jax.checkpoints.about import write_run_info
from pasta_jax.checkpoints.save import Checkpoints
from pasta_jax.config import CheckpointConfig, Config, DataConfig
from pasta_jax.files import json_bytes
from pasta_jax.foreign import parse_object, read_bytes
from pasta_jax.interchange import gemma, hub
from pasta_jax.interchange.errors import InterchangeError
from pasta_jax.interchange.gguf.model import config_json, open_gguf
from pasta_jax.interchange.origin import Origin, origin_of, write_origin
from pasta_jax.interchange.placing import Path, aligned
from pasta_jax.interchange.reading import ADAPTERS, Folder, model_config, open_folder, read_params
from pasta_jax.interchange.tensors import CHUNK, INDEX, SINGLE
from pasta_jax.model import ModelConfig
from pasta_jax.model.forms import Int8, contracted, quantize_leaf
from pasta_jax.model.presets import presets
from pasta_jax.rounding import ceil_div
from pasta_jax.tokens.base import TextTokenizer
from pasta_jax.tokens.export import minimal_files
from pasta_jax.tokens.gguf import tokenizer_files
from pasta_jax.tokens.load import load_tokenizer, tokenizer_from_files
from pasta_jax.tokens.tokenizer import Tokenizer, TokenizerError

SourceKind = Literal["folder", "hub", "gguf", "orbax", "peft", "workdir"]
"""A Hugging Face folder, a repository on its hub, a GGUF file, an Orbax checkpoint of Gemma, a folder of PEFT's
adapters, or a workdir."""

_SCHEMES: dict[str, SourceKind] = {"hf": "folder", "orbax": "orbax", "peft": "peft"}
"""What stands before the name of a folder, and the kind that it states."""


@dataclasses.dataclass(frozen=True)
class ImportOptions:
    """Options of an import.

    Attributes:
      dtype: of the parameters; by default the model's own.
      tokenizer: file or folder of a tokenizer; by default the model's own.
      chat: format of prompts, or "auto".
      extend_tokenizer: tags without a free id get new ids, and new rows of the embedding.
      preset: name of the published model that has the sizes of an Orbax checkpoint; by default found by shapes.
      quantize: each matrix becomes int8 as soon as it is read. Such a model decodes; it cannot be written.
    """

    dtype: str | None = None
    tokenizer: str | os.PathLike[str] | None = None
    chat: str = "auto"
    extend_tokenizer: bool = False
    preset: str | None = None
    quantize: bool = False


@dataclasses.dataclass(frozen=True)
class Published:
    """A model that passed all checks and has not been read yet.

    Attributes:
      source: its name: org/name, or a path.
      config: of the imported model.
      tokenizer: with an id for each tag.
      tokenizer_path: the tokenizer's file or folder.
      origin: what is kept of its folder, or what a folder of it would have; None for an Orbax checkpoint.
      folder: the Hugging Face folder or GGUF file to compare logits with; None for an Orbax checkpoint.
      new_rows: number of rows added to the embedding.
      read: reads the parameters onto a mesh.
    """

    source: str
    config: ModelConfig
    tokenizer: TextTokenizer
    tokenizer_path: str
    origin: Origin | None
    folder: str | None
    new_rows: int
    read: Callable[[Mesh | None], Any]


def kind_of(source: str | os.PathLike[str]) -> tuple[SourceKind, str]:
    """Classifies the name of a model: its kind, and the folder or the name on the hub.

    hf:DIRECTORY, hf:org/name, orbax:DIRECTORY, peft:DIRECTORY and gguf:FILE state their kind; FILE.gguf alone is a
    GGUF file. Any other folder is a Hugging Face folder if its config.json names an architecture or it has
    safetensors files beside it (our own workdirs have a config.json too), and one of PEFT's adapters if it has
    those and no whole model. The name of a published model (`model.presets`) is a repository on the hub. Everything
    else counts as a workdir, org/name too, whether it exists or not.

    Raises:
      InterchangeError: hf:, orbax: or peft: before something that is neither a folder nor a name; gguf: before what
        is no file.
    """
    text = os.fspath(source)
    scheme, colon, rest = text.partition(":")
    if colon and scheme == "gguf":
        if os.path.isfile(os.path.expanduser(rest)):
            return "gguf", rest
        raise InterchangeError(f"{text}: there is no file {rest}.")
    if colon and scheme in _SCHEMES:
        if os.path.isdir(os.path.expanduser(rest)):
            return _SCHEMES[scheme], rest
        if scheme == "hf" and hub.NAME.fullmatch(rest):
            return "hub", rest
        raise InterchangeError(
            f"{text}: there is no folder {rest}" + ", and names on the hub are org/name." * (scheme == "hf")
        )
    folder = os.path.expanduser(text)
    if os.path.isdir(folder):
        return _kind_of_folder(folder), text
    if text.endswith(".gguf") and os.path.isfile(folder):
        return "gguf", text
    if text.lower() in presets():
        return "hub", presets()[text.lower()].hub
    return "workdir", text


def _kind_of_folder(folder: str) -> SourceKind:
    names = os.listdir(folder)
    if ADAPTERS in names:
        return "peft" if {SINGLE, INDEX}.isdisjoint(names) else "folder"
    if "config.json" not in names:
        return "workdir"
    if any(name.endswith(".safetensors") for name in names):
        return "folder"
    try:
        tree = parse_object(read_bytes(os.path.join(folder, "config.json")), "config.json")
    except ValueError:
        return "workdir"
    return "workdir" if tree.keys().isdisjoint(("model_type", "architectures")) else "folder"


def open_published(kind: SourceKind, path: str, options: ImportOptions = ImportOptions()) -> Published:
    """Checks a published model. Reads headers only.

    Args:
      kind: "folder" (of Hugging Face), "hub" (org/name there), "gguf" (a file), or "orbax" (a checkpoint of Gemma).
      path: the folder or file, or the name on the hub.
      options: options of the import.

    Raises:
      InterchangeError: with every fault of the model.
      TokenizerError: its tokenizer cannot be used.
    """
    if kind == "orbax":
        return _open_orbax(path, options)
    if kind == "gguf":
        return _open_gguf(path, options)
    if kind == "hub":
        return _open_folder(open_folder(hub.download(path), source=path), options)
    return _open_folder(open_folder(path), options)


def write_workdir(
    published: Published,
    params: Any,
    workdir: str | os.PathLike[str],
    options: ImportOptions = ImportOptions(),
) -> None:
    """Writes a workdir to decode or train from: config.json, env.json, origin/ and checkpoints/0."""
    data = DataConfig(
        tokenizer=published.tokenizer_path,
        extend_tokenizer=options.extend_tokenizer,
        chat=options.chat,  # type: ignore[arg-type]
    )
    config = Config(model=published.config, data=data, checkpoint=CheckpointConfig(keep=1))
    if published.origin is not None:
        write_origin(published.origin, workdir)
    with Checkpoints(workdir, config, published.tokenizer) as checkpoints:
        checkpoints.save_weights(params)
    write_run_info(os.fspath(workdir), config)


def quantize_by_parts(path: Path, array: np.ndarray) -> Any:
    """Quantises a parameter (`forms.quantize_leaf`), a large one in parts of independent columns."""
    over = contracted(path[-1])
    if over is None:
        return array
    kept = [axis for axis in range(array.ndim) if axis not in over]
    axis, columns = kept[0], tuple(array.shape[axis] for axis in kept)
    quantized = Int8(aligned(array.shape, np.dtype(np.int8)), aligned(columns, np.dtype(np.float32)))
    done = 0
    for part in np.array_split(array, min(array.shape[axis], ceil_div(array.nbytes, CHUNK)), axis):
        piece, some = quantize_leaf(path[-1], part), slice(done, done + part.shape[axis])
        quantized.values[(slice(None),) * axis + (some,)] = piece.values
        quantized.scale[some] = piece.scale
        done += part.shape[axis]
    return quantized


def _open_folder(folder: Folder, options: ImportOptions) -> Published:
    path = os.fspath(options.tokenizer or folder.path)
    rows = folder.config.vocab_size
    tokenizer = load_tokenizer(path, extend=options.extend_tokenizer, chat=options.chat, vocab_size=rows)
    return _published(folder, tokenizer, path, origin_of(folder), options)


def _open_gguf(path: str, options: ImportOptions) -> Published:
    """A GGUF file as the folder that it would be: its origin has the files that are made of its metadata."""
    model = open_gguf(path)
    folder, how = model.folder, dict[str, Any](extend=options.extend_tokenizer, chat=options.chat)
    how["vocab_size"] = folder.config.vocab_size
    if options.tokenizer is not None:
        tokenizer_path = os.fspath(options.tokenizer)
        tokenizer = load_tokenizer(tokenizer_path, **how)
        files = minimal_files(tokenizer)
    else:
        tokenizer_path, files = folder.path, tokenizer_files(model.keys)
        try:
            tokenizer = tokenizer_from_files(files, **how)
        except TokenizerError as error:
            raise TokenizerError(f"{folder.path}: {error}") from error
    files["config.json"] = json_bytes(config_json(model, files))
    origin = Origin(folder.source, folder.prefix, (), files, {})
    return _published(folder, tokenizer, tokenizer_path, origin, options)


def _published(
    folder: Folder, tokenizer: TextTokenizer, path: str, origin: Origin, options: ImportOptions
) -> Published:
    if options.preset is not None:
        raise InterchangeError(
            f"preset={options.preset} is for Orbax checkpoints; {folder.source} says its own sizes."
        )
    rows = folder.config.vocab_size
    new = _new_rows(tokenizer, rows, path, options.extend_tokenizer)
    config = model_config(folder, dtype=options.dtype, vocab_size=rows + new)
    transform = quantize_by_parts if options.quantize else None

    def read(mesh: Mesh | None) -> Any:
        return read_params(folder, config, mesh=mesh, transform=transform)

    return Published(folder.source, config, tokenizer, path, origin, folder.path, new, read)


def _open_orbax(path: str, options: ImportOptions) -> Published:
    if options.extend_tokenizer:
        raise InterchangeError(
            f"extend_tokenizer is for Hugging Face folders; {path} is a checkpoint of Gemma, which has free ids."
        )
    checkpoint = gemma.open_gemma(path, options.preset)
    if options.tokenizer is None:
        raise InterchangeError(
            f"{checkpoint.path} holds no tokenizer. Add --tokenizer=FILE with Gemma's tokenizer.model, which is "
            "published beside the checkpoint."
        )
    rows, tokenizer_path = checkpoint.config.vocab_size, os.fspath(options.tokenizer)
    tokenizer = load_tokenizer(tokenizer_path, chat=options.chat, vocab_size=rows)
    _new_rows(tokenizer, rows, tokenizer_path, False)
    config = dataclasses.replace(checkpoint.config, dtype=options.dtype or checkpoint.config.dtype)
    transform = quantize_by_parts if options.quantize else None

    def read(mesh: Mesh | None) -> Any:
        return gemma.read_gemma(checkpoint, config, mesh=mesh, transform=transform)

    return Published(checkpoint.path, config, tokenizer, tokenizer_path, None, None, 0, read)


def _new_rows(tokenizer: Tokenizer, rows: int, path: str, may_grow: bool) -> int:
    """Number of rows that the embedding lacks. Raises TokenizerError if it may not grow."""
    vocabulary = tokenizer.vocabulary
    missing = max(0, len(vocabulary) - rows)
    if missing and not may_grow:
        needs = " (those of tags)" if max(vocabulary.tag_ids.values()) >= rows else ""
        raise TokenizerError(
            f"{path}: the tokenizer has {len(vocabulary)} ids, the model's embedding {rows} rows: {missing} ids"
            f"{needs} have none. Add --extend_tokenizer, which adds rows, or use the model's own --tokenizer."
        )
    return missing
