"""Tokenizes records once, for training to read by number.

    python -m pasta_jax.prepare --sources=mine.jsonl --tokenizer=mine.model --to=data/mine

Every record is read, checked and cut as training would (--config.data.FIELD=VALUE, or --config=FILE.py), and its
ids are written as a data set of tensorflow-datasets in array_record files (extra [tfds]; TensorFlow is not needed).
The same command goes on where it was stopped. Train with --config.data.sources=prepared:data/mine; mix several with
weights, as in prepared:a=0.7,prepared:b=0.3.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags
from tqdm import tqdm

from pasta_jax.config import Config, ConfigError, DataConfig, is_records
from pasta_jax.data.fitting import Fitter
from pasta_jax.data.prepared import DROPPED, made_with
from pasta_jax.data.reading import RecordError
from pasta_jax.data.sources import make_tokenizer
from pasta_jax.files import Lines, json_line, locked, shows_progress
from pasta_jax.overrides import load_config, override, split_overrides
from pasta_jax.prepare.encoding import EncodedBatch, encoding, read_batches
from pasta_jax.prepare.folder import PROGRESS, SHARD_BYTES, State, begin, finish, write_shard
from pasta_jax.tokens.tokenizer import Tokenizer, TokenizerError
from pasta_jax.verbs import begin_alone, refuse, run_main

LOG = logging.getLogger("pasta_jax")

ENDS = 2**16
"""Bytes at the start and at the end of a file by which it is known again."""


def main(argv: Sequence[str], *, values: flags.FlagValues, overrides: Sequence[str]) -> None:
    """Runs the command. A mistake ends in one line and status 2."""
    if len(argv) > 1 or not values.to:
        refuse(f"Add --sources=FILE.jsonl --tokenizer=FILE.model --to=FOLDER. {__doc__.splitlines()[0]}")
    if not re.fullmatch(r"\d+\.\d+\.\d+", values.data_version):
        refuse(f"--data_version={values.data_version} must be three numbers, as 1.0.0.")
    overrides = [*overrides]
    overrides += [f"data.sources={values.sources}"] if values.sources else []
    overrides += [f"data.tokenizer={values.tokenizer}"] if values.tokenizer else []
    begin_alone()
    try:
        config = load_config(values.config, overrides) if values.config else override(Config(), overrides)
        if config.init_from:
            from pasta_jax.experiment import resolve  # it loads jax

            config, tokenizer = resolve(config, overrides=overrides)
        elif not values.config and not any(text.startswith("data.tokenizer=") for text in overrides):
            raise ConfigError(
                "Which tokenizer? Add --tokenizer=FILE, that of the model to train, or --config.init_from=WORKDIR, "
                "a model to start from."
            )
        else:
            tokenizer = make_tokenizer(config.data)
        with locked(values.to):
            done = prepare(
                config.data,
                tokenizer,
                values.to,
                shard=values.shard_examples,
                workers=values.workers or os.cpu_count() or 1,
                version=values.data_version,
            )
    except (ConfigError, RecordError, TokenizerError, OSError, ValueError) as error:
        refuse(" ".join(str(error).split()))
    print(done)


def prepare(
    config: DataConfig,
    tokenizer: Tokenizer,
    folder: str,
    *,
    shard: int = 32768,
    workers: int = 1,
    version: str = "1.0.0",
) -> str:
    """Prepares the files of `config.sources` in a folder, or goes on with that.

    Args:
      config: the sources, how to read them, and the limits.
      tokenizer: of the model.
      folder: to write to.
      shard: examples of a file. A stop loses what was done since the last whole one.
      workers: processes that tokenize.
      version: of the data, for tensorflow-datasets.

    Returns:
      What was made, for people.

    Raises:
      ConfigError, RecordError: a source cannot be used, or the folder holds something else.
    """
    begun = time.monotonic()
    names = _files(config)
    about = {
        "made": made_with(config, tokenizer),
        "sources": [_known(name) for name in names],
        "shard": shard,
    }
    fitter = Fitter(config, tokenizer)
    assert fitter.reader  # columns that do not exist are refused before a folder is made
    if finished := begin(folder, about):
        return f"{folder} is prepared already.\n{_summary(folder, finished)}"
    state = State.read(folder, names)
    first = sum(account.records for account in state.accounts)
    with (
        tqdm(initial=first, unit=" records", disable=not shows_progress()) as bar,
        Lines(os.path.join(folder, PROGRESS)) as progress,
        encoding(read_batches(names, state.batches), fitter, names, workers) as encoded,
    ):
        while chunk := _chunk(encoded, shard):
            state = write_shard(folder, state, chunk)
            progress.write(json_line(state.line()))
            bar.update(sum(batch.account.records for batch in chunk))
            if bar.disable:
                LOG.info("%s", _rate(state, begun, first))
    kept = os.path.join(folder, DROPPED)
    for account in state.accounts:
        account.check(config.max_unusable, kept, may_cut=config.too_long == "drop")
        if report := account.report():
            LOG.warning("%s", report)
    if any(account.unusable for account in state.accounts):
        LOG.warning("All records that cannot be used are kept in %s.", kept)
    finished = finish(folder, state, about, tokenizer, version)
    return f"{_summary(folder, finished)}\n{_rate(state, begun, first)}"


def _files(config: DataConfig) -> list[str]:
    """The files to prepare. Raises ConfigError."""
    names = [name for name, _ in config.sources]
    if other := [name for name in names if not is_records(name)]:
        raise ConfigError(
            f"config.data.sources: {other[0]!r} is not a file of records, as mine.jsonl. Name files by --sources."
        )
    if len({weight for _, weight in config.sources}) > 1:
        raise ConfigError(
            "Weights do not go into prepared data. Prepare each file by itself, and give the folders weights when "
            "training, as in --config.data.sources=prepared:a=0.7,prepared:b=0.3."
        )
    return names


def _known(name: str) -> dict[str, Any]:
    """By what a file is known again. Raises RecordError."""
    if name.startswith("hf:"):
        return {"name": name}
    try:
        with open(name, "rb") as file:
            size = os.path.getsize(name)
            start = file.read(ENDS)
            file.seek(max(0, size - ENDS))
            ends = hashlib.sha256(start + file.read(ENDS)).hexdigest()
    except OSError as error:
        raise RecordError(f"Cannot read {name}: {error.strerror}.") from error
    return {"name": name, "bytes": size, "ends": ends}


def _chunk(encoded: Iterator[EncodedBatch], shard: int) -> list[EncodedBatch]:
    """The batches of the next shard; the same ones whatever was done before."""
    chunk: list[EncodedBatch] = []
    count = size = 0
    while count < shard and size < SHARD_BYTES and (batch := next(encoded, None)) is not None:
        chunk.append(batch)
        count += len(batch.examples)
        size += sum(map(len, batch.examples))
    return chunk


def _summary(folder: str, about: dict[str, Any]) -> str:
    shards = len(about["shards"])
    return (
        f"{folder}: {about['examples']:,} examples of {about['records']:,} records, {about['tokens']:,} tokens, "
        f"the longest {about['longest']:,}; {sum(about['bytes']) / 1e6:,.1f} MB in {shards} "
        f"file{'s' * (shards > 1)}.\n"
        f"Train on it: --config.data.sources=prepared:{folder} "
        f"--config.data.tokenizer={about['made']['tokenizer']['name']}"
    )


def _rate(state: State, begun: float, first: int) -> str:
    count, seconds = sum(account.records for account in state.accounts) - first, time.monotonic() - begun
    return f"{count:,} records in {seconds:,.0f} s: {count / max(seconds, 1e-9):,.0f} records/s."


def command() -> None:
    """Parses the command line and runs `main`."""
    flags.DEFINE_string("sources", None, "Files of records, as a.jsonl,b.jsonl (config.data.sources).")
    flags.DEFINE_string("tokenizer", None, "That of the model to train (config.data.tokenizer).")
    flags.DEFINE_string("to", None, "Folder to write to.")
    flags.DEFINE_string(
        "config", None, "An experiment whose data to prepare, as configs/sft.py; by default none."
    )
    flags.DEFINE_integer("workers", 0, "Processes that tokenize; 0: one for each core.", lower_bound=0)
    flags.DEFINE_integer("shard_examples", 32768, "Examples of a file.", lower_bound=1)
    flags.DEFINE_string("data_version", "1.0.0", "Version of the data, for tensorflow-datasets.")
    overrides, rest = split_overrides(sys.argv)
    run_main(functools.partial(main, values=flags.FLAGS, overrides=overrides), argv=rest)


if __name__ == "__main__":
    command()
