"""Reads safetensors files, and checks a whole header before it reads a tensor.

    8 bytes    length of the header, little-endian
    header     JSON: name -> dtype, shape, [start, end) in the data; "__metadata__" -> strings
    data       the tensors, without holes (https://github.com/huggingface/safetensors#format)

The library's own reader does not serve here: an export needs the bytes of the header and the order of the data, a
fault has to name its tensor, and nothing of a file may stay mapped.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping, Sequence

import ml_dtypes
import numpy as np

from pasta_jax.foreign import parse_object, read_bytes
from pasta_jax.interchange.errors import InterchangeError, listed
from pasta_jax.messages import name_shown, shown
from pasta_jax.model.weights import HfTensor, is_ignored

DTYPES: Mapping[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
"""The dtypes that a model's tensors may have."""

SIZES = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1},
    **{"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1},
}
"""Bytes of an element, for each dtype that a file may have."""

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
CHUNK = 32 * 2**20
"""Bytes that are read at once: all that a reader allocates in addition to its result."""

MAX_HEADER = 100_000_000
"""Bytes; the limit of the format."""

MOST_DIMENSIONS = 32
"""Of a tensor; a model's have two at most."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    file: str  # path
    name: str
    dtype: str  # as the format spells it: "BF16"
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * SIZES[self.dtype]

    @property
    def numpy_dtype(self) -> np.dtype:
        return DTYPES[self.dtype]

    @property
    def row_nbytes(self) -> int:
        """Bytes of a row in the file; of the whole tensor if it is a number."""
        return self.nbytes // max(1, self.shape[0]) if self.shape else self.nbytes

    @property
    def rows_at_once(self) -> int:
        """So many rows, decoded, are CHUNK bytes at most, or one."""
        return max(1, CHUNK // max(1, self.row_nbytes))

    def decoded(self, data: np.ndarray, count: int) -> np.ndarray:
        """So many rows from their bytes in the file."""
        return data.view(self.numpy_dtype).reshape(count, *self.shape[1:])


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """The header of a safetensors file that passed all checks."""

    path: str
    header: bytes  # exactly as stored, without its length
    metadata: Mapping[str, str]
    tensors: tuple[Stored, ...]  # in the order of the data


def read_header(path: str) -> TensorFile:
    """Reads a header and checks it against the size of the file. Raises InterchangeError with file and tensor."""
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if start == b"version ":
                raise InterchangeError(
                    f"{path} is a pointer of Git LFS, not the file itself. Run git lfs pull in its folder."
                )
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise InterchangeError(
                    f"{path} is truncated or no safetensors file: {size} bytes, a header of {length} by its start."
                )
            header = file.read(length)
    except OSError as error:
        raise InterchangeError(f"Cannot read {path}: {error.strerror}.") from error
    return parse_header(path, header, size)


def parse_header(path: str, header: bytes, size: int | None = None) -> TensorFile:
    """Parses and checks a header; `size` is the file's, None to skip that check. Raises InterchangeError."""
    start = 8 + len(header)
    tree = parse_object(header, f"{path}: its header", InterchangeError, unique=True)
    metadata = tree.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise InterchangeError(f"{path}: __metadata__ must give names texts. The file is damaged.")
    entries = []
    for name, entry in tree.items():
        if not _is_entry(entry):
            raise InterchangeError(
                f"{path}: {shown(name)} is {shown(entry)}, not the dtype, shape and data_offsets of a tensor. The "
                "file is damaged."
            )
        begin, end = entry["data_offsets"]
        entries.append((begin, end, Stored(path, name, entry["dtype"], tuple(entry["shape"]), start + begin)))
    entries.sort(key=lambda entry: entry[:2])
    size_by_header = start
    for begin, end, tensor in entries:
        if tensor.dtype not in SIZES:
            raise InterchangeError(
                f"{path}: {name_shown(tensor.name)} has the unknown dtype {shown(tensor.dtype)}."
            )
        if (
            tensor.offset != size_by_header
            or min(tensor.shape, default=0) < 0
            or end - begin != tensor.nbytes
        ):
            raise InterchangeError(
                f"{path}: {tensor.name} is {tensor.dtype} {list(tensor.shape)}, {tensor.nbytes} bytes from "
                f"{size_by_header - start} on; its header says bytes {begin} to {end}. The file is damaged."
            )
        size_by_header = start + end
    if size is not None and size != size_by_header:
        cut = next((tensor.name for _, end, tensor in entries if start + end > size), None)
        fault = f"is truncated: {cut} is not whole" if cut else "has bytes after its last tensor"
        raise InterchangeError(
            f"{path} {fault} ({size} bytes, {size_by_header} by its header). Download or copy it again."
        )
    return TensorFile(path, header, metadata, tuple(tensor for _, _, tensor in entries))


def read_files(folder: str) -> tuple[TensorFile, ...]:
    """Reads the headers of a folder's model: of `model.safetensors`, or of the files that its index names.

    Raises:
      InterchangeError: there are no such files (pickles are refused), one is damaged, or the index and the files
        disagree.
    """
    if os.path.exists(single := os.path.join(folder, SINGLE)):
        return (read_header(single),)
    index = os.path.join(folder, INDEX)
    if not os.path.exists(index):
        raise InterchangeError(_no_tensors(folder))
    named = parse_object(read_bytes(index, InterchangeError), index, InterchangeError).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(shard, str) for shard in named.values()):
        raise InterchangeError(
            f"{index} is no index of safetensors: weight_map must give each tensor its file."
        )
    shards = sorted(set(named.values()))
    missing = [shard for shard in shards if not _is_beside(folder, shard)]
    faults = [f"{name_shown(shard)} is not there" for shard in missing]
    if faults or not shards:
        raise InterchangeError(
            f"{index} names files that are missing. Download the folder again:{listed(faults or ['none at all'])}"
        )
    files = tuple(read_header(os.path.join(folder, shard)) for shard in shards)
    stored = {tensor.name for file in files for tensor in file.tensors}
    for shard, file in zip(shards, files):
        for tensor in file.tensors:
            if tensor.name not in named:
                faults.append(f"{tensor.name} is in {shard} and not in the index")
            elif shard != named[tensor.name]:
                faults.append(f"{tensor.name} is in {shard}; the index says {named[tensor.name]}")
    faults += [f"{name} is not in {shard}" for name, shard in named.items() if name not in stored]
    if faults:
        raise InterchangeError(f"{index} and its files disagree:{listed(faults)}")
    return files


def match(
    files: Sequence[TensorFile], wanted: Sequence[HfTensor], optional: Sequence[HfTensor] = ()
) -> tuple[dict[str, Stored], tuple[str, ...]]:
    """Finds each tensor of a model in its files, with the right shape and a supported dtype.

    Args:
      files: of the model.
      wanted: tensors that must be there.
      optional: tensors that may be there.

    Returns:
      The tensors, by name; and the names of those that belong to no text model (`model.weights.is_ignored`).

    Raises:
      InterchangeError: with file and name of each tensor that is missing, unknown or wrong.
    """
    stored: dict[str, Stored] = {}
    faults: list[str] = []
    for tensor in (tensor for file in files for tensor in file.tensors):
        if tensor.name in stored:
            faults.append(f"{tensor.name}: twice, in {stored[tensor.name].file} and {tensor.file}")
        stored[tensor.name] = tensor
    shapes = {tensor.name: tensor for tensor in (*wanted, *optional)}
    names = ", ".join(os.path.basename(file.path) for file in files[:2]) + (", ..." if len(files) > 2 else "")
    faults += [
        f"{tensor.name} {list(tensor.shape)}: missing from {names}"
        for tensor in wanted
        if tensor.name not in stored
    ]
    matched, ignored = {}, []
    for name, tensor in stored.items():
        file = os.path.basename(tensor.file)
        if name not in shapes:
            if is_ignored(name):
                ignored.append(name)
            else:
                faults.append(f"{file}: {name} {list(tensor.shape)}: there is no such tensor in this model")
            continue
        if tensor.shape != shapes[name].shape:
            expected = list(shapes[name].shape)
            faults.append(f"{file}: {name} is {list(tensor.shape)}, {expected} by config.json")
        if tensor.dtype not in DTYPES:
            faults.append(f"{file}: {name} is {tensor.dtype}; only {', '.join(DTYPES)} are taken")
        matched[name] = tensor
    if faults:
        folder = os.path.dirname(files[0].path)
        raise InterchangeError(
            f"The tensors in {folder} are not those of the model in its config.json:{listed(faults)}"
        )
    return matched, tuple(ignored)


def rows(stored: Stored) -> Iterator[tuple[int, np.ndarray]]:
    """Yields a tensor in pieces of at most CHUNK bytes, or one row: the index of the first row, and the rows.

    Each piece has memory of its own. It is no view of the file, which may be overwritten later.

    Raises:
      InterchangeError: the file became shorter meanwhile.
    """
    per_row, step = stored.row_nbytes, stored.rows_at_once
    count = stored.shape[0] if stored.shape else 1
    with open(stored.file, "rb") as file:
        for start in range(0, count, step):
            length = min(step, count - start)
            piece = np.empty(length * per_row, np.uint8)
            file.seek(stored.offset + start * per_row)
            if file.readinto(piece.data) != piece.nbytes:
                raise InterchangeError(f"{stored.file} ended within {stored.name} while it was read.")
            yield start, stored.decoded(piece, length)


def equal(a: Stored, b: Stored) -> bool:
    """Whether two stored tensors hold the same bytes."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    pairs = zip(rows(a), rows(b), strict=True)
    return all(np.array_equal(x.view(np.uint8), y.view(np.uint8)) for (_, x), (_, y) in pairs)


def _is_entry(entry: object) -> bool:
    match entry:
        case {"dtype": str(), "shape": [*shape], "data_offsets": [begin, end]}:
            sizes = (begin, end, *shape)
            return len(shape) <= MOST_DIMENSIONS and all(type(n) is int and 0 <= n < 2**63 for n in sizes)
    return False


def _is_beside(folder: str, shard: str) -> bool:
    """Whether it is a file of this very folder: an index may not lead elsewhere."""
    return os.path.basename(shard) == shard and os.path.isfile(os.path.join(folder, shard))


def _no_tensors(folder: str) -> str:
    if not os.path.isdir(folder):
        return f"{folder} is not a folder."
    names = sorted(os.listdir(folder))
    if pickles := [name for name in names if name.endswith(PICKLES)]:
        return (
            f"{folder} holds {', '.join(pickles[:3])} and no {SINGLE}. Such files are pickles, which may run any "
            "code when they are opened; only safetensors are read. Look for a revision with safetensors, or "
            "convert files that you trust: transformers' save_pretrained writes safetensors."
        )
    present = ", ".join(names[:8]) or "nothing"
    lost = " The index of these shards is missing: download it too." * any("-of-" in name for name in names)
    return f"{folder} holds neither {SINGLE} nor {INDEX} (found: {present}).{lost}"
