"""From examples to documents that fit into a row, and the account of those that do not.

`config.data.too_long` says what becomes of a record with an answer that does not fit with its prompt: it is
dropped, or only that answer, or the answer is cut after its last whole sentence or block that fits. The end of an
answer that was cut is not learnt. A topic that is too long is shortened.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from pasta_jax.arrays import ThreadedTokens
from pasta_jax.config import ConfigError, DataConfig
from pasta_jax.data.layouts import Fault
from pasta_jax.data.reading import Entry
from pasta_jax.data.records import Example, Problem, Reader, encode_prompt, problem
from pasta_jax.lang.program import Program, Promise, Text
from pasta_jax.lang.sentences import SENTENCE_END
from pasta_jax.lang.topics import with_short_topics
from pasta_jax.tokens.layout import TOPIC_TOO_LONG, LayoutError, answer_ids, check_threads, layout_ids
from pasta_jax.tokens.tokenizer import LACKING, TextError, Tokenizer

LOG = logging.getLogger("pasta_jax")

SHOWN = 20
"""Faults that a report lists."""

TOO_LONG = "longer than a row"

WHOLE = -1
"""Instead of the number of a cut."""

_SENTENCE = re.compile(rf"{SENTENCE_END.pattern}|\u2026[\"'\u201d\u2019)\]*_]*(?=\s)|\S(?=\s*\n)")
"""The end of a sentence or of a line, before the white space that follows."""

_MARKER = re.compile(r"\s*(\d{1,3}[.)]|[A-Za-z][.)]|[^\w\s])")
"""What stands before a line of a list, and is no sentence."""


class Fit(NamedTuple):
    """An example that fits.

    Attributes:
      example: as it was read.
      cut: the number of the place where its answer ends, WHOLE if at its end.
      prompt, answer: ids (`tokens.layout.layout_ids`).
    """

    example: Example
    cut: int
    prompt: list[int]
    answer: list[int]


@dataclasses.dataclass(frozen=True)
class Fitter:
    """Turns examples into ids and documents, within the limits of a configuration."""

    config: DataConfig
    tokenizer: Tokenizer

    @functools.cached_property
    def reader(self) -> Reader:
        """Reads the records. Raises RecordError."""
        return Reader(
            dict(self.config.columns), self.config.max_depth, self.config.turns, self.config.dialect
        )

    def document(self, fit: Fit) -> ThreadedTokens:
        """The training document. [L] fields."""
        vocabulary, config = self.tokenizer.vocabulary, self.config
        return layout_ids(vocabulary, fit.prompt, fit.answer, config.positions, config.threads)

    def at(self, example: Example, cut: int) -> Fit:
        """An example whose cut is known. Raises Fault."""
        program = example.program
        if cut != WHOLE:
            program = up_to(program, places(program)[cut])
        return Fit(example, cut, self._prompt(example), self._answer(program, ended=cut == WHOLE))

    def fit(self, example: Example) -> Fit:
        """An example that fits into a row, its answer cut if need be and allowed. Raises Fault."""
        whole = self.at(example, WHOLE)
        room = self.config.length - len(whole.prompt)
        if len(whole.answer) <= room:
            return whole
        if self.config.too_long == "sentence":
            ends = places(example.program)
            first, beyond = 0, len(ends)  # places before `first` fit, those from `beyond` on do not
            best = None
            while first < beyond:
                middle = (first + beyond) // 2
                answer = self._answer(up_to(example.program, ends[middle]), ended=False)
                if len(answer) <= room:
                    best, first = Fit(example, middle, whole.prompt, answer), middle + 1
                else:
                    beyond = middle
            if best:
                return best
        length = len(whole.prompt) + len(whole.answer)
        raise Fault(
            TOO_LONG,
            f"{length} tokens, a row holds {self.config.length}. Set --config.data.length={length} or more"
            + (", or --config.data.too_long." if self.config.too_long == "drop" else "."),
        )

    def _prompt(self, example: Example) -> list[int]:
        try:
            return encode_prompt(self.tokenizer, example.prompt)
        except TextError as error:
            raise Fault(LACKING, str(error)) from error
        except ValueError as error:
            raise Fault("chat format", str(error)) from error

    def _answer(self, program: Program, *, ended: bool) -> list[int]:
        try:
            try:
                ids = answer_ids(self.tokenizer, program)
            except LayoutError as error:
                if error.reason != TOPIC_TOO_LONG:
                    raise
                ids = answer_ids(self.tokenizer, with_short_topics(self.tokenizer, program))
            check_threads(self.tokenizer.vocabulary, ids, self.config.threads)
        except LayoutError as error:
            raise Fault(error.reason, str(error)) from error
        except TextError as error:
            raise Fault(LACKING, str(error)) from error
        return ids if ended else ids[:-1]


def places(program: Program) -> list[tuple[int, int]]:
    """Where an answer may be cut: after each sentence of the main thread and each block.

    A place is the number of a node, and how much of its text goes before, all of it in a block.
    """
    found: list[tuple[int, int]] = []
    for i, node in enumerate(program.nodes):
        if isinstance(node, Promise):
            found.append((i, 0))
        elif isinstance(node, Text):
            ends = (match.end() for match in _SENTENCE.finditer(node.text))
            found += [(i, end) for end in ends if not _MARKER.fullmatch(_line_before(node.text, end))]
    return found


def _line_before(text: str, end: int) -> str:
    return text[text.rfind("\n", 0, end) + 1 : end]


def up_to(program: Program, place: tuple[int, int]) -> Program:
    r"""The program before one of its places.

    >>> program = Program((Text("One. Two!\n\n1. three\n2. four"),))
    >>> for place in places(program):
    ...     print(up_to(program, place).nodes)
    (Text(text='One.'),)
    (Text(text='One. Two!'),)
    (Text(text='One. Two!\n\n1. three'),)
    """
    i, end = place
    node = program.nodes[i]
    return Program((*program.nodes[:i], Text(node.text[:end]) if isinstance(node, Text) else node))


# ------------------------------------------------------------------------------------------------ the account


@dataclasses.dataclass
class Account:
    """What became of the records of a file.

    Attributes:
      path: of the file.
      records: how many there are.
      unusable: by reason, those of which nothing can be used.
      left_out: by reason, answers of other records that are left out.
      cut: answers that are cut.
      first: the first problems.
    """

    path: str
    records: int = 0
    unusable: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    left_out: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    cut: int = 0
    first: list[Problem] = dataclasses.field(default_factory=list)

    def add(self, problem: Problem) -> None:
        """Counts a record that cannot be used."""
        self.unusable[problem.reason] += 1
        if len(self.first) < SHOWN:
            self.first.append(problem)

    @property
    def total(self) -> str:
        """How many cannot be used, and why."""
        count = self.unusable.total()
        share = count / max(self.records, 1)
        return (
            f"{count:,} of {self.records:,} records cannot be used ({share:.1%}): {_counted(self.unusable)}"
        )

    def report(self) -> str:
        """The totals by reason, and the first problems; "" if everything is used as it is."""
        lines = []
        if self.unusable:
            lines += [self.total, *(f"  {problem}" for problem in self.first)]
            if (more := self.unusable.total() - len(self.first)) > 0:
                lines.append(f"  ... and {more:,} more")
        if self.left_out:
            lines.append(f"{self.path}: answers left out of records that are used: {_counted(self.left_out)}")
        if self.cut:
            lines.append(f"{self.path}: answers cut after a sentence or a block: {self.cut:,} {TOO_LONG}")
        return "\n".join(lines)

    def check(self, most: float, kept: str = "", *, may_cut: bool = False) -> None:
        """Refuses a file of which too little can be used.

        Args:
          most: the share of unusable records that is allowed.
          kept: where they are kept, for the message.
          may_cut: whether to propose that answers are cut.

        Raises:
          ConfigError: in one line.
        """
        if not self.records:
            raise ConfigError(f"{self.path} is empty.")
        count = self.unusable.total()
        if count <= most * self.records and count < self.records:
            return
        allow = ""
        if count < self.records:
            allow = f", or go on with the others by --config.data.max_unusable={_share(count / self.records)}"
        advice = "Fix them"
        if self.unusable.most_common(1)[0][0] == TOO_LONG:
            cut = f"{',' if allow else ' or'} set --config.data.too_long=sentence"
            advice = f"Raise --config.data.length{cut if may_cut else ''}"
        raise ConfigError(
            f"{self.path}: {self.total}. {advice}{allow}. "
            f"The first: {self.first[0].in_file}" + (f" All are in {kept}." if kept else "")
        )


def _share(share: float) -> str:
    """A share, rounded up to hundredths."""
    return f"{min(1.0, -(-share * 100 // 1) / 100):g}"


def _counted(reasons: collections.Counter[str]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())


def fitting(
    found: Iterable[Entry], fitter: Fitter, account: Account, keep: Callable[[Problem], object]
) -> Iterator[tuple[Entry, Sequence[Fit]]]:
    """The records that can be used, each with its answers that fit; the account is kept meanwhile.

    Args:
      found: the records (`reading.entries`).
      fitter: of the configuration.
      account: of the file.
      keep: takes the records that cannot be used.
    """
    for entry in found:
        account.records += 1
        try:
            fits, faults = _fits(fitter, entry)
        except Fault as fault:
            each = problem(account.path, entry, fault)
            account.add(each)
            keep(each)
            continue
        account.left_out.update(fault.reason for fault in faults)
        account.cut += sum(fit.cut != WHOLE for fit in fits)
        yield entry, fits


def _fits(fitter: Fitter, entry: Entry) -> tuple[list[Fit], list[Fault]]:
    """The answers of a record that fit, at least one, and the faults of those that do not. Raises Fault."""
    fits: list[Fit] = []
    faults: list[Fault] = []
    for example in fitter.reader.examples(entry):
        try:
            fits.append(fitter.fit(example))
        except Fault as fault:
            if fitter.config.too_long == "drop":
                raise
            faults.append(fault)
    if not fits:
        raise faults[0]
    return fits, faults
