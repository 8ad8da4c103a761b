"""Replay: the real engine decodes answers with forced tokens, to measure speed without trained weights.

Each answer is decoded as it is annotated, and again as the same tokens of text one by one, both by the same
`Decoder`, in turn:

    theoretical speedup   tokens of text / critical path: steps by steps, with unlimited lanes
    realized speedup      seconds of the sequential decode / seconds of the parallel one, prompt and host included
    efficiency            realized / theoretical; of several answers, of their geometric means, as in the paper
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import sys
from collections.abc import Mapping, Sequence

import numpy as np
from tqdm import tqdm

from pasta_jax.benchmark.measure import log_first, number
from pasta_jax.benchmark.trees import without_tags
from pasta_jax.decoding.engine import Decoder
from pasta_jax.decoding.request import SamplingParams
from pasta_jax.decoding.script import FREE, Script, depth_of, in_document_order, script_of, threads_in
from pasta_jax.decoding.state import Limits, Stop
from pasta_jax.decoding.trace import Trace
from pasta_jax.lang.program import Program
from pasta_jax.rounding import round_up
from pasta_jax.tokens.cost import critical_path
from pasta_jax.tokens.detokenize import read
from pasta_jax.tokens.tokenizer import Tokenizer

PROMPT = "Go on."
"""A short prompt, so that it takes little time."""

OVERALL = "overall"
"""The kind in the summary of all answers."""

UNLIMITED = 2**30
"""A token limit for answers that must not be cut."""


class ReplayError(RuntimeError):
    """The engine wrote other tokens than it was forced to."""


def limits_for(
    programs: Sequence[Program | Trace], tokenizer: Tokenizer, *, lanes: int = 8, prompt: str = PROMPT
) -> Limits:
    """Limits of a decoder that can replay all these; pool plus lanes is a multiple of 128."""
    answers = [threads_in(program, tokenizer) for program in programs]
    tokens = max(sum(map(len, answer.tokens)) for answer in answers)
    threads = max(len(answer.tokens) for answer in answers)
    pool = round_up(len(tokenizer.encode_prompt(prompt)) + tokens + lanes, 128)
    return Limits(lanes, max(threads, lanes), pool - lanes, max(1, *(depth_of(answer) for answer in answers)))


@dataclasses.dataclass(frozen=True)
class Replayed:
    """One answer, measured.

    Attributes:
      kind: of its tree, such as "8 unbalanced".
      branches: number of threads besides main.
      text_tokens, critical_path: as in `Stats`.
      steps: decode steps taken.
      steps_by_width: number of steps that used 1, 2, ... lanes.
      parallel_s, sequential_s: seconds of each repeat, including prompt and host, without compiling.
      start_s: the same, of a request that ends after its first decode step.
    """

    kind: str
    branches: int
    text_tokens: int
    critical_path: int
    steps: int
    steps_by_width: tuple[int, ...]
    parallel_s: tuple[float, ...]
    sequential_s: tuple[float, ...]
    start_s: tuple[float, ...]

    @property
    def theoretical(self) -> float:
        return self.text_tokens / self.critical_path

    @property
    def speedups(self) -> tuple[float, ...]:
        """Sequential seconds / parallel seconds of each repeat, whose two decodes follow each other directly."""
        return tuple(
            sequential / parallel for sequential, parallel in zip(self.sequential_s, self.parallel_s)
        )

    @property
    def step_s(self) -> tuple[float, float]:
        """Seconds of a parallel and of a sequential decode step, without the start."""
        start = statistics.median(self.start_s)

        def step(seconds: Sequence[float], steps: int) -> float:
            return (statistics.median(seconds) - start) / max(1, steps - 1)

        return step(self.parallel_s, self.steps), step(self.sequential_s, self.text_tokens)

    @property
    def decode_efficiency(self) -> float:
        """The efficiency of the decode steps alone, without prompt and start.

        NaN if the noise is larger than the steps, so that the start took longer than the whole.
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
    """Measures answers, one request at a time, after a first round that compiles.

    Args:
      decoder: with limits that hold all answers (`limits_for`).
      programs: the answers by kind of tree: annotated ones, or traces of decodes.
      repeats: of each measurement. Parallel and sequential decodes of all answers take turns, so that other load on
        the machine affects them alike.
      prompt: of every request; short, so that it takes little time.

    Raises:
      ValueError: an answer does not fit into the limits, or a trace is incomplete.
      ReplayError: the engine wrote other tokens.
    """
    tokenizer, limits = decoder.model.tokenizer, decoder.limits
    ids = tokenizer.encode_prompt(prompt)
    answers = [(kind, program) for kind, of_kind in programs.items() for program in of_kind]
    pairs = [(script_of(program, tokenizer), _sequential(program, tokenizer)) for _, program in answers]
    every = [script for pair in pairs for script in pair]
    for script in every:
        check_room(script, limits, len(ids))
    alike = iter([Run(decoder, ids, script) for script in in_one_size(every)])
    runs = [*zip(alike, alike)]
    warm = [(parallel.start(), parallel.answer(), sequential.answer()) for parallel, sequential in runs]
    seconds: list[list[tuple[float, float, float]]] = [[] for _ in runs]
    for repeat in tqdm(range(repeats), desc="replay", unit="repeat", disable=not sys.stderr.isatty()):
        for (kind, _), taken, (parallel, sequential) in zip(answers, seconds, runs):
            taken.append((parallel.start()[1], parallel.answer()[1], sequential.answer()[1]))
            if not repeat:
                _, parallel_s, sequential_s = taken[0]
                log_first(f"replay, {kind}", f"{number(sequential_s / parallel_s)}x", repeats)
    return [
        _measured(kind, tokenizer, parallel, sequential, taken)
        for (kind, _), (_, (parallel, _), (sequential, _)), taken in zip(answers, warm, seconds)
    ]


def _sequential(answer: Program | Trace, tokenizer: Tokenizer) -> Script:
    """The answer's text alone, token by token."""
    if isinstance(answer, Program):
        return script_of(without_tags(answer), tokenizer)
    if answer.stop != Stop.EOS:
        raise ValueError(
            f"A trace that stopped with {answer.stop.reason!r} has no end to replay. Give it more room, or decode "
            "another."
        )
    tokens = [*read(tokenizer.vocabulary, answer.threads).text, answer.threads.tokens[0][-1]]
    return Script(np.array([tokens], np.int32), np.full((1, len(tokens)), FREE, np.int32))


def in_one_size(scripts: Sequence[Script]) -> list[Script]:
    """The scripts in arrays of one size, so that one program serves them all."""
    R, C = map(max, zip(*(script.size for script in scripts)))
    return [script.padded((R, C)) for script in scripts]


def check_room(script: Script, limits: Limits, prompt_length: int) -> None:
    """Raises ValueError if prompt and answer do not fit into the limits."""
    threads = script.threads
    if len(threads.tokens) > limits.threads:
        raise ValueError(
            f"The answer has {len(threads.tokens)} threads, the decoder room for {limits.threads}. Raise "
            "Limits.threads."
        )
    if (depth := depth_of(threads)) > limits.max_depth:
        raise ValueError(
            f"The answer's promises nest {depth} deep, the decoder's {limits.max_depth}. Raise Limits.max_depth."
        )
    tokens = int((script.tokens >= 0).sum()) - 1  # the answer's end is never fed
    if prompt_length + tokens > limits.pool:
        raise ValueError(
            f"A prompt of {prompt_length} tokens and an answer of {tokens} do not fit into the pool of "
            f"{limits.pool}. Raise Limits.pool to {prompt_length + tokens} or more."
        )


@dataclasses.dataclass(frozen=True)
class Run:
    """A request whose answer is a script; each call decodes it, and returns the trace and the seconds it took."""

    decoder: Decoder
    prompt: list[int]
    script: Script

    def answer(self) -> tuple[Trace, float]:
        """Decodes the whole answer. Raises ReplayError if the engine wrote anything else."""
        trace, seconds = self._decode(UNLIMITED)
        threads, script = in_document_order(trace.threads), self.script.threads
        if trace.stop != Stop.EOS or threads != script:
            pairs = itertools.zip_longest(threads.tokens, script.tokens)
            differ = [thread for thread, (written, wanted) in enumerate(pairs) if written != wanted]
            raise ReplayError(
                f"The engine stopped with {trace.stop.reason!r} and differs from the script in the threads "
                f"{differ[:8]}, in document order: this is a fault of the engine."
            )
        return trace, seconds

    def start(self) -> tuple[Trace, float]:
        """Decodes the answer up to its first decode step."""
        return self._decode(1)

    def _decode(self, max_tokens: int) -> tuple[Trace, float]:
        sampling = SamplingParams(max_new_tokens=max_tokens, max_branch_tokens=UNLIMITED, script=self.script)
        (trace,), timing = self.decoder.decode([self.prompt], [sampling])
        return trace, timing.wall_s


def _measured(
    kind: str,
    tokenizer: Tokenizer,
    parallel: Trace,
    sequential: Trace,
    seconds: Sequence[tuple[float, float, float]],
) -> Replayed:
    start_s, parallel_s, sequential_s = zip(*seconds)
    steps_by_width = np.bincount(parallel.widths)[1:]
    return Replayed(
        kind=kind,
        branches=len(parallel.parent) - 1,
        text_tokens=sequential.steps,
        critical_path=critical_path(parallel.threads, tokenizer.vocabulary),
        steps=parallel.steps,
        steps_by_width=tuple(steps_by_width.tolist()),
        parallel_s=parallel_s,
        sequential_s=sequential_s,
        start_s=start_s,
    )


# ---------------------------------------------------------------------------------------------- kinds of trees


@dataclasses.dataclass(frozen=True)
class KindSummary:
    """All answers of one kind of tree, or of all kinds. Speeds are geometric means over its answers.

    Attributes:
      kind: of the trees, or OVERALL.
      answers: number of answers.
      theoretical: speedup.
      speedups: realized, of each repeat.
      decode_efficiency: as in `Replayed`; NaN if it is NaN for any answer.
    """

    kind: str
    answers: int
    theoretical: float
    speedups: tuple[float, ...]
    decode_efficiency: float

    @property
    def realized(self) -> float:
        """The median over repeats."""
        return statistics.median(self.speedups)

    @property
    def efficiencies(self) -> tuple[float, ...]:
        """The efficiency of the mean speedups, as in the paper, of each repeat."""
        return tuple(speedup / self.theoretical for speedup in self.speedups)


def summaries(replayed: Sequence[Replayed]) -> list[KindSummary]:
    """A summary for each kind of tree, and one for all answers (OVERALL)."""
    mean = statistics.geometric_mean
    rows = []
    for kind in (*dict.fromkeys(answer.kind for answer in replayed), OVERALL):
        group = [answer for answer in replayed if kind in (answer.kind, OVERALL)]
        rows.append(
            KindSummary(
                kind=kind,
                answers=len(group),
                theoretical=mean([answer.theoretical for answer in group]),
                speedups=tuple(map(mean, zip(*(answer.speedups for answer in group)))),
                decode_efficiency=mean([answer.decode_efficiency for answer in group]),
            )
        )
    return rows
