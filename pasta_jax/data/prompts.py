"""What a file asks: the last question of each record, in every layout of `layouts`, with its answer if it has one.

{"prompt": "Name two rivers."}
{"instruction": "Name two rivers.", "output": "The Nile, ..."}
{"messages": [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello!"},
              {"role": "user", "content": "Name two rivers."}]}
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

from pasta_jax.data.layouts import ROLES, Fault
from pasta_jax.data.reading import Entry, entries
from pasta_jax.data.records import Problem, Prompt, Reader, problem, raw_text
from pasta_jax.files import BROKEN
from pasta_jax.lang.assemble import assemble

ANSWERS = {"prompt": ("response", "completion"), "instruction": ("output", "response")}
"""The keys of answers, by the key of what asks."""

NOTHING = "-"
"""Stands for the answer while a record without one is read."""


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt.

    Attributes:
      prompt: what the model is asked.
      answer: the record's, without tags; None if it has none.
      line: of the record in the file, from 1.
      raw: the record itself.
    """

    prompt: Prompt
    answer: str | None
    line: int
    raw: str


def read_questions(
    path: str | os.PathLike[str], columns: Mapping[str, str] | None = None
) -> tuple[list[Question], list[Problem]]:
    """The question of each record of a file, and the records that cannot be used.

    Args:
      path: of the file.
      columns: as in `data.records.Reader`.

    Raises:
      RecordError: the file cannot be read.
    """
    reader = Reader(dict(columns or {}), turns="last")
    questions: list[Question] = []
    problems: list[Problem] = []
    for entry in entries(path):
        try:
            questions.append(_question(entry, reader))
        except Fault as fault:
            problems.append(problem(os.fspath(path), entry, fault))
    return questions, problems


def questions_of(path: str | os.PathLike[str], columns: Mapping[str, str] | None = None) -> list[Question]:
    """The question of each record of a file, all of them.

    Raises:
      RecordError: the file cannot be read.
      ValueError: a record cannot be used, or there is none.
    """
    questions, problems = read_questions(path, columns)
    if problems:
        more = f" ({len(problems)} of {len(problems) + len(questions)} records)" if len(problems) > 1 else ""
        raise ValueError(f"{problems[0]}{more} Every prompt counts, so fix or remove what cannot be asked.")
    if not questions:
        raise ValueError(f"{os.fspath(path)} is empty.")
    return questions


def answered_record(prompt: Prompt, answer: str) -> dict[str, Any]:
    """The record of a prompt, a text or messages, with an answer.

    >>> answered_record("Name two rivers.", "The Nile and the Rhine.")
    {'prompt': 'Name two rivers.', 'response': 'The Nile and the Rhine.'}
    """
    if isinstance(prompt, str):
        return {"prompt": prompt, "response": answer}
    return {"messages": [*map(dict, prompt), {"role": "assistant", "content": answer}]}


def _question(entry: Entry, reader: Reader) -> Question:
    """What a record asks. Raises Fault."""
    try:
        completed = _completed(json.loads(entry.data), reader.columns)
    except BROKEN:
        completed = None  # `reader` says what is wrong
    if completed is None:
        (example,) = reader.examples(entry)
        return Question(example.prompt, assemble(example.program), entry.number, example.raw)
    (example,) = reader.examples(entry._replace(data=json.dumps(completed).encode()))
    return Question(example.prompt, None, entry.number, raw_text(entry))


def _completed(record: Any, columns: Mapping[str, str]) -> dict[str, Any] | None:
    """A record with an answer to its last question, if it has none. Raises what BROKEN has if it is no record."""
    if not isinstance(record, dict):
        raise TypeError("no object")
    for key in (columns["messages"],) if "messages" in columns else ("messages", "conversations"):
        if isinstance(said := record.get(key), list) and said and isinstance(said[-1], dict):
            name, text = ("from", "value") if "from" in said[-1] else ("role", "content")
            asks = ROLES.get(str(said[-1].get(name)).lower()) == "user"
            return {**record, key: [*said, {name: "assistant", text: NOTHING}]} if asks else None
    if columns:
        answers: tuple[str, ...] = (columns.get("response", "response"),)
    else:
        answers = next((ANSWERS[key] for key in ANSWERS if key in record), ())
    if not answers or any(record.get(key) and str(record[key]).strip() for key in answers):
        return None
    there = [key for key in answers if key in record]
    return {**record, (there or answers)[0]: NOTHING}
