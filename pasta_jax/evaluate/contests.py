"""What is said of a model's answers: by a judge beside an opponent's, by an audit, and in the reports."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from pasta_jax.annotate.annotators import MAX_LOSS
from pasta_jax.annotate.audit import Auditor
from pasta_jax.annotate.audited import Audited, audit_file
from pasta_jax.annotate.audited import write_report as write_audit
from pasta_jax.data.prompts import ANSWERS, Question, questions_of
from pasta_jax.data.records import Example, prompt_text
from pasta_jax.evaluate.alpaca_eval import Estimate, length_controlled_win_rate, write_outputs
from pasta_jax.evaluate.length_controlled import Difficulties
from pasta_jax.evaluate.measures import audit_gap_of, measures_of, speeds_of, win_rate_of
from pasta_jax.evaluate.names import name_of, sha256, slug
from pasta_jax.evaluate.own import Evaluated, Settings, datasets_of, field_of
from pasta_jax.evaluate.report import Result, write_reports
from pasta_jax.evaluate.summary import Contest, Quality, chances, quality_of
from pasta_jax.files import locked
from pasta_jax.judges.bulk import judge_all
from pasta_jax.judges.protocol import Judge, JudgeError
from pasta_jax.lang.parse import parse
from pasta_jax.loading import identity_of, load, place_of

LOG = logging.getLogger("pasta_jax")


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
    generators = {field_of(each, "generator") for each in given} - {""}
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
            "dataset": field_of(question, "dataset"),
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


def audit(settings: Settings, evaluated: Evaluated) -> list[Audited]:
    """What the blocks of the answers lose without sight of their siblings, by the model of `settings.audit`.

    It is kept in a folder of the evaluation, line for line, and goes on where it was cut off.

    Raises:
      CheckpointError: the model cannot be loaded.
    """
    path, dialect = place_of(settings.audit), evaluated.tokenizer.vocabulary.dialect
    about = identity_of(path) | {"answers": sha256([each.annotated for each in evaluated.test])}
    folder = os.path.join(evaluated.folder, f"audit-{name_of(path)}-{sha256(about)[:8]}")
    examples = [
        Example(question.prompt, parse(answer.annotated, dialect=dialect), line, "")
        for line, (question, answer) in enumerate(zip(evaluated.questions, evaluated.test, strict=True), 1)
        if answer.promises
    ]
    if not examples:
        return []
    LOG.info("Auditing %d answers with promises; in %s.", len(examples), folder)
    audited = audit_file(Auditor(load(path, **settings.loading), rows=1), examples, folder, about)
    write_audit(audited, folder, MAX_LOSS, f"{evaluated.name} read by {settings.audit}")
    return audited


def write_report(
    settings: Settings,
    evaluated: Evaluated,
    quality: Quality | None,
    judge: str,
    asked: Contests | None,
    caution: str = "",
    audited: Sequence[Audited] = (),
) -> str:
    """Writes the reports, and returns the Markdown of this one.

    Args:
      settings: what was evaluated.
      evaluated: the answers.
      quality: what the judge said of them.
      judge: its name for people.
      asked: what it was asked.
      caution: what to know of it.
      audited: what blocks lose, if that was measured.
    """
    measures, of_baseline = (
        measures_of(
            answers,
            evaluated.kinds,
            settings.plain_kinds,
            evaluated.tokenizer.vocabulary.dialect,
            lambda text: len(evaluated.tokenizer.encode(text)),
        )
        for answers in (evaluated.test, evaluated.baseline)
    )
    measures |= speeds_of(evaluated.baseline, evaluated.test, evaluated.batches, settings.rows)
    if quality is not None:
        measures["win rate"] = win_rate_of(quality.chances, "win rate")
    if audited:
        measures["audit gap"] = audit_gap_of(audited, len(evaluated.test))
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
        rows=settings.rows,
        timed=evaluated.timed,
        measures=measures,
        baseline_measures=of_baseline,
    )
    return write_reports(asked.folder if asked else evaluated.folder, settings.workdir, result)


def _is_answered(question: Question, columns: Mapping[str, str]) -> bool:
    """Whether a record has an answer, if an empty one."""
    record = json.loads(question.raw)
    names = (columns["response"],) if "response" in columns else (*itertools.chain(*ANSWERS.values()),)
    return isinstance(record, dict) and any(name in record for name in names)
