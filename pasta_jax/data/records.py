r"""Annotated answers in JSONL files, one record per line.

    {"prompt": "Name two rivers.", "response": "<promise topic=\"rivers\" tokens=1 /><async>...</async>"}

An invalid line does not stop the others and is not lost: it is reported with its position and a fix, and
`write_invalid` keeps it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from pasta_jax.files import replacing
from pasta_jax.lang.parse import ParseError, parse
from pasta_jax.lang.program import Program
from pasta_jax.lang.render import render
from pasta_jax.messages import name_shown, shown
from pasta_jax.tokens.tokenizer import TextError, check_text

KEYS = ("prompt", "response")
SHOWN = 20


class RecordError(ValueError):
    """A file cannot be used; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Example:
    """A valid record."""

    prompt: str
    program: Program
    line: int  # in the file, from 1
    raw: str  # the line itself


@dataclasses.dataclass(frozen=True)
class Problem:
    """An invalid line: where it is, what is wrong, and what to do."""

    file: str
    line: int  # from 1
    column: int | None  # from 1; None if the fault is not at one position
    message: str
    raw: str  # the line itself; invalid UTF-8 as lone surrogates, which keep the bytes

    def __str__(self) -> str:
        column = f", column {self.column}" if self.column else ""
        return f"{self.file} line {self.line}{column}: {self.message}"


class _Fault(Exception):
    """What is wrong with a line."""

    def __init__(self, column: int | None, message: str):
        super().__init__(column, message)
        self.column, self.message = column, message


def read_records(
    path: str | os.PathLike[str], *, columns: Mapping[str, str] | None = None, max_depth: int = 1
) -> tuple[list[Example], list[Problem]]:
    """The valid and the invalid records of a JSONL file.

    Args:
      path: of the file.
      columns: the file's own names for "prompt" and "response".
      max_depth: how deep promises may nest.

    Raises:
      RecordError: the file cannot be read.
    """
    names = {key: key for key in KEYS} | dict(columns or {})
    if unknown := set(names) - set(KEYS):
        raise RecordError(
            f"columns maps {', '.join(map(shown, sorted(unknown)))}; only {' and '.join(KEYS)} can be mapped."
        )
    try:
        with open(path, "rb") as file:
            lines = file.read().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise RecordError(f"Cannot read {os.fspath(path)}: {error.strerror}.") from error
    examples, problems = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        raw = line.rstrip(b"\r").decode("utf-8", errors="surrogateescape")
        try:
            prompt, program = _read_line(line, names, max_depth)
            examples.append(Example(prompt, program, number, raw))
        except _Fault as fault:
            problems.append(Problem(os.fspath(path), number, fault.column, fault.message, raw))
    return examples, problems


def _read_line(line: bytes, names: Mapping[str, str], max_depth: int) -> tuple[str, Program]:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        column = len(line[: error.start].decode("utf-8")) + 1
        byte = line[error.start]
        raise _Fault(column, f"byte 0x{byte:02x} is not UTF-8. Save the file as UTF-8.") from None
    except json.JSONDecodeError as error:
        raise _Fault(error.colno, f"not JSON: {error.msg}. Write one object on each line.") from None
    except ValueError:  # Python's limit of 4300 digits
        raise _Fault(None, "a number of thousands of digits. Write it as a text, or leave it out.") from None
    except RecursionError:
        raise _Fault(None, "not a record: nested too deeply. Write one flat object on each line.") from None
    if not isinstance(record, dict):
        raise _Fault(None, f"not an object. Write one with the keys {' and '.join(KEYS)}.")
    for name in names.values():
        if name not in record:
            keys = ", ".join(map(name_shown, record))[:500] or "none"
            raise _Fault(
                None,
                f'missing "{name}" (found: {keys}). Map the names that the file uses, as in '
                "--config.data.columns=prompt=instruction,response=output.",
            )
        if not isinstance(record[name], str) or not record[name].strip():
            raise _Fault(None, f'"{name}" must be a text that is not empty. Fix or remove the line.')
        try:
            check_text(record[name])
        except TextError as error:
            raise _Fault(None, f'in "{name}": {error}') from None
    try:
        return record[names["prompt"]], parse(record[names["response"]], max_depth=max_depth)
    except ParseError as error:
        raise _Fault(None, f'in "{names["response"]}", {error}') from None


def digest(examples: Sequence[Example]) -> dict[str, Any]:
    """The number of examples, and a hash of their texts in their order, however the file spells them."""
    texts = hashlib.sha256()
    for example in examples:
        texts.update(json.dumps([example.prompt, render(example.program)]).encode())
    return {"examples": len(examples), "sha256": texts.hexdigest()}


def report(problems: Sequence[Problem], total: int) -> str:
    """The first problems, and their number among `total` records."""
    more = f"... and {len(problems) - SHOWN:,} more" if len(problems) > SHOWN else ""
    share = len(problems) / max(total, 1)
    head = f"{len(problems):,} of {total:,} records cannot be used ({share:.1%}):"
    return "\n  ".join(filter(None, [head, *map(str, problems[:SHOWN]), more]))


def write_invalid(path: str | os.PathLike[str], problems: Sequence[Problem]) -> None:
    """Writes every invalid line, with its position and what is wrong with it, as JSONL."""
    with replacing(path) as file:
        for problem in problems:
            # ASCII escapes preserve the surrogates of `raw`, and so the original bytes.
            file.write(json.dumps(dataclasses.asdict(problem), ensure_ascii=True) + "\n")
