r"""Annotates answers: text in, the same text with promises out.

    python -m pasta_jax.annotate --input=data.jsonl --output=annotated.jsonl --annotator=rule:structure \
        --tokenizer=tokenizer.model

    rule:structure    promises list items, sections and paragraphs where that pays; needs nothing else
    rule:apar         the forks of APAR's rules; train with --config.data.dialect=apar
    llm               a language model behind an endpoint inserts the tags, and judges each block
    self              candidates of --candidates, filtered by your model: --ckpt=WORKDIR (the independence audit)
    MODULE:FUNCTION   your own, with the signature of pasta_jax.annotate.protocol.Annotator

Every layout of records is read (docs/usage.md), and the same layout is written. The text of an answer is never
altered, which is checked, and no annotated answer is slower than without tags in theory. A run that was
interrupted goes on when the same command is given again. OUTPUT.report.json, .md and .png say what was made, and
what stayed as it was and why.

    python -m pasta_jax.annotate --audit --input=annotated.jsonl --output=FOLDER --ckpt=WORKDIR

Audits annotated answers instead: how many nats each block loses by not seeing its siblings, in FOLDER/audit.md,
.png and .jsonl. WORKDIR is a model trained on texts of this kind; it need not know tags.

    python -m pasta_jax.annotate --measure --input=annotated.jsonl --tokenizer=FILE [--output=measures.json]

Measures annotated answers instead: lists whose items have one marker, doubled items, repeated topics, errors of
promised lengths, loops. `evaluate` leaves a model's answers as annotated.jsonl, which it reads, too.

    python -m pasta_jax.annotate --plain --input=annotated.jsonl --output=plain.jsonl

Takes the tags out of annotated answers instead: what a sequential baseline learns, to be compared with a model that
learned the annotated ones.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any

from absl import flags

from pasta_jax.annotate import auditing
from pasta_jax.annotate.annotators import MAKERS, ROW, AnnotatorError, Options, dialect_of, make_annotator
from pasta_jax.annotate.protocol import Estimating
from pasta_jax.annotate.report import one_line, write_report
from pasta_jax.annotate.run import RunError, annotate_file, answers_of, journal_of
from pasta_jax.config import ConfigError, DataConfig
from pasta_jax.data.reading import HUB, RecordError
from pasta_jax.data.records import Reader, read
from pasta_jax.endpoint import flags as endpoint_flags
from pasta_jax.lang.validate import MAX_BRANCHES
from pasta_jax.tokens.tokenizer import TokenizerError
from pasta_jax.verbs import CHATS, begin_alone, columns_of, refuse, run_main

RULE_FLAGS = ("marker", "min_block", "max_branches", "length", "min_speedup", "keep_plain")


def main(argv: Sequence[str]) -> None:
    """Runs the command line. A mistake ends in one line and status 2."""
    values = flags.FLAGS
    if values.audit and not (len(argv) == 1 and values.input and values.output and values.ckpt):
        refuse(
            "Name what to audit, where to, and a model: --input=annotated.jsonl --output=FOLDER --ckpt=WORKDIR."
        )
    if values.measure and (len(argv) > 1 or not values.input or values.audit):
        refuse("Name what to measure: --measure --input=annotated.jsonl --tokenizer=FILE.")
    if values.plain and (values.audit or values.measure):
        refuse("--plain writes answers without their tags. Leave --audit and --measure out.")
    makes = not (values.audit or values.measure)
    if len(argv) > 1 or not values.input or not (values.output or values.measure):
        refuse("Name both files: --input=data.jsonl --output=annotated.jsonl.")
    if makes and not values.output.endswith(".jsonl"):
        refuse(f"--output={values.output} must end in .jsonl: one record a line is written.")
    if not (values.audit or values.plain or values.tokenizer):
        refuse("Name the tokenizer of the model to train: --tokenizer=FILE, a folder, or almanac.")
    begin_alone()
    try:
        modes = {"audit": audit, "measure": measure, "plain": plain}
        print(next((modes[name] for name in modes if values[name].value), annotate)(values))
    except (AnnotatorError, RunError, ConfigError, RecordError, TokenizerError, ValueError, OSError) as error:
        refuse(" ".join(str(error).split()))


def annotate(values: flags.FlagValues) -> str:
    """Annotates what the flags name, writes the report, and returns its most important line."""
    from pasta_jax.data.sources import make_tokenizer

    dialect = dialect_of(values.annotator)
    config = data_config(values)
    tokenizer = make_tokenizer(config).with_dialect(dialect)
    options = Options(
        tokenizer,
        folder=f"{values.output}.run",
        flags=values.flag_values_dict(),
        marker=values.marker,
        min_block=values.min_block,
        max_branches=values.max_branches,
        length=values.length,
        min_speedup=values.min_speedup,
    )
    about = {
        "contents": _digest(values.input),
        "tokenizer": hashlib.sha256(tokenizer.to_bytes()).hexdigest(),
        "columns": dict(config.columns),
        **options_of(values),
    }
    reader = Reader(dict(config.columns), turns=values.turns, dialect=dialect)
    annotator = make_annotator(values.annotator, options)
    if values.dry_run is not None:
        if not isinstance(annotator, Estimating):
            what = f"--annotator={values.annotator}"
            what += f" --candidates={values.candidates}" * (values.annotator == "self")
            raise AnnotatorError(f"{what} sends no requests, so --dry_run does not apply.")
        return annotator.estimate(
            answers_of(values.input, reader, tokenizer, values.length), shown=values.dry_run
        )
    annotate_file(
        values.input,
        values.output,
        annotator,
        tokenizer,
        reader,
        about,
        max_branches=values.max_branches,
        length=values.length,
        min_speedup=values.min_speedup,
        keep_plain=values.keep_plain,
    )
    figures = write_report(values.output, journal_of(values.output), about)
    result = [one_line(figures), f"{values.output}.report.md has the shapes and the reasons."]
    if figures["unusable"]:
        result.append(f"{values.output}.invalid.jsonl has the records that cannot be read.")
    if dialect != "pasta":
        result.append(f"Train on it with --config.data.dialect={dialect}.")
    return "\n".join(result)


def data_config(values: flags.FlagValues) -> DataConfig:
    """The tokenizer and the columns that the flags name."""
    return DataConfig(
        tokenizer=values.tokenizer,
        extend_tokenizer=values.extend_tokenizer,
        chat=values.chat,
        columns=tuple(columns_of(values.columns).items()),
    )


def options_of(values: flags.FlagValues) -> dict[str, Any]:
    """What an annotated answer depends on besides the answer and the tokenizer, as JSON can hold it."""
    names = ["input", "annotator", "turns", "model", *RULE_FLAGS]
    if "llm" in (values.annotator, values.annotator == "self" and values.candidates):
        names += ["base_url", "temperature"]
    found = {name: values[name].value for name in names}
    return found | (auditing.model_of(values) if values.annotator == "self" else {})


def audit(values: flags.FlagValues) -> str:
    """Audits what the flags name, writes the report, and returns its most important lines."""
    about = {"input": values.input, "contents": _digest(values.input)}
    return auditing.audit(values, columns_of(values.columns), about)


def measure(values: flags.FlagValues) -> str:
    """The measures of the answers that the flags name, as a table."""
    from pasta_jax.annotate.measuring import forms_of, report
    from pasta_jax.data.sources import make_tokenizer

    config = data_config(values)
    tokenizer = make_tokenizer(config)
    reading: dict[str, Any] = {
        "turns": values.turns,
        "max_depth": values.max_depth,
        "dialect": values.dialect,
    }
    examples = read(values.input, columns=dict(config.columns), **reading)
    forms, problems = forms_of(examples, lambda text: len(tokenizer.encode(text)))
    if not forms:
        raise RecordError(f"No answer of {values.input} can be read.")
    return report(forms, problems, values.output or "")


def plain(values: flags.FlagValues) -> str:
    """Writes the answers that the flags name without their tags, and says so."""
    from pasta_jax.annotate.plain import write_plain

    options: dict[str, Any] = {"max_depth": values.max_depth, "dialect": values.dialect}
    reader = Reader(columns_of(values.columns), **options)
    return write_plain(values.input, values.output, reader)


def _digest(path: str) -> str:
    """Of a file's bytes; "" of what is none."""
    if path.startswith(HUB):
        return ""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RecordError(f"Cannot read {os.fspath(path)}: {error.strerror}.") from error


def command() -> None:
    """Parses the command line and runs `main`."""
    text: Any = flags.DEFINE_string
    text("input", None, "The records: .jsonl, .json, .gz, .zst, .parquet or hf:OWNER/NAME.")
    text("output", None, "The file to write, FILE.jsonl.")
    text("annotator", "rule:structure", f"One of {', '.join(MAKERS)}, or MODULE:FUNCTION.")
    text("tokenizer", None, "Of the model to train: a file, a folder, or almanac. It counts all lengths.")
    flags.DEFINE_bool("extend_tokenizer", False, "Give the tags new ids if the tokenizer has none to spare.")
    flags.DEFINE_enum("chat", "auto", CHATS, "Format of prompts.")
    flags.DEFINE_list("columns", [], "The file's own names, as in prompt=question,response=answer.")
    flags.DEFINE_enum("turns", "all", ["all", "last"], "Which answers of a conversation to annotate.")
    flags.DEFINE_enum(
        "marker", "main", ["main", "block"], "Rules: where marks, numbers and bold heads of items go."
    )
    flags.DEFINE_integer("min_block", 16, "Rules: shorter blocks stay in main, in tokens.", lower_bound=1)
    flags.DEFINE_integer("max_branches", MAX_BRANCHES, "The most promises of an answer.", lower_bound=1)
    flags.DEFINE_integer(
        "length",
        ROW,
        "Answers that are longer with their prompt stay plain, in tokens: data.length in training; 0: any.",
        lower_bound=0,
    )
    flags.DEFINE_float(
        "min_speedup", 1.1, "Answers with a lower theoretical speedup stay plain.", lower_bound=1.0
    )
    flags.DEFINE_float(
        "keep_plain",
        1.0,
        "The share of the records without a promise to write.",
        lower_bound=0.0,
        upper_bound=1.0,
    )
    endpoint_flags.define_endpoint()
    flags.adopt_module_key_flags(endpoint_flags)  # so that --help shows them
    flags.DEFINE_bool("measure", False, "Measure the annotated answers of --input; --output is a .json then.")
    flags.DEFINE_bool("plain", False, "Write the annotated answers of --input without their tags.")
    auditing.define()
    flags.adopt_module_key_flags(auditing)
    run_main(main)


if __name__ == "__main__":
    command()
