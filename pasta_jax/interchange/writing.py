"""Writes Hugging Face folders that transformers loads. An interrupted export leaves nothing.

A model that was imported and never trained comes out as it went in: files byte for byte, tensors bit for bit and in
the same order. A trained model keeps those files of its origin that are still true.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from pasta_jax.files import LOCK, json_bytes, locked
from pasta_jax.foreign import Fields, parse_object
from pasta_jax.interchange.errors import InterchangeError
from pasta_jax.interchange.origin import Origin
from pasta_jax.interchange.tensors import CHUNK, DTYPES, INDEX, SINGLE
from pasta_jax.model import ModelConfig
from pasta_jax.model.families import FamilyError, config_to_hf
from pasta_jax.model.forms import is_plain
from pasta_jax.model.weights import HfTensor, hf_tensors, is_ignored, tied_head
from pasta_jax.tokens import export
from pasta_jax.tokens.base import TextTokenizer
from pasta_jax.tokens.load import FILES, TAGS_FILE, end_ids, read_hints
from pasta_jax.tokens.templates import template_of
from pasta_jax.tokens.tokenizer import TokenizerError

SHARD_BYTES = 5 * 10**9
"""The largest safetensors file; a tensor is never split."""

_SPELLED = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Shard:
    """A safetensors file to write: its tensors with their dtypes, in the order of the data."""

    name: str
    tensors: tuple[tuple[HfTensor, np.dtype], ...]
    header: bytes


@dataclasses.dataclass(frozen=True)
class Exported:
    """A model to export.

    Attributes:
      params: plain parameters, adapters merged.
      config: of the model.
      tokenizer: of the model.
      origin: of an imported model, else None.
      is_trained: whether it was trained since it was imported.
    """

    params: Mapping[str, Any]
    config: ModelConfig
    tokenizer: TextTokenizer
    origin: Origin | None = None
    is_trained: bool = True


def write_folder(
    destination: str | os.PathLike[str],
    model: Exported,
    *,
    dtype: str | None = None,
    name_tags: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes config.json, safetensors with their index, tokenizer, chat template and the ids of the tags.

    Args:
      destination: a folder that does not exist or is empty.
      model: the model to export.
      dtype: of the tensors. By default the model's, or the origin's if it was imported and not trained.
      name_tags: whether the tokenizer's files call the ids of the tags by the tags' names.
      shard_bytes: size limit of a file. An imported model keeps its own files.

    Raises:
      InterchangeError: no architecture expresses the model, or the destination is not empty.
    """
    check_destination(destination)
    shards, params = plan(model, dtype=dtype, shard_bytes=shard_bytes), flatten_dict(model.params)
    files = companions(model, shards, name_tags=name_tags)
    with unfinished(destination) as folder:
        write_files(folder, files)
        for shard in shards:
            with open(os.path.join(folder, shard.name), "wb") as file:
                file.write(len(shard.header).to_bytes(8, "little") + shard.header)
                for tensor, kind in shard.tensors:
                    _write_tensor(file, tensor, kind, params[tensor.path])


def write_files(folder: str, files: Mapping[str, bytes]) -> None:
    """Writes files by their names, which may have folders in them."""
    for name, content in files.items():
        path = pathlib.Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def check_destination(destination: str | os.PathLike[str]) -> None:
    """Refuses a destination that is not empty, in use, or not on a local file system."""
    if "://" in os.fspath(destination):
        raise InterchangeError(
            f"Cannot write to {os.fspath(destination)}: only local folders are supported. Write to a local folder "
            "and copy it."
        )
    if os.path.isdir(destination) and os.listdir(destination) == [LOCK]:
        with locked(destination):  # of a run that was killed: it is removed; of one that goes on: InUse
            pass
    if os.path.exists(destination) and (not os.path.isdir(destination) or os.listdir(destination)):
        raise InterchangeError(f"{os.fspath(destination)} exists and is not empty. Choose another --to.")


@contextlib.contextmanager
def unfinished(destination: str | os.PathLike[str]) -> Iterator[str]:
    """A folder that is renamed to `destination` when the block ends without an error, and is deleted otherwise."""
    target = os.path.abspath(os.path.expanduser(destination))
    parent = above = os.path.dirname(target)
    created = []  # folders above it, the innermost first
    while not os.path.lexists(above):
        created.append(above)
        above = os.path.dirname(above)
    folder = os.path.join(parent, f".{os.path.basename(target)}.{os.getpid()}.unfinished")
    try:
        try:
            os.makedirs(parent, exist_ok=True)
            os.mkdir(folder)
        except OSError as error:
            raise InterchangeError(f"Cannot write {target}: {error.strerror}.") from error
        yield folder
        if os.path.isdir(target):
            os.rmdir(target)  # empty, as was checked
        os.rename(folder, target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # other processes have written there
            for path in created:
                os.rmdir(path)
        raise


# ----------------------------------------------------------------------------------------------------- tensors


def plan(model: Exported, *, dtype: str | None = None, shard_bytes: int = SHARD_BYTES) -> tuple[Shard, ...]:
    """Assigns each tensor a file and a dtype: those of the origin, if there is one."""
    origin, config = model.origin, model.config
    if dtype is not None and np.dtype(dtype) not in _SPELLED:
        raise InterchangeError(f"dtype {dtype} is none of {', '.join(str(d) for d in _SPELLED)}.")
    if not is_plain(model.params):
        raise InterchangeError("The model's weights are int8. Export the one that it was quantised from.")
    default = np.dtype(dtype or config.dtype)
    if origin is None or not origin.is_text or not origin.headers:
        return _divided([(tensor, default) for tensor in hf_tensors(config)], shard_bytes)
    head = [tied_head(config, origin.prefix)] if config.tie_embeddings else []
    known = {tensor.name: tensor for tensor in (*hf_tensors(config, origin.prefix), *head)}
    keeps_dtype = dtype is None and not model.is_trained
    shards = []
    for file in origin.shards():
        chosen = [
            (known[stored.name], _kept(stored.numpy_dtype, default) if keeps_dtype else default)
            for stored in file.tensors
            if not is_ignored(stored.name)
        ]
        same = len(chosen) == len(file.tensors) and all(
            (tensor.shape, kind) == (stored.shape, stored.numpy_dtype)
            for (tensor, kind), stored in zip(chosen, file.tensors)
        )
        header = origin.headers[file.path] if same else header_of(chosen, file.metadata)
        shards.append(Shard(file.path, tuple(chosen), header))
    return tuple(shards)


def header_of(tensors: Sequence[tuple[HfTensor, np.dtype]], metadata: Mapping[str, str]) -> bytes:
    """A safetensors header, padded so that the data begins at a multiple of eight."""
    tree: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for tensor, dtype in tensors:
        end = begin + _nbytes(tensor, dtype)
        shape = list(tensor.shape)
        tree[tensor.name] = {"dtype": _SPELLED[dtype], "shape": shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(tree, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def _divided(tensors: Sequence[tuple[HfTensor, np.dtype]], shard_bytes: int) -> tuple[Shard, ...]:
    groups: list[list[tuple[HfTensor, np.dtype]]] = [[]]
    size = 0
    for tensor, dtype in tensors:
        if groups[-1] and size + _nbytes(tensor, dtype) > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append((tensor, dtype))
        size += _nbytes(tensor, dtype)
    names = [f"model-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
    names = names if len(groups) > 1 else [SINGLE]
    metadata = {"format": "pt"}  # transformers requires the framework whose layout the tensors have
    return tuple(Shard(name, tuple(group), header_of(group, metadata)) for name, group in zip(names, groups))


def _write_tensor(file: Any, tensor: HfTensor, dtype: np.dtype, leaf: Any) -> None:
    array = tensor.to_hf(np.asarray(leaf))
    step = max(1, CHUNK // max(1, array[:1].nbytes))
    for start in range(0, len(array), step):
        piece = np.ascontiguousarray(array[start : start + step].astype(dtype, copy=False))
        file.write(piece.view(np.uint8).data)


def _kept(original: np.dtype, imported: np.dtype) -> np.dtype:
    """The origin's dtype, unless the model was imported into a narrower one."""
    return original if imported in (np.float32, original) else imported


def _nbytes(tensor: HfTensor, dtype: np.dtype) -> int:
    return int(np.prod(tensor.shape)) * dtype.itemsize


# ------------------------------------------------------------------------------------------ files beside them


def companions(model: Exported, shards: Sequence[Shard], *, name_tags: bool) -> dict[str, bytes]:
    """All files of the folder but the tensors, by name."""
    origin, vocabulary = model.origin, model.tokenizer.vocabulary
    if origin is None:
        files = dict(export.minimal_files(model.tokenizer))
        files["config.json"] = json_bytes(_new_config(model, shards))
        files["generation_config.json"] = json_bytes(_special_ids(model))
    else:
        files = {name: content for name, content in origin.files.items() if name != INDEX}
        files["config.json"] = _config_of(model, origin, shards)
        if model.is_trained:
            _end_answers(files, model)
    if name_tags:
        files = dict(export.with_named_tags(files, vocabulary))
    files[TAGS_FILE] = export.tags_json(vocabulary)
    if len(shards) > 1 or (origin is not None and INDEX in origin.files):
        files[INDEX] = _index(model, shards)
    return files


def _config_of(model: Exported, origin: Origin, shards: Sequence[Shard]) -> bytes:
    """The origin's config.json with the fields that changed; its very bytes if none did."""
    if not origin.is_text:
        return json_bytes(_new_config(model, shards))
    old = origin.tree("config.json") or {}
    changed: dict[str, Any] = {}
    if old.get("vocab_size") != model.config.vocab_size:
        changed["vocab_size"] = model.config.vocab_size
    dtypes = {kind for shard in shards for _, kind in shard.tensors}
    original = {
        tensor.numpy_dtype for file in origin.shards() for tensor in file.tensors if tensor.dtype in DTYPES
    }
    if dtypes != original:
        changed["dtype" if "dtype" in old else "torch_dtype"] = _dtype_name(shards)
    return json_bytes(old | changed) if changed else origin.files["config.json"]


def _new_config(model: Exported, shards: Sequence[Shard]) -> dict[str, Any]:
    try:
        tree = config_to_hf(dataclasses.replace(model.config, dtype=_dtype_name(shards)))
    except FamilyError as error:
        raise InterchangeError(str(error)) from error
    return tree | _special_ids(model)


def _special_ids(model: Exported) -> dict[str, Any]:
    vocabulary = model.tokenizer.vocabulary
    stops = sorted(vocabulary.stops, key=lambda i: (i != vocabulary.eos, i))
    ends = stops[0] if len(stops) == 1 else stops
    return {"bos_token_id": vocabulary.bos, "eos_token_id": ends, "pad_token_id": vocabulary.pad}


def _end_answers(files: dict[str, bytes], model: Exported) -> None:
    """Tells transformers how a trained model ends its answers, and the chat template it was trained with."""
    vocabulary = model.tokenizer.vocabulary
    tree = parse_object(
        files.get("generation_config.json", b"{}"), "generation_config.json", InterchangeError
    )
    old = end_ids(tree)
    if missing := sorted(vocabulary.stops - set(old)):
        files["generation_config.json"] = json_bytes(tree | {"eos_token_id": [*old, *missing]})
    usage = model.tokenizer.usage
    hints = read_hints({name: files[name] for name in FILES if name in files}, 0)
    try:
        if model.tokenizer.chat_of(hints.template or "") == (usage.chat, usage.opening):
            return
    except TokenizerError:  # an unknown format: the model was trained with another one
        pass
    for name in ("chat_template.jinja", "chat_template.json"):
        files.pop(name, None)
    tree = parse_object(files.get("tokenizer_config.json", b"{}"), "tokenizer_config.json", InterchangeError)
    if tree.pop("chat_template", None) is not None:
        files["tokenizer_config.json"] = json_bytes(tree)
    if template := template_of(usage.chat, usage.opening):
        files["chat_template.jinja"] = template.encode()


def _index(model: Exported, shards: Sequence[Shard]) -> bytes:
    weight_map = {tensor.name: shard.name for shard in shards for tensor, _ in shard.tensors}
    size = sum(_nbytes(tensor, kind) for shard in shards for tensor, kind in shard.tensors)
    if model.origin is not None and INDEX in model.origin.files:
        tree = model.origin.tree(INDEX) or {}
        headers = {shard.name: shard.header for shard in shards}
        if headers == dict(model.origin.headers):
            return model.origin.files[INDEX]
        metadata = {**Fields(tree, INDEX, error=InterchangeError).inner("metadata").tree, "total_size": size}
        return json_bytes(tree | {"metadata": metadata, "weight_map": weight_map})
    return json_bytes({"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))})


def _dtype_name(shards: Sequence[Shard]) -> str:
    kinds = {kind.name for shard in shards for _, kind in shard.tensors}
    return kinds.pop() if len(kinds) == 1 else "float32"
