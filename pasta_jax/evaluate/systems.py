"""Systems that answer prompts, measured one beside the other: what `evaluate`, the demo and `reproduce` share.

A system is anything that answers a task and says what it cost: a model in the engine, or Skeleton-of-Thought,
which asks the engine twice. Speeds are measured at batch 1, each request decoded twice and the second timed
(paper section 5.1).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from tqdm import tqdm

from pasta_jax.baselines import sot
from pasta_jax.data import almanac
from pasta_jax.decoding.engine import Decoder
from pasta_jax.decoding.model import Model
from pasta_jax.decoding.request import SamplingParams
from pasta_jax.decoding.results import result
from pasta_jax.decoding.state import Limits
from pasta_jax.decoding.trace import Trace
from pasta_jax.files import replacing
from pasta_jax.lang.parse import parse
from pasta_jax.lang.program import Promise, Sync
from pasta_jax.rounding import next_power_of_two

LOG = logging.getLogger("pasta_jax")

LIMITS = Limits(lanes=8, threads=16, pool=448)
GREEDY = SamplingParams(max_new_tokens=384, max_branch_tokens=256)


@dataclasses.dataclass(frozen=True)
class Measured:
    """One system's answer to one prompt, measured.

    Attributes:
      truth: the judge's score, 0 to 1.
      output_tokens: tokens of the answer, tags included.
      text_tokens: tokens without tags.
      critical_path: decode steps needed with unlimited lanes.
      decode_steps: decode steps taken.
      wall_s: seconds of the second of two decodes, prompt included; 0 if it was not timed.
      promises: branches that the answer was decoded in, main apart.
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


System: TypeAlias = Callable[[almanac.Task], Measured]


# ------------------------------------------------------------------------------------------------- systems


def decoding(model: Model, like: Decoder | None = None) -> System:
    """A model in the engine at batch 1. `like` is a decoder whose compiled programs it shares if they fit."""
    decoder = like.for_model(model) if like and like.fits(model) else Decoder(model, limits=LIMITS)

    def answer(task: almanac.Task) -> Measured:
        prompt = [model.tokenizer.encode_prompt(task.prompt)]
        decoder.decode(prompt, [GREEDY])
        (trace,), timing = decoder.decode(prompt, [GREEDY])
        return judged(model, task, trace, timing.wall_s)

    return answer


def judged(model: Model, task: almanac.Task, trace: Trace, wall_s: float) -> Measured:
    """A trace as an answer to a task."""
    tokenizer = model.tokenizer
    decoded = result(tokenizer, trace, wall_s)
    return Measured(
        family=task.family,
        prompt=task.prompt,
        text=decoded.text,
        annotated=decoded.annotated,
        truth=almanac.truth(task, decoded.text).score,
        output_tokens=decoded.stats.output_tokens,
        text_tokens=decoded.stats.text_tokens,
        critical_path=decoded.stats.critical_path,
        decode_steps=trace.steps,
        wall_s=wall_s,
        stop_reason=decoded.stop_reason,
        issues=decoded.issues,
        promises=len(decoded.branches),
    )


def skeleton_of_thought(model: Model) -> System:
    """Skeleton-of-Thought with a model that knows its prompts, in the engine: the points in rows of a batch.

    The batch is the smallest of 1, 2, 4 and 8 rows that holds the points, a lane each, so that no step is
    wider than it must be.
    """
    limits = dataclasses.replace(LIMITS, lanes=1)
    sequential = dataclasses.replace(GREEDY, open_bias=-math.inf)

    @functools.cache
    def decoder(rows: int) -> Decoder:
        return Decoder(model, limits=limits, rows=rows)

    def once(task: almanac.Task) -> tuple[sot.SkeletonAnswer, float, str]:
        wall_s: list[float] = []
        stops: list[str] = []

        def ask(prompts: list[str]) -> list[_Reply]:
            rows = next_power_of_two(len(prompts))
            ids = [model.tokenizer.encode_prompt(prompt) for prompt in prompts]
            traces, timing = decoder(rows).decode(ids, [sequential] * len(ids))
            wall_s.append(timing.wall_s)
            results = [result(model.tokenizer, trace) for trace in traces]
            stops.extend(each.stop_reason for each in results)
            return [_Reply(each.text, each.stats.output_tokens) for each in results]

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


@dataclasses.dataclass(frozen=True)
class _Reply:
    text: str
    steps: int


def answer_at_once(
    model: Model, tasks: Sequence[almanac.Task], like: Decoder | None = None
) -> list[Measured]:
    """Many answers of a model, in batches and not timed: what truth and theoretical speed need."""
    decoder = like.for_model(model) if like else batched_decoder(model)
    prompts = [model.tokenizer.encode_prompt(task.prompt) for task in tasks]
    traces, _ = decoder.decode(prompts, [GREEDY] * len(prompts))
    return [judged(model, task, trace, 0.0) for task, trace in zip(tasks, traces, strict=True)]


def batched_decoder(model: Model) -> Decoder:
    """The decoder of `answer_at_once`."""
    return Decoder(model, limits=dataclasses.replace(LIMITS, lanes=4), rows=32, chunk=64)


# --------------------------------------------------------------------------------------- answers, and at rest


def evaluate(
    systems: Mapping[str, System], prompts: int, workdir: str, about: Mapping[str, Any]
) -> dict[str, list[Measured]]:
    """Every system's answers to the same held-out prompts; also written to WORKDIR/NAME.jsonl as they come.

    The systems take turns at each prompt, so that what the machine does besides meets them alike. Prompts that
    all of them answered in an earlier call are not asked again.

    Args:
      systems: by name.
      prompts: how many.
      workdir: where to write; answers that are there already count if they are of the same `about`.
      about: which systems these are, as JSON can hold it.
    """
    os.makedirs(workdir, exist_ok=True)
    tasks = almanac.evaluation_tasks(prompts)
    paths = {name: os.path.join(workdir, f"{name}.jsonl") for name in systems}
    answers = _answered(tasks, paths, os.path.join(workdir, "about.json"), about)
    done = min(map(len, answers.values()))
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(path, "a", encoding="utf-8")) for name, path in paths.items()}
        quiet = not sys.stderr.isatty()
        bar = tqdm(tasks[done:], initial=done, total=len(tasks), unit="prompt", disable=quiet)
        for number, task in enumerate(bar, done + 1):
            for name, system in systems.items():
                answers[name].append(system(task))
                print(_line(answers[name][-1]), file=files[name], flush=True)
            if quiet and number % 100 == 0:
                LOG.info("%d of %d prompts", number, len(tasks))
    return answers


def _answered(
    tasks: Sequence[almanac.Task], paths: Mapping[str, str], about_path: str, about: Mapping[str, Any]
) -> dict[str, list[Measured]]:
    """Answers of an earlier call to the first of the tasks, as many as every system has; the files hold no more."""
    found: dict[str, list[Measured]] = {name: [] for name in paths}
    if os.path.exists(about_path):
        with open(about_path, encoding="utf-8") as file:
            if file.read() == _as_json(about):
                found = {name: read_answers(path) for name, path in paths.items()}
    done = 0
    for task, *given in zip(tasks, *found.values()):
        if any(answer.prompt != task.prompt for answer in given):
            break
        done += 1
    for name, path in paths.items():
        found[name] = found[name][:done]
        write_answers(path, found[name])
    with replacing(about_path) as file:  # last: until then the files may be of other systems
        file.write(_as_json(about))
    return found


def write_answers(path: str, answers: Sequence[Measured]) -> None:
    """Replaces the file."""
    with replacing(path) as file:
        file.writelines(_line(answer) + "\n" for answer in answers)


def read_answers(path: str) -> list[Measured]:
    """The answers in a file, up to the first line that is none, as one that was cut short."""
    answers: list[Measured] = []
    with contextlib.suppress(OSError, ValueError, TypeError), open(path, encoding="utf-8") as file:
        for line in file:
            fields = json.loads(line)
            answers.append(Measured(**fields | {"issues": tuple(fields["issues"])}))
    return answers


def _line(answer: Measured) -> str:
    return json.dumps(dataclasses.asdict(answer), ensure_ascii=False)


def _as_json(about: Mapping[str, Any]) -> str:
    return json.dumps(about, indent=2) + "\n"


# ------------------------------------------------------------------------------------------------- numbers


def win(baseline: Measured, test: Measured) -> float:
    """What the judge says of the test's answer against the baseline's: 1 better, 0 worse, 0.5 a tie."""
    winner = almanac.compare(test.prompt, test.text, baseline.text).winner
    return 0.5 if winner is None else float(winner == 0)


def realized(baseline: Measured, test: Measured) -> float:
    """Seconds of the baseline / seconds of the test; both must have been timed."""
    return baseline.wall_s / test.wall_s


def concludes_last(test: Measured) -> bool:
    """Whether no branch is open where main says its last text, so that it may rest on all of them.

    For PASTA-LANG only: the tags of other dialects are not read.
    """
    is_open = beside = False
    for node in parse(test.annotated, lenient=True).nodes:
        if isinstance(node, Promise | Sync):
            is_open = isinstance(node, Promise)
        elif node.text.strip():
            beside = is_open
    return not beside


def geometric_mean(ratios: Sequence[float]) -> float:
    """exp(mean(log)).

    >>> round(geometric_mean([1.0, 4.0]), 6)
    2.0
    """
    return math.exp(sum(map(math.log, ratios)) / len(ratios))
