"""What the replies of all endpoints are made of, and what a reply is."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from pasta_jax.decoding.results import DecodeResult
from pasta_jax.decoding.stops import characters_before, cut
from pasta_jax.decoding.streaming import Event
from pasta_jax.serve.asked import Asked
from pasta_jax.serve.errors import ApiError
from pasta_jax.tokens.detokenize import Role
from pasta_jax.tokens.tokenizer import Vocabulary

FINISH = {"length": "length", "cache_full": "length"}
"""OpenAI's names for why an answer ended; the others are "stop"."""

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity and NaN, which JSON lacks."""


@dataclasses.dataclass(frozen=True)
class Head:
    """What identifies a reply.

    Attributes:
      id: of the reply.
      created: Unix time in seconds.
      model: the model's name.
      vocabulary: of its tokens.
    """

    id: str
    created: int
    model: str
    vocabulary: Vocabulary


def head(prefix: str, model: str, vocabulary: Vocabulary) -> Head:
    """The head of a reply that begins now."""
    return Head(f"{prefix}-{secrets.token_hex(12)}", int(time.time()), model, vocabulary)


class Reply(Protocol):
    """A reply that is made while its answers are decoded. It keeps no more than the answers."""

    def whole(self, results: Sequence[DecodeResult]) -> dict[str, Any]:
        """The reply to a request without `stream`."""

    def begin(self) -> Iterator[bytes]:
        """The first events of a stream."""

    def add(self, choice: int, event: Event) -> Iterator[bytes]:
        """What an event of the answer with this index adds."""

    def end(self) -> Iterator[bytes]:
        """The last events, when every answer is done."""

    def failed(self, error: ApiError) -> bytes:
        """The last event of a stream that fails."""


def usage_of(asked: Asked, results: Sequence[DecodeResult]) -> tuple[int, int, int]:
    """Tokens of the prompts, each counted once, those of them that were not fed, and of the answers with tags."""
    prompts = [result.stats for result in results[:: asked.n]]
    answers = sum(result.stats.output_tokens for result in results)
    return sum(each.prompt_tokens for each in prompts), sum(each.reused_tokens for each in prompts), answers


def account_of(result: DecodeResult) -> dict[str, Any]:
    """What an answer cost: steps, seconds of work while it had a row, and when each branch was written."""
    stats = result.stats
    return {
        "steps": stats.decode_steps,
        "text_tokens": stats.text_tokens,
        "seconds": round(stats.wall_s, 6),
        "branches": [
            {
                "branch": branch.id,
                "parent": branch.parent,
                "topic": branch.topic,
                "tokens": branch.promised_tokens,
                "start_step": branch.start_step,
                "end_step": branch.end_step,
            }
            for branch in result.branches
        ],
    }


class Told:
    """The events of one answer as a client gets them, each with the step in which its thread was last fed."""

    def __init__(self) -> None:
        self._step = dict[int, int]()

    def tell(self, event: Event) -> dict[str, Any] | None:
        """An event as JSON; None for one that clients do not get."""
        match event.kind:
            case "token":
                self._step[event.branch] = max(event.step, self._step.get(event.branch, 0))
                return None
            case "text":
                step = self._step.get(event.branch, 0)
                return {"kind": "text", "branch": event.branch, "text": event.text, "step": step}
            case "promise":
                return {
                    "kind": "promise",
                    "branch": event.branch,
                    "parent": event.parent,
                    "topic": event.topic,
                    "tokens": event.promised_tokens,
                    "step": self._step.get(event.parent, 0),
                }
            case "closed":
                return {"kind": "closed", "branch": event.branch, "step": self._step.get(event.branch, 0)}
            case "done":
                assert event.result is not None
                return {"kind": "done", **account_of(event.result)}


def text_logprobs(result: DecodeResult, vocabulary: Vocabulary) -> Iterator[tuple[bytes, float, int]]:
    """The tokens of an answer's text in document order, tags left out.

    Of each its bytes, its log-probability, and the characters of text before it.
    """
    trace = result.trace
    if result.stop_reason == "stop":
        trace = cut(trace, vocabulary, len(result.text))
    for index, role, before in characters_before(trace, vocabulary):
        if role == Role.TEXT:
            spelled = vocabulary.spelled([int(trace.tokens.token[index])])
            logprob = float(trace.logprob[index])
            yield spelled, logprob if logprob > LEAST_LOGPROB else LEAST_LOGPROB, before
