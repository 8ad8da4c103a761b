"""From `config.data` to documents.

almanac:base        facts as plain text, and plain instructions with plain answers
almanac:plain       instructions with plain answers
almanac:annotated   the same answers, annotated imperfectly
almanac:apar        the same answers, forked by APAR's rules; needs dialect=apar
FILE.jsonl          records with a prompt and an annotated response (see `records`)
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

from pasta_jax.arrays import ThreadedTokens
from pasta_jax.config import ConfigError, DataConfig
from pasta_jax.data import almanac
from pasta_jax.data.batches import Mixture, Shuffled, Stream, batches, held_out, steps_until
from pasta_jax.data.records import (
    Example,
    Problem,
    RecordError,
    digest,
    encode_prompt,
    read_records,
    report,
    write_invalid,
)
from pasta_jax.tokens.layout import LayoutError, layout
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
    problems: list[Problem] = []
    streams: list[Stream] = []
    held: list[ThreadedTokens] = []
    for number, (name, _) in enumerate(config.sources):
        own_seed = seed * 1000 + number
        if name.startswith("almanac:"):
            streams.append(_almanac(name.partition(":")[2], config, tokenizer, own_seed))
        elif name.endswith((".jsonl", ".json")):
            records = _records(name, config, tokenizer, problems)
            prompts = [example.asked for example in records.examples]
            trained, measured = held_out(prompts, config.held_out_share, own_seed)
            if not trained:
                raise ConfigError(
                    f"config.data.held_out leaves nothing of {name} ({len(records)} examples; those with the same "
                    "prompt stay together)."
                )
            held += [records[i] for i in measured]
            chosen = dataclasses.replace(records, examples=[records.examples[i] for i in trained])
            streams.append(Shuffled(chosen, own_seed))
        else:
            raise ConfigError(f"config.data.sources: {name!r} is neither almanac:NAME nor a .jsonl file.")
    if problems and invalid is not None:
        write_invalid(invalid, problems)
        LOG.warning("All invalid records are kept in %s.", os.fspath(invalid))
    if config.held_out_share and not held:
        raise ConfigError(
            "config.data.held_out is a share of the examples of .jsonl files, and the almanac generates its own. "
            "Name a file of examples instead."
        )
    held = held or held_out_file(config, tokenizer)
    if len(streams) == 1:
        return streams[0], held
    return Mixture(streams, [weight for _, weight in config.sources]), held


def check_held_out(config: DataConfig, field: str, *files: str) -> None:
    """Refuses a file to hold out that is among those of another field. Raises ConfigError."""
    held = config.held_out_file
    if held and os.path.realpath(held) in map(os.path.realpath, files):
        raise ConfigError(
            f"config.data.held_out={held} is trained on too: config.{field} names it. Name another file, or give "
            "a share, as 0.05."
        )


def held_out_file(config: DataConfig, tokenizer: Tokenizer) -> list[ThreadedTokens]:
    """The documents of the file that `config.held_out` names, if it names one. Raises ConfigError."""
    if not config.held_out_file:
        return []
    records = _records(config.held_out_file, config, tokenizer, [], field="held_out")
    return [records[i] for i in range(len(records))]


def contents(source: Stream) -> dict[str, dict[str, Any]]:
    """The number and a hash of the examples of each file that `source` reads, by the name of the file."""
    streams = source.streams if isinstance(source, Mixture) else [source]
    read = [stream.source for stream in streams if isinstance(stream, Shuffled)]
    return {each.path: digest(each.examples) for each in read if isinstance(each, Records)}


def steps_of_epochs(config: DataConfig, source: Stream, epochs: float) -> int:
    """The steps of a number of passes over the data, from the batches of the first pass.

    Raises:
      ConfigError: more than one source, or an endless one.
    """
    if not isinstance(source, Shuffled):
        raise ConfigError(
            "config.epochs counts passes over one .jsonl file; the almanac is endless, and a mixture has no "
            "common pass. Set --config.epochs=0 and --config.steps."
        )
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


@dataclasses.dataclass(frozen=True)
class Records:
    """The examples of a file, laid out on demand."""

    path: str
    examples: Sequence[Example]
    layout: Callable[[Example], ThreadedTokens]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> ThreadedTokens:
        return self.layout(self.examples[index])


def _records(
    path: str, config: DataConfig, tokenizer: Tokenizer, problems: list[Problem], field: str = "sources"
) -> Records:
    """The records of a file that can be read, laid out and packed. Adds the others to `problems`."""

    def document(example: Example) -> ThreadedTokens:
        try:
            prompt = encode_prompt(tokenizer, example.prompt)
        except ValueError as error:
            raise LayoutError(str(error)) from error
        return layout(tokenizer, prompt, example.program, config.positions, config.threads)

    try:
        examples, unusable = read_records(path, columns=dict(config.columns), max_depth=config.max_depth)
    except RecordError as error:
        raise ConfigError(f"config.data.{field}: {error}") from error
    total = len(examples) + len(unusable)
    usable = []
    for example in examples:
        try:
            if (length := len(document(example))) <= config.length:
                usable.append(example)
                continue
            fault = (
                f"{length} tokens, a row holds {config.length}. Set --config.data.length={length} or more."
            )
        except LayoutError as error:
            fault = str(error)
        unusable.append(Problem(path, example.line, None, fault, example.raw))
    problems += unusable
    if not usable:
        raise ConfigError(f"config.data.{field}: {report(unusable, total)}" if total else f"{path} is empty.")
    if unusable:
        LOG.warning("%s", report(sorted(unusable, key=lambda p: p.line), total))
    return Records(path, usable, document)
