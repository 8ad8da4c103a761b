"""A model on a user's own prompts: `python -m pasta_jax.evaluate --prompts=FILE`.

    WORKDIR/NAME/model.jsonl, baseline.jsonl   every answer with its tokens, steps and seconds
                 model_outputs.json            the model's answers as AlpacaEval has them
                 report.md, .html, .json       speed
                 JUDGE/judged.jsonl            what the judge said, in both orders
                       annotations.json        the same as AlpacaEval has it
                       report.md, .html, .json, frontier.png

NAME is of the checkpoints, the prompts and the settings, JUDGE of the judge and the opponent, so that two
evaluations in one workdir never overwrite each other; a report shows all of the workdir that can be compared.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from pasta_jax.checkpoints.about import checkpoint_identity, find_checkpoint
from pasta_jax.data.prompts import ANSWERS, Question, read_questions
from pasta_jax.data.records import prompt_text
from pasta_jax.decoding.model import Model
from pasta_jax.evaluate.alpaca_eval import Estimate, length_controlled_win_rate, write_outputs
from pasta_jax.evaluate.answers import Answered, Respondent, key_of, read_answered
from pasta_jax.evaluate.length_controlled import Difficulties
from pasta_jax.evaluate.names import name_of, sha256, slug
from pasta_jax.evaluate.report import Result, write_reports
from pasta_jax.evaluate.summary import Contest, Quality, Speed, chances, quality_of, speed_of
from pasta_jax.evaluate.systems import take_turns
from pasta_jax.files import locked
from pasta_jax.judges.bulk import judge_all
from pasta_jax.judges.protocol import Judge, JudgeError
from pasta_jax.loading import load

LOG = logging.getLogger("pasta_jax")


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
    """

    ckpt: str
    baseline: str
    prompts: str
    columns: dict[str, str]
    workdir: str
    max_new_tokens: int
    loading: dict[str, Any]


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
      baseline_identity: its checkpoint and how it was loaded.
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

    @property
    def speed(self) -> Speed:
        """How fast the answers came."""
        return speed_of(self.baseline, self.test)

    @property
    def instructions(self) -> list[str]:
        """The prompts as AlpacaEval has them."""
        return [instruction_of(question) for question in self.questions]


def questions_of(path: str, columns: dict[str, str]) -> list[Question]:
    """The prompts of a file, all of them. Raises RecordError, and ValueError if one cannot be used."""
    questions, problems = read_questions(path, columns)
    if problems:
        more = f" ({len(problems)} of {len(problems) + len(questions)} records)" if len(problems) > 1 else ""
        raise ValueError(f"{problems[0]}{more} Every prompt counts, so fix or remove what cannot be asked.")
    if not questions:
        raise ValueError(f"{path} is empty.")
    return questions


def instruction_of(question: Question) -> str:
    """A prompt as AlpacaEval has it."""
    return prompt_text(question.prompt)


def answer_all(settings: Settings, questions: Sequence[Question]) -> Evaluated:
    """Has model and baseline answer the prompts in turn, goes on where an earlier call was cut off, writes speeds.

    Raises:
      CheckpointError: a model cannot be loaded.
    """
    paths = {"model": find_checkpoint(settings.ckpt)}
    paths["baseline"] = find_checkpoint(settings.baseline or settings.ckpt)
    given = {k: v for k, v in settings.loading.items() if k != "base" and v not in (None, False, "auto")}
    digest = sha256([key_of(question.prompt) for question in questions])
    about: dict[str, Any] = {name: checkpoint_identity(path) | given for name, path in paths.items()}
    about |= {"itself": not settings.baseline, "prompts": digest, "max_new_tokens": settings.max_new_tokens}
    name, baseline_name = ("-".join([name_of(path), *_options(given)]) for path in paths.values())
    folder = os.path.join(settings.workdir, f"{name}-{sha256(about)[:8]}")
    LOG.info("Evaluating %s on %d prompts of %s; in %s.", name, len(questions), settings.prompts, folder)
    model = load(paths["model"], **settings.loading)
    baseline = load(paths["baseline"], **settings.loading) if settings.baseline else model
    sequential = Respondent(baseline, settings.max_new_tokens, sequential=True)
    systems = {
        "baseline": sequential,
        "model": Respondent(model, settings.max_new_tokens, like=sequential),
    }
    answers = take_turns(
        systems, questions, folder, about, read_answered, lambda q, answer: answer.prompt == key_of(q.prompt)
    )
    found = Evaluated(
        folder=folder,
        name=name,
        baseline_name=baseline_name if settings.baseline else f"{name}, sequential",
        questions=questions,
        sha256=digest,
        test=answers["model"],
        baseline=answers["baseline"],
        baseline_model=baseline,
        baseline_identity=about["baseline"] | {"itself": about["itself"]},
    )
    outputs = [
        {"instruction": instruction_of(q), "output": answer.text, "generator": name, "dataset": _dataset(q)}
        for q, answer in zip(questions, found.test, strict=True)
    ]
    write_outputs(os.path.join(folder, "model_outputs.json"), outputs)
    return found


def _options(given: Mapping[str, Any]) -> list[str]:
    """How a model is loaded, for its name.

    >>> _options({"quantize": "int8", "tokenizer": "some/tokenizer.model", "extend_tokenizer": True})
    ['int8', 'tokenizer.model', 'extend_tokenizer']
    """
    return [slug(name if value is True else os.path.basename(str(value))) for name, value in given.items()]


@dataclasses.dataclass(frozen=True)
class Opponent:
    """Whose answers the model's are compared with: the text for each prompt, None where one failed.

    Attributes:
      identity: of what it says, as JSON can hold it: of the baseline, or a hash of the answers of a file.
    """

    name: str
    answers: Sequence[str | None]
    identity: Any


def baseline_as_opponent(evaluated: Evaluated) -> Opponent:
    """The baseline's answers."""
    texts = [None if answer.error else answer.text for answer in evaluated.baseline]
    return Opponent(evaluated.baseline_name, texts, evaluated.baseline_identity)


def opponent_of(questions: Sequence[Question], path: str, columns: dict[str, str]) -> Opponent:
    """The answers of a file to the same prompts, such as AlpacaEval's model outputs.

    Raises:
      RecordError: the file cannot be read.
      ValueError: it has other prompts, another order, or a record without an answer. An empty one has failed.
    """
    given = questions_of(path, columns)
    if len(given) != len(questions):
        raise ValueError(f"{path} has {len(given)} records, and there are {len(questions)} prompts.")
    for mine, theirs in zip(questions, given):
        if mine.prompt != theirs.prompt:
            raise ValueError(
                f"{path}, record {theirs.line}: the prompt is {prompt_text(theirs.prompt)[:60]!r}, where "
                f"{prompt_text(mine.prompt)[:60]!r} is asked. Both files need the same prompts in the same order."
            )
        if theirs.answer is None and not _is_answered(theirs, columns):
            raise ValueError(
                f"{path}, record {theirs.line} has no answer. --opponent needs one to each prompt."
            )
    generators = {_field(each, "generator") for each in given} - {""}
    name = generators.pop() if len(generators) == 1 else os.path.basename(path)
    answers = [each.answer for each in given]
    if failed := answers.count(None):
        LOG.warning("%s: %d empty answers count as failed.", path, failed)
    return Opponent(name, answers, sha256(answers))


@dataclasses.dataclass(frozen=True)
class Contests:
    """What a judge is asked, and where its answers go.

    Attributes:
      judge: identifies the judge, as JSON can hold it.
    """

    folder: str
    opponent: Opponent
    contests: Sequence[Contest]
    judge: Any


def contests_of(evaluated: Evaluated, opponent: Opponent, judge: str, identity: Any = None) -> Contests:
    """The model's answers against the opponent's.

    Args:
      evaluated: the answers.
      opponent: the others.
      judge: its name for people, whose first word names the folder.
      identity: what the verdicts depend on beside their answers, as JSON can hold it.
    """
    identified = [judge, identity]
    key = sha256([identified, opponent.name, *opponent.answers])[:8]
    folder = os.path.join(evaluated.folder, f"{slug(judge.split()[0])}-{key}")
    return Contests(
        folder,
        opponent,
        [
            Contest(question.prompt, None if answer.error else answer.text, other)
            for question, answer, other in zip(
                evaluated.questions, evaluated.test, opponent.answers, strict=True
            )
        ],
        identified,
    )


def judge_contests(
    evaluated: Evaluated, asked: Contests, judge: Judge, name: str, difficulties: Difficulties | None = None
) -> Quality:
    """What a judge says of all of them; also writes annotations.json, where no verdict is null.

    Raises:
      JudgeError: the judge cannot say, of one or of any.
      InUse: another process is being told.
      AnnotationError, DifficultyError: `difficulties` belongs to other prompts.
    """
    os.makedirs(asked.folder, exist_ok=True)
    comparisons = [each for contest in asked.contests for each in contest.comparisons]
    with locked(asked.folder):
        said = judge_all(judge, comparisons, os.path.join(asked.folder, "judged.jsonl"))
    if said and not any(each.is_verdict for each in said):
        raise JudgeError(f"The judge {name} gave no verdict on any of {len(said)} comparisons.")
    chance, agreed = chances(asked.contests, said)
    annotations = [
        {
            "instruction": instruction,
            "output_1": contest.opponent or "",
            "generator_1": asked.opponent.name,
            "output_2": contest.answer or "",
            "generator_2": evaluated.name,
            "dataset": _dataset(question),
            "annotator": name,
            "preference": None if math.isnan(value) else 1 + float(value),
        }
        for instruction, question, contest, value in zip(
            evaluated.instructions, evaluated.questions, asked.contests, chance, strict=True
        )
    ]
    write_outputs(os.path.join(asked.folder, "annotations.json"), annotations)
    quality = quality_of(chance, agreed)
    if difficulties is None:
        return quality
    controlled: Estimate = length_controlled_win_rate(annotations, difficulties, evaluated.instructions)
    return dataclasses.replace(quality, length_controlled=controlled)


def write_report(
    settings: Settings,
    evaluated: Evaluated,
    quality: Quality | None,
    judge: str,
    asked: Contests | None,
    caution: str = "",
) -> str:
    """Writes the reports, and returns the Markdown of this one. `caution` is what to know of the judge."""
    result = Result(
        name=evaluated.name,
        baseline=evaluated.baseline_name,
        prompts=settings.prompts,
        sha256=evaluated.sha256,
        max_new_tokens=settings.max_new_tokens,
        judge=judge,
        opponent=asked.opponent.name if asked else "",
        speed=evaluated.speed,
        quality=quality,
        is_alpaca_eval=all(datasets_of(evaluated.questions)),
        alike=sha256([evaluated.baseline_identity, asked and [asked.judge, asked.opponent.identity]]),
        caution=caution,
    )
    return write_reports(asked.folder if asked else evaluated.folder, settings.workdir, result)


# -------------------------------------------------------------------------------------------------- records


def _field(question: Question, name: str) -> str:
    record = json.loads(question.raw)
    value = record.get(name) if isinstance(record, dict) else None
    return value if isinstance(value, str) else ""


def _dataset(question: Question) -> str:
    return _field(question, "dataset")


def datasets_of(questions: Sequence[Question]) -> list[str]:
    """The data set that each record names, "" if it names none."""
    return [_dataset(question) for question in questions]


def _is_answered(question: Question, columns: Mapping[str, str]) -> bool:
    """Whether a record has an answer, if an empty one."""
    record = json.loads(question.raw)
    names = (columns["response"],) if "response" in columns else (*itertools.chain(*ANSWERS.values()),)
    return isinstance(record, dict) and any(name in record for name in names)
