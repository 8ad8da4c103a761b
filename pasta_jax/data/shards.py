"""Examples in array_record files, in the form of tensorflow-datasets, which need not be installed.

    FOLDER/dataset_info.json, features.json        what tensorflow-datasets reads first
    FOLDER/pasta-train.array_record-00000, ...     the examples

An example is a tf.train.Example of integers: the ids of the prompt and of the annotated answer in document order,
from which all fields of a document follow (`tokens.layout.layout_ids`), and where it was read.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from pasta_jax.data.reading import RecordError
from pasta_jax.extras import optional
from pasta_jax.files import unwritten, write_json
from pasta_jax.messages import message_of

DATASET, SPLIT = "pasta", "train"
FILES = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}"
WRITING = "group_size:1"
"""One example in a group: any can be read without its neighbours, as Grain expects."""

READING = "readahead_buffer_size:0"
BUFFER = 32768
"""Bytes read at once for one example."""


class Encoded(NamedTuple):
    """An example as ids.

    Attributes:
      prompt, answer: ids, as `tokens.layout.layout_ids` takes them.
      source: number of its file among the sources.
      record: number of the line or record there, from 1.
      turn: number of the answer in the record, from 0.
    """

    prompt: Sequence[int]
    answer: Sequence[int]
    source: int
    record: int
    turn: int


SCALARS = ("source", "record", "turn")


def serialized(example: Encoded) -> bytes:
    """As a tf.train.Example."""
    message = _message()()
    for name, value in zip(Encoded._fields, example):
        values = [value] if name in SCALARS else value
        message.features.feature[name].int64_list.value.extend(values)
    data: bytes = message.SerializeToString(deterministic=True)
    return data


def parsed(data: bytes) -> Encoded:
    """From a tf.train.Example. Raises RecordError."""
    try:
        features = _message().FromString(data).features.feature
        found = [features[name].int64_list.value for name in Encoded._fields]
        prompt, answer, *place = found
        return Encoded(list(prompt), list(answer), *(int(value) for (value,) in place))
    except (DecodeError, ValueError) as error:
        raise RecordError(f"An example is damaged: {message_of(error)}.") from error


@functools.cache
def _message() -> Any:
    """The class of tf.train.Example, as far as integers need it: built here, since TensorFlow has it."""
    file = descriptor_pb2.FileDescriptorProto(
        name="pasta_jax/example.proto", package="pasta_jax", syntax="proto3"
    )
    kinds = descriptor_pb2.FieldDescriptorProto

    def message(parent: Any, name: str) -> Any:
        made = parent.add()
        made.name = name
        return made

    def field(parent: Any, name: str, number: int, kind: int, of: str = "", *, many: bool = False) -> None:
        label = kinds.LABEL_REPEATED if many else kinds.LABEL_OPTIONAL
        type_name = f".pasta_jax.{of}" if of else ""
        parent.field.add(name=name, number=number, type=kind, label=label, type_name=type_name or None)

    messages = file.message_type
    field(message(messages, "Int64List"), "value", 1, kinds.TYPE_INT64, many=True)
    field(message(messages, "Feature"), "int64_list", 3, kinds.TYPE_MESSAGE, "Int64List")
    features = message(messages, "Features")
    entry = message(features.nested_type, "FeatureEntry")
    entry.options.map_entry = True
    field(entry, "key", 1, kinds.TYPE_STRING)
    field(entry, "value", 2, kinds.TYPE_MESSAGE, "Feature")
    field(features, "feature", 1, kinds.TYPE_MESSAGE, "Features.FeatureEntry", many=True)
    field(message(messages, "Example"), "features", 1, kinds.TYPE_MESSAGE, "Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("pasta_jax.Example"))


# ---------------------------------------------------------------------------------------------------- files


def shard_name(number: int) -> str:
    """The file name of a shard."""
    return FILES.format(DATASET=DATASET, SPLIT=SPLIT, FILEFORMAT="array_record", SHARD_INDEX=f"{number:05d}")


def _library(purpose: str) -> Any:
    return optional("array_record.python.array_record_module", "tfds", purpose, RecordError)


@contextlib.contextmanager
def writing(path: str) -> Iterator[Any]:
    """An array_record file, whole or absent: it has its name once the block has ended without an error."""
    unfinished = f"{path}.tmp"
    try:
        writer = _library("Preparing data").ArrayRecordWriter(unfinished, WRITING)
        try:
            yield writer
        finally:
            writer.close()
        os.replace(unfinished, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(unfinished)
        if isinstance(error, RuntimeError | OSError):  # what the library raises
            raise RecordError(unwritten(path, error)) from error
        raise


class Reader:
    """The examples of a folder's shards by number. For several threads; it can be pickled."""

    MOST_OPEN = 200

    def __init__(self, folder: str, shards: Sequence[int]):
        """`shards`: the number of examples of each."""
        self.folder, self.shards = folder, list(shards)
        self._ends = np.cumsum(self.shards, dtype=np.int64)
        self._open: dict[int, Any] = {}
        self._library = _library(f"Reading {folder}")

    def __reduce__(self) -> Any:
        return Reader, (self.folder, self.shards)

    def read(self, number: int) -> Encoded:
        """An example. Raises RecordError if its file is damaged."""
        shard = int(np.searchsorted(self._ends, number, "right"))
        place = number - int(self._ends[shard]) + self.shards[shard]
        path = os.path.join(self.folder, shard_name(shard))
        try:
            if (reader := self._open.get(shard)) is None:
                reader = self._library.ArrayRecordReader(path, READING, file_reader_buffer_size=BUFFER)
                if len(self._open) >= self.MOST_OPEN:  # a process may open no more than a thousand or so
                    self._open = {}
                self._open[shard] = reader
            [data] = reader.read([place])
        except Exception as error:  # whatever the library raises
            raise RecordError(f"{path} is damaged: {message_of(error)}. Prepare the data again.") from error
        return parsed(data)


def write_descriptions(folder: str, version: str, shards: Sequence[int], size: int, description: str) -> None:
    """Writes what tensorflow-datasets reads first.

    Args:
      folder: of the shards.
      version: of the data, as 1.0.0.
      shards: the number of examples of each.
      size: bytes of all.
      description: of the data, for people.
    """
    split = {
        "filepathTemplate": FILES,
        "name": SPLIT,
        "numBytes": str(size),
        "shardLengths": [str(count) for count in shards],
    }
    about = {"fileFormat": "array_record", "name": DATASET, "description": description, "splits": [split]}
    write_json(os.path.join(folder, "dataset_info.json"), about | {"version": version})
    features = {name: _feature(name not in SCALARS) for name in Encoded._fields}
    tree = {
        "featuresDict": {"features": features},
        "pythonClassName": f"{_FEATURES}.features_dict.FeaturesDict",
    }
    write_json(os.path.join(folder, "features.json"), tree)


_FEATURES = "tensorflow_datasets.core.features"


def _feature(is_list: bool) -> Mapping[str, Any]:
    shape = {"dimensions": ["-1"]} if is_list else {}
    tensor = {"dtype": "int32", "encoding": "none", "shape": shape}
    return {"pythonClassName": f"{_FEATURES}.tensor_feature.Tensor", "tensor": tensor}
