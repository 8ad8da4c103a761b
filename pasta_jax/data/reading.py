"""Files of records as bytes of JSON, one record after another, so that a file of any size takes little memory.

FILE.jsonl, FILE.json      one record per line; a .json file that starts with [ is an array of records
FILE.jsonl.gz, .zst        the same, compressed; .zst needs the extra [zstd] before Python 3.14
FILE.parquet               one record per row; needs the extra [parquet]
hf:OWNER/NAME[:SPLIT]      a data set of the Hugging Face hub, the split "train" by default; needs [datasets]
"""

from __future__ import annotations

import gzip
import importlib
import io
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, Any, NamedTuple

from pasta_jax.extras import optional
from pasta_jax.messages import message_of

BOM = b"\xef\xbb\xbf"
HUB = "hf:"
CHUNK = 1 << 20


class RecordError(ValueError):
    """A file cannot be used; the message says what to do."""


class Entry(NamedTuple):
    """A record that was not read yet.

    Attributes:
      number: from 1; of the line if `unit` is "line", else of the record.
      unit: what is counted: "line", or "record".
      data: its JSON, not blank.
      offset: of `data` in the file if that is plain lines, else -1.
    """

    number: int
    unit: str
    data: bytes
    offset: int


def entries(path: str | os.PathLike[str]) -> Iterator[Entry]:
    """The records of a file or data set, one after another. Raises RecordError; at once if there is no file."""
    name = os.fspath(path)
    if name.startswith(HUB):
        return _rows(_hub(name), name)
    try:
        file = open(name, "rb")  # noqa: SIM115
    except OSError as error:
        raise RecordError(f"Cannot read {name}: {error.strerror}.") from error
    if name.endswith(".parquet"):
        return _rows(_parquet(file, name), name)
    return _checked(_texts(file, name), name)


def _checked(found: Iterator[Entry], name: str) -> Iterator[Entry]:
    """The same, with what files raise as RecordError."""
    try:
        yield from found
    except EOFError as error:
        raise RecordError(f"{name} is cut off: its end is missing. Copy it again.") from error
    except zlib.error as error:
        raise RecordError(f"{name} is damaged: {message_of(error)}. Copy it again.") from error
    except OSError as error:
        raise RecordError(f"Cannot read {name}: {error.strerror or message_of(error)}.") from error


def _texts(file: IO[bytes], name: str) -> Iterator[Entry]:
    with file:
        whole: Any = file
        if name.endswith(".gz"):
            whole = gzip.GzipFile(fileobj=file)
        elif name.endswith(".zst"):
            whole = _zstandard(file, name)
        plain = name.removesuffix(".gz").removesuffix(".zst")
        if plain.endswith(".json") and whole.peek(CHUNK).removeprefix(BOM).lstrip().startswith(b"["):
            for number, data in enumerate(_elements(whole, name), 1):
                yield Entry(number, "record", data, -1)
        else:
            yield from _lines(whole, is_plain=whole is file)


def _lines(file: Iterable[bytes], *, is_plain: bool) -> Iterator[Entry]:
    offset = 0
    for number, line in enumerate(file, 1):
        mark = len(BOM) if number == 1 and line.startswith(BOM) else 0
        data = line[mark:].removesuffix(b"\n").rstrip(b"\r")
        if data.strip():
            yield Entry(number, "line", data, offset + mark if is_plain else -1)
        offset += len(line)


# -------------------------------------------------------------------------------------------- JSON arrays

_STRUCTURE = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)|[\[\]{},]', re.DOTALL)
"""A string, perhaps cut off at the end of what was read, or a character that has a meaning outside of strings."""


def _elements(file: IO[bytes], name: str) -> Iterator[bytes]:
    """The elements of an array, each as it is written; blank ones are left out.

    Only brackets and strings are looked at, so that an element which is no JSON does not cost the others.
    """
    buffer = file.read(CHUNK).removeprefix(BOM).lstrip()
    first = position = 1  # where the element begins, and where to look on
    depth, size = 0, CHUNK
    while True:
        match = _STRUCTURE.search(buffer, position)
        mark = buffer[match.start() : match.start() + 1] if match else b""
        if match is None or (mark == b'"' and match.end() == len(buffer)):
            if not (more := file.read(size)):
                raise EOFError
            position = (match.start() if match else len(buffer)) - first
            buffer, first = buffer[first:] + more, 0
            size = 2 * size if match else CHUNK  # a string longer than what was read is not read too often
            continue
        position = match.end()
        if mark in b"[{":
            depth += 1
        elif depth and mark in b"]}":
            depth -= 1
        elif not depth and mark in b",]":
            if element := buffer[first : match.start()].strip():
                yield element
            first = position
            if mark == b"]":
                break
    if (buffer[position:] + file.read(CHUNK)).strip():
        raise RecordError(f"{name} goes on after its array. Write one array, or one record on each line.")


# ------------------------------------------------------------------------------------- compressed, in columns


def _zstandard(file: IO[bytes], name: str) -> IO[bytes]:
    try:
        return importlib.import_module("compression.zstd").open(file)  # Python 3.14
    except ModuleNotFoundError:
        package = optional("zstandard", "zstd", f"Reading {name}", RecordError)
    return io.BufferedReader(_Chunks(_unpacked(file, package, name)))


def _unpacked(file: IO[bytes], package: Any, name: str) -> Iterator[bytes]:
    """What the frames of a file hold. The package's own reader is silent about one that is cut off."""
    data = file.read(CHUNK)
    while data:
        frame = package.ZstdDecompressor().decompressobj()
        while not frame.eof:
            if not data:
                raise EOFError
            try:
                yield frame.decompress(data)
            except package.ZstdError as error:
                raise RecordError(f"{name} is damaged: {message_of(error)}. Copy it again.") from error
            data = frame.unused_data or file.read(CHUNK)


class _Chunks(io.RawIOBase):
    """Pieces of bytes as a file."""

    def __init__(self, pieces: Iterator[bytes]):
        self._pieces, self._piece = pieces, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._piece:
            if (piece := next(self._pieces, None)) is None:
                return 0
            self._piece = piece
        count = min(len(buffer), len(self._piece))
        buffer[:count], self._piece = self._piece[:count], self._piece[count:]
        return count


def _parquet(file: IO[bytes], name: str) -> Iterator[Any]:
    parquet = optional("pyarrow.parquet", "parquet", f"Reading {name}", RecordError)
    with file:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=256):
            yield from batch.to_pylist()


def _hub(name: str) -> Iterator[Any]:
    datasets = optional("datasets", "datasets", f"Reading {name}", RecordError)
    path, _, split = name.removeprefix(HUB).partition(":")
    yield from datasets.load_dataset(path, split=split or "train", streaming=True)


def _rows(rows: Iterator[Any], name: str) -> Iterator[Entry]:
    """Rows as JSON; values that it has no form for as texts."""
    try:
        for number, row in enumerate(rows, 1):
            data = json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")
            yield Entry(number, "record", data, -1)
    except RecordError:
        raise
    except Exception as error:  # whatever the library raises
        raise RecordError(f"Cannot read {name}: {message_of(error)}.") from error
