r"""Annotated answers in files, one record per line.

    {"prompt": "Name two rivers.", "response": "<promise topic=\"rivers\" tokens=1 /><async>...</async>"}

`layouts` has the other layouts. A record of several answers gives an example for each that is learnt; its prompt
has the earlier answers without their tags, which is what decoding sees.

An invalid record does not stop the others and is not lost: it is reported with its position and a fix, and
training keeps it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from pasta_jax.config import Turns
from pasta_jax.data.layouts import COLUMNS, Fault, conversation
from pasta_jax.data.reading import Entry, RecordError, entries
from pasta_jax.lang import tags
from pasta_jax.lang.assemble import assemble
from pasta_jax.lang.parse import ParseError, parse
from pasta_jax.lang.program import Program
from pasta_jax.lang.render import render
from pasta_jax.messages import shown
from pasta_jax.tokens.tokenizer import Tokenizer

Message: TypeAlias = Mapping[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}"""

Prompt: TypeAlias = str | tuple[Message, ...]
"""What the model is asked: a text, or a conversation that ends with the user's message."""


@dataclasses.dataclass(frozen=True)
class Example:
    """A valid answer that is to be learnt.

    Attributes:
      prompt: what the model is asked. A single message of the user is a text.
      program: the annotated answer.
      line: of the record in the file, from 1; in files without lines, the number of the record.
      raw: the record itself.
      turn: the number of the answer among those of the record, from 0.
    """

    prompt: Prompt
    program: Program
    line: int
    raw: str
    turn: int = 0

    @property
    def asked(self) -> str:
        """What the user said first. Examples with the same are never split between training and held-out ones."""
        if isinstance(self.prompt, str):
            return self.prompt
        return next(message["content"] for message in self.prompt if message["role"] == "user")


@dataclasses.dataclass(frozen=True)
class Problem:
    """An invalid record: where it is, what is wrong, and what to do.

    Attributes:
      file: its name.
      line: from 1, or the number of the record.
      column: from 1; None if the fault is not at one position.
      message: what is wrong, and what to do.
      raw: the record itself; invalid UTF-8 as lone surrogates, which keep the bytes.
      reason: the kind of fault, one of few.
      unit: "line", or "record" in a file without lines.
    """

    file: str
    line: int
    column: int | None
    message: str
    raw: str
    reason: str = ""
    unit: str = "line"

    @property
    def in_file(self) -> str:
        """The problem without the name of the file."""
        column = f", column {self.column}" if self.column else ""
        return f"{self.unit} {self.line}{column}: {self.message}"

    def __str__(self) -> str:
        return f"{self.file} {self.in_file}"


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Ids of a prompt, up to where the answer starts. Raises ValueError if the chat format cannot write it."""
    return tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else tokenizer.encode_chat(prompt)


def prompt_text(prompt: Prompt) -> str:
    """A prompt as a person or a judge reads it.

    >>> print(prompt_text(({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"})))
    system: Be brief.
    <BLANKLINE>
    user: Hi
    """
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


@dataclasses.dataclass(frozen=True)
class Reader:
    """How records are read.

    Attributes:
      columns: a file's own names for "prompt", "response", "system" or "messages" (`layouts.conversation`).
      max_depth: how deep promises may nest.
      turns: which answers of a conversation are learnt.
      dialect: of the tags.
    """

    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    max_depth: int = 1
    turns: Turns = "all"
    dialect: tags.Dialect = "pasta"

    def __post_init__(self) -> None:
        if unknown := set(self.columns) - set(COLUMNS):
            raise RecordError(
                f"columns maps {', '.join(map(shown, sorted(unknown)))}; only {', '.join(COLUMNS)} can be mapped."
            )

    def examples(self, entry: Entry) -> list[Example]:
        """An example for each answer of a record that is learnt, at least one. Raises layouts.Fault."""
        raw, record = raw_text(entry), _parsed(entry.data)
        examples: list[Example] = []
        said: list[Message] = []
        number = 0
        for turn in conversation(record, self.columns).turns:
            content = turn.text
            if turn.role == "assistant":
                try:
                    program = parse(turn.text, max_depth=self.max_depth, dialect=self.dialect)
                except ParseError as error:
                    raise Fault("tags", f'in "{turn.key}", {error}') from None
                if turn.is_learnt:
                    prompt: Prompt = said[0]["content"] if len(said) == 1 else tuple(said)
                    examples.append(Example(prompt, program, entry.number, raw, number))
                content, number = assemble(program), number + 1
            said.append({"role": turn.role, "content": content})
        return examples[-1:] if self.turns == "last" else examples


def raw_text(entry: Entry) -> str:
    """A record as it is written; bytes that are not UTF-8 as lone surrogates."""
    return entry.data.decode("utf-8", errors="surrogateescape")


def problem(path: str, entry: Entry, fault: Fault) -> Problem:
    """A fault with its place."""
    return Problem(
        path, entry.number, fault.column, fault.message, raw_text(entry), fault.reason, unit=entry.unit
    )


def read(
    path: str | os.PathLike[str],
    *,
    columns: Mapping[str, str] | None = None,
    max_depth: int = 1,
    turns: Turns = "all",
    dialect: tags.Dialect = "pasta",
) -> Iterator[Example | Problem]:
    """The examples and the faults of a file or data set, one after another; a record is held at a time.

    Args:
      path: of the file (`reading`).
      columns, max_depth, turns, dialect: as in `Reader`.

    Raises:
      RecordError: the file cannot be read, or columns that do not exist are mapped.
    """
    return _read(Reader(dict(columns or {}), max_depth, turns, dialect), entries(path), os.fspath(path))


def _read(reader: Reader, found: Iterable[Entry], path: str) -> Iterator[Example | Problem]:
    for entry in found:
        try:
            yield from reader.examples(entry)
        except Fault as fault:
            yield problem(path, entry, fault)


def read_records(
    path: str | os.PathLike[str],
    *,
    columns: Mapping[str, str] | None = None,
    max_depth: int = 1,
    turns: Turns = "all",
) -> tuple[list[Example], list[Problem]]:
    """The examples and the faults of a file, as `read`, collected."""
    examples: list[Example] = []
    problems: list[Problem] = []
    for each in read(path, columns=columns, max_depth=max_depth, turns=turns):
        if isinstance(each, Example):
            examples.append(each)
        else:
            problems.append(each)
    return examples, problems


def _parsed(line: bytes) -> Any:
    """What a line of JSON holds. Raises Fault."""
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        column = len(line[: error.start].decode("utf-8")) + 1
        byte = line[error.start]
        raise Fault("not UTF-8", f"byte 0x{byte:02x} is not UTF-8. Save the file as UTF-8.", column) from None
    except json.JSONDecodeError as error:
        message = f"not JSON: {error.msg}. Write one object on each line."
        raise Fault("not JSON", message, error.colno) from None
    except ValueError:  # Python's limit of 4300 digits
        message = "a number of thousands of digits. Write it as a text, or leave it out."
        raise Fault("a long number", message) from None
    except RecursionError:
        message = "not a record: nested too deeply. Write one flat object on each line."
        raise Fault("nested too deeply", message) from None


def digest(examples: Iterable[Example]) -> dict[str, Any]:
    """The number of examples, and a hash of their texts in their order, however the file spells them."""
    texts, count = hashlib.sha256(), 0
    for example in examples:
        texts.update(json.dumps([example.prompt, render(example.program)]).encode())
        count += 1
    return {"examples": count, "sha256": texts.hexdigest()}


def invalid_line(problem: Problem) -> str:
    """An invalid record with its position and what is wrong with it, as a line of JSON.

    ASCII escapes preserve the surrogates of `raw`, and so the original bytes.
    """
    return json.dumps(dataclasses.asdict(problem), ensure_ascii=True) + "\n"
