"""The folder of prepared data while it is made: whole shards, and what is known of them."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pasta_jax.config import ConfigError
from pasta_jax.data.fitting import SHOWN, Account
from pasta_jax.data.prepared import ABOUT, DROPPED, FORMAT, INDEX, TOKENIZER, checksum, read_about
from pasta_jax.data.records import Problem, invalid_line
from pasta_jax.data.shards import shard_name, write_descriptions, writing
from pasta_jax.files import LOCK, Change, Stamp, changes, json_line, read_jsonl, replacing, write_json
from pasta_jax.prepare.encoding import EncodedBatch
from pasta_jax.tokens.tokenizer import Tokenizer

BEGUN, PROGRESS, PARTS = "preparing.json", "progress.jsonl", "parts"
"""While data is prepared: what it is made from, a line for each shard, and each shard's part of the index."""

SHARD_BYTES = 2**26
"""A shard is not longer than this and a batch."""


def begin(folder: str, about: dict[str, Any]) -> dict[str, Any] | None:
    """Begins a folder, or goes on with one.

    Args:
      folder: to write to.
      about: what is prepared; plain data.

    Returns:
      What prepared.json says if it is there.

    Raises:
      ConfigError: the folder holds something else.
    """
    stamp = Stamp(os.path.join(folder, BEGUN))
    if os.path.exists(os.path.join(folder, ABOUT)):
        finished = read_about(folder)
        _check_same(folder, {name: finished.get(name) for name in about}, about)
        return finished
    if os.path.exists(stamp.path):
        if read_jsonl(os.path.join(folder, PROGRESS), _state):
            with open(stamp.path, encoding="utf-8") as file:
                _check_same(folder, json.load(file), about)
    elif strange := sorted({*os.listdir(folder)} - {LOCK}) if os.path.isdir(folder) else []:
        raise ConfigError(f"{folder} has other files, as {strange[0]}. Give a folder of its own.")
    os.makedirs(os.path.join(folder, PARTS), exist_ok=True)
    stamp.write(about)
    return None


def _check_same(folder: str, then: dict[str, Any], now: dict[str, Any]) -> None:
    if differing := changes(then, json.loads(json.dumps(now))):
        raise ConfigError(
            f"{folder} was begun with something else: {_shown(differing[0])}. "
            "Give another folder, or remove this one."
        )


def _shown(change: Change) -> str:
    """A difference, with files by name alone."""
    if change.name != "sources":
        return str(change)
    then, now = ({each["name"]: each for each in side or ()} for side in (change.old, change.new))
    if then.keys() == now.keys():
        return (
            "; ".join(f"{name} has changed" for name in now if then[name] != now[name])
            or "the files are in another order"
        )
    return str(change._replace(old=", ".join(then), new=", ".join(now)))


@dataclasses.dataclass(frozen=True)
class State:
    """What is done: whole shards.

    Attributes:
      batches: of records that are read.
      shards: examples of each.
      bytes: of each file.
      size: bytes of all examples.
      hash: of all examples with their numbers, a sum.
      dropped: bytes of the records that cannot be used.
      accounts: of each source.
    """

    batches: int
    shards: tuple[int, ...]
    bytes: tuple[int, ...]
    size: int
    hash: str
    dropped: int
    accounts: tuple[Account, ...]

    def line(self) -> dict[str, Any]:
        """As plain data, without the first problems."""
        return vars(self) | {"accounts": [vars(account) | {"first": []} for account in self.accounts]}

    @staticmethod
    def read(folder: str, names: Sequence[str]) -> State:
        """The state of a folder; what was begun after it is removed."""
        path, dropped = os.path.join(folder, PROGRESS), os.path.join(folder, DROPPED)
        state = State(0, (), (), 0, "0", 0, tuple(map(Account, names)))
        for found in read_jsonl(path, _state)[-1:]:
            state = found
        with open(path, "w", encoding="utf-8") as file:  # without a line that was cut off
            if state.batches:
                file.write(json_line(state.line()))
        with open(dropped, "ab") as kept:
            kept.truncate(state.dropped)
        first = {account.path: account.first for account in state.accounts}
        wanted = sum(min(SHOWN, account.unusable.total()) for account in state.accounts)
        for problem in _problems(dropped):
            if sum(map(len, first.values())) == wanted:
                break
            if len(first[problem.file]) < SHOWN:
                first[problem.file].append(problem)
        return state


def _state(fields: dict[str, Any]) -> State:
    counter = collections.Counter
    accounts = tuple(
        Account(**each | {"unusable": counter(each["unusable"]), "left_out": counter(each["left_out"])})
        for each in fields["accounts"]
    )
    shards, sizes = tuple(fields["shards"]), tuple(fields["bytes"])
    return State(**fields | {"accounts": accounts, "shards": shards, "bytes": sizes})


def _problems(path: str) -> Iterator[Problem]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield Problem(**json.loads(line))


def write_shard(folder: str, state: State, chunk: Sequence[EncodedBatch]) -> State:
    """The state after one more shard. What a batch of records left is in it, even if that are no examples."""
    with open(os.path.join(folder, DROPPED), "a", encoding="utf-8") as dropped:
        for batch in chunk:
            account = state.accounts[batch.source]
            account.records += batch.account.records
            account.left_out.update(batch.account.left_out)
            account.cut += batch.account.cut
            for problem in batch.problems:
                account.add(problem)
                dropped.write(invalid_line(problem))
        dropped.flush()
        kept = dropped.tell()
    state = dataclasses.replace(state, batches=state.batches + len(chunk), dropped=kept)
    examples = [example for batch in chunk for example in batch.examples]
    if not examples:
        return state
    path = os.path.join(folder, shard_name(len(state.shards)))
    hashed, number = int(state.hash, 16), sum(state.shards)
    with writing(path) as writer:
        for i, example in enumerate(examples, number):
            writer.write(example)
            hashed += int.from_bytes(hashlib.blake2b(b"%d " % i + example, digest_size=16).digest())
    with replacing(os.path.join(folder, PARTS, f"{len(state.shards):05d}.npy"), "wb") as file:
        np.save(file, np.concatenate([batch.rows for batch in chunk]))
    return dataclasses.replace(
        state,
        shards=(*state.shards, len(examples)),
        bytes=(*state.bytes, os.path.getsize(path)),
        size=state.size + sum(map(len, examples)),
        hash=f"{hashed % 2**128:032x}",
    )


def finish(
    folder: str, state: State, about: dict[str, Any], tokenizer: Tokenizer, version: str
) -> dict[str, Any]:
    """Writes what describes the shards, prepared.json last, and removes what was needed on the way."""
    parts = [os.path.join(folder, PARTS, f"{number:05d}.npy") for number in range(len(state.shards))]
    index = np.concatenate([np.load(part) for part in parts])
    table = io.BytesIO()
    np.save(table, index)
    with replacing(os.path.join(folder, INDEX), "wb") as file:
        file.write(table.getvalue())
    with replacing(os.path.join(folder, TOKENIZER), "wb") as file:
        file.write(tokenizer.to_bytes())
    names = ", ".join(account.path for account in state.accounts)
    text = f"Ids of prompts and annotated answers of {names}, prepared by pasta_jax."
    write_descriptions(folder, version, state.shards, state.size, text)
    unusable, left_out = collections.Counter[str](), collections.Counter[str]()
    for account in state.accounts:
        unusable.update(account.unusable)
        left_out.update(account.left_out)
    finished = about | {
        "format": FORMAT,
        "version": version,
        "examples": len(index),
        "tokens": int(index["tokens"].sum(dtype=np.int64)),
        "longest": int(index["tokens"].max()),
        "most_threads": int(index["threads"].max()),
        "records": sum(account.records for account in state.accounts),
        "unusable": dict(unusable),
        "left_out": dict(left_out),
        "cut": sum(account.cut for account in state.accounts),
        "hash": state.hash,
        "index": hashlib.sha256(table.getvalue()).hexdigest(),
        "shards": list(state.shards),
        "bytes": list(state.bytes),
    }
    if not state.dropped:
        os.remove(os.path.join(folder, DROPPED))
    write_json(os.path.join(folder, ABOUT), finished | {"check": checksum(finished)})
    for path in (*parts, os.path.join(folder, BEGUN), os.path.join(folder, PROGRESS)):
        with contextlib.suppress(OSError):
            os.remove(path)
    with contextlib.suppress(OSError):
        os.rmdir(os.path.join(folder, PARTS))
    return finished
