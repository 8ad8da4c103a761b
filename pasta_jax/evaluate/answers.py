"""Models that answer a user's own prompts, and what is measured of their answers.

Speeds are measured as on Almanac's prompts (`systems`): at batch 1, the second of two decodes is timed. Of batches
each is decoded once, after a first one that is decoded twice. A prompt that a model cannot be asked is an answer
too, an empty one that failed; nothing is asked again. Where answers are drawn, each prompt has a seed of its own,
which is the same for all models.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from pasta_jax.data.prompts import Question
from pasta_jax.data.records import Prompt, encode_prompt
from pasta_jax.decoding.engine import Decoder
from pasta_jax.decoding.model import Model
from pasta_jax.decoding.request import SamplingParams, seed_of
from pasta_jax.decoding.results import DecodeResult, result
from pasta_jax.decoding.state import MAX_POOL, Limits
from pasta_jax.decoding.trace import Trace
from pasta_jax.evaluate.names import sha256
from pasta_jax.evaluate.systems import COSTS
from pasta_jax.files import read_jsonl
from pasta_jax.rounding import next_power_of_two
from pasta_jax.tokens.detokenize import comes_of_a_limit

LOG = logging.getLogger("pasta_jax")

LANES, THREADS = 8, 16


@dataclasses.dataclass(frozen=True)
class Answered:
    """One model's answer to one prompt.

    The counts and wall_s are fields of `Stats` and mean the same.

    Attributes:
      prompt: what was asked, as JSON.
      text, annotated, stop_reason, issues: as in `DecodeResult`.
      wall_s: of the second of two decodes; 0 if it was decoded in a batch.
      promises: number of branches.
      error: why the model could not be asked; "" if it was.
    """

    prompt: str
    text: str = ""
    annotated: str = ""
    output_tokens: int = 0
    text_tokens: int = 0
    critical_path: int = 1
    decode_steps: int = 0
    wall_s: float = 0.0
    stop_reason: str = ""
    issues: tuple[str, ...] = ()
    promises: int = 0
    error: str = ""

    @property
    def is_cut(self) -> bool:
        """Whether a limit ended it."""
        return self.stop_reason in ("length", "cache_full")

    @property
    def is_malformed(self) -> bool:
        """Whether a tag or a branch was not in order; that a limit ended it within one is no fault."""
        return any(not (self.is_cut and comes_of_a_limit(issue)) for issue in self.issues)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Answers that were decoded together, and the seconds that they took together."""

    answers: tuple[Answered, ...]
    wall_s: float


class Respondent:
    """A model in the engine at batch 1, called with a question.

    Args:
      model: with its tokenizer.
      max_new_tokens: of an answer.
      sequential: forbid promises.
      like: another one; what it compiled is shared if it fits.
      rows: prompts that are answered together.
      drawing: how, as in `SamplingParams`; by default greedily.
    """

    def __init__(
        self,
        model: Model,
        max_new_tokens: int,
        *,
        sequential: bool = False,
        like: Respondent | None = None,
        rows: int = 1,
        drawing: Mapping[str, float] = MappingProxyType({}),
    ):
        self.model, self.max_new_tokens, self.like, self.rows = model, max_new_tokens, like, rows
        bias = -math.inf if sequential else 0.0
        options = dict[str, Any](drawing)
        self.sampling = SamplingParams(max_new_tokens, max_new_tokens, open_bias=bias, **options)
        self._decoders: dict[int, Decoder] = {}
        self._warm: set[Decoder] = set()

    def sampling_of(self, question: Question) -> SamplingParams:
        """How a question is answered. Each has a seed of its own: with one for all, answers would be correlated."""
        number = int(sha256(question.prompt)[:8], 16)
        return dataclasses.replace(self.sampling, seed=seed_of(self.sampling.seed, number))

    def decoder(self, pool: int) -> Decoder:
        """That of a pool of this many tokens."""
        if pool not in self._decoders:
            other = self.like.decoder(pool) if self.like else None
            if other and other.fits(self.model):
                self._decoders[pool] = other.for_model(self.model)
            else:
                limits = Limits(LANES, THREADS, pool, self.model.max_depth)
                self._decoders[pool] = Decoder(self.model, limits=limits, rows=self.rows)
        return self._decoders[pool]

    def decoder_of(self, longest: int) -> Decoder:
        """That for prompts of up to this many tokens."""
        return self.decoder(min(MAX_POOL, next_power_of_two(longest + self.max_new_tokens)))

    def __call__(self, question: Question) -> Answered:
        """The answer to a question; an empty one with an error if the model cannot be asked."""
        try:
            ids = encode_prompt(self.model.tokenizer, question.prompt)
            engine = self.decoder_of(len(ids))
            asked = [ids], [self.sampling_of(question)]
            engine.decode(*asked)
            (trace,), timing = engine.decode(*asked)
        except ValueError as error:
            return _failed(question, error)
        return self._answered(question, trace, timing.wall_s)

    def together(self, questions: Sequence[Question]) -> Batch:
        """The answers to questions that are decoded together, no more than there are rows.

        The first of a decoder are decoded twice: what happens once is not timed.
        """
        prompts, answers, wall_s = dict[int, list[int]](), dict[int, Answered](), 0.0
        for number, question in enumerate(questions):
            try:
                prompts[number] = encode_prompt(self.model.tokenizer, question.prompt)
            except ValueError as error:
                answers[number] = _failed(question, error)
        if prompts:
            engine = self.decoder_of(max(map(len, prompts.values())))
            asked = [*prompts.values()], [self.sampling_of(questions[number]) for number in prompts]
            if engine not in self._warm:
                engine.decode(*asked)
                self._warm.add(engine)
            traces, timing = engine.decode(*asked)
            wall_s = timing.wall_s
            for number, trace in zip(prompts, traces, strict=True):
                answers[number] = self._answered(questions[number], trace, 0.0)
        return Batch(tuple(answers[number] for number in range(len(questions))), wall_s)

    def _answered(self, question: Question, trace: Trace, wall_s: float) -> Answered:
        return answered(key_of(question.prompt), result(self.model.tokenizer, trace, wall_s))


def answered(prompt: str, decoded: DecodeResult) -> Answered:
    """What is kept of an answer to a prompt, given as JSON."""
    return Answered(
        prompt,
        decoded.text,
        decoded.annotated,
        **{name: getattr(decoded.stats, name) for name in COSTS},
        stop_reason=decoded.stop_reason,
        issues=decoded.issues,
        promises=len(decoded.branches),
    )


def _failed(question: Question, error: ValueError) -> Answered:
    LOG.warning("A prompt has no answer, and counts as failed: %s", error)
    return Answered(key_of(question.prompt), error=str(error))


def key_of(prompt: Prompt) -> str:
    """A prompt as JSON."""
    return json.dumps(prompt, ensure_ascii=False)


def read_answered(path: str) -> list[Answered]:
    """The answers in a JSONL file, up to the first broken line."""
    return read_jsonl(path, _answered_of)


def read_batches(path: str) -> list[Batch]:
    """The batches in a JSONL file, up to the first broken line."""
    return read_jsonl(
        path, lambda fields: Batch(tuple(map(_answered_of, fields["answers"])), fields["wall_s"])
    )


def _answered_of(fields: dict[str, Any]) -> Answered:
    return Answered(**fields | {"issues": tuple(fields["issues"])})
