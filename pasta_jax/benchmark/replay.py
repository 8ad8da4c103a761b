"""Replay: answers through the real engine with their tokens forced, to measure speed without trained weights.

Each answer is decoded as it is annotated and again as the same tokens of text one by one, both by the same
`Decoder`, in turn:

    theoretical speedup   tokens of text / critical path: steps by steps, with unlimited lanes
    realized speedup      seconds of the sequential decode / seconds of the parallel one, prompt and host included
    efficiency            realized / theoretical; of several answers, of their geometric means, as in the paper
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
from collections.abc import Mapping, Sequence

import numpy as np
from tqdm import tqdm

from pasta_jax.benchmark.trees import sequential
from pasta_jax.decoding.engine import Decoder
from pasta_jax.decoding.request import SamplingParams
from pasta_jax.decoding.script import Script, depth_of, lines_of, script_of, threads_in
from pasta_jax.decoding.state import Limits, Stop
from pasta_jax.decoding.trace import Trace, critical_path
from pasta_jax.lang.program import Program
from pasta_jax.rounding import round_up
from pasta_jax.tokens.detokenize import read
from pasta_jax.tokens.tokenizer import Tokenizer

PROMPT = "Go on."
"""Short, so that little time goes into it."""

UNLIMITED = 2**30
"""Tokens, of what must not be cut."""


class ReplayError(RuntimeError):
    """The engine did not say what it was made to say."""


def limits_for(
    programs: Sequence[Program | Trace], tokenizer: Tokenizer, *, lanes: int = 8, prompt: str = PROMPT
) -> Limits:
    """Limits of a decoder that can replay all these, its pool with the lanes' room a whole number of 128s."""
    answers = [threads_in(program, tokenizer) for program in programs]
    tokens = max(sum(map(len, answer.tokens)) for answer in answers)
    threads = max(len(answer.tokens) for answer in answers)
    pool = round_up(len(tokenizer.encode_prompt(prompt)) + tokens + lanes, 128)
    return Limits(lanes, max(threads, lanes), pool - lanes, max(1, *(depth_of(answer) for answer in answers)))


@dataclasses.dataclass(frozen=True)
class Replayed:
    """One answer, measured.

    Attributes:
      shape: its shape class.
      branches: threads but main.
      text_tokens: tokens of its text, without tags.
      critical_path: decode steps with unlimited lanes.
      steps: decode steps taken.
      widths: how many steps used 1, 2, ... lanes.
      parallel_s, sequential_s: seconds of each repeat, prompt and host included, compiling not.
      start_s: likewise, of a request that ends after its first decode step.
    """

    shape: str
    branches: int
    text_tokens: int
    critical_path: int
    steps: int
    widths: tuple[int, ...]
    parallel_s: tuple[float, ...]
    sequential_s: tuple[float, ...]
    start_s: tuple[float, ...]

    @property
    def theoretical(self) -> float:
        return self.text_tokens / self.critical_path

    @property
    def speedups(self) -> tuple[float, ...]:
        """Seconds by seconds, of each repeat."""
        return tuple(plain / parallel for plain, parallel in zip(self.sequential_s, self.parallel_s))

    @property
    def realized(self) -> float:
        """The median repeat's: the two decodes of one were made right after each other."""
        return statistics.median(self.speedups)

    @property
    def efficiency(self) -> float:
        return self.realized / self.theoretical

    @property
    def step_s(self) -> tuple[float, float]:
        """Seconds of a decode step, without the start: of the parallel and the sequential decode."""
        start = statistics.median(self.start_s)

        def each(seconds: Sequence[float], steps: int) -> float:
            return (statistics.median(seconds) - start) / max(1, steps - 1)

        return each(self.parallel_s, self.steps), each(self.sequential_s, self.text_tokens)

    @property
    def decode_efficiency(self) -> float:
        """As `efficiency`, of decode steps alone, without prompt and start.

        NaN where the noise is larger than the steps: the start took longer than the whole.
        """
        parallel, sequential = self.step_s
        if min(parallel, sequential) <= 0:
            return math.nan
        return self.critical_path / self.steps * sequential / parallel


def replay(
    decoder: Decoder,
    programs: Mapping[str, Sequence[Program | Trace]],
    repeats: int = 5,
    *,
    prompt: str = PROMPT,
) -> list[Replayed]:
    """Measures answers one request at a time; what compiles does so before.

    Args:
      decoder: with limits that hold them all (`limits_for`).
      programs: the answers, by shape class: annotated ones, or what decodes did.
      repeats: of everything; parallel and sequential decodes of all answers take turns, so that what the machine
        does besides meets them alike.
      prompt: whose answer each is; short, so that little time goes into it.

    Raises:
      ValueError: an answer does not fit into the limits, or a trace did not come to its end.
      ReplayError: the engine said something else.
    """
    tokenizer, limits = decoder.model.tokenizer, decoder.limits
    ids = tokenizer.encode_prompt(prompt)
    shapes = [(shape, program) for shape, several in programs.items() for program in several]
    pairs = [
        (script_of(program, tokenizer, limits), _plain(program, tokenizer, limits)) for _, program in shapes
    ]
    every = [script for pair in pairs for script in pair]
    for script in every:
        check_room(script, limits, len(ids))
    size = max(script.size[0] for script in every), max(script.size[1] for script in every)
    runs = [[Run(decoder, ids, script.padded(size)) for script in pair] for pair in pairs]
    warm = [(parallel.start(), parallel.answer(), plain.answer()) for parallel, plain in runs]
    seconds: list[list[tuple[float, float, float]]] = [[] for _ in runs]
    for _ in tqdm(range(repeats), desc="replay", unit="repeat", disable=not sys.stderr.isatty()):
        for taken, (parallel, plain) in zip(seconds, runs):
            taken.append((parallel.start()[1], parallel.answer()[1], plain.answer()[1]))
    return [
        _measured(shape, tokenizer, parallel, plain, taken)
        for (shape, _), (_, (parallel, _), (plain, _)), taken in zip(shapes, warm, seconds)
    ]


def _plain(answer: Program | Trace, tokenizer: Tokenizer, limits: Limits) -> Script:
    """Its text alone, token for token."""
    if isinstance(answer, Program):
        return script_of(sequential(answer), tokenizer, limits)
    if answer.stop != Stop.EOS:
        raise ValueError(
            f"A trace that stopped with {answer.stop.reason!r} has no end to replay. Give it more room, or decode "
            "another."
        )
    said = [*read(tokenizer.vocabulary, answer.threads).text, answer.threads.tokens[0][-1]]
    return Script(np.zeros(1, np.int32), np.array([said], np.int32))


def check_room(script: Script, limits: Limits, prompt_length: int) -> None:
    """Raises ValueError if prompt and answer do not fit into the pool."""
    tokens = int((script.tokens >= 0).sum()) - 1  # the answer's end is never fed
    if prompt_length + tokens > limits.pool:
        raise ValueError(
            f"A prompt of {prompt_length} tokens and an answer of {tokens} do not fit into the pool of "
            f"{limits.pool}. Raise Limits.pool to {prompt_length + tokens} or more."
        )


@dataclasses.dataclass(frozen=True)
class Run:
    """A request that says what a script has; each call decodes it, and gives the trace and the seconds it took."""

    decoder: Decoder
    prompt: list[int]
    script: Script

    def answer(self) -> tuple[Trace, float]:
        """The whole of it. Raises ReplayError if the engine did anything else."""
        trace, seconds = self._decode(UNLIMITED)
        found = lines_of(trace.threads, self.decoder.limits.threads)
        asked = self.script.lines
        if trace.stop != Stop.EOS or found != asked:
            differ = [path for path in asked.keys() | found.keys() if asked.get(path) != found.get(path)]
            raise ReplayError(
                f"The engine stopped with {trace.stop.reason!r} and differs from the script in threads with the "
                f"paths {differ[:8]}: this is a fault of the engine."
            )
        return trace, seconds

    def start(self) -> tuple[Trace, float]:
        """The same up to its first decode step."""
        return self._decode(1)

    def _decode(self, most: int) -> tuple[Trace, float]:
        wishes = SamplingParams(max_new_tokens=most, max_branch_tokens=UNLIMITED, script=self.script)
        (trace,), timing = self.decoder.decode([self.prompt], [wishes])
        return trace, timing.wall_s


def _measured(
    shape: str,
    tokenizer: Tokenizer,
    parallel: Trace,
    plain: Trace,
    seconds: Sequence[tuple[float, float, float]],
) -> Replayed:
    start_s, parallel_s, sequential_s = zip(*seconds)
    widths = np.bincount(parallel.widths)[1:]
    return Replayed(
        shape=shape,
        branches=len(parallel.parent) - 1,
        text_tokens=plain.steps,
        critical_path=critical_path(parallel.threads, tokenizer.vocabulary),
        steps=parallel.steps,
        widths=tuple(int(count) for count in widths),
        parallel_s=parallel_s,
        sequential_s=sequential_s,
        start_s=start_s,
    )


# ------------------------------------------------------------------------------------------------ shape classes


@dataclasses.dataclass(frozen=True)
class Summary:
    """A shape class, or all of them; speeds are geometric means over its answers.

    Attributes:
      shape: its name.
      answers: how many.
      theoretical: speedup.
      speedups: realized, of each repeat.
      decode_efficiency: as `Replayed.decode_efficiency`; NaN if that of one answer is.
    """

    shape: str
    answers: int
    theoretical: float
    speedups: tuple[float, ...]
    decode_efficiency: float

    @property
    def realized(self) -> float:
        """The median repeat's."""
        return statistics.median(self.speedups)

    @property
    def efficiencies(self) -> tuple[float, ...]:
        """Of each repeat, and of the means, as the paper has it."""
        return tuple(speedup / self.theoretical for speedup in self.speedups)

    @property
    def efficiency(self) -> float:
        """The median repeat's."""
        return self.realized / self.theoretical


def summaries(replayed: Sequence[Replayed]) -> list[Summary]:
    """One for each shape class in turn, and one for all of them together, called overall."""
    mean = statistics.geometric_mean
    found = []
    for shape in (*dict.fromkeys(each.shape for each in replayed), "overall"):
        mine = [each for each in replayed if shape in (each.shape, "overall")]
        found.append(
            Summary(
                shape=shape,
                answers=len(mine),
                theoretical=mean([each.theoretical for each in mine]),
                speedups=tuple(map(mean, zip(*(each.speedups for each in mine)))),
                decode_efficiency=mean([each.decode_efficiency for each in mine]),
            )
        )
    return found
