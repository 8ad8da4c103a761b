"""Trains a tokenizer on your own text.

    python -m pasta_jax.tokenizer --text=data.jsonl --vocab_size=8000 --to=my.model

The text is that of records, prompts and answers without their tags, or of plain text files. What is written is a
SentencePiece model with all that training needs: symbols for the tags and the turns, single digits, bytes for rare
characters, no normalisation. Train with it: --config.data.tokenizer=my.model --config.model.vocab_size=8000.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags
from tqdm import tqdm

from pasta_jax.config import Config, ConfigError, DataConfig, is_records
from pasta_jax.data.fitting import Account
from pasta_jax.data.records import Problem, RecordError, read
from pasta_jax.files import replacing, shows_progress
from pasta_jax.lang.assemble import assemble
from pasta_jax.overrides import override, split_overrides
from pasta_jax.tokens.pieces import OWN, Measured, measure, sentences_of, train_pieces
from pasta_jax.tokens.sentence_piece import SentencePieceTokenizer
from pasta_jax.tokens.tokenizer import TokenizerError
from pasta_jax.verbs import begin_alone, refuse, run_main

LOG = logging.getLogger("pasta_jax")

MEASURED_BYTES = 2**20
"""Of the texts that are kept apart, at most."""

LONGEST_LINE = 2**20
"""Characters of plain text that are one text, at most."""


def main(argv: Sequence[str], *, values: flags.FlagValues, overrides: Sequence[str]) -> None:
    """Runs the command. A mistake ends in one line and status 2."""
    if len(argv) > 1 or not values.text or not values.vocab_size or not values.to:
        refuse(f"Add --text=FILE,FILE --vocab_size=8000 --to=FILE.model. {__doc__.splitlines()[0]}")
    if not values.to.endswith(".model"):
        refuse(f"--to={values.to} must end in .model, by which a SentencePiece model is known.")
    if os.path.exists(values.to):
        refuse(f"--to={values.to} exists. Remove it, or give another name.")
    begin_alone()

    try:
        config = override(Config(), overrides).data
        made = train(
            values.text,
            values.vocab_size,
            config,
            sample=int(values.sample_mb * 2**20),
            held_out=values.held_out,
            coverage=values.coverage,
            seed=values.seed,
        )
        with replacing(values.to, "wb") as file:
            file.write(made.model)
    except OSError as error:
        refuse(f"Cannot use {error.filename}: {error.strerror}." if error.filename else str(error))
    except (ConfigError, RecordError, TokenizerError) as error:
        refuse(" ".join(str(error).split()))
    print(made.report(values.to))


@dataclasses.dataclass(frozen=True)
class Made:
    """A tokenizer, and what it was made from.

    Attributes:
      model: the SentencePiece model.
      pieces: V.
      texts, bytes: all that was read.
      trained: bytes of the sample that was trained on.
      measured: how it spells the texts that were kept apart.
    """

    model: bytes
    pieces: int
    texts: int
    bytes: int
    trained: int
    measured: Measured

    def report(self, path: str) -> str:
        """What was made, for people."""
        measured = self.measured
        how = "Nothing was kept apart to measure it on: there are too few texts."
        if measured.tokens:
            how = (
                f"On {measured.bytes:,} bytes that were kept apart: {measured.bytes / measured.tokens:.2f} bytes "
                f"per token; {measured.covered / measured.characters:.2%} of the characters have pieces of their "
                "own, the others are spelled byte by byte."
            )
        return (
            f"{path} has {self.pieces:,} pieces, trained on {self.trained:,} of {self.bytes:,} bytes in "
            f"{self.texts:,} texts.\n{how}\nTrain a model with it: --config.data.tokenizer={path} "
            f"--config.model.vocab_size={self.pieces}"
        )


def train(
    files: Sequence[str],
    vocab_size: int,
    config: DataConfig = DataConfig(),
    *,
    sample: int = 16 * 2**20,
    held_out: float = 0.05,
    coverage: float = 0.9995,
    seed: int = 0,
) -> Made:
    """Trains a tokenizer on a sample of the text in some files.

    Args:
      files: records, or plain text.
      vocab_size: V.
      config: how to read records: `columns`, `max_depth`, `dialect`, and how many may be unusable.
      sample: bytes to train on, at most. The memory needed is about 15 times as much.
      held_out: the share of texts that is kept apart to measure the tokenizer.
      coverage: share of characters (not of different ones) that get pieces of their own.
      seed: of the sample.

    Raises:
      RecordError, ConfigError, OSError: a file cannot be read, has no text, or too little of it can be used.
      TokenizerError: this vocabulary cannot be made from this text.
    """
    kept, apart = Sample(sample, seed), Sample(MEASURED_BYTES, seed)
    texts = size = 0
    for text in tqdm(_all(files, config), unit="text", disable=not shows_progress()):
        if _draw(seed, "apart", texts) < held_out:
            apart.add(text)
        else:
            for sentence in sentences_of(text):
                kept.add(sentence)
        texts, size = texts + 1, size + len(text.encode())
    LOG.info("Training on %.1f MB of text.", kept.bytes / 2**20)
    model = train_pieces(kept.texts, vocab_size, character_coverage=coverage, **OWN)
    pieces = len(SentencePieceTokenizer(model).vocabulary)  # it loads, and loses no text
    return Made(model, pieces, texts, size, kept.bytes, measure(model, apart.texts))


class Sample:
    """The texts that were added, or of more than so many bytes a random share; the same for the same texts.

    When there are too many, those go that drew the higher half of the numbers, and so do half of those to come.
    """

    def __init__(self, bytes: int, seed: int):
        self._most, self._seed = bytes, seed
        self._share, self._count, self.bytes = 1.0, 0, 0
        self._kept: list[tuple[float, str]] = []

    def add(self, text: str) -> None:
        """Keeps a text, if it is drawn."""
        drawn = _draw(self._seed, "kept", self._count)
        self._count += 1
        if drawn >= self._share:
            return
        self._kept.append((drawn, text))
        self.bytes += len(text.encode())
        while self.bytes > self._most:
            self._share /= 2
            self._kept = [(drawn, text) for drawn, text in self._kept if drawn < self._share]
            self.bytes = sum(len(text.encode()) for _, text in self._kept)

    @property
    def texts(self) -> list[str]:
        """What was kept, in its order."""
        return [text for _, text in self._kept]


def _draw(seed: int, purpose: str, number: int) -> float:
    """A number from 0 to 1, always the same for the same arguments."""
    digest = hashlib.blake2b(f"{seed} {purpose} {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


def _all(files: Sequence[str], config: DataConfig) -> Iterator[str]:
    """The texts of all files: paragraphs of plain text, or prompts and answers of records."""
    for path in files:
        empty = True
        for text in _records(path, config) if is_records(path) else _paragraphs(path):
            empty = False
            yield text
        if empty:
            raise ConfigError(f"{path} has no text.")


def _records(path: str, config: DataConfig) -> Iterator[str]:
    """What is said in each record: in its last prompt, and in the answer to it. Raises ConfigError."""
    account = Account(path)
    reading: Any = {"columns": dict(config.columns), "max_depth": config.max_depth, "dialect": config.dialect}
    for each in read(path, turns="last", **reading):
        account.records += 1
        if isinstance(each, Problem):
            account.add(each)
            continue
        asked = [each.prompt] if isinstance(each.prompt, str) else [m["content"] for m in each.prompt]
        yield from (*asked, assemble(each.program))
    if account.unusable:
        account.check(config.max_unusable)
        LOG.warning("%s", account.report())


def _paragraphs(path: str) -> Iterator[str]:
    """Runs of lines between empty ones, which come with the run before them, of 1 MiB at most.

    Raises ConfigError if they are not UTF-8.
    """

    def read_line() -> str:
        try:
            return file.readline(LONGEST_LINE)
        except UnicodeDecodeError:
            raise ConfigError(
                f"{path} is not text in UTF-8. Save it as that; records are known by the ends of their files: "
                ".jsonl or .json, also .gz or .zst, and .parquet."
            ) from None

    with open(path, encoding="utf-8-sig", newline="") as file:
        lines: list[str] = []
        size = 0
        while line := read_line():
            lines.append(line)
            size += len(line)
            if not line.strip() or size >= LONGEST_LINE:
                yield "".join(lines)
                lines, size = [], 0
        if lines:
            yield "".join(lines)


def command() -> None:
    """Parses the command line and runs `main`."""
    flags.DEFINE_list(
        "text",
        [],
        "Files: records (.jsonl, .json, .gz, .zst, .parquet, hf:OWNER/NAME), or plain text in UTF-8.",
    )
    flags.DEFINE_integer(
        "vocab_size", None, "Pieces of the vocabulary, with 268 or so for bytes and control."
    )
    flags.DEFINE_string("to", None, "The file to write, FILE.model.")
    flags.DEFINE_float("sample_mb", 16.0, "Megabytes of text to train on, at most; a random sample if more.")
    flags.DEFINE_float("held_out", 0.05, "Share of the texts to measure the tokenizer on.", 0.0, 0.5)
    flags.DEFINE_float("coverage", 0.9995, "Share of characters with pieces of their own.", 0.5, 1.0)
    flags.DEFINE_integer("seed", 0, "Seed of the samples.")
    overrides, rest = split_overrides(sys.argv)
    run_main(functools.partial(main, values=flags.FLAGS, overrides=overrides), argv=rest)


if __name__ == "__main__":
    command()
