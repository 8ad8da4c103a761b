"""Answers a file of prompts, many at once.

    python -m pasta_jax.answer --ckpt=W --prompts=prompts.jsonl --output=answers.jsonl
    python -m pasta_jax.answer --ckpt=W --prompts=prompts.jsonl --output=answers.jsonl --samples=2 --temperature=0.7

The prompts have any layout that training reads. The output has a record for each answer, with the other keys of
its prompt's record, ready for `annotate` and training: a model finetuned on its own answers learns how to write,
not what. Answers that a limit cut off, repeat themselves, are empty, or are equal to an earlier one are left out,
unless --keep_all is given; a line says how many. OUTPUT.run/ has every answer. The same command resumes; with more
--samples it adds those.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import flags

from pasta_jax import verbs
from pasta_jax.lang.form import form_of
from pasta_jax.lang.program import Program, Text
from pasta_jax.verbs import begin_first, columns_of, define_loading, define_processes, loading_options, refuse

if TYPE_CHECKING:
    from pasta_jax.data.prompts import Question
    from pasta_jax.decoding.engine import Decoder
    from pasta_jax.decoding.pending import PendingAnswer
    from pasta_jax.decoding.request import SamplingParams

LOG = logging.getLogger("pasta_jax")

AHEAD = 4
"""Requests under way, as a multiple of the rows: a row that is free never waits for the next prompt."""


THREADS = 16
"""T, of answers with promises."""

REPETITIVE = 0.2
"""An answer repeats itself if so large a share of its runs of four words occurred before (`lang.form`)."""


class Asked(NamedTuple):
    """The number of a prompt in its file, and that of a sample among its answers, both from 0."""

    question: int
    sample: int


@dataclasses.dataclass(frozen=True)
class Settings:
    """How answers are drawn; `mode` is parallel, or sequential, which forbids promises. As in `SamplingParams`."""

    mode: str = "parallel"
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def sampling(self, asked: Asked) -> SamplingParams:
        """Its seed depends on what is asked alone, however often the run was interrupted."""
        from pasta_jax.decoding.request import SamplingParams, seed_of

        return SamplingParams(
            max_new_tokens=self.max_new_tokens,
            max_branch_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=seed_of(self.seed, *asked),
            open_bias=float("-inf") if self.mode == "sequential" else 0.0,
        )


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
      question: number of its prompt in the file, from 0.
      sample: its number among the answers to this prompt, from 0.
      text: without tags.
      annotated: with its tags.
      tokens: of `text`.
      stop_reason: as in `DecodeResult`.
    """

    question: int
    sample: int
    text: str
    annotated: str
    tokens: int
    stop_reason: str


def main(argv: Sequence[str], *, values: Any) -> None:
    """Runs the command line. A mistake ends in one line and status 2."""
    missing = [f"--{name}" for name in ("ckpt", "prompts", "output") if not values[name].value]
    if len(argv) > 1 or missing:
        refuse(f"Add {' and '.join(missing)}." if missing else f"{argv[1]} is no flag. --help shows them.")
    if not values.output.endswith(".jsonl"):
        refuse(f"--output={values.output} is written as JSON lines. Give a name that ends with .jsonl.")
    if values.samples > 1 and values.temperature == 0:
        refuse("--samples above 1 are all the same at --temperature=0. Add --temperature=0.7, for one.")
    begin_first()
    from pasta_jax.checkpoints.about import CheckpointError

    try:
        run(values)
    except (CheckpointError, ValueError) as error:
        refuse(str(error))


def run(values: Any) -> None:
    """Answers what is missing, and writes the output.

    Raises:
      ValueError: prompts that cannot be asked, or an earlier run of other settings.
      CheckpointError: a model that cannot be loaded.
    """
    from pasta_jax.data.prompts import questions_of
    from pasta_jax.files import Stamp, json_line, locked, read_jsonl, replacing, write_jsonl
    from pasta_jax.loading import given_of, identity_of

    questions = questions_of(values.prompts, columns_of(values.columns))
    chosen: dict[str, Any] = {field.name: values[field.name].value for field in dataclasses.fields(Settings)}
    settings = Settings(**chosen)
    about = {
        "model": identity_of(values.ckpt) | given_of(loading_options(values)),
        "prompts": [question.raw for question in questions],
        "settings": dataclasses.asdict(settings),
    }
    run = f"{values.output}.run"
    path = os.path.join(run, "answers.jsonl")
    with locked(run):
        stamp = Stamp(os.path.join(run, "about.json"))
        if os.path.exists(path) and (changed := stamp.check(about)):
            raise ValueError(
                f"{run} is of other answers ({changed[0].name}). Use another --output, or remove it."
            )
        stamp.write(about)
        asked = [Asked(i, j) for j in range(values.samples) for i in range(len(questions))]
        answers = read_jsonl(path, lambda tree: Answer(**tree))
        write_jsonl(path, map(dataclasses.asdict, answers))  # without a broken last line
        if rest := asked[len(answers) :]:
            decoder = _decoder(values, questions)
            answers += _answered(decoder, questions, settings, rest, path, len(answers))
        answers = answers[: len(asked)]
    with replacing(values.output) as file:
        found = kept(answers, keep_all=values.keep_all)
        for answer in found.answers:
            record = record_of(questions[answer.question], answer, annotated=values.annotated)
            file.write(json_line(record))
    print(f"{len(questions):,} prompts, {len(answers):,} answers: {found}. Wrote {values.output}.")


def _answered(
    decoder: Decoder,
    questions: Sequence[Question],
    settings: Settings,
    asked: Sequence[Asked],
    path: str,
    done: int,
) -> list[Answer]:
    """The answers that are missing, each written as soon as those before it are there."""
    from tqdm import tqdm

    from pasta_jax.files import LOG_EVERY_S, Lines, json_line, shows_progress

    answers: list[Answer] = []
    quiet, logged_at, total = not shows_progress(), time.monotonic(), done + len(asked)
    LOG.info("%d answers; %d are done. The first take longer: programs are compiled.", total, done)
    start, tokens = time.monotonic(), 0
    with Lines(path) as file, tqdm(initial=done, total=total, unit="answer", disable=quiet) as bar:
        for answer in answer_all(decoder, questions, settings, asked):
            answers.append(answer)
            file.write(json_line(dataclasses.asdict(answer)))
            tokens += answer.tokens
            bar.update()
            if quiet and time.monotonic() - logged_at > LOG_EVERY_S:
                logged_at = time.monotonic()
                rate = tokens / (logged_at - start)
                LOG.info("%d of %d answers, %.0f tokens a second", done + len(answers), total, rate)
    return answers


def answer_all(
    decoder: Decoder, questions: Sequence[Question], settings: Settings, asked: Iterable[Asked]
) -> Iterator[Answer]:
    """Answers in the order in which they are asked for, as many at once as the decoder has rows."""
    from pasta_jax.data.records import encode_prompt
    from pasta_jax.decoding.results import result

    tokenizer = decoder.model.tokenizer
    waiting: collections.deque[tuple[Asked, PendingAnswer]] = collections.deque()
    todo = iter(asked)
    while True:
        while len(waiting) < AHEAD * decoder.compiled.rows and (each := next(todo, None)) is not None:
            ids = encode_prompt(tokenizer, questions[each.question].prompt)
            waiting.append((each, decoder.submit(ids, settings.sampling(each))))
        if not waiting:
            return
        each, pending = waiting.popleft()
        decoded = result(tokenizer, pending.wait())
        text, annotated = decoded.text, decoded.annotated
        yield Answer(*each, text, annotated, decoded.stats.text_tokens, decoded.stop_reason)


def _decoder(values: Any, questions: Sequence[Question]) -> Decoder:
    """A decoder with a pool for the longest of the prompts and its answer."""
    from pasta_jax.data.records import encode_prompt
    from pasta_jax.decoding.engine import Decoder
    from pasta_jax.decoding.state import MAX_POOL, Limits
    from pasta_jax.loading import load
    from pasta_jax.rounding import next_power_of_two

    model = load(values.ckpt, **loading_options(values))
    longest = max(len(encode_prompt(model.tokenizer, question.prompt)) for question in questions)
    pool = min(MAX_POOL, next_power_of_two(longest + values.max_new_tokens))
    lanes, threads = (1, 2) if values.mode == "sequential" else (values.lanes, THREADS)
    return Decoder(model, limits=Limits(lanes, threads, pool, model.max_depth), rows=values.rows)


# ------------------------------------------------------------------------------------------------- the output


@dataclasses.dataclass(frozen=True)
class Kept:
    """The answers that are good enough, in the order of the prompts, and how many are not, by the reason."""

    answers: Sequence[Answer]
    dropped: Mapping[str, int]

    def __str__(self) -> str:
        reasons = "".join(f", {count:,} {reason}" for reason, count in self.dropped.items())
        return f"{len(self.answers):,} kept{reasons}"


def kept(answers: Sequence[Answer], *, keep_all: bool = False) -> Kept:
    """Leaves out answers that a limit cut off, that repeat themselves, are empty, or equal to an earlier one.

    >>> good = Answer(0, 0, "Rome.", "Rome.", 2, "eos")
    >>> cut = dataclasses.replace(good, sample=1, text="Ro", stop_reason="length")
    >>> str(kept([good, cut, dataclasses.replace(good, sample=2)]))
    '1 kept, 1 truncated, 1 equal'
    """
    found: list[Answer] = []
    dropped: collections.Counter[str] = collections.Counter()
    seen: set[tuple[int, str]] = set()
    for answer in sorted(answers, key=lambda each: (each.question, each.sample)):
        reason = "" if keep_all else _reason(answer) or "equal" * ((answer.question, answer.text) in seen)
        seen.add((answer.question, answer.text))
        if reason:
            dropped[reason] += 1
        else:
            found.append(answer)
    return Kept(found, dropped)


def _reason(answer: Answer) -> str:
    """Why an answer is left out, or ""."""
    if answer.stop_reason not in ("eos", "stop"):
        return "truncated"
    if not answer.text.strip():
        return "empty"
    form = form_of(Program((Text(answer.text),)))
    return "repetitive" if form.loops or form.repeated_ngrams > REPETITIVE * form.ngrams else ""


def record_of(question: Question, answer: Answer, *, annotated: bool = False) -> dict[str, Any]:
    """The record of an answer: its prompt or messages, the answer, and what else the prompt's record has."""
    from pasta_jax.data.layouts import KEYS
    from pasta_jax.data.prompts import answered_record

    others = {key: value for key, value in json.loads(question.raw).items() if key not in KEYS}
    return answered_record(question.prompt, answer.annotated if annotated else answer.text) | others


def define(values: flags.FlagValues) -> None:
    """Defines the flags."""
    own: Any = {"flag_values": values}
    flags.DEFINE_string("ckpt", None, "Workdir or checkpoint of the model.", **own)
    flags.DEFINE_string("prompts", None, "A file of records; those with answers are asked too.", **own)
    flags.DEFINE_list("columns", [], "The file's own keys, as prompt=question.", **own)
    flags.DEFINE_string("output", None, "The file of answers, a .jsonl.", **own)
    flags.DEFINE_enum("mode", "parallel", ["parallel", "sequential"], "Sequential forbids promises.", **own)
    flags.DEFINE_bool("annotated", False, "Write the answers with their tags.", **own)
    flags.DEFINE_bool("keep_all", False, "Write every answer.", **own)
    flags.DEFINE_integer("samples", 1, "Answers to each prompt.", lower_bound=1, **own)
    flags.DEFINE_float("temperature", 0.0, "0 is greedy.", lower_bound=0.0, **own)
    flags.DEFINE_integer("top_k", 0, "Sample among this many likeliest tokens; 0: all.", lower_bound=0, **own)
    flags.DEFINE_float("top_p", 1.0, "Sample among the likeliest tokens of this probability; 1: all.", **own)
    flags.DEFINE_float(
        "min_p", 0.0, "Leave out tokens below this share of the likeliest one; 0: none.", **own
    )
    flags.DEFINE_integer("seed", 0, "Of the sampling.", lower_bound=0, **own)
    flags.DEFINE_integer("max_new_tokens", 512, "Maximum tokens of answer and tags.", lower_bound=1, **own)
    flags.DEFINE_integer("rows", 16, "Prompts decoded at once.", lower_bound=1, **own)
    flags.DEFINE_integer("lanes", 4, "Threads of an answer that decode in a step.", lower_bound=1, **own)
    define_loading(values)


def command() -> None:
    """Parses the command line and runs `main`."""
    define(flags.FLAGS)
    flags.adopt_module_key_flags(verbs)  # so that --help shows them
    define_processes()
    verbs.run_main(functools.partial(main, values=flags.FLAGS))


if __name__ == "__main__":
    command()
