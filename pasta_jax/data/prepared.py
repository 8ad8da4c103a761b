"""Data that `python -m pasta_jax.prepare` has tokenized: documents by number, from a folder.

    FOLDER/prepared.json      what it was made from, and what became of the records; written last
    FOLDER/index.npy          of each example its size, its threads and a hash of what was asked
    FOLDER/tokenizer.bin      the tokenizer
    FOLDER/dropped.jsonl      the records that could not be used
    and the examples (`shards`)

The ids of an example do not depend on positions, and its fields follow when it is read. So one folder serves all
position schemes, and rows of any length that holds its longest example.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pasta_jax.arrays import ThreadedTokens
from pasta_jax.config import PREPARED, ConfigError, DataConfig
from pasta_jax.data.fitting import TOO_LONG
from pasta_jax.data.reading import RecordError
from pasta_jax.data.shards import Reader, shard_name
from pasta_jax.files import BROKEN
from pasta_jax.messages import message_of, shown
from pasta_jax.tokens.base import unpack
from pasta_jax.tokens.layout import layout_ids
from pasta_jax.tokens.load import tokenizer_from_bytes
from pasta_jax.tokens.positions import Positions
from pasta_jax.tokens.tokenizer import Tokenizer, Vocabulary

LOG = logging.getLogger("pasta_jax")

FORMAT = 1
ABOUT, INDEX, TOKENIZER, DROPPED = "prepared.json", "index.npy", "tokenizer.bin", "dropped.jsonl"

ROW = np.dtype([("asked", np.uint64), ("tokens", np.int32), ("threads", np.int32)])
"""An example in the index: hash of what the user said first, length of the document, its threads."""

READ_FROM = ("columns", "turns", "too_long", "max_depth")
"""Fields of `config.data` that say how records are read: when data is prepared, and not later."""


def is_prepared(name: str) -> bool:
    """Whether a source is a folder of prepared data: `prepared:FOLDER`, or a folder that is one."""
    return name.startswith(PREPARED) or os.path.isfile(os.path.join(name, ABOUT))


def fingerprint(tokenizer: Tokenizer) -> str:
    """Tells tokenizers apart that write other ids for the same text or prompt; not their dialects."""
    kind, model, usage = unpack(tokenizer.to_bytes())
    fields = {
        name: sorted(value) if isinstance(value, frozenset) else value
        for name, value in dataclasses.asdict(usage).items()
    }
    head = json.dumps([kind, fields], sort_keys=True).encode()
    return hashlib.sha256(head + model).hexdigest()


def made_with(config: DataConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """What decides how records become ids, besides the records: plain data."""
    fields = {name: getattr(config, name) for name in (*READ_FROM, "length", "threads", "dialect")}
    about = {
        "tokenizer": {"name": config.tokenizer, "sha256": fingerprint(tokenizer)},
        "tags": dict(tokenizer.vocabulary.tag_ids),
        **fields,
    }
    plain: dict[str, Any] = json.loads(json.dumps(about))
    return plain


@dataclasses.dataclass(frozen=True)
class Prepared(Sequence[ThreadedTokens]):
    """The documents of a folder [L].

    Attributes:
      path: the folder.
      about: what prepared.json says.
      vocabulary: has the tags.
      positions: the scheme.
      threads: T; it fixes W.
      table: ROW [N], of all examples.
      numbers: int64 [n], those that this sequence has.
      reader: of their files.
    """

    path: str
    about: Mapping[str, Any]
    vocabulary: Vocabulary
    positions: Positions
    threads: int
    table: np.ndarray
    numbers: np.ndarray
    reader: Reader

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.of(range(len(self))[index])
        example = self.reader.read(int(self.numbers[index]))
        return layout_ids(self.vocabulary, example.prompt, example.answer, self.positions, self.threads)

    def of(self, indices: Sequence[int]) -> Prepared:
        """Some of the documents."""
        return dataclasses.replace(self, numbers=self.numbers[np.asarray(indices, np.int64)])

    @property
    def asked(self) -> list[int]:
        """Hashes of what the user said first, to tell equal ones."""
        hashes: list[int] = self.table["asked"][self.numbers].tolist()
        return hashes

    @property
    def lengths(self) -> np.ndarray:
        """int32 [n]: tokens of each document."""
        lengths: np.ndarray = self.table["tokens"][self.numbers]
        return lengths

    @property
    def digest(self) -> dict[str, Any]:
        """The number of documents, and a hash of them in their order (`data.sources.contents`)."""
        chosen = hashlib.sha256(self.about["hash"].encode() + self.numbers.tobytes())
        return {"examples": len(self), "sha256": chosen.hexdigest()}


def open_prepared(
    folder: str,
    *,
    positions: Positions = Positions(),
    threads: int | None = None,
    tokenizer: Tokenizer | None = None,
) -> Prepared:
    """The documents of a folder.

    Args:
      folder: of prepared data, perhaps with PREPARED.
      positions: the scheme.
      threads: T; by default what was the limit when the data was prepared.
      tokenizer: has the tags; by default the folder's own.

    Raises:
      RecordError: the folder is not one, is not finished, or is damaged.
    """
    folder = folder.removeprefix(PREPARED)
    about = read_about(folder)
    try:
        with open(os.path.join(folder, INDEX), "rb") as file:
            data = file.read()
        if hashlib.sha256(data).hexdigest() != about["index"]:
            raise ValueError("its checksum differs")
    except (OSError, ValueError) as error:
        raise RecordError(
            f"{folder}/{INDEX} is damaged: {message_of(error)}. Prepare the data again."
        ) from error
    index = np.load(io.BytesIO(data))
    vocabulary = (tokenizer or own_tokenizer(folder, about)).vocabulary
    threads = about["made"]["threads"] if threads is None else threads
    for number, size in enumerate(about["bytes"]):
        path = os.path.join(folder, shard_name(number))
        if not os.path.isfile(path) or os.path.getsize(path) != size:
            raise RecordError(
                f"{path} is missing or not whole. Copy the folder again, or prepare the data again."
            )
    numbers = np.arange(len(index), dtype=np.int64)
    return Prepared(
        folder, about, vocabulary, positions, threads, index, numbers, Reader(folder, about["shards"])
    )


def read_about(folder: str) -> dict[str, Any]:
    """What prepared.json says. Raises RecordError."""
    path = os.path.join(folder, ABOUT)
    try:
        with open(path, encoding="utf-8") as file:
            about: dict[str, Any] = dict(json.load(file))
    except FileNotFoundError:
        raise RecordError(
            f"{folder} has no {ABOUT}: nothing was prepared there, or not to the end. Run python -m "
            f"pasta_jax.prepare --to={folder} to its end."
        ) from None
    except (OSError, *BROKEN) as error:
        raise RecordError(f"{path} is damaged: {message_of(error)}. Prepare the data again.") from error
    if about.get("format") != FORMAT:
        raise RecordError(f"{path} has the format {shown(about.get('format'))}; this version reads {FORMAT}.")
    if about.pop("check", None) != checksum(about):
        raise RecordError(f"{path} is damaged: its checksum differs. Prepare the data again.")
    return about


def checksum(about: Mapping[str, Any]) -> str:
    """Of what prepared.json says."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def own_tokenizer(folder: str, about: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer with which a folder was prepared. Raises RecordError."""
    path = os.path.join(folder, TOKENIZER)
    try:
        with open(path, "rb") as file:
            tokenizer = tokenizer_from_bytes(file.read())
        if fingerprint(tokenizer) != about["made"]["tokenizer"]["sha256"]:
            raise ValueError("its checksum differs")
    except (OSError, ValueError) as error:
        raise RecordError(f"{path} is damaged: {message_of(error)}. Prepare the data again.") from error
    return tokenizer.with_dialect(about["made"]["dialect"])


def open_for(name: str, config: DataConfig, tokenizer: Tokenizer) -> Prepared:
    """The documents of a folder for a run.

    Raises:
      RecordError: as `open_prepared`.
      ConfigError: they were made for another tokenizer, or other limits; says in one line what differs.
    """
    found = open_prepared(name, positions=config.positions, threads=config.threads, tokenizer=tokenizer)
    made, now = found.about["made"], made_with(config, tokenizer)
    longest = int(found.table["tokens"].max())
    threads = int(found.table["threads"].max())
    faults: list[str] = []
    if made["tokenizer"]["sha256"] != now["tokenizer"]["sha256"]:
        (was, then), (name, sha) = (each["tokenizer"].values() for each in (made, now))
        faults.append(f"its tokenizer is {was} ({then[:8]}), and that of the run {name} ({sha[:8]})")
    elif made["tags"] != now["tags"]:
        faults.append("the ids of its tags are others")
    if made["dialect"] != now["dialect"]:
        faults.append(f"its tags are those of {made['dialect']}, and config.data.dialect is {now['dialect']}")
    if longest > config.length:
        faults.append(f"its longest example has {longest} tokens, and config.data.length is {config.length}")
    if threads > config.threads:
        faults.append(f"it has {threads} threads in an answer, and config.data.threads is {config.threads}")
    plain = json.loads(json.dumps(dataclasses.asdict(DataConfig())))
    for field in READ_FROM:
        if now[field] not in (made[field], plain[field]):
            faults.append(f"config.data.{field} was {made[field]!r} and is {now[field]!r}")
    if faults:
        raise ConfigError(
            f"{found.path} was prepared for something else: {'; '.join(faults)}. Change the run, or prepare the "
            "data again."
        )
    if config.length > made["length"] and TOO_LONG in str([found.about["unusable"], found.about["left_out"]]):
        LOG.warning(
            "%s was prepared for rows of %d tokens, and lacks longer answers that a row of %d might hold.",
            *(found.path, made["length"], config.length),
        )
    return found


class Fields(Sequence[Mapping[str, np.ndarray]]):
    """Documents as dicts of their arrays, for loaders that know no other records: Grain's `MapDataset.source`."""

    def __init__(self, documents: Sequence[ThreadedTokens]):
        self._documents = documents

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: Any) -> Any:
        return self._documents[index].fields()


def grain_source(folder: str, *, positions: Positions = Positions(), threads: int | None = None) -> Fields:
    """The documents of a folder for `grain.MapDataset.source`: dicts of arrays, [L] and [L, W] (`arrays`).

    Arguments and errors as those of `open_prepared`.
    """
    return Fields(open_prepared(folder, positions=positions, threads=threads))
