"""A run of the command: a file of records in, the same records with annotated answers out.

While it runs it keeps two files to append to in OUTPUT.run: `records.jsonl`, the finished records in the order in
which they were finished, and `journal.jsonl`, with a line for each record that says what became of it. A run that
was killed goes on after the last line that both have. At the end OUTPUT is written at once, in the input's order.
"""

from __future__ import annotations

import array
import collections
import contextlib
import dataclasses
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pasta_jax.annotate.progress import Progress
from pasta_jax.annotate.protocol import (
    Annotator,
    Item,
    ManyAnnotator,
    Result,
    annotate_all,
)
from pasta_jax.data.layouts import Fault, replaced
from pasta_jax.data.reading import Entry, entries
from pasta_jax.data.records import Example, Reader, encode_prompt, problem, raw_text
from pasta_jax.endpoint.post import EndpointError
from pasta_jax.files import Lines, Stamp, locked, replacing, stream_jsonl
from pasta_jax.lang.assemble import assemble, text_of
from pasta_jax.lang.program import Node, Program, Promise, Sync, Text, length_in_tens
from pasta_jax.lang.render import render
from pasta_jax.lang.topics import with_short_topics
from pasta_jax.lang.validate import validate
from pasta_jax.tokens.cost import critical_path, threads_of_program
from pasta_jax.tokens.tokenizer import LACKING, TextError, Tokenizer

LOG = logging.getLogger("pasta_jax")

HAS_TAGS = "it has tags already"
SLOWER = "slower than without tags"
SAVES_LITTLE = "saves too little time"
TOO_LONG = "longer than a row with its tags"
TOO_LONG_PLAIN = "longer than a row without tags"


class RunError(ValueError):
    """A run cannot start; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of an answer.

    Attributes:
      turn: its number among the answers of the record.
      reason: why it stays as it was; "" if it is annotated.
      notes: how many blocks stayed in main, by the reason.
      blocks: tokens of each block, in document order.
      depth: how deep promises nest.
      syncs: how many there are.
      tokens, steps: tokens of the plain answer, and the critical path of the annotated one.
    """

    turn: int
    reason: str = ""
    notes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    blocks: Sequence[int] = ()
    depth: int = 0
    syncs: int = 0
    tokens: int = 0
    steps: int = 0

    @property
    def speedup(self) -> float:
        """Theoretical; 1 of an answer that is not annotated."""
        return 1.0 if self.reason else self.tokens / max(1, self.steps)


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of the journal: a record, and what became of its answers or what makes it unusable."""

    number: int
    outcomes: Sequence[Outcome] = ()
    problem: Mapping[str, Any] | None = None


def annotate_file(
    path: str,
    output: str,
    annotator: Annotator | ManyAnnotator,
    tokenizer: Tokenizer,
    reader: Reader,
    about: Mapping[str, Any],
    *,
    max_branches: int,
    length: int = 0,
    min_speedup: float = 1.0,
    keep_plain: float = 1.0,
) -> None:
    """Annotates a file, or what an earlier run has left of it; `journal_of` says what became of each record.

    Args:
      path: of the records.
      output: a .jsonl file that is written at the end. OUTPUT.invalid.jsonl gets records that cannot be read.
      annotator: of the answers.
      tokenizer: of the model, in the dialect of the annotator.
      reader: how records are read.
      about: what the output is made from, as JSON can hold it; a run goes on only with the same.
      max_branches: the most promises of an answer.
      length: an answer stays plain that is longer with its tags and its prompt, in tokens; 0 for any number.
      min_speedup: an answer whose theoretical speedup is lower stays plain.
      keep_plain: the share of the records without a promise that is written, evenly over the file.

    Raises:
      RunError: `output` is of another run, not of this command, or the input; or no record can be used.
      RecordError: the file cannot be read.
      EndpointError: the annotator asks an endpoint, which does not answer any more; what is done is kept.
      InUse: another process works on the same output.
    """
    check_output(path, output)
    folder, journal = f"{output}.run", _journal(output)
    records = os.path.join(folder, "records.jsonl")
    with locked(folder):
        stamp = Stamp(os.path.join(folder, "about.json"))
        done = _begun(output, stamp, about, records, journal)
        if os.path.exists(output):
            LOG.info("%s is complete.", output)
            return
        if len(done):
            LOG.info("%d records were annotated before.", len(done))
        check = _Check(tokenizer, reader.max_depth, max_branches, length, min_speedup)
        one_at_a_time = threading.Lock()  # an annotator may take items in a thread of its own
        progress = Progress(len(done), _total(path), annotator)
        try:
            with Lines(records) as to_records, Lines(journal) as to_journal, progress:

                def keep(line: Line, raw: str) -> None:
                    with one_at_a_time:
                        if line.problem is None:
                            to_records.write(raw)
                        # ASCII: bytes that are no text
                        to_journal.write(json.dumps(dataclasses.asdict(line)) + "\n")
                        progress.add(any(not outcome.reason for outcome in line.outcomes))

                _work(path, annotator, reader, check, done, keep)
        except EndpointError as error:
            kept = f"{progress.done} are done and kept; run the same command again to go on."
            raise EndpointError(f"{error} {kept}") from None
        _finish(path, output, journal, records, keep_plain)


def check_output(path: str, output: str) -> None:
    """Raises RunError for an output that is the input."""
    if os.path.realpath(output) == os.path.realpath(path):
        raise RunError(f"--output={output} is --input itself. Give another --output.")


def journal_of(output: str) -> Iterator[Line]:
    """What became of each record, in the order in which they were finished."""
    return stream_jsonl(_journal(output), _line_of)


def _journal(output: str) -> str:
    return os.path.join(f"{output}.run", "journal.jsonl")


# ------------------------------------------------------------------------------------------------ the work


@dataclasses.dataclass
class _Record:
    """A record whose answers are being annotated."""

    entry: Entry
    waiting: dict[int, Example]
    outcomes: list[Outcome] = dataclasses.field(default_factory=list)
    texts: dict[int, str] = dataclasses.field(default_factory=dict)

    def finished(self, columns: Mapping[str, str]) -> tuple[Line, str]:
        """Its line of the journal, and the record with its annotated answers as a line."""
        outcomes = tuple(sorted(self.outcomes, key=lambda outcome: outcome.turn))
        raw = raw_text(self.entry).strip()
        if self.texts or "\n" in raw:
            record = json.loads(raw)
            for turn, text in self.texts.items():
                record = replaced(record, turn, text, columns)
            raw = as_json(record)
        return Line(self.entry.number, outcomes), raw + "\n"


def answers_of(path: str, reader: Reader, tokenizer: Tokenizer, length: int = 0) -> Iterator[Item]:
    """The answers that a run gives to its annotator."""
    for entry in entries(path):
        with contextlib.suppress(Fault):
            for example in reader.examples(entry):
                if not _left(example, tokenizer, length):
                    yield Item(f"{entry.number}:{example.turn}", example.prompt, assemble(example.program))


def _left(example: Example, tokenizer: Tokenizer, length: int) -> str:
    """Why no annotator is asked about an answer, which stays as it is; or ""."""
    if not all(isinstance(node, Text) for node in example.program.nodes):
        return HAS_TAGS
    try:
        tokens = len(tokenizer.encode(assemble(example.program)))
    except TextError:
        return LACKING
    if length:
        with contextlib.suppress(ValueError):  # a prompt that the chat format lacks: `_Check` says so
            if length < tokens + len(encode_prompt(tokenizer, example.prompt)):
                return TOO_LONG_PLAIN
    return ""


def _work(
    path: str,
    annotator: Annotator | ManyAnnotator,
    reader: Reader,
    check: _Check,
    done: _Numbers,
    keep: Callable[[Line, str], None],
) -> None:
    """Keeps a line for each record that is not done yet, and the record as text, as soon as it is finished."""
    open_records: dict[int, _Record] = {}

    def items() -> Iterator[Item]:
        for entry in entries(path):
            if entry.number in done:
                continue
            try:
                examples = reader.examples(entry)
            except Fault as fault:
                keep(Line(entry.number, problem=dataclasses.asdict(problem(path, entry, fault))), "")
                continue
            record = _Record(entry, {example.turn: example for example in examples})
            for example in examples:
                if reason := _left(example, check.tokenizer, check.length):
                    del record.waiting[example.turn]
                    record.outcomes.append(Outcome(example.turn, reason))
            if not record.waiting:
                keep(*record.finished(reader.columns))
                continue
            open_records[entry.number] = record
            for turn, example in [*record.waiting.items()]:
                yield Item(f"{entry.number}:{turn}", example.prompt, assemble(example.program))

    for result in annotate_all(annotator, items()):
        number, turn = map(int, result.key.split(":"))
        record = open_records[number]
        outcome, text = check.outcome(record.waiting.pop(turn), result)
        record.outcomes.append(outcome)
        if not outcome.reason:
            record.texts[turn] = text
        if not record.waiting:
            keep(*open_records.pop(number).finished(reader.columns))


@dataclasses.dataclass(frozen=True)
class _Check:
    """Looks at what an annotator returns: the one border that all of them pass."""

    tokenizer: Tokenizer
    max_depth: int
    max_branches: int
    length: int
    min_speedup: float

    def outcome(self, example: Example, result: Result) -> tuple[Outcome, str]:
        """What becomes of an answer, and its annotated text."""
        turn, answer = example.turn, assemble(example.program)
        if result.annotated is None:
            return Outcome(turn, result.declined), ""
        notes = dict(collections.Counter(result.annotated.notes).most_common())
        tokens = len(self.tokenizer.encode(answer))
        program = with_short_topics(self.tokenizer, measured(self.tokenizer, result.annotated.program))
        promises = [*program.promises()]
        text, steps = "", 0
        reason = "" if promises else next(iter(notes), "no structure")
        if not reason:
            try:
                text = render(program)
                threads = threads_of_program(self.tokenizer, program)
                steps = critical_path(threads, self.tokenizer.vocabulary)
                size = sum(map(len, threads.tokens)) + len(encode_prompt(self.tokenizer, example.prompt))
                reason = self._doubt(text, program) or self._limit(tokens, steps, size)
            except (
                ValueError
            ) as error:  # a promise that cannot be written, a prompt that the chat format lacks
                reason = str(error)
        if reason:
            return Outcome(turn, reason, notes, tokens=tokens), ""
        blocks = tuple(len(self.tokenizer.encode(text_of(promise.block))) for promise in promises)
        depth, syncs = _depth_and_syncs(program)
        return Outcome(turn, "", notes, blocks, depth, syncs, tokens, steps), text

    def _limit(self, tokens: int, steps: int, size: int) -> str:
        """Which limit an answer exceeds, or ""."""
        if steps > tokens:
            return SLOWER
        if tokens < self.min_speedup * steps:
            return SAVES_LITTLE
        return TOO_LONG if 0 < self.length < size else ""

    def _doubt(self, text: str, program: Program) -> str:
        """What the validator finds first, or ""."""
        if next(program.promises()).is_bare:
            return ""
        limits: dict[str, Any] = dict(max_depth=self.max_depth, max_branches=self.max_branches)
        found = validate(text, **limits, tokenizer=self.tokenizer)
        return f"validator: {found[0].problem}" if found else ""


def measured(tokenizer: Tokenizer, program: Program) -> Program:
    """The program with the length of every block counted by the tokenizer, whatever its promise says."""

    def count(node: Node) -> Node:
        if not isinstance(node, Promise) or node.is_bare:
            return node
        tens = length_in_tens(len(tokenizer.encode(text_of(node.block))))
        return dataclasses.replace(node, tokens=tens, block=tuple(map(count, node.block)))

    return Program(tuple(map(count, program.nodes)))


def _depth_and_syncs(program: Program) -> tuple[int, int]:
    depth, syncs = 0, 0
    todo = [(node, 1) for node in program.nodes]
    while todo:
        node, level = todo.pop()
        if isinstance(node, Promise):
            depth = max(depth, level)
            todo += [(inner, level + 1) for inner in node.block]
        syncs += isinstance(node, Sync)
    return depth, syncs


def as_json(record: Mapping[str, Any]) -> str:
    """A record on one line; in ASCII if it holds half a character somewhere, which UTF-8 cannot write."""
    try:
        return json.dumps(record, ensure_ascii=False).encode().decode()
    except UnicodeEncodeError:
        return json.dumps(record)


# ----------------------------------------------------------------------------------------- beginning and end


def _begun(output: str, stamp: Stamp, about: Mapping[str, Any], records: str, journal: str) -> _Numbers:
    """What an earlier run with the same `about` has done; both files are cut to what they have in common."""
    changed = stamp.check(about)
    if changed and (os.path.exists(output) or os.path.exists(journal)):
        if not os.path.exists(stamp.path):
            raise RunError(f"{output} exists, and is not of this command. Give another --output.")
        why = "; ".join(map(str, changed[:3]))
        raise RunError(
            f"{output} is of another run: {why}. Remove it and {output}.run, or give another --output."
        )
    stamp.write(about)
    done = _Numbers()
    if os.path.exists(output):
        return done
    whole, kept = _whole_lines(records), 0
    for line in stream_jsonl(journal, _line_of):
        if line.problem is None:
            if kept == whole:
                break
            kept += 1
        done.add(line.number)
    _cut(records, kept)
    _cut(journal, len(done))
    return done


class _Numbers:
    """Numbers of records, a byte each: there may be millions."""

    def __init__(self) -> None:
        self._bytes, self._count = bytearray(), 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, number: int) -> bool:
        return number < len(self._bytes) and bool(self._bytes[number])

    def add(self, number: int) -> None:
        self._bytes.extend(bytes(max(0, number + 1 - len(self._bytes))))
        self._bytes[number] = 1
        self._count += 1


def _finish(path: str, output: str, journal: str, records: str, keep_plain: float) -> None:
    """Writes the output in the order of the input, and removes the records as they were finished.

    Where no record can be used it raises RunError, and the command may be given again with other options.
    """
    numbers, invalid = array.array("q"), array.array("q")
    usable, plain = array.array("b"), array.array("b")
    for line in stream_jsonl(journal, _line_of):
        usable.append(line.problem is None)
        (numbers if usable[-1] else invalid).append(line.number)
        if usable[-1]:
            plain.append(all(outcome.reason for outcome in line.outcomes))
    if not numbers:
        first = next(stream_jsonl(journal, _line_of), Line(0)).problem
        os.remove(journal)
        if first is None:
            raise RunError(f"{path} has no records.")
        where = f"{first['unit']} {first['line']}"
        raise RunError(
            f"{path}: none of {len(invalid):,} records can be used. The first: {where}: {first['message']}"
        )
    if invalid:
        with replacing(f"{output}.invalid.jsonl") as file:
            for raw in _in_order(journal, invalid, np.flatnonzero(~np.array(usable, bool))):
                file.write(json.dumps(json.loads(raw)["problem"], ensure_ascii=True) + "\n")
    with replacing(output, "wb") as to:
        kept = _kept(np.array(numbers, np.int64), np.array(plain, bool), keep_plain)
        to.writelines(_in_order(records, np.array(numbers)[kept], kept))
    os.remove(records)


def _kept(numbers: np.ndarray, is_plain: np.ndarray, share: float) -> np.ndarray:
    """Indices of the records to write: all that have promises, and a share of the others.

    >>> _kept(np.array([3, 1, 2, 4]), np.array([True, True, False, True]), 2 / 3).tolist()
    [2, 0, 3]
    """
    order = np.argsort(numbers)
    plain = order[is_plain[order]]
    left = np.floor((np.arange(len(plain)) + 1) * share + 1e-9)  # how many are written up to each of them
    return np.concatenate([order[~is_plain[order]], plain[np.diff(left, prepend=0.0) > 0]])


def _in_order(path: str, numbers: Sequence[int], lines: np.ndarray) -> Iterator[bytes]:
    """Some lines of a file, by index, in the order of their numbers."""
    with open(path, "rb") as file:
        sizes = np.fromiter(map(len, file), np.int64)
        starts = np.cumsum(sizes) - sizes
        for start in starts[lines[np.argsort(np.array(numbers, np.int64))]]:
            file.seek(start)
            yield file.readline()


def _line_of(fields: dict[str, Any]) -> Line:
    outcomes = tuple(Outcome(**each | {"blocks": tuple(each["blocks"])}) for each in fields["outcomes"])
    return Line(fields["number"], outcomes, fields["problem"])


def _whole_lines(path: str) -> int:
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        return sum(line.endswith(b"\n") for line in file)
    return 0


def _cut(path: str, lines: int) -> None:
    """Leaves this many lines of a file."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb+") as file:
        for _ in range(lines):
            file.readline()
        file.truncate(file.tell())


def _total(path: str) -> int | None:
    """How many records a file has, if that is quickly told: at most as many as it has lines."""
    if not path.endswith(".jsonl"):
        return None
    with open(path, "rb") as file:
        return sum(1 for line in file if line.strip())
