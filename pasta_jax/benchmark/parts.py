"""Measurements of the engine: steps by width and by used pool, concurrent requests, replayed shapes.

Each part takes a model and what to vary, and returns a table: a list of points. All of them use `Decoder`, as
requests do. The time of one step is the slope between a shorter and a longer answer that are otherwise alike, so
it excludes the fixed cost of a call.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import random
import statistics
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pasta_jax.baselines import apar
from pasta_jax.benchmark.measure import Point, Spread, in_turn, ratio
from pasta_jax.benchmark.replay import PROMPT, UNLIMITED, ReplayError, Run, limits_for, replay, summaries
from pasta_jax.benchmark.trees import random_tree, some_words, text_of, with_topics
from pasta_jax.decoding.engine import Decoder
from pasta_jax.decoding.model import Model
from pasta_jax.decoding.request import SamplingParams
from pasta_jax.decoding.script import script_of
from pasta_jax.decoding.state import Limits
from pasta_jax.decoding.trace import Trace
from pasta_jax.lang.assemble import assemble
from pasta_jax.lang.program import Program, Promise, Text
from pasta_jax.tokens.tokenizer import Tokenizer

SEQUENTIAL = SamplingParams(open_bias=-math.inf)

LONGEST_REAL = 640
"""Maximal tokens of a real response to replay: longer ones take a CPU too long."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
      repeats: of each measurement.
      lanes: S of the decoder.
      widths: numbers of concurrent branches.
      rows: numbers of concurrent requests.
      branches: of replayed trees.
      tokens: mean length of a branch.
      answers: number replayed of each shape class.
      steps: number over which the time of a step is averaged.
      pool: P plus the lanes; some parts need more.
      prompt: length of the prompt in the comparison with peers.
      real: number of given responses to replay.
    """

    repeats: int = 5
    lanes: int = 16
    widths: tuple[int, ...] = (1, 2, 4, 8, 16)
    rows: tuple[int, ...] = (1, 2, 4, 8)
    branches: tuple[int, ...] = (2, 4, 8, 16)
    tokens: int = 32
    answers: int = 1
    steps: int = 32
    pool: int = 1024
    prompt: int = 512
    real: int = 6

    def __post_init__(self) -> None:
        if self.steps < 2 or self.pool <= self.lanes:
            raise ValueError(
                f"steps={self.steps} must be at least 2, pool={self.pool} more than the {self.lanes} lanes."
            )
        if max(self.widths) > self.lanes:
            raise ValueError(
                f"lanes={self.lanes} is less than the largest width to measure, {max(self.widths)}."
            )


QUICK = Plan(
    repeats=2, lanes=4, widths=(1, 4), rows=(1, 4), branches=(4,), tokens=8, steps=8, pool=128, prompt=32, real=1
)  # fmt: skip
"""A check that everything works, in seconds; the numbers mean little."""


# -------------------------------------------------------------------------------------------------------- width


def width(model: Model, plan: Plan, rng: random.Random) -> list[Point]:
    """Time of a decode step with k concurrent branches, one request."""
    ramp = 7 * max(plan.widths)  # steps after which main has written all its promises
    texts = [beside(rng, model.tokenizer, k, ramp + extra) for k in plan.widths for extra in (0, plan.steps)]
    decoder = Decoder(model, limits=limits_for(texts, model.tokenizer, lanes=plan.lanes))
    runs = [scripted(decoder, program) for program in texts]
    pairs = dict(zip(plan.widths, zip(runs[::2], runs[1::2])))
    used = {k: checked_pool(k, plan.steps, *pair) for k, pair in pairs.items()}
    times = step_times("width", pairs, plan)
    return [{"lanes used": k, "pool used": used[k], **times[k]} for k in plan.widths]


def beside(rng: random.Random, tokenizer: Tokenizer, branches: int, tokens: int) -> Program:
    """Branches of one length, promised right after each other, while main writes nothing else."""
    words = some_words(tokenizer)
    tens = min(99, math.ceil(tokens / 10))

    def promise() -> Promise:
        return Promise(rng.choice(words).strip(), tens, (Text(text_of(rng, tokenizer, words, tokens)),))

    return Program(tuple(promise() for _ in range(branches)))


def scripted(decoder: Decoder, program: Program, prompt: list[int] | None = None) -> Run:
    """A request whose answer is forced to be the program."""
    tokenizer = decoder.model.tokenizer
    script = script_of(program, tokenizer)
    return Run(decoder, tokenizer.encode_prompt(PROMPT) if prompt is None else prompt, script)


def checked_pool(k: int, steps: int, short: Run, long: Run) -> int:
    """Checks that the longer answer has only steps of width k more, and returns the mean pool entries in use."""
    (one, _), (other, _) = short.answer(), long.answer()
    size = k + 1 + int(max(one.widths.max(), other.widths.max()))
    more = np.bincount(other.widths, minlength=size) - np.bincount(one.widths, minlength=size)
    if np.flatnonzero(more).tolist() != [k] or more[k] != steps:
        raise ReplayError(
            f"Asked for {steps} more steps of width {k}, the engine took {more.tolist()} by width."
        )
    return (len(one.tokens) + len(other.tokens)) // 2


def step_times(part: str, pairs: Mapping[int, tuple[Run, Run]], plan: Plan) -> dict[int, Point]:
    """The time of a step for each short and long answer, and its ratio to the first one's."""
    slopes = {str(key): slope(*pair, plan.steps) for key, pair in pairs.items()}
    samples = dict(zip(pairs, in_turn(part, slopes, plan.repeats).values()))
    first = next(iter(samples.values()))
    return {
        key: {"step, ms": Spread.of(times), "against the first": ratio(times, first)}
        for key, times in samples.items()
    }


def slope(short: Run, long: Run, steps: int) -> Callable[[], float]:
    """A function that measures the milliseconds of one additional step of `long`."""

    def step_ms() -> float:
        before, after = short.answer()[1], long.answer()[1]
        return 1000 * (after - before) / steps

    return step_ms


# --------------------------------------------------------------------------------------------------------- pool


def pool_used(model: Model, plan: Plan, rng: random.Random) -> list[Point]:
    """Time of a decode step of one thread, by the number of pool entries in use."""
    tokenizer = model.tokenizer
    words = some_words(tokenizer)
    pool = plan.pool - plan.lanes  # with the lanes, one of the sizes that programs are compiled for
    room = pool - plan.steps - 2
    used = sorted({max(16, room * eighths // 8) for eighths in (0, 1, 2, 4, 8)})
    decoder = Decoder(model, limits=Limits(plan.lanes, plan.lanes, pool, model.max_depth))
    pairs = {}
    for length in used:
        prompt = [tokenizer.vocabulary.bos, *tokenizer.encode(text_of(rng, tokenizer, words, length - 1))]
        text = [Program((Text(text_of(rng, tokenizer, words, n)),)) for n in (1, 1 + plan.steps)]
        short, long = (scripted(decoder, program, prompt) for program in text)
        pairs[length] = short, long
    times = step_times("pool", pairs, plan)
    return [{"pool used": length + plan.steps // 2, "pool": pool, **times[length]} for length in used]


# -------------------------------------------------------------------------------------------------------- batch


def batch(model: Model, plan: Plan, rng: random.Random) -> list[Point]:
    """Tokens per second of the same requests in batches of different sizes.

    `plain` requests are decoded freely and sequentially; their text must not depend on the batch. `trees` are
    replayed.
    """
    tokenizer, count = model.tokenizer, max(plan.rows)
    words = some_words(tokenizer)
    prompts = [
        tokenizer.encode_prompt(text_of(rng, tokenizer, words, rng.randint(4, 24))) for _ in range(count)
    ]
    trees = [random_tree(rng, tokenizer, branches=4, tokens=plan.tokens) for _ in range(count)]
    limits = limits_for(trees, tokenizer, lanes=plan.lanes, prompt=" ".join(["word"] * 40))
    scripts = [script_of(tree, tokenizer) for tree in trees]
    plain = dataclasses.replace(SEQUENTIAL, max_new_tokens=3 * plan.tokens)
    sampling = {
        "plain": [plain] * count,
        "trees": [SamplingParams(UNLIMITED, UNLIMITED, script=script) for script in scripts],
    }
    answers: dict[tuple[str, int], list[Trace]] = {}
    calls = {}
    for rows in plan.rows:
        decoder = Decoder(model, limits=limits, rows=rows)
        for kind in sampling:
            calls[f"{kind}, {rows}"] = _throughput(decoder, prompts, sampling[kind], answers, (kind, rows))
    samples = in_turn("batch", calls, plan.repeats)
    points: list[Point] = []
    for kind in sampling:
        first = samples[f"{kind}, {plan.rows[0]}"]
        for rows in plan.rows:
            rates = samples[f"{kind}, {rows}"]
            points.append(
                {
                    "answers": kind,
                    "rows": rows,
                    "tokens/s": Spread.of(rates),
                    "against the first": ratio(rates, first),
                    "same text": _tokens(answers[kind, rows]) == _tokens(answers[kind, plan.rows[0]]),
                }
            )
    return points


def _throughput(
    decoder: Decoder,
    prompts: list[list[int]],
    sampling: list[SamplingParams],
    answers: dict[tuple[str, int], list[Trace]],
    name: tuple[str, int],
) -> Callable[[], float]:
    """A function that measures the tokens per second of all requests, and leaves the traces in `answers[name]`."""

    def tokens_per_s() -> float:
        answers[name], timing = decoder.decode(prompts, sampling)
        return sum(int((trace.step > 0).sum()) for trace in answers[name]) / timing.wall_s

    return tokens_per_s


def _tokens(traces: Sequence[Trace]) -> list[list[list[int]]]:
    return [[list(tokens) for tokens in trace.threads.tokens] for trace in traces]


# ------------------------------------------------------------------------------------------------------- replay


def shapes(
    tokenizer: Tokenizer, plan: Plan, rng: random.Random, responses: Sequence[str] = ()
) -> dict[str, list[Program]]:
    """The shape classes that are replayed: numbers of branches, their lengths, syncs, nesting, real responses."""
    middle = plan.branches[len(plan.branches) // 2]
    settings: dict[str, dict] = {}
    for branches in plan.branches:
        settings[f"{branches} branches"] = dict(branches=branches)
        settings[f"{branches} unbalanced"] = dict(branches=branches, balanced=False)
    settings[f"{middle} with syncs"] = dict(branches=middle, syncs=True)
    settings[f"{middle} nested"] = dict(branches=middle, balanced=False, depth=2)
    programs = {
        name: [random_tree(rng, tokenizer, tokens=plan.tokens, **shape) for _ in range(plan.answers)]
        for name, shape in settings.items()
    }
    if responses:
        programs["real"] = real_shapes(tokenizer, responses, plan.real, rng)
    return programs


def real_shapes(
    tokenizer: Tokenizer, responses: Sequence[str], count: int, rng: random.Random
) -> list[Program]:
    """A sample of the responses that are short enough and in which a rule finds promises (`baselines.apar`).

    Raises:
      ValueError: there is none.
    """
    annotated = [program for text in responses if [*(program := apar.annotate(text)).promises()]]
    short = [program for program in annotated if len(tokenizer.encode(assemble(program))) <= LONGEST_REAL]
    if not short:
        raise ValueError(
            f"None of {len(responses)} responses is a list or has paragraphs with something to promise."
        )
    return [with_topics(program, tokenizer) for program in rng.sample(short, min(count, len(short)))]


def read_responses(path: str | os.PathLike[str]) -> list[str]:
    """The `response` of each line of a JSONL file. Raises ValueError if a line has none."""
    responses = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                responses.append(json.loads(line)["response"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{os.fspath(path)}, line {number}: no JSON object with a response."
                ) from error
    return responses


def replayed(model: Model, plan: Plan, rng: random.Random, responses: Sequence[str] = ()) -> list[Point]:
    """Efficiency of each shape class and overall."""
    programs = shapes(model.tokenizer, plan, rng, responses)
    every = [program for several in programs.values() for program in several]
    decoder = Decoder(model, limits=limits_for(every, model.tokenizer, lanes=plan.lanes))
    measured = replay(decoder, programs, plan.repeats)
    points: list[Point] = []
    for summary in summaries(measured):
        group = [answer for answer in measured if summary.shape in (answer.shape, "overall")]
        points.append(
            {
                "shape": summary.shape,
                "answers": summary.answers,
                "text tokens": statistics.mean(answer.text_tokens for answer in group),
                "steps": statistics.mean(answer.steps for answer in group),
                "mean width": statistics.mean(_mean_width(answer.widths) for answer in group),
                "steps of width 1, 2, ...": _sum([answer.widths for answer in group]),
                "theoretical, x": summary.theoretical,
                "realized, x": summary.realized,
                "efficiency": Spread.of(summary.efficiencies),
                "of steps alone": summary.decode_efficiency,
            }
        )
    return points


def _sum(histograms: Sequence[Sequence[int]]) -> tuple[int, ...]:
    return tuple(map(sum, itertools.zip_longest(*histograms, fillvalue=0)))


def _mean_width(widths: Sequence[int]) -> float:
    return sum(width * steps for width, steps in enumerate(widths, 1)) / sum(widths)
