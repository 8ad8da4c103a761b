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

from pasta_jax.data.layouts import Fault
from pasta_jax.data.records import Example, Problem, Prompt, examples_of, read
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
      columns: as in `data.records.read`.

    Raises:
      RecordError: the file cannot be read.
    """
    columns = dict(columns or {})
    questions: list[Question] = []
    problems: list[Problem] = []
    for each in read(path, columns=columns, turns="last"):
        try:
            completed = _completed(json.loads(each.raw), columns)
            if completed is not None:
                (example,) = examples_of(completed, each.line, each.raw, columns, 1, "last")
                questions.append(Question(example.prompt, None, each.line, each.raw))
                continue
        except (Fault, *BROKEN):
            pass  # what `read` found says more
        if isinstance(each, Example):
            questions.append(Question(each.prompt, assemble(each.program), each.line, each.raw))
        else:
            problems.append(each)
    return questions, problems


def _completed(record: Any, columns: Mapping[str, str]) -> dict[str, Any] | None:
    """A record with an answer to its last question, if it has none."""
    for key in (columns["messages"],) if "messages" in columns else ("messages", "conversations"):
        if isinstance(said := record.get(key), list):
            name, text = ("from", "value") if "from" in said[-1] else ("role", "content")
            asks = said[-1][name].lower() in ("user", "human", "prompter")
            return {**record, key: [*said, {name: "assistant", text: NOTHING}]} if asks else None
    if columns:
        answers: tuple[str, ...] = (columns.get("response", "response"),)
    else:
        answers = next((ANSWERS[key] for key in ANSWERS if key in record), ())
    if not answers or any(record.get(key) and str(record[key]).strip() for key in answers):
        return None
    there = [key for key in answers if key in record]
    return {**record, (there or answers)[0]: NOTHING}
