"""What is measured of the engine: steps by their width and by the pool used, requests at once, replayed shapes.

Each part takes a model and what to vary, and gives a table: a list of points. All of it goes through `Decoder`, as
requests do. The time of one step is the slope between a shorter and a longer answer that are otherwise alike, so
that what a call costs besides its steps is not in it.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import random
import statistics
from collections.abc import Callable, Sequence

import numpy as np

from pasta_jax.baselines import apar
from pasta_jax.benchmark.measure import Point, Spread, in_turn, ratio
from pasta_jax.benchmark.replay import PROMPT, UNLIMITED, ReplayError, Run, limits_for, replay, summaries
from pasta_jax.benchmark.trees import random_tree, sequential, some_words, text_of, with_topics
from pasta_jax.decoding.engine import Decoder
from pasta_jax.decoding.model import Model
from pasta_jax.decoding.request import SamplingParams
from pasta_jax.decoding.script import script_of
from pasta_jax.decoding.state import Limits
from pasta_jax.decoding.trace import Trace
from pasta_jax.lang.program import Program, Promise, Text
from pasta_jax.tokens.tokenizer import Tokenizer

SEQUENTIAL = SamplingParams(open_bias=-math.inf)

LONGEST_REAL = 640
"""Tokens of a real response that is replayed, at most: longer ones take a CPU too long."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
      repeats: of everything.
      lanes: S of the decoder.
      widths: branches in flight at once.
      rows: requests at once.
      branches: of replayed trees.
      tokens: mean length of a branch.
      answers: replayed of each shape class.
      steps: that a step's time is averaged over.
      pool: P and the lanes' room, where a part does not need more.
      prompt: tokens of the prompt that is prefilled beside peers.
      real: responses replayed of those given.
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
            raise ValueError(f"lanes={self.lanes} are less than the width of {max(self.widths)} to measure.")


QUICK = Plan(
    repeats=2, lanes=4, widths=(1, 4), rows=(1, 4), branches=(4,), tokens=8, steps=8, pool=128, prompt=32, real=1
)  # fmt: skip
"""Whether all of it works, in seconds; the numbers say little."""


# -------------------------------------------------------------------------------------------------------- width


def width(model: Model, plan: Plan, rng: random.Random) -> list[Point]:
    """Time of a decode step with k branches in flight, one request."""
    ramp = 7 * max(plan.widths)  # steps in which main has made all its promises
    texts = [beside(rng, model.tokenizer, k, ramp + extra) for k in plan.widths for extra in (0, plan.steps)]
    decoder = Decoder(model, limits=limits_for(texts, model.tokenizer, lanes=plan.lanes))
    runs = [scripted(decoder, program) for program in texts]
    pairs = dict(zip(plan.widths, zip(runs[::2], runs[1::2])))
    used = {k: _grown(k, plan.steps, *pair) for k, pair in pairs.items()}
    slopes = {str(k): _slope(*pair, plan.steps) for k, pair in pairs.items()}
    samples = in_turn("width", slopes, plan.repeats)
    first = samples[str(plan.widths[0])]
    return [
        {
            "lanes used": k,
            "pool used": used[k],
            "step, ms": Spread.of(samples[str(k)]),
            "against the first": ratio(samples[str(k)], first),
        }
        for k in plan.widths
    ]


def beside(rng: random.Random, tokenizer: Tokenizer, branches: int, tokens: int) -> Program:
    """Branches of one length, promised one right after the other, while main has nothing to say."""
    words = some_words(tokenizer)
    said = min(99, math.ceil(tokens / 10))

    def promise() -> Promise:
        return Promise(rng.choice(words).strip(), said, (Text(text_of(rng, tokenizer, words, tokens)),))

    return Program(tuple(promise() for _ in range(branches)))


def scripted(decoder: Decoder, program: Program, prompt: list[int] | None = None) -> Run:
    """A request that is answered with the program."""
    tokenizer = decoder.model.tokenizer
    script = script_of(program, tokenizer, decoder.limits)
    return Run(decoder, tokenizer.encode_prompt(PROMPT) if prompt is None else prompt, script)


def _grown(k: int, steps: int, short: Run, long: Run) -> int:
    """Checks that all that the longer answer has more is steps of width k; how many entries it fills by then."""
    (one, _), (other, _) = short.answer(), long.answer()
    size = k + 1 + int(max(one.widths.max(), other.widths.max()))
    more = np.bincount(other.widths, minlength=size) - np.bincount(one.widths, minlength=size)
    if np.flatnonzero(more).tolist() != [k] or more[k] != steps:
        raise ReplayError(
            f"Asked for {steps} more steps of width {k}, the engine took {more.tolist()} by width."
        )
    return (len(one.tokens) + len(other.tokens)) // 2


def _slope(short: Run, long: Run, steps: int) -> Callable[[], float]:
    """Measures milliseconds of one of the steps that `long` has more."""

    def step_ms() -> float:
        before, after = short.answer()[1], long.answer()[1]
        return 1000 * (after - before) / steps

    return step_ms


# --------------------------------------------------------------------------------------------------------- pool


def pool_used(model: Model, plan: Plan, rng: random.Random) -> list[Point]:
    """Time of a decode step of one thread, by how much of the pool is used before."""
    tokenizer = model.tokenizer
    words = some_words(tokenizer)
    pool = plan.pool - plan.lanes  # with their room it is one of the sizes that programs are compiled for
    room = pool - plan.steps - 2
    used = sorted({max(16, room * eighths // 8) for eighths in (0, 1, 2, 4, 8)})
    decoder = Decoder(model, limits=Limits(plan.lanes, plan.lanes, pool, model.max_depth))
    slopes = {}
    for length in used:
        prompt = [tokenizer.vocabulary.bos, *tokenizer.encode(text_of(rng, tokenizer, words, length - 1))]
        text = [Program((Text(text_of(rng, tokenizer, words, n)),)) for n in (1, 1 + plan.steps)]
        short, long = (scripted(decoder, program, prompt) for program in text)
        slopes[str(length)] = _slope(short, long, plan.steps)
    samples = in_turn("pool", slopes, plan.repeats)
    first = samples[str(used[0])]
    return [
        {
            "pool used": length + plan.steps // 2,
            "pool": pool,
            "step, ms": Spread.of(samples[str(length)]),
            "against the first": ratio(samples[str(length)], first),
        }
        for length in used
    ]


# -------------------------------------------------------------------------------------------------------- batch


def batch(model: Model, plan: Plan, rng: random.Random) -> list[Point]:
    """Tokens a second of as many requests as the largest batch has, in batches of different sizes.

    `plain` requests are answered freely, one token after the other, and have to give the same text whatever the
    batch; `trees` are replayed.
    """
    tokenizer, count = model.tokenizer, max(plan.rows)
    words = some_words(tokenizer)
    prompts = [
        tokenizer.encode_prompt(text_of(rng, tokenizer, words, rng.randint(4, 24))) for _ in range(count)
    ]
    trees = [random_tree(rng, tokenizer, branches=4, tokens=plan.tokens) for _ in range(count)]
    limits = limits_for(trees, tokenizer, lanes=plan.lanes, prompt=" ".join(["word"] * 40))
    scripts = [script_of(tree, tokenizer, limits) for tree in trees]
    plain = dataclasses.replace(SEQUENTIAL, max_new_tokens=3 * plan.tokens)
    wishes = {
        "plain": [plain] * count,
        "trees": [SamplingParams(UNLIMITED, UNLIMITED, script=script) for script in scripts],
    }
    answers: dict[tuple[str, int], list[Trace]] = {}
    calls = {}
    for rows in plan.rows:
        decoder = Decoder(model, limits=limits, rows=rows)
        for kind in wishes:
            calls[f"{kind}, {rows}"] = _throughput(decoder, prompts, wishes[kind], answers, (kind, rows))
    samples = in_turn("batch", calls, plan.repeats)
    points: list[Point] = []
    for kind in wishes:
        first = samples[f"{kind}, {plan.rows[0]}"]
        for rows in plan.rows:
            rates = samples[f"{kind}, {rows}"]
            points.append(
                {
                    "answers": kind,
                    "rows": rows,
                    "tokens/s": Spread.of(rates),
                    "against the first": ratio(rates, first),
                    "same text": _said(answers[kind, rows]) == _said(answers[kind, plan.rows[0]]),
                }
            )
    return points


def _throughput(
    decoder: Decoder,
    prompts: list[list[int]],
    wishes: list[SamplingParams],
    answers: dict[tuple[str, int], list[Trace]],
    name: tuple[str, int],
) -> Callable[[], float]:
    """Measures tokens a second of all requests; leaves the traces in `answers[name]`."""

    def tokens_per_s() -> float:
        answers[name], timing = decoder.decode(prompts, wishes)
        return sum(int((trace.step > 0).sum()) for trace in answers[name]) / timing.wall_s

    return tokens_per_s


def _said(traces: Sequence[Trace]) -> list[list[list[int]]]:
    return [[list(tokens) for tokens in trace.threads.tokens] for trace in traces]


# ------------------------------------------------------------------------------------------------------- replay


def shapes(
    tokenizer: Tokenizer, plan: Plan, rng: random.Random, responses: Sequence[str] = ()
) -> dict[str, list[Program]]:
    """The shape classes that are replayed: numbers of branches, their lengths, syncs, nesting, real responses."""
    middle = plan.branches[len(plan.branches) // 2]
    wished: dict[str, dict] = {}
    for branches in plan.branches:
        wished[f"{branches} branches"] = dict(branches=branches)
        wished[f"{branches} unbalanced"] = dict(branches=branches, balanced=False)
    wished[f"{middle} with syncs"] = dict(branches=middle, syncs=True)
    wished[f"{middle} nested"] = dict(branches=middle, balanced=False, depth=2)
    found = {
        name: [random_tree(rng, tokenizer, tokens=plan.tokens, **wishes) for _ in range(plan.answers)]
        for name, wishes in wished.items()
    }
    if responses:
        found["real"] = real_shapes(tokenizer, responses, plan.real, rng)
    return found


def real_shapes(
    tokenizer: Tokenizer, responses: Sequence[str], count: int, rng: random.Random
) -> list[Program]:
    """Some of the responses in which a rule finds promises (`baselines.apar`), and which are not too long.

    Raises:
      ValueError: there is none.
    """
    found = [program for text in responses if [*(program := apar.annotate(text)).promises()]]
    usable = []
    for program in found:
        text = "".join(node.text for node in _texts(program))
        if len(tokenizer.encode(text)) <= LONGEST_REAL:
            usable.append(with_topics(program, tokenizer))
    if not usable:
        raise ValueError(
            f"None of {len(responses)} responses is a list or has paragraphs with something to promise."
        )
    return rng.sample(usable, min(count, len(usable)))


def _texts(program: Program) -> list[Text]:
    return [node for node in sequential(program).nodes if isinstance(node, Text)]


def read_responses(path: str | os.PathLike[str]) -> list[str]:
    """The `response` of each line of a JSONL file. Raises ValueError if a line has none."""
    found = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                found.append(json.loads(line)["response"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{os.fspath(path)}, line {number}: no JSON object with a response."
                ) from error
    return found


def replayed(model: Model, plan: Plan, rng: random.Random, responses: Sequence[str] = ()) -> list[Point]:
    """Efficiency of each shape class, and of all together."""
    programs = shapes(model.tokenizer, plan, rng, responses)
    every = [program for several in programs.values() for program in several]
    decoder = Decoder(model, limits=limits_for(every, model.tokenizer, lanes=plan.lanes))
    measured = replay(decoder, programs, plan.repeats)
    points: list[Point] = []
    for summary in summaries(measured):
        mine = [each for each in measured if summary.shape in (each.shape, "overall")]
        points.append(
            {
                "shape": summary.shape,
                "answers": summary.answers,
                "text tokens": statistics.mean(each.text_tokens for each in mine),
                "steps": statistics.mean(each.steps for each in mine),
                "mean width": statistics.mean(_mean_width(each.widths) for each in mine),
                "steps of width 1, 2, ...": _together([each.widths for each in mine]),
                "theoretical, x": summary.theoretical,
                "realized, x": summary.realized,
                "efficiency": Spread.of(summary.efficiencies),
                "of steps alone": summary.decode_efficiency,
            }
        )
    return points


def _together(histograms: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Their sum."""
    return tuple(map(sum, itertools.zip_longest(*histograms, fillvalue=0)))


def _mean_width(widths: Sequence[int]) -> float:
    return sum(width * steps for width, steps in enumerate(widths, 1)) / sum(widths)
