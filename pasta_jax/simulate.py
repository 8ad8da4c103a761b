"""How many requests a server answers in time: requests that arrive at random, by a table of step times.

    python -m pasta_jax.simulate --rows=16 --step_ms=4:8.87 --tokens=400 --branches=4 --bound=5
    python -m pasta_jax.simulate --step_ms=1:58,4:70,8:84 --answers=mine.jsonl --tokenizer=FILE --rates=0.1,0.2

The server has --rows rows and a queue, and looks at both between chunks of steps: answers that are complete leave,
and waiting requests take free rows, prefilled one after another. All rows of a step have the same number of lanes,
the least of the table that the widest of them needs, and the step takes what the table says. Answers have the
widths of annotated answers (--answers), or of main text with equal branches. For each rate it prints the seconds
until an answer is complete, and the goodput: requests a second that are answered within --bound seconds. No model
is needed; docs/serving.md says what this leaves out.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import re
import sys
from collections.abc import Sequence

import numpy as np
from absl import flags

from pasta_jax.terminal import markdown_table
from pasta_jax.verbs import refuse, run_main

LOADS = (0.3, 0.5, 0.7, 0.8, 0.9)
"""Shares of the most requests a second, at which a server is looked at by default."""


HIGHEST = 0.9
"""No rate beyond this share of the most is called in time: a queue grows there that few requests do not show."""


@dataclasses.dataclass(frozen=True)
class StepTimes:
    """Seconds of a decode step of all rows, by the lanes that each of them has: the widths that are compiled.

    Attributes:
      lanes: increasing, at least one.
      seconds: of a step with so many lanes a row.
    """

    lanes: tuple[int, ...]
    seconds: tuple[float, ...]

    @classmethod
    def read(cls, text: str) -> StepTimes:
        """From "1:6.65,8:6.97": lanes and milliseconds. Raises ValueError."""
        pairs = [re.fullmatch(r"\s*(\d+)\s*:\s*(\d+(?:\.\d*)?)\s*", part) for part in text.split(",")]
        found = [(int(pair[1]), float(pair[2]) / 1000) for pair in pairs if pair]
        lanes = [each for each, _ in found]
        if (
            not found
            or len(found) < len(pairs)
            or lanes != sorted({*lanes})
            or min(min(pair) for pair in found) <= 0
        ):
            raise ValueError(
                f"--step_ms={text}: write increasing lanes with milliseconds, as in 1:6.65,8:6.97."
            )
        return cls(tuple(lanes), tuple(seconds for _, seconds in found))

    def of(self, widest: np.ndarray) -> np.ndarray:
        """Seconds of steps whose widest row has so many threads, at most the last lanes."""
        return np.array(self.seconds)[np.searchsorted(self.lanes, widest)]

    def in_turns(self, answer: np.ndarray) -> np.ndarray:
        """An answer of which no step feeds more threads than there are lanes: the others have the next step."""
        most = self.lanes[-1]
        turns = -(-answer // most)
        turn = np.arange(turns.sum()) - np.repeat(np.cumsum(turns) - turns, turns)
        return np.minimum(np.repeat(answer, turns) - turn * most, most)


@dataclasses.dataclass(frozen=True)
class Replica:
    """One server.

    Attributes:
      rows: requests that are decoded at once.
      times: of its steps, with so many rows.
      prefill_s: seconds in which a request is prefilled, and nothing else is done.
      chunk: the most steps between two looks; a row that becomes free while a request waits ends them.
    """

    rows: int
    times: StepTimes
    prefill_s: float = 0.0
    chunk: int = 8


@dataclasses.dataclass(frozen=True)
class Run:
    """What became of requests, in the order in which they came.

    Attributes:
      arrived, started, ended: float64 [n]: seconds.
      tokens: int64 [n]: that were decoded.
    """

    arrived: np.ndarray
    started: np.ndarray
    ended: np.ndarray
    tokens: np.ndarray

    @property
    def latency(self) -> np.ndarray:
        """Seconds from arrival to the complete answer."""
        return self.ended - self.arrived

    @property
    def span(self) -> float:
        """Seconds from the first arrival to the last answer."""
        return float(self.ended.max() - self.arrived.min())

    def goodput(self, bound: float) -> float:
        """Requests a second that were answered within so many seconds."""
        return float((self.latency <= bound).sum()) / self.span

    @property
    def in_system(self) -> float:
        """Requests that waited or were decoded, on average over time."""
        return float(self.latency.sum()) / self.span


def simulate(replica: Replica, arrived: np.ndarray, answers: Sequence[np.ndarray]) -> Run:
    """Has a server answer requests, first come, first served.

    Args:
      replica: the server.
      arrived: float64 [n], increasing: when each request comes, in seconds.
      answers: n answers, each the threads that each of its steps feeds: int64 [steps].
    """
    tokens = np.array([int(answer.sum()) for answer in answers])
    answers = [replica.times.in_turns(answer) for answer in answers]
    started, ended = np.zeros(len(answers)), np.zeros(len(answers))
    free, coming, now = replica.rows, 0, 0.0
    running: dict[int, int] = {}  # requests, and how many steps each has done
    while coming < len(answers) or running:
        if not running:
            now = max(now, float(arrived[coming]))
        while free and coming < len(answers) and arrived[coming] <= now:
            started[coming], running[coming] = now, 0
            free, coming, now = free - 1, coming + 1, now + replica.prefill_s
        left = {request: len(answers[request]) - done for request, done in running.items()}
        waits = coming < len(answers) and arrived[coming] <= now
        steps = min(replica.chunk, min(left.values()) if waits else max(left.values()))
        widest = np.zeros(steps, np.int64)
        for request, done in running.items():
            part = answers[request][done : done + steps]
            np.maximum(widest[: len(part)], part, out=widest[: len(part)])
        now += float(replica.times.of(widest).sum())
        for request in left:
            running[request] += steps
            if steps >= left[request]:
                ended[request] = now
                del running[request]
                free += 1
    return Run(arrived, started, ended, tokens)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Requests that arrive independently of each other (a Poisson process), with answers drawn from some.

    Attributes:
      gaps: float64 [n]: between arrivals, at one request a second on average.
      answers: n of them, as in `simulate`.
    """

    gaps: np.ndarray
    answers: Sequence[np.ndarray]

    @classmethod
    def drawn(cls, answers: Sequence[np.ndarray], requests: int, seed: int) -> Traffic:
        """So many requests, of a seed."""
        rng = np.random.default_rng(seed)
        chosen = rng.integers(0, len(answers), requests)
        return cls(rng.exponential(size=requests), [answers[i] for i in chosen])

    def at(self, replica: Replica, rate: float) -> Run:
        """At so many requests a second; the same requests for each rate."""
        return simulate(replica, np.cumsum(self.gaps) / rate, self.answers)

    def most(self, replica: Replica) -> float:
        """Requests a second of a server that always has some waiting."""
        return len(self.answers) / simulate(replica, np.zeros(len(self.answers)), self.answers).span

    def most_in_time(self, replica: Replica, bound: float, share: float) -> float:
        """The highest rate, up to HIGHEST of the most, at which this share is answered within so many seconds."""
        low, high = 0.0, HIGHEST * self.most(replica)
        for _ in range(12):
            rate = (low + high) / 2
            in_time = float((self.at(replica, rate).latency <= bound).mean()) >= share
            low, high = (rate, high) if in_time else (low, rate)
        return low


def equal_branches(tokens: int, branches: int) -> np.ndarray:
    """The widths of an answer of so many tokens: main promises the branches in turn, and joins them at the end.

    A promise takes main PROMISE steps; the branches share the other tokens evenly.
    """
    if not branches:
        return np.ones(tokens, np.int64)
    own = max(1, (tokens - branches * PROMISE) // branches)
    widths = np.zeros(branches * PROMISE - 1 + own, np.int64)
    widths[: branches * PROMISE] += 1
    for branch in range(branches):
        start = (branch + 1) * PROMISE - 1  # with the last token of its promise
        widths[start : start + own] += 1
    return widths


PROMISE = 7
"""Tokens of a promise with a topic of one or two words."""


def table(replica: Replica, traffic: Traffic, rates: Sequence[float], bound: float) -> str:
    """What requests see at each of these rates, or at LOADS of the most that the server answers."""
    most = traffic.most(replica)
    rows = []
    for rate in rates or [load * most for load in LOADS]:
        run = traffic.at(replica, rate)
        half, nearly, almost = np.quantile(run.latency, [0.5, 0.95, 0.99])
        wait = float(np.quantile(run.started - run.arrived, 0.95))
        cells = (rate, half, nearly, almost, wait, run.goodput(bound), run.tokens.sum() / run.span)
        rows.append([f"{rate / most:.0%}", *(f"{cell:.3g}" for cell in cells)])
    seconds = ["median, s", "95 %, s", "99 %, s", "wait 95 %, s"]
    return markdown_table(["load", "requests/s", *seconds, f"in {bound:g} s, 1/s", "tokens/s"], rows)


def costs(
    rate: float, tokens: float, *, chips: int, dollars_per_chip_hour: float, demand: float
) -> list[str]:
    """What a replica at this rate costs, and how many a demand needs.

    Args:
      rate: requests a second of a replica.
      tokens: of an answer, on average.
      chips: of a replica.
      dollars_per_chip_hour: 0 is not known.
      demand: requests a second in all; 0 is not known.
    """
    lines = []
    if not rate:
        return ["No replica answers in time: give it fewer rows, shorter answers, or a later bound."]
    if chips > 1:
        lines.append(f"{rate / chips:.3g} requests/s a chip.")
    if dollars_per_chip_hour:
        each = dollars_per_chip_hour * chips / 3600 / rate
        lines.append(
            f"{1000 * each:.3g} dollars for 1,000 requests, {1e6 * each / tokens:.3g} for a million tokens."
        )
    if demand:
        lines.append(
            f"{math.ceil(demand / rate)} replicas for {demand:g} requests/s, and one more while one restarts."
        )
    return lines


def main(argv: Sequence[str]) -> None:
    """Runs the command. A user's mistake ends in one line and status 2."""
    values = flags.FLAGS
    if len(argv) > 1 or not values.step_ms:
        refuse(
            "Give the time of a step by the lanes of a row: --step_ms=1:6.65,8:6.97. --help shows the rest."
        )
    try:
        rates = _rates(values.rates)
        times = StepTimes.read(values.step_ms)
        answers = _answers(values)
    except (ValueError, OSError) as error:
        refuse(str(error))
    replica = Replica(values.rows, times, values.prefill_ms / 1000, values.chunk)
    traffic = Traffic.drawn(answers, values.requests, values.seed)
    print(table(replica, traffic, rates, values.bound))
    rate = traffic.most_in_time(replica, values.bound, values.share)
    print(
        f"Saturated at {traffic.most(replica):.3g} requests/s. {values.share:.0%} are answered within "
        f"{values.bound:g} s up to {rate:.3g} requests/s."
    )
    tokens = float(np.mean([answer.sum() for answer in traffic.answers]))
    price = dict(dollars_per_chip_hour=values.dollars_per_chip_hour, demand=values.demand)
    for line in costs(rate, tokens, chips=values.chips, **price):
        print(line)


def _rates(words: Sequence[str]) -> list[float]:
    """The numbers of --rates. Raises ValueError."""
    with contextlib.suppress(ValueError):
        rates = [float(word) for word in words]
        if all(0 < rate < math.inf for rate in rates):
            return rates
    raise ValueError(f"--rates={','.join(words)}: give numbers above 0, such as --rates=0.5,1.")


def _answers(values: flags.FlagValues) -> list[np.ndarray]:
    """The widths of the answers that the flags name. Raises ValueError."""
    if not values.answers:
        return [equal_branches(values.tokens, values.branches)]
    from pasta_jax.config import DataConfig
    from pasta_jax.data.records import Problem, read
    from pasta_jax.data.sources import make_tokenizer
    from pasta_jax.tokens.cost import threads_of_program, widths

    if not values.tokenizer:
        raise ValueError("Name the tokenizer that counts the answers' tokens: --tokenizer=FILE.")
    tokenizer = make_tokenizer(DataConfig(tokenizer=values.tokenizer))
    found, faults = list[np.ndarray](), collections.Counter[str]()
    for each in read(values.answers):
        if isinstance(each, Problem):
            faults[each.in_file] += 1
            continue
        threads = threads_of_program(tokenizer, each.program)
        found.append(np.array(widths(threads, tokenizer.vocabulary), np.int64))
    if faults:
        print(f"{faults.total()} records cannot be read; the first: {next(iter(faults))}", file=sys.stderr)
    if not found:
        raise ValueError(f"{values.answers} has no answer that can be read.")
    return found


def command() -> None:
    """Parses the command line and runs `main`."""
    flags.DEFINE_string(
        "step_ms", None, "Lanes that each row of a step has, and its milliseconds: LANES:MS,LANES:MS."
    )
    flags.DEFINE_float(
        "prefill_ms", 0.0, "Milliseconds to prefill a prompt.", lower_bound=0.0, upper_bound=1e9
    )
    flags.DEFINE_integer("rows", 8, "Requests that are decoded at once.", lower_bound=1)
    flags.DEFINE_integer(
        "chunk", 8, "Maximum steps between two looks of the host: 8 for streams, otherwise 64.", lower_bound=1
    )
    flags.DEFINE_string("answers", None, "Annotated records, whose widths the answers have.")
    flags.DEFINE_string(
        "tokenizer", None, "Tokenizer that counts their tokens: a file, a folder, or almanac."
    )
    flags.DEFINE_integer(
        "tokens", 256, "Tokens of an answer, without --answers.", lower_bound=1, upper_bound=1_000_000
    )
    flags.DEFINE_integer(
        "branches", 4, "Branches of an answer, without --answers; 0: none.", lower_bound=0, upper_bound=1_000
    )
    flags.DEFINE_list(
        "rates", [], "Requests a second; by default shares of the most that the server answers."
    )
    flags.DEFINE_float("bound", 10.0, "Seconds within which an answer is in time.", lower_bound=0.0)
    flags.DEFINE_float(
        "share", 0.95, "Share of requests that are to be in time.", lower_bound=0.0, upper_bound=1.0
    )
    flags.DEFINE_integer(
        "requests", 2000, "Number of requests that arrive.", lower_bound=1, upper_bound=1_000_000
    )
    flags.DEFINE_integer("seed", 0, "Seed of their arrival.", lower_bound=0)
    flags.DEFINE_integer("chips", 1, "Chips of one server.", lower_bound=1)
    flags.DEFINE_float("dollars_per_chip_hour", 0.0, "What a chip costs an hour.", lower_bound=0.0)
    flags.DEFINE_float(
        "demand",
        0.0,
        "Requests a second of all users, for the number of servers.",
        lower_bound=0.0,
        upper_bound=1e12,
    )
    run_main(main)


if __name__ == "__main__":
    command()
