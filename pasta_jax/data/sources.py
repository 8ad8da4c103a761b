"""From `config.data` to documents.

almanac:base        facts as plain text, and plain instructions with plain answers
almanac:plain       instructions with plain answers
almanac:annotated   the same answers, annotated imperfectly
almanac:apar        the same answers, forked by APAR's rules; needs dialect=apar
prepared:FOLDER     what `python -m pasta_jax.prepare` has made of such records (`prepared`)
FILE.jsonl          records of prompts and annotated answers, in any layout and kind of file (`layouts`, `reading`)
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any

import numpy as np
from tqdm import tqdm

from pasta_jax.arrays import ThreadedTokens
from pasta_jax.config import PREPARED, ConfigError, DataConfig, is_records
from pasta_jax.data import almanac
from pasta_jax.data.batches import Mixture, Shuffled, Stream, batches, held_out, steps_of_sizes, steps_until
from pasta_jax.data.fitting import Account, Fitter
from pasta_jax.data.prepared import Prepared, is_prepared, open_for, read_about
from pasta_jax.data.reading import RecordError, entries
from pasta_jax.data.records import Problem, digest, invalid_line
from pasta_jax.data.stored import Chained, Stored, store
from pasta_jax.files import replacing, shows_progress
from pasta_jax.tokens.load import load_tokenizer
from pasta_jax.tokens.tokenizer import Tokenizer

LOG = logging.getLogger("pasta_jax")


def make_tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer that `config.tokenizer` names. Raises TokenizerError, ConfigError."""
    if config.tokenizer == "almanac":
        if config.chat != "auto":
            raise ConfigError(
                f"config.data.chat is {config.chat}, but the almanac's tokenizer has its own format. "
                "Leave it at auto."
            )
        return almanac.load_tokenizer().with_dialect(config.dialect)
    tokenizer = load_tokenizer(config.tokenizer, extend=config.extend_tokenizer, chat=config.chat)
    return tokenizer.with_dialect(config.dialect)


def make_source(
    config: DataConfig, tokenizer: Tokenizer, seed: int, *, invalid: str | os.PathLike[str] | None = None
) -> Stream:
    """The documents of `make_sources` to train on."""
    return make_sources(config, tokenizer, seed, invalid=invalid)[0]


def make_sources(
    config: DataConfig, tokenizer: Tokenizer, seed: int, *, invalid: str | os.PathLike[str] | None = None
) -> tuple[Stream, Sequence[ThreadedTokens]]:
    """The documents of a run, endless and indexed, and those that are held out, which may be none.

    Args:
      config: the sources and their weights.
      tokenizer: of the model.
      seed: of the order, of generated documents, and of the choice of those that are held out.
      invalid: file to keep the invalid records, if there are any.

    Raises:
      ConfigError: an unknown source, a file without a valid record, or a share of examples that cannot be held out.
    """
    check_held_out(config, "data.sources", *(name for name, _ in config.sources))
    for name, _ in config.sources:
        if not is_records(name) and not name.startswith("almanac:") and not is_prepared(name):
            raise ConfigError(
                f"config.data.sources: {name!r} is neither almanac:NAME nor a file of records, as mine.jsonl, nor "
                "a folder of prepared ones."
            )
    with _keeping(invalid) as keep:
        files = {
            number: _stored(name, config, tokenizer, keep)
            for number, (name, _) in enumerate(config.sources)
            if is_records(name) and not is_prepared(name)
        }
    kept = os.fspath(invalid) if invalid is not None else ""
    for _, account in files.values():
        _check(account, config, kept)
    if kept and any(account.unusable for _, account in files.values()):
        LOG.warning("All invalid records are kept in %s.", kept)
    read: dict[int, Stored | Prepared] = {
        number: files[number][0] if number in files else _prepared(name, config, tokenizer)
        for number, (name, _) in enumerate(config.sources)
        if not name.startswith("almanac:")
    }
    trained, held = _divided(read, config, seed) if config.held_out_share else (read, [])
    streams = [
        Shuffled(trained[number], seed * 1000 + number)
        if number in trained
        else _almanac(name.partition(":")[2], config, tokenizer, seed * 1000 + number)
        for number, (name, _) in enumerate(config.sources)
    ]
    measured_on = Chained(held) if held else held_out_file(config, tokenizer)
    if len(streams) == 1:
        return streams[0], measured_on
    return Mixture(streams, [weight for _, weight in config.sources]), measured_on


def _divided(
    read: Mapping[int, Stored | Prepared], config: DataConfig, seed: int
) -> tuple[dict[int, Stored | Prepared], list[Stored | Prepared]]:
    """Of each source, by its number, what is trained on; and what is held out of them.

    One draw for all, so that what is asked in several sources is on one side. Raises ConfigError.
    """
    if not read:
        raise ConfigError(
            "config.data.held_out is a share of the examples of files, and the almanac generates its own. "
            "Name a file of examples instead."
        )
    asked: Any = np.concatenate([np.asarray(stored.asked, np.uint64) for stored in read.values()])
    is_held = np.zeros(len(asked), bool)
    is_held[held_out(asked, config.held_out_share, seed * 1000 + min(read))[1]] = True
    trained, held = dict[int, Stored | Prepared](), list[Stored | Prepared]()
    first = 0
    for number, stored in read.items():
        own = is_held[first : first + len(stored)]
        first += len(stored)
        if own.all():
            raise ConfigError(
                f"config.data.held_out leaves nothing of {config.sources[number][0]} ({len(stored)} examples; "
                "those with the same prompt stay together)."
            )
        trained[number] = stored.of(np.flatnonzero(~own).tolist())
        if own.any():
            held.append(stored.of(np.flatnonzero(own).tolist()))
    return trained, held


def check_held_out(config: DataConfig, field: str, *files: str) -> None:
    """Refuses to hold out records that another field names: by their file, or prepared. Raises ConfigError."""
    held = config.held_out_file
    if held and _files_of(held) & {*itertools.chain(*map(_files_of, files))}:
        raise ConfigError(
            f"config.data.held_out={held} is trained on too: config.{field} names it. Name another file, or give "
            "a share, as 0.05."
        )


def _files_of(name: str) -> set[str]:
    """The file or folder of a source, and the files that a folder was prepared from."""
    folder = name.removeprefix(PREPARED)
    made_from = []
    if is_prepared(name):
        with contextlib.suppress(RecordError):  # a damaged folder is refused when it is read
            made_from = [each["name"] for each in read_about(folder)["sources"]]
    return {*map(os.path.realpath, [folder, *made_from])}


def held_out_file(config: DataConfig, tokenizer: Tokenizer) -> Sequence[ThreadedTokens]:
    """The documents of the file that `config.held_out` names, if it names one. Raises ConfigError."""
    if not config.held_out_file:
        return []
    if is_prepared(config.held_out_file):
        return _prepared(config.held_out_file, config, tokenizer, field="held_out")
    stored, account = _stored(config.held_out_file, config, tokenizer, lambda _: None, field="held_out")
    _check(account, config, field="held_out")
    return stored


def contents(source: Stream) -> dict[str, dict[str, Any]]:
    """The number and a hash of the examples of each file that `source` reads, by the name of the file."""
    streams = source.streams if isinstance(source, Mixture) else [source]
    read = [stream.source for stream in streams if isinstance(stream, Shuffled)]
    stored = {each.path: digest(each.examples()) for each in read if isinstance(each, Stored)}
    return stored | {each.path: each.digest for each in read if isinstance(each, Prepared)}


def steps_of_epochs(config: DataConfig, source: Stream, epochs: float) -> int:
    """The steps of a number of passes over the data, from the batches of the first pass.

    Raises:
      ConfigError: more than one source, or an endless one.
    """
    if not isinstance(source, Shuffled):
        raise ConfigError(
            "config.epochs counts passes over one file of records; the almanac is endless, and a mixture has no "
            "common pass. Set --config.epochs=0 and --config.steps."
        )
    if isinstance(source.source, Prepared):
        lengths = source.source.lengths
        sizes = (config.rows, config.length, len(source))
        count, seen = steps_of_sizes(lambda index: int(lengths[source.place(index)]), *sizes)
    else:
        count, seen = steps_until(batches(source, 0, config.rows, config.length), len(source))
    steps = max(1, round(epochs * len(source) * count / seen))
    LOG.info("%g passes over %d documents are %d steps.", epochs, len(source), steps)
    if steps == 1 and seen > epochs * len(source):
        LOG.warning(
            "A batch of %d rows of %d tokens holds %d of these documents: one step sees each of them %.3g times. "
            "Use fewer --config.data.rows or more documents for --config.epochs to matter.",
            *(config.rows, config.length, seen, seen / len(source)),
        )
    return steps


def _almanac(which: str, config: DataConfig, tokenizer: Tokenizer, seed: int) -> Stream:
    """Documents generated for each index: they are endless and need no shuffling."""
    if which not in almanac.SOURCES:
        names = ", ".join(f"almanac:{name}" for name in almanac.SOURCES)
        raise ConfigError(f"config.data.sources: no almanac:{which}. Use one of {names}.")
    return almanac.source(
        which, tokenizer, seed=seed, length=config.length, threads=config.threads, positions=config.positions
    )


def _stored(
    path: str,
    config: DataConfig,
    tokenizer: Tokenizer,
    keep: Callable[[Problem], object],
    field: str = "sources",
) -> tuple[Stored, Account]:
    """The examples of a file that fit into a row, and the account of all. Raises ConfigError."""
    account = Account(path)
    try:
        found = tqdm(entries(path), f"reading {path}", unit=" records", delay=2, disable=not shows_progress())
        fitter = Fitter(config, tokenizer)
        return store(path, found, fitter, account, keep, is_grouped=bool(config.held_out_share)), account
    except RecordError as error:
        raise ConfigError(f"config.data.{field}: {error}") from error


def _prepared(name: str, config: DataConfig, tokenizer: Tokenizer, field: str = "sources") -> Prepared:
    """The documents of a folder. Raises ConfigError."""
    try:
        return open_for(name, config, tokenizer)
    except RecordError as error:
        raise ConfigError(f"config.data.{field}: {error}") from error


def _check(account: Account, config: DataConfig, kept: str = "", field: str = "sources") -> None:
    """Says what of a file cannot be used. Raises ConfigError if that is too much."""
    try:
        account.check(config.max_unusable, kept, may_cut=config.too_long == "drop")
    except ConfigError as error:
        raise ConfigError(f"config.data.{field}: {error}") from None
    if report := account.report():
        LOG.warning("%s", report)


@contextlib.contextmanager
def _keeping(path: str | os.PathLike[str] | None) -> Iterator[Callable[[Problem], object]]:
    """Takes problems and writes them to a file, which is made with the first of them."""
    with contextlib.ExitStack() as stack:
        files: list[IO[str]] = []

        def keep(problem: Problem) -> None:
            if path is not None:
                if not files:
                    files.append(stack.enter_context(replacing(path)))
                files[0].write(invalid_line(problem))

        yield keep
