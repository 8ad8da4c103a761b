"""Measurements of the decoder: the time of a step by width and by pool fill, throughput by batch size, replay.

Each function takes a model and an effort, and returns a table. All of them decode with `Decoder`, as requests do.
The time of a step is (time of a longer answer - time of a shorter one) / additional steps, for answers that are
otherwise alike. So it excludes the fixed cost of a call.
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
from typing import Any

import numpy as np

from pasta_jax.baselines import apar
from pasta_jax.benchmark.measure import Key, Quartiles, TableRow, interleaved, median_ratio
from pasta_jax.benchmark.replay import (
    OVERALL,
    PROMPT,
    UNLIMITED,
    ReplayError,
    Run,
    in_one_size,
    limits_for,
    replay,
    summaries,
)
from pasta_jax.benchmark.trees import (
    complete_promises,
    one_token_words,
    promised_tens,
    random_text,
    random_tree,
)
from pasta_jax.decoding.engine import Decoder
from pasta_jax.decoding.model import Model
from pasta_jax.decoding.request import SamplingParams
from pasta_jax.decoding.script import no_script, script_of
from pasta_jax.decoding.state import Limits
from pasta_jax.decoding.trace import Trace
from pasta_jax.lang.assemble import assemble
from pasta_jax.lang.program import Program, Promise, Text
from pasta_jax.tokens.tokenizer import Tokenizer

SEQUENTIAL = SamplingParams(open_bias=-math.inf)
"""Sampling that forbids promises."""

PROMISE_STEPS = 7
"""At most so many steps write a promise whose topic is one word."""

MIN_PROMPT_TOKENS = 16
"""Tokens of the shortest prompt in the measurement by pool fill."""

BATCHED_PROMPT = 32
"""The bucket of the prompts in the measurement by batch size: one, so that little is compiled."""

MAX_REAL_TOKENS = 640
"""Longer responses are not replayed: they take a CPU too long."""


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
      repeats: how often each measurement is repeated.
      lanes: S of the decoder.
      branches_at_once: in the measurement by width, the numbers of branches decoded at the same time.
      rows: in the measurement by batch size, the numbers of concurrent requests.
      requests: the same, in the measurement of admission.
      branches: the numbers of branches of the replayed trees.
      branch_tokens: mean length of their branches.
      answers_per_kind: how many answers of each kind of tree are replayed.
      steps: decode steps over which the time of one is averaged.
      entries: P + S, the pool with the entries that idle lanes write; replay may need more.
      prompt_tokens: length of the prompts in the comparison with peers, and of the system prompt.
      real_responses: how many of the given responses are replayed.
      train_rows, train_length: B and L of an update of training.
    """

    repeats: int = 5
    lanes: int = 16
    branches_at_once: tuple[int, ...] = (1, 2, 4, 8, 16)
    rows: tuple[int, ...] = (1, 2, 4, 8)
    requests: tuple[int, ...] = (1, 4, 8, 16)
    branches: tuple[int, ...] = (2, 4, 8, 16)
    branch_tokens: int = 32
    answers_per_kind: int = 1
    steps: int = 32
    entries: int = 1024
    prompt_tokens: int = 512
    real_responses: int = 6
    train_rows: int = 8
    train_length: int = 512

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ValueError(f"--steps={self.steps} must be at least 2: the time of a step is a difference.")
        if self.entries <= self.lanes:
            raise ValueError(f"--pool={self.entries} must be more than the {self.lanes} lanes.")
        if max(self.branches_at_once) > self.lanes:
            raise ValueError(
                f"{max(self.branches_at_once)} branches at once need as many lanes, but lanes={self.lanes}."
            )


QUICK = Effort(
    repeats=2, lanes=4, branches_at_once=(1, 4), rows=(1, 4), branches=(4,), branch_tokens=8, steps=8, entries=128,
    requests=(1, 2), prompt_tokens=32, real_responses=1, train_rows=2, train_length=64,
)  # fmt: skip
"""A check that everything works, in seconds; the numbers mean little."""


# -------------------------------------------------------------------------------------------------------- width


def measure_width(model: Model, effort: Effort, rng: random.Random) -> list[TableRow]:
    """Measures the time of a decode step of one request; one table row per number of concurrent branches."""
    promising = PROMISE_STEPS * max(
        effort.branches_at_once
    )  # steps in which main may still write its promises
    programs = [
        concurrent_branches(rng, model.tokenizer, branches, promising + additional)
        for branches in effort.branches_at_once
        for additional in (0, effort.steps)
    ]
    decoder = Decoder(model, limits=limits_for(programs, model.tokenizer, lanes=effort.lanes))
    prompt = model.tokenizer.encode_prompt(PROMPT)
    runs = scripted_runs(decoder, [(prompt, program) for program in programs])
    pairs = dict(zip(effort.branches_at_once, zip(runs[::2], runs[1::2])))
    pool_used = {width: checked_pool_use(width, effort.steps, *pair) for width, pair in pairs.items()}
    times = step_times("width", pairs, effort)
    return [{"width": width, "pool used": pool_used[width], **times[width]} for width in pairs]


def concurrent_branches(rng: random.Random, tokenizer: Tokenizer, branches: int, tokens: int) -> Program:
    """Branches of one length, promised right after each other, while main writes nothing else."""
    words = one_token_words(tokenizer)

    def promise() -> Promise:
        topic = rng.choice(words).strip()
        return Promise(topic, promised_tens(tokens), (Text(random_text(rng, tokenizer, words, tokens)),))

    return Program(tuple(promise() for _ in range(branches)))


def scripted_runs(decoder: Decoder, answers: Sequence[tuple[list[int], Program]]) -> list[Run]:
    """Requests, prompts with what their tokens are forced to be; all through the same program."""
    scripts = in_one_size([script_of(program, decoder.model.tokenizer) for _, program in answers])
    return [Run(decoder, prompt, script) for (prompt, _), script in zip(answers, scripts, strict=True)]


def checked_pool_use(width: int, steps: int, short: Run, long: Run) -> int:
    """The mean number of pool entries that the two answers use.

    Raises:
      ReplayError: the longer answer does not take just `steps` more steps, all of this width.
    """
    (short_trace, _), (long_trace, _) = short.answer(), long.answer()
    size = 1 + max(width, int(short_trace.widths.max()), int(long_trace.widths.max()))
    additional = np.bincount(long_trace.widths, minlength=size) - np.bincount(
        short_trace.widths, minlength=size
    )
    if np.flatnonzero(additional).tolist() != [width] or additional[width] != steps:
        raise ReplayError(
            f"Expected {steps} additional steps of width {width}, but by width there are {additional.tolist()}."
        )
    return (len(short_trace.tokens) + len(long_trace.tokens)) // 2


def step_times(part: str, pairs: Mapping[Key, tuple[Run, Run]], effort: Effort) -> dict[Key, TableRow]:
    """The time of a step for each pair of a short and a long answer, also relative to the first pair's."""
    timers = {key: step_timer(short, long, effort.steps) for key, (short, long) in pairs.items()}
    samples = interleaved(part, timers, effort.repeats, "ms a step")
    first = next(iter(samples.values()))
    return {
        key: {"step, ms": Quartiles.of(times), "relative to the first row": median_ratio(times, first)}
        for key, times in samples.items()
    }


def step_timer(short: Run, long: Run, steps: int) -> Callable[[], float]:
    """A function that measures the milliseconds of one of the steps that `long` takes more than `short`."""

    def step_ms() -> float:
        short_s, long_s = short.answer()[1], long.answer()[1]
        return 1000 * (long_s - short_s) / steps

    return step_ms


# --------------------------------------------------------------------------------------------------------- pool


def measure_pool_fill(model: Model, effort: Effort, rng: random.Random) -> list[TableRow]:
    """Measures the time of a decode step of one thread; one table row per number of pool entries in use."""
    tokenizer = model.tokenizer
    words = one_token_words(tokenizer)
    pool = effort.entries - effort.lanes
    longest = pool - effort.steps - 2  # the longer answer has 1 + steps tokens and its end
    lengths = sorted({max(MIN_PROMPT_TOKENS, int(longest * share)) for share in (0, 1 / 8, 1 / 4, 1 / 2, 1)})
    limits = Limits(lanes=effort.lanes, threads=effort.lanes, pool=pool, max_depth=model.max_depth)
    decoder = Decoder(model, limits=limits)
    answers = []
    for length in lengths:
        text = random_text(rng, tokenizer, words, length - 1)
        prompt = [tokenizer.vocabulary.bos, *tokenizer.encode(text)]
        for tokens in (1, 1 + effort.steps):
            answers.append((prompt, Program((Text(random_text(rng, tokenizer, words, tokens)),))))
    runs = scripted_runs(decoder, answers)
    pairs = dict(zip(lengths, zip(runs[::2], runs[1::2])))
    times = step_times("pool", pairs, effort)
    return [{"pool used": length + effort.steps // 2, "pool": pool, **times[length]} for length in lengths]


# -------------------------------------------------------------------------------------------------------- batch


def measure_batch(model: Model, effort: Effort, rng: random.Random) -> list[TableRow]:
    """Measures throughput for the same requests in batches; one table row per kind of answer and batch size.

    Tokens per second counts all tokens fed, those of tags included. `sequential` answers are the model's own, with
    promises forbidden: their text must not depend on the batch. `trees` are replayed.
    The largest batch is measured with `batch_invariant` too.
    """
    tokenizer, count = model.tokenizer, max(effort.rows)
    words = one_token_words(tokenizer)
    prompts = [
        tokenizer.encode_prompt(random_text(rng, tokenizer, words, rng.randint(4, 24))) for _ in range(count)
    ]
    trees = [random_tree(rng, tokenizer, branches=4, tokens=effort.branch_tokens) for _ in range(count)]
    longest_prompt = " ".join(["word"] * 40)  # longer than any of them
    limits = limits_for(trees, tokenizer, lanes=effort.lanes, prompt=longest_prompt)
    # The script of the model's own answers leaves all free; it is there so that one program serves both kinds.
    free, *scripts = in_one_size([no_script(), *(script_of(tree, tokenizer) for tree in trees)])
    own = dataclasses.replace(SEQUENTIAL, max_new_tokens=3 * effort.branch_tokens, script=free)
    sampling = {
        "sequential": [own] * count,
        "trees": [
            SamplingParams(UNLIMITED, max_branch_tokens=UNLIMITED, script=script) for script in scripts
        ],
    }
    texts, meters = {}, {}
    batches = [(rows, False) for rows in effort.rows] + [(count, True)]
    for rows, invariant in batches:
        decoder = Decoder(
            model, limits=limits, rows=rows, prompt_buckets=(BATCHED_PROMPT,), batch_invariant=invariant
        )
        for kind in sampling:
            traces, _ = decoder.decode(prompts, sampling[kind])
            texts[kind, rows, invariant] = _thread_tokens(traces)
            meters[kind, rows, invariant] = throughput_meter(decoder, prompts, sampling[kind])
    named = {
        f"{kind}, {rows}{', batch-invariant' * invariant}": meter
        for (kind, rows, invariant), meter in meters.items()
    }
    samples = dict(zip(meters, interleaved("batch", named, effort.repeats, "tokens/s").values()))
    return [
        {
            "answers": f"{kind}, batch-invariant" if invariant else kind,
            "rows": rows,
            "tokens/s": Quartiles.of(samples[kind, rows, invariant]),
            "relative to the first row": median_ratio(
                samples[kind, rows, invariant], samples[kind, effort.rows[0], False]
            ),
            "same text": texts[kind, rows, invariant] == texts[kind, effort.rows[0], False],
        }
        for kind in sampling
        for rows, invariant in batches
    ]


def throughput_meter(
    decoder: Decoder, prompts: list[list[int]], sampling: list[SamplingParams]
) -> Callable[[], float]:
    """A function that answers all requests and returns the tokens fed per second."""

    def tokens_per_s() -> float:
        traces, timing = decoder.decode(prompts, sampling)
        return sum(int((trace.step > 0).sum()) for trace in traces) / timing.wall_s

    return tokens_per_s


def _thread_tokens(traces: Sequence[Trace]) -> list[list[list[int]]]:
    return [[list(tokens) for tokens in trace.threads.tokens] for trace in traces]


# ------------------------------------------------------------------------------------------------------- replay


def measure_replay(
    model: Model, effort: Effort, rng: random.Random, responses: Sequence[str] = ()
) -> list[TableRow]:
    """Measures speedups and efficiency of replayed answers; one table row per kind of tree, and one for all."""
    programs = programs_by_kind(model.tokenizer, effort, rng, responses)
    all_programs = [program for of_kind in programs.values() for program in of_kind]
    decoder = Decoder(model, limits=limits_for(all_programs, model.tokenizer, lanes=effort.lanes))
    measured = replay(decoder, programs, effort.repeats)
    table: list[TableRow] = []
    for summary in summaries(measured):
        group = [answer for answer in measured if summary.kind in (answer.kind, OVERALL)]
        table.append(
            {
                "kind": summary.kind,
                "answers": summary.answers,
                "text tokens": statistics.mean(answer.text_tokens for answer in group),
                "steps": statistics.mean(answer.steps for answer in group),
                "mean width": statistics.mean(_mean_width(answer.steps_by_width) for answer in group),
                "steps of width 1, 2, ...": _sum([answer.steps_by_width for answer in group]),
                "theoretical, x": summary.theoretical,
                "realized, x": summary.realized,
                "efficiency": Quartiles.of(summary.efficiencies),
                "efficiency without the start": summary.decode_efficiency,
            }
        )
    return table


def programs_by_kind(
    tokenizer: Tokenizer, effort: Effort, rng: random.Random, responses: Sequence[str] = ()
) -> dict[str, list[Program]]:
    """The answers to replay, by kind of tree: number of branches, their lengths, syncs, nesting; real responses."""
    middle = effort.branches[len(effort.branches) // 2]
    options: dict[str, dict[str, Any]] = {}  # of `random_tree`, by kind
    for branches in effort.branches:
        options[f"{branches} branches"] = dict(branches=branches)
        options[f"{branches} unbalanced"] = dict(branches=branches, balanced=False)
    options[f"{middle} with syncs"] = dict(branches=middle, syncs=True)
    options[f"{middle} nested"] = dict(branches=middle, balanced=False, depth=2)
    programs = {
        kind: [
            random_tree(rng, tokenizer, tokens=effort.branch_tokens, **of_kind)
            for _ in range(effort.answers_per_kind)
        ]
        for kind, of_kind in options.items()
    }
    if responses:
        programs["real"] = real_programs(tokenizer, responses, effort.real_responses, rng)
    return programs


def real_programs(
    tokenizer: Tokenizer, responses: Sequence[str], count: int, rng: random.Random
) -> list[Program]:
    """A sample of the responses that are short enough and in which a rule finds promises (`baselines.apar`).

    Raises:
      ValueError: there is none.
    """
    annotated = [apar.annotate(response) for response in responses]
    promising = [program for program in annotated if any(program.promises())]
    if not promising:
        raise ValueError(
            f"None of {len(responses)} responses is a list or has paragraphs with something to promise."
        )
    short = [program for program in promising if len(tokenizer.encode(assemble(program))) <= MAX_REAL_TOKENS]
    if not short:
        raise ValueError(
            f"{len(promising)} of {len(responses)} responses have something to promise, but all of those have more "
            f"than {MAX_REAL_TOKENS} tokens."
        )
    return [complete_promises(program, tokenizer) for program in rng.sample(short, min(count, len(short)))]


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


def _sum(histograms: Sequence[Sequence[int]]) -> tuple[int, ...]:
    return tuple(map(sum, itertools.zip_longest(*histograms, fillvalue=0)))


def _mean_width(steps_by_width: Sequence[int]) -> float:
    return sum(width * steps for width, steps in enumerate(steps_by_width, 1)) / sum(steps_by_width)
