"""A model on a user's own prompts: `python -m pasta_jax.evaluate --prompts=FILE`.

    WORKDIR/summary-PROMPTS.md, .html, .png    all that can be compared with the last evaluation
            NAME/model.jsonl, baseline.jsonl   every answer at batch 1 with its tokens, steps and seconds
                 batches-8/                    the same for eight prompts at once
                 annotated.jsonl               the model's answers with their tags, as records
                 model_outputs.json            the model's answers as AlpacaEval has them
                 side_by_side.md, .html        the first of them beside the baseline's
                 audit-MODEL/                  what blocks lose without sight of their siblings
                 report.md, .html, .json       speed
                 measures.json                 every measure, prompt by prompt
                 JUDGE/judged.jsonl            what the judge said, in both orders
                       annotations.json        the same as AlpacaEval has it
                       report.md, .html, .json, measures.json, frontier.png

NAME is of the checkpoints, the prompts and the settings, JUDGE of the judge and the opponent, so that two
evaluations in one workdir never overwrite each other; a report shows all of the workdir that can be compared.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from pasta_jax.data.prompts import Question, answered_record
from pasta_jax.data.records import prompt_text
from pasta_jax.decoding.model import Model
from pasta_jax.evaluate.alpaca_eval import write_outputs
from pasta_jax.evaluate.answers import Answered, Batch, Respondent, key_of, read_answered, read_batches
from pasta_jax.evaluate.names import name_of, sha256, slug
from pasta_jax.evaluate.side_by_side import SHOWN, Pair, as_html, as_markdown
from pasta_jax.evaluate.summary import Speed, speed_of
from pasta_jax.evaluate.systems import Match, take_turns
from pasta_jax.files import replacing, write_jsonl
from pasta_jax.loading import given_of, identity_of, load, place_of
from pasta_jax.tokens.tokenizer import Tokenizer

LOG = logging.getLogger("pasta_jax")

PLAIN_KINDS = "single", "story"
"""Kinds of prompts, by the key `kind` of their records: answers of one sentence or fact, and stories."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is evaluated.

    Attributes:
      ckpt: workdir or checkpoint of the model.
      baseline: of the sequential model; "" is the model itself, decoding sequentially.
      prompts: the file.
      columns: its own names (`data.records.Reader`).
      workdir: folder of the output.
      max_new_tokens: of an answer.
      loading: keyword arguments of `load` for both models.
      rows: prompts that are answered together, in a second pass over all; 1: none.
      timed: how many of the first prompts are answered at batch 1; the answers to the others are those of the
        second pass. None: all.
      audit: workdir or checkpoint of the model that audits the answers; "" for no audit.
      plain_kinds: kinds of prompts whose answers have no independent parts.
      drawing: how both models sample, as options of `SamplingParams`; {} is greedy.
    """

    ckpt: str
    baseline: str
    prompts: str
    columns: dict[str, str]
    workdir: str
    max_new_tokens: int
    loading: dict[str, Any]
    rows: int = 1
    timed: int | None = None
    audit: str = ""
    plain_kinds: tuple[str, ...] = PLAIN_KINDS
    drawing: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """Answers to the prompts.

    Attributes:
      folder: of the output.
      name, baseline_name: of the models, for people.
      questions: the prompts.
      sha256: of them.
      test, baseline: the answers, one to each prompt.
      baseline_model: the sequential model.
      baseline_identity: its checkpoint, how it was loaded and how it answered.
      tokenizer: of the model.
      timed: how many of the first answers were decoded at batch 1.
      batches: the baseline's and the model's answers to as many prompts at once as there are rows.
    """

    folder: str
    name: str
    baseline_name: str
    questions: Sequence[Question]
    sha256: str
    test: Sequence[Answered]
    baseline: Sequence[Answered]
    baseline_model: Model
    baseline_identity: Mapping[str, Any]
    tokenizer: Tokenizer
    timed: int
    batches: Sequence[tuple[Batch, Batch]] = ()

    @property
    def speed(self) -> Speed:
        """How fast the answers came."""
        return speed_of(self.baseline, self.test)

    @property
    def kinds(self) -> list[str]:
        """The kind that each record names, or ""."""
        return [field_of(question, "kind") for question in self.questions]

    @property
    def instructions(self) -> list[str]:
        """The prompts as AlpacaEval has them."""
        return [instruction_of(question) for question in self.questions]


def instruction_of(question: Question) -> str:
    """A prompt as AlpacaEval has it."""
    return prompt_text(question.prompt)


@dataclasses.dataclass(frozen=True)
class _Entrant:
    """A model that is evaluated, and its baseline.

    Attributes:
      folder: of the output.
      about: identifies what is in it, as JSON can hold it.
      name, baseline_name: of the models, for people.
      model, baseline: where they are.
    """

    folder: str
    about: dict[str, Any]
    name: str
    baseline_name: str
    model: epath.Path
    baseline: epath.Path


def answer_all(several: Sequence[Settings], questions: Sequence[Question]) -> list[Evaluated]:
    """Has models and their baseline answer the prompts in turn, and writes the answers.

    It goes on where an earlier call was cut off. A baseline answers once for all models that lack its answer.

    Args:
      several: for each model; they differ in `ckpt` alone.
      questions: the prompts.

    Raises:
      CheckpointError: a model cannot be loaded.
      ValueError: two of them are the same model.
    """
    first = several[0]
    entrants = [_entrant(settings, questions) for settings in several]
    if len({entrant.folder for entrant in entrants}) < len(entrants):
        raise ValueError(f"--ckpt={','.join(settings.ckpt for settings in several)} names a model twice.")
    loaded = functools.cache(lambda path: load(path, **first.loading))
    turns = _Turns(first, questions, entrants, loaded)
    answers = turns.one_by_one()
    batches = turns.in_batches() if first.rows > 1 else [[] for _ in entrants]
    timed = min(len(alone["model"]) for alone in answers)  # as many of each, so that they can be compared
    found = []
    for entrant, alone, together in zip(entrants, answers, batches):
        slow, fast = ([answer for pair in together for answer in pair[i].answers] for i in (0, 1))
        itself, given = entrant.about["itself"], entrant.about.get("drawing", {})
        found.append(
            Evaluated(
                folder=entrant.folder,
                name=entrant.name,
                baseline_name=entrant.baseline_name,
                questions=questions,
                sha256=entrant.about["prompts"],
                test=[*alone["model"][:timed], *fast[timed:]],
                baseline=[*alone["baseline"][:timed], *slow[timed:]],
                baseline_model=loaded(entrant.baseline),
                baseline_identity=entrant.about["baseline"] | {"itself": itself} | given,
                tokenizer=loaded(entrant.model).tokenizer,
                timed=timed,
                batches=together,
            )
        )
        _write_answers(found[-1])
    return found


def _entrant(settings: Settings, questions: Sequence[Question]) -> _Entrant:
    paths = {"model": place_of(settings.ckpt)}
    paths["baseline"] = place_of(settings.baseline or settings.ckpt)
    given = given_of(settings.loading)
    digest = sha256([key_of(question.prompt) for question in questions])
    about: dict[str, Any] = {name: identity_of(path) | given for name, path in paths.items()}
    about |= {"itself": not settings.baseline, "prompts": digest, "max_new_tokens": settings.max_new_tokens}
    if settings.drawing:
        about["drawing"] = {"seeds": "one for each prompt", **settings.drawing}
    name, baseline_name = ("-".join([name_of(path), *_options(given)]) for path in paths.values())
    folder = os.path.join(settings.workdir, f"{name}-{sha256(about)[:8]}")
    LOG.info("Evaluating %s on %d prompts of %s; in %s.", name, len(questions), settings.prompts, folder)
    sequential = baseline_name if settings.baseline else f"{name}, sequential"
    return _Entrant(folder, about, name, sequential, paths["model"], paths["baseline"])


@dataclasses.dataclass(frozen=True)
class _Turns:
    """Models that answer in turn.

    Attributes:
      settings: of all of them.
      questions: the prompts.
      entrants: the models and their baselines.
      loaded: the model at a place.
    """

    settings: Settings
    questions: Sequence[Question]
    entrants: Sequence[_Entrant]
    loaded: Callable[[epath.Path], Model]

    def one_by_one(self) -> list[dict[str, list[Answered]]]:
        """The answers of each pair at batch 1."""
        matches = [
            Match({"baseline": slow, "model": fast}, entrant.folder, entrant.about)
            for entrant, slow, fast in self._pairs(rows=1)
        ]
        return take_turns(
            matches,
            self.questions,
            read_answered,
            lambda question, answer: answer.prompt == key_of(question.prompt),
            first=self.settings.timed,
        )

    def in_batches(self) -> list[list[tuple[Batch, Batch]]]:
        """The answers of each pair to as many prompts at once as there are rows."""
        rows, questions = self.settings.rows, self.questions
        matches = [
            Match(
                {"baseline": slow.together, "model": fast.together},
                os.path.join(entrant.folder, f"batches-{rows}"),
                {**entrant.about, "rows": rows},
            )
            for entrant, slow, fast in self._pairs(rows)
        ]
        found = take_turns(
            matches,
            [questions[start : start + rows] for start in range(0, len(questions), rows)],
            read_batches,
            lambda some, batch: (
                [each.prompt for each in batch.answers] == [key_of(each.prompt) for each in some]
            ),
            units="batches",
        )
        return [[*zip(table["baseline"], table["model"], strict=True)] for table in found]

    def _pairs(self, rows: int) -> Iterator[tuple[_Entrant, Respondent, Respondent]]:
        """Each with its baseline and its model; entrants with one baseline share its respondent."""
        options: dict[str, Any] = {"rows": rows, "drawing": self.settings.drawing}
        length = self.settings.max_new_tokens
        baselines = dict[epath.Path, Respondent]()
        for entrant in self.entrants:
            if (slow := baselines.get(entrant.baseline)) is None:
                slow = Respondent(self.loaded(entrant.baseline), length, sequential=True, **options)
                baselines[entrant.baseline] = slow
            yield entrant, slow, Respondent(self.loaded(entrant.model), length, like=slow, **options)


def _write_answers(found: Evaluated) -> None:
    """Writes the model's answers as AlpacaEval has them and as annotated records, and the page side by side."""
    outputs = [
        {
            "instruction": instruction,
            "output": answer.text,
            "generator": found.name,
            "dataset": field_of(question, "dataset"),
        }
        for instruction, question, answer in zip(found.instructions, found.questions, found.test, strict=True)
    ]
    write_outputs(os.path.join(found.folder, "model_outputs.json"), outputs)
    write_jsonl(
        os.path.join(found.folder, "annotated.jsonl"),
        map(_as_record, found.questions, found.test, found.kinds),
    )
    pairs = [*map(Pair, found.instructions, found.kinds, found.baseline, found.test)][:SHOWN]
    names, dialect = (found.baseline_name, found.name), found.tokenizer.vocabulary.dialect
    for ending, written in (("md", as_markdown), ("html", as_html)):
        with replacing(os.path.join(found.folder, f"side_by_side.{ending}")) as file:
            file.write(written(pairs, names, dialect))


def _as_record(question: Question, answer: Answered, kind: str) -> dict[str, Any]:
    """A record of what was asked and the annotated answer."""
    return ({"kind": kind} if kind else {}) | answered_record(question.prompt, answer.annotated)


def _options(given: Mapping[str, Any]) -> list[str]:
    """How a model is loaded, for its name.

    >>> _options({"quantize": "int8", "tokenizer": "some/tokenizer.model", "extend_tokenizer": True})
    ['int8', 'tokenizer.model', 'extend_tokenizer']
    """
    return [slug(name if value is True else os.path.basename(str(value))) for name, value in given.items()]


# -------------------------------------------------------------------------------------------------- records


def field_of(question: Question, name: str) -> str:
    """A text of a record, "" if it has none."""
    record = json.loads(question.raw)
    value = record.get(name) if isinstance(record, dict) else None
    return value if isinstance(value, str) else ""


def datasets_of(questions: Sequence[Question]) -> list[str]:
    """The data set that each record names, "" if it names none."""
    return [field_of(question, "dataset") for question in questions]
