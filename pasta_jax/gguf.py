"""GGUF files, llama.cpp's format, by the `gguf` package (the extra `[gguf]`), which parses and dequantises."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from pasta_jax.extras import optional
from pasta_jax.messages import message_of, name_shown, shown

_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor in a file's list.

    Attributes:
      file: its path.
      name: of the tensor.
      kind: the name of its quantisation.
      type_id: the number of its quantisation.
      block: elements of a block, and its bytes.
      shape: [rows, columns] of a matrix.
      offset: of its first byte in the file.
    """

    file: str
    name: str
    kind: str
    type_id: int
    block: tuple[int, int]
    shape: tuple[int, ...]
    offset: int


class _End(Exception):
    """The file is shorter than it says."""


def _package(error: type[BaseException] = ImportError) -> Any:
    return optional("gguf", "gguf", "Reading GGUF files", error)


def read_file(path: str, error: type[ValueError]) -> tuple[dict[str, Any], dict[str, Entry]]:
    """Metadata by key, and tensors by name.

    Raises:
      error: the package is not installed, it is no such file, or a damaged one.
    """
    gguf = _package(error)
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            start = file.read(7)
    except OSError as fault:
        raise error(f"Cannot read {path}: {fault.strerror}.") from fault
    if start == b"version":
        raise error(f"{path} is a pointer of Git LFS, not the file itself. Run git lfs pull in its folder.")
    if start[:4] != b"GGUF":
        raise error(f"{path} is no GGUF file: it starts with {shown(start[:4])}.")
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
        made = [_entry(path, tensor, gguf) for tensor in reader.tensors]
        is_swapped = reader.byte_order != "I"
    except Exception as fault:  # the package raises many kinds for damaged files
        what = "it ends there" if isinstance(fault, _End) else message_of(fault)
        raise error(
            f"{path} ({size} bytes) is truncated or damaged at {place[0]}: {what}. Download or copy it again."
        ) from fault
    if is_swapped:
        raise error(f"{path} has another byte order than this machine.")
    tensors = {tensor.name: tensor for tensor in made}
    if len(tensors) < len(made):
        raise error(f"{path} is damaged: a tensor stands twice in it.")
    return tree, tensors


def _value(field: Any) -> Any:
    """The value of a key; float32 as the shortest number that it is."""
    value = field.contents()
    if isinstance(value, float) and field.parts[-1].dtype.itemsize == 4:
        return float(str(np.float32(value)))
    return value


def _entry(path: str, tensor: Any, gguf: Any) -> Entry:
    kind = tensor.tensor_type
    shape = tuple(int(size) for size in reversed(tensor.shape))
    block = gguf.GGML_QUANT_SIZES[kind]
    return Entry(path, str(tensor.name), kind.name, int(kind), block, shape, int(tensor.data_offset))


def other_files(path: str, tree: Mapping[str, Any], error: type[ValueError]) -> list[str]:
    """The other files of a model that was split. Raises `error` if this is not the first, or one is missing."""
    count = tree.get("split.count", 0)
    if not isinstance(count, int) or count < 2:
        return []
    found = _SHARD.fullmatch(path)
    if found is None or int(found[3]) != count:
        raise error(
            f"{path} is one of {count} files of a model, which must be called NAME-00001-of-{count:05}.gguf and so "
            "on."
        )
    names = [f"{found[1]}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
    if path != names[0]:
        raise error(f"{path} is one of {count} files of a model. Name the first: {names[0]}.")
    if missing := [os.path.basename(name) for name in names if not os.path.isfile(name)]:
        raise error(
            f"{path} is one of {count} files of a model; beside it are missing: {', '.join(missing[:6])}."
        )
    return names[1:]


def dequantized(data: np.ndarray, type_id: int) -> np.ndarray:
    """Float32 values of some blocks, uint8: [n], by the package."""
    gguf = _package()
    # As one row: the package loops in Python over groups of rows.
    values: np.ndarray = gguf.dequantize(data.reshape(1, -1), gguf.GGMLQuantizationType(type_id))
    return values.reshape(-1)


def is_readable(tensor: Entry) -> bool:
    """Whether the package dequantises it: tried on a block of zeros."""
    try:
        dequantized(np.zeros(tensor.block[1], np.uint8), tensor.type_id)
    except Exception:  # NotImplementedError, and others for types that are no numbers of a model
        return False
    return True
