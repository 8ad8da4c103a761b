"""Systems that answer prompts, and what is measured of their answers.

A system is a function from a task to a measured answer: a model in the engine, or Skeleton-of-Thought, which calls
the engine twice. Speeds are measured at batch 1: each request is decoded twice and the second decode is timed
(paper section 5.1).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeAlias, TypeVar

from tqdm import tqdm

from pasta_jax.baselines import sot
from pasta_jax.data import almanac
from pasta_jax.decoding.engine import Decoder
from pasta_jax.decoding.model import Model
from pasta_jax.decoding.request import SamplingParams
from pasta_jax.decoding.results import result
from pasta_jax.decoding.state import Limits
from pasta_jax.decoding.trace import Trace
from pasta_jax.files import (
    LOG_EVERY_S,
    Lines,
    Stamp,
    json_line,
    locked,
    read_jsonl,
    shows_progress,
    write_jsonl,
)
from pasta_jax.lang.parse import parse
from pasta_jax.lang.program import Promise, Sync
from pasta_jax.rounding import next_power_of_two

LOG = logging.getLogger("pasta_jax")

LIMITS = Limits(lanes=8, threads=16, pool=448)
GREEDY = SamplingParams(max_new_tokens=384, max_branch_tokens=256)


@dataclasses.dataclass(frozen=True)
class Measured:
    """One system's answer to one prompt.

    The counts and wall_s are fields of `Stats` and mean the same.

    Attributes:
      family, prompt: of the task.
      text, annotated, stop_reason, issues: as in `DecodeResult`.
      truth: the judge's score, 0 to 1.
      wall_s: of the second of two decodes; 0 if it was not timed.
      promises: number of branches.
    """

    family: str
    prompt: str
    text: str
    annotated: str
    truth: float
    output_tokens: int
    text_tokens: int
    critical_path: int
    decode_steps: int
    wall_s: float
    stop_reason: str
    issues: tuple[str, ...]
    promises: int


COSTS = ("output_tokens", "text_tokens", "critical_path", "decode_steps", "wall_s")
"""Fields that `Measured` shares with `Stats`."""

System: TypeAlias = Callable[[almanac.Task], Measured]

Task = TypeVar("Task")
Answer = TypeVar("Answer", bound=Any)


# ------------------------------------------------------------------------------------------------- systems


def decoding(model: Model, like: Decoder | None = None) -> System:
    """A model in the engine at batch 1. It shares the compiled programs of `like` if they fit."""
    decoder = like.for_model(model) if like and like.fits(model) else Decoder(model, limits=LIMITS)

    def answer(task: almanac.Task) -> Measured:
        prompt = [model.tokenizer.encode_prompt(task.prompt)]
        decoder.decode(prompt, [GREEDY])
        (trace,), timing = decoder.decode(prompt, [GREEDY])
        return judged(model, task, trace, timing.wall_s)

    return answer


def judged(model: Model, task: almanac.Task, trace: Trace, wall_s: float) -> Measured:
    """A trace as an answer to a task."""
    decoded = result(model.tokenizer, trace, wall_s)
    return Measured(
        family=task.family,
        prompt=task.prompt,
        text=decoded.text,
        annotated=decoded.annotated,
        truth=almanac.truth(task, decoded.text).score,
        **{name: getattr(decoded.stats, name) for name in COSTS},
        stop_reason=decoded.stop_reason,
        issues=decoded.issues,
        promises=len(decoded.branches),
    )


def skeleton_of_thought(model: Model) -> System:
    """Skeleton-of-Thought in the engine, with a model trained on its prompts.

    The points are the rows of a batch: the smallest of 1, 2, 4 and 8 rows that holds them, with one lane each, so
    that no step is wider than necessary.
    """
    limits = dataclasses.replace(LIMITS, lanes=1)
    sequential = dataclasses.replace(GREEDY, open_bias=-math.inf)

    @functools.cache
    def decoder(rows: int) -> Decoder:
        return Decoder(model, limits=limits, rows=rows)

    def once(task: almanac.Task) -> tuple[sot.SkeletonAnswer, float, str]:
        wall_s: list[float] = []
        stops: list[str] = []

        def ask(prompts: list[str]) -> list[sot.Reply]:
            rows = next_power_of_two(len(prompts))
            ids = [model.tokenizer.encode_prompt(prompt) for prompt in prompts]
            traces, timing = decoder(rows).decode(ids, [sequential] * len(ids))
            wall_s.append(timing.wall_s)
            results = [result(model.tokenizer, trace) for trace in traces]
            stops.extend(decoded.stop_reason for decoded in results)
            return [sot.Reply(decoded.text, decoded.stats.output_tokens) for decoded in results]

        reply = sot.answer(ask, task.prompt)
        return reply, sum(wall_s), next((stop for stop in stops if stop != "eos"), "eos")

    def answer(task: almanac.Task) -> Measured:
        once(task)
        reply, wall_s, stop = once(task)
        return Measured(
            family=task.family,
            prompt=task.prompt,
            text=reply.text,
            annotated=reply.text,
            truth=almanac.truth(task, reply.text).score,
            output_tokens=reply.tokens,
            text_tokens=len(model.tokenizer.encode(reply.text)),
            critical_path=max(1, reply.steps),
            decode_steps=reply.steps,
            wall_s=wall_s,
            stop_reason=stop,
            issues=(),
            promises=len(reply.points),
        )

    return answer


def answer_at_once(
    model: Model, tasks: Sequence[almanac.Task], like: Decoder | None = None
) -> list[Measured]:
    """A model's answers to many tasks, in batches and not timed: enough for truth and theoretical speed."""
    decoder = like.for_model(model) if like else batched_decoder(model)
    prompts = [model.tokenizer.encode_prompt(task.prompt) for task in tasks]
    traces, _ = decoder.decode(prompts, [GREEDY] * len(prompts))
    return [judged(model, task, trace, 0.0) for task, trace in zip(tasks, traces, strict=True)]


def batched_decoder(model: Model) -> Decoder:
    """The decoder of `answer_at_once`."""
    return Decoder(model, limits=dataclasses.replace(LIMITS, lanes=4), rows=32, chunk=64)


# ------------------------------------------------------------------------------------------------ evaluation


def evaluate(
    systems: Mapping[str, System], prompts: int, workdir: str, about: Mapping[str, Any]
) -> dict[str, list[Measured]]:
    """Every system's answers to the same held-out prompts, also written to WORKDIR/NAME.jsonl one by one.

    The systems take turns at each prompt, so that other load on the machine affects them alike. Prompts that all
    of them answered in an earlier call are not asked again.

    Args:
      systems: by name.
      prompts: number of prompts.
      workdir: folder of the output. Answers in it are kept if they were stamped with the same `about`.
      about: identifies the systems, as JSON can hold it.
    """
    tasks = almanac.evaluation_tasks(prompts)
    match = Match(systems, workdir, about)
    (answers,) = take_turns([match], tasks, read_answers, lambda task, answer: answer.prompt == task.prompt)
    return answers


@dataclasses.dataclass(frozen=True)
class Match(Generic[Task, Answer]):
    """Systems that answer the same tasks, and where to: as in `evaluate`, but of any tasks and answers."""

    systems: Mapping[str, Callable[[Task], Answer]]
    workdir: str
    about: Mapping[str, Any]

    def path(self, name: str) -> str:
        """The file of a system's answers."""
        return os.path.join(self.workdir, f"{name}.jsonl")


def take_turns(
    matches: Sequence[Match[Task, Answer]],
    tasks: Sequence[Task],
    read: Callable[[str], list[Answer]],
    belongs: Callable[[Task, Answer], bool],
    *,
    first: int | None = None,
    units: str = "prompts",
) -> list[dict[str, list[Answer]]]:
    """`evaluate` for several matches in turn. A system that several have by one name answers a task once for all.

    Args:
      matches: each has a workdir of its own.
      tasks: what all are asked.
      read: the answers in a file, up to the first broken line.
      belongs: whether an answer is one to this task.
      first: how many of the tasks to ask; answers that are there to more are kept and returned.
      units: what tasks are, for people.
    """
    with contextlib.ExitStack() as stack:
        for match in matches:
            stack.enter_context(locked(match.workdir))
        answers = [_kept(match, tasks, read, belongs) for match in matches]
        done = [len(next(iter(table.values()))) for table in answers]
        asked = tasks[:first]
        names = dict.fromkeys(system for match in matches for system in match.systems)
        if min(done) < len(asked):
            LOG.info(
                "%d %s for %s; %d are done. The first take longer: programs are compiled.",
                *(len(asked), units, " and ".join(names), min(done)),
            )
        files = [
            {name: stack.enter_context(Lines(match.path(name))) for name in match.systems}
            for match in matches
        ]
        quiet, logged_at, start = not shows_progress(), time.monotonic(), min(done)
        bar = tqdm(asked[start:], initial=start, total=len(asked), unit=f" {units}", disable=quiet)
        for number, task in enumerate(bar, start):
            said = dict[tuple[str, Callable[[Task], Answer]], Answer]()
            for match, table, count, to in zip(matches, answers, done, files):
                for name, system in match.systems.items() if number >= count else ():
                    if (name, system) not in said:
                        said[name, system] = system(task)
                    table[name].append(said[name, system])
                    to[name].write(json_line(dataclasses.asdict(said[name, system])))
            if quiet and time.monotonic() - logged_at > LOG_EVERY_S:
                LOG.info("%d of %d %s", number + 1, len(asked), units)
                logged_at = time.monotonic()
    return answers


def _kept(
    match: Match[Task, Answer],
    tasks: Sequence[Task],
    read: Callable[[str], list[Answer]],
    belongs: Callable[[Task, Answer], bool],
) -> dict[str, list[Answer]]:
    """The answers of earlier calls to as many of the first tasks as all systems answered."""
    stamp = Stamp(os.path.join(match.workdir, "about.json"))
    answers: dict[str, list[Answer]] = {name: [] for name in match.systems}
    if not stamp.check(match.about):
        answers = {name: read(match.path(name)) for name in match.systems}
    done = 0
    for task, *row in zip(tasks, *answers.values()):
        if not all(belongs(task, answer) for answer in row):
            break
        done += 1
    for name in answers:
        answers[name] = answers[name][:done]
        write_answers(match.path(name), answers[name])
    stamp.write(match.about)  # last: until now the files may have been of other systems
    return answers


def write_answers(path: str, answers: Sequence[Any]) -> None:
    """Replaces a JSONL file of answers."""
    write_jsonl(path, map(dataclasses.asdict, answers))


def read_answers(path: str) -> list[Measured]:
    """The answers in a JSONL file, up to the first broken line."""
    return read_jsonl(path, lambda fields: Measured(**fields | {"issues": tuple(fields["issues"])}))


# ------------------------------------------------------------------------------------------------- numbers


def win(baseline: Measured, test: Measured) -> float:
    """The judge's verdict on `test` against `baseline`: 1 better, 0 worse, 0.5 a tie."""
    winner = almanac.compare(test.prompt, test.text, baseline.text).winner
    return 0.5 if winner is None else float(winner == 0)


def realized(baseline: Measured, test: Measured) -> float:
    """The baseline's seconds / the test's; both must have been timed."""
    return baseline.wall_s / test.wall_s


def concludes_last(test: Measured) -> bool:
    """Whether no branch is open when main writes its last text, so that the text can depend on all of them.

    PASTA-LANG only: the tags of other dialects are not read.
    """
    is_open = last_was_open = False
    for node in parse(test.annotated, lenient=True).nodes:
        if isinstance(node, Promise | Sync):
            is_open = isinstance(node, Promise)
        elif node.text.strip():
            last_was_open = is_open
    return not last_was_open


def geometric_mean(ratios: Sequence[float]) -> float:
    """exp(mean(log)).

    >>> round(geometric_mean([1.0, 4.0]), 6)
    2.0
    """
    return math.exp(sum(map(math.log, ratios)) / len(ratios))
