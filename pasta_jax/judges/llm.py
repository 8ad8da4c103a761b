"""The judge `llm`: a language model says which of two answers is better, as in AlpacaEval.

How sure it is comes from the probabilities of its first token where the endpoint gives them, and otherwise from the
percentage that it writes. Models favour the answer that they see first or last, so callers ask in both orders; how
often both gave the same winner is counted. The prompt is in llm.toml.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import math
import pathlib
import re
import threading
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pasta_jax.endpoint.client import Endpoint, Planned
from pasta_jax.endpoint.cost import Prices
from pasta_jax.endpoint.post import EndpointError, Reply, RequestError
from pasta_jax.files import InUse
from pasta_jax.judges.protocol import NO_VERDICT, Comparison, JudgeError, Preference

LOG = logging.getLogger("pasta_jax")

TOP = 5
"""Likeliest first tokens that are asked for."""

LEAST_CHANCE = 0.5
"""Of A and B together as the first token; else the reply begins otherwise, and its text has the verdict."""

REPLY_TOKENS = 8

_VERDICT = re.compile(
    r"\W*(?:answer[ _])?([AB])(?:\W+(\d{1,3}))?(?:\W*(?:percent)?\W*)(?:\n.*)?", re.IGNORECASE | re.DOTALL
)


@functools.cache
def prompts() -> Mapping[str, Any]:
    """The texts of llm.toml."""
    return tomllib.loads(pathlib.Path(__file__).with_name("llm.toml").read_text(encoding="utf-8"))


@dataclasses.dataclass
class Tally:
    """What a judge was asked, and how it answered.

    Attributes:
      comparisons: that it was asked. Two equal answers are a tie and not counted.
      by_logprobs: of these, how many had probabilities of the first token.
      unreadable: to how many it gave no verdict.
      first: how many were won by the answer shown first.
      both_orders: pairs of answers with a verdict in both orders, and a winner in one at least.
      agreed: of these, how many had the same winner in both.
    """

    comparisons: int = 0
    by_logprobs: int = 0
    unreadable: int = 0
    first: int = 0
    both_orders: int = 0
    agreed: int = 0

    def __str__(self) -> str:
        parts = [f"{self.comparisons:,} comparisons"]
        if self.both_orders:
            share = self.agreed / self.both_orders
            parts.append(f"the same winner in both orders for {share:.1%} of {self.both_orders:,} pairs")
        if decided := self.comparisons - self.unreadable:
            parts.append(f"the answer shown first won {self.first / decided:.1%}")
            parts.append(f"probabilities of tokens for {self.by_logprobs / decided:.1%}")
        if self.unreadable:
            parts.append(f"{self.unreadable:,} without a verdict")
        return "; ".join(parts)


class LlmJudge:
    """Compares answers by an endpoint; its methods may be called from several threads.

    Attributes:
      endpoint: which is asked.
      tally: what it was asked.
    """

    def __init__(self, endpoint: Endpoint):
        self.endpoint = endpoint
        self.tally = Tally()
        self._mutex = threading.Lock()
        self._seen: dict[bytes, tuple[bool, Preference]] = {}

    def compare(self, prompt: str, a: str, b: str, /) -> Preference:
        """Which answer is better; NO_VERDICT if the endpoint refuses, or what it says cannot be read.

        Raises:
          JudgeError: the endpoint does not answer any more.
        """
        try:
            return self._compared(Comparison(prompt, a, b))
        except EndpointError as error:
            raise JudgeError(str(error)) from None

    def compare_all(self, comparisons: Sequence[Comparison]) -> Iterator[Preference]:
        """As `compare`, several at once, in their order."""
        try:
            yield from self.endpoint.each(self._compared, comparisons, in_order=True)
        except EndpointError as error:
            raise JudgeError(str(error)) from None

    def planned(self, comparisons: Sequence[Comparison]) -> Iterator[Planned]:
        """The requests for some comparisons, for an estimate."""
        return (
            Planned(_messages(each), REPLY_TOKENS, top_logprobs=TOP)
            for each in comparisons
            if each.a != each.b
        )

    def report(self) -> str:
        """What was asked, how the judge answered, and what it cost, in one line."""
        return f"Judge {self.endpoint.model}: {self.tally}; {self.endpoint.meter}."

    def _compared(self, comparison: Comparison) -> Preference:
        if comparison.a == comparison.b:
            return Preference(None, 0.5)
        try:
            chance, by_logprobs = self._chance(comparison)
        except RequestError as error:
            LOG.warning("A comparison has no verdict: %s.", error)
            chance, by_logprobs = None, False
        preference = _preference(chance)
        is_sorted = comparison.a < comparison.b
        pair = [comparison.prompt, *sorted((comparison.a, comparison.b))]
        name = hashlib.sha256("\0".join(pair).encode(errors="replace")).digest()
        of_sorted = preference if is_sorted else preference.swapped
        with self._mutex:
            tally = self.tally
            tally.comparisons += 1
            tally.by_logprobs += by_logprobs
            tally.unreadable += chance is None
            tally.first += preference.winner == 0
            was_sorted, before = self._seen.setdefault(name, (is_sorted, of_sorted))
            if was_sorted != is_sorted:
                if (agreed := before.agrees(of_sorted)) is not None:
                    tally.both_orders += 1
                    tally.agreed += agreed
                del self._seen[name]
        return preference

    def _chance(self, comparison: Comparison) -> tuple[float | None, bool]:
        """How probable it is that the first answer is better, and whether that is from probabilities of tokens."""
        messages = _messages(comparison)
        for _ in range(2):
            reply = self.endpoint.ask(messages, expected=REPLY_TOKENS, top_logprobs=TOP)
            if (chance := _by_logprobs(reply)) is not None:
                return chance, True
            if (chance := _by_text(reply.said)) is not None:
                return chance, False
            messages += [
                {"role": "assistant", "content": reply.said},
                {"role": "user", "content": prompts()["correction"].strip()},
            ]
        return None, False


def make(
    base_url: str = "",
    model: str = "",
    *,
    endpoint: Endpoint | None = None,
    price_in: float = 0.0,
    price_out: float = 0.0,
    **options: Any,
) -> LlmJudge:
    """The judge of an endpoint, or of the one that the arguments of `Endpoint` describe.

    Args:
      base_url: of the endpoint.
      model: the endpoint's.
      endpoint: instead of the two.
      price_in: dollars for a million tokens that are sent.
      price_out: dollars for a million tokens of replies.
      options: further ones of `Endpoint`.

    Raises:
      JudgeError: there is no such endpoint.
    """
    try:
        if endpoint is None:
            endpoint = Endpoint(base_url, model, prices=Prices(price_in, price_out), **options)
    except (EndpointError, InUse) as error:
        raise JudgeError(f"The judge llm: {error}") from None
    return LlmJudge(endpoint)


def _messages(comparison: Comparison) -> list[dict[str, str]]:
    texts = prompts()
    task = texts["task"].strip().format(prompt=comparison.prompt, a=comparison.a, b=comparison.b)
    return [{"role": "system", "content": texts["rules"].strip()}, {"role": "user", "content": task}]


def _preference(chance: float | None) -> Preference:
    """The preference of a judge that gives the first answer this chance of being better.

    >>> _preference(0.75), _preference(0.25), _preference(0.5)
    (Preference(winner=0, confidence=0.75), Preference(winner=1, confidence=0.75), Preference(winner=None, confidence=0.5))
    """  # noqa: E501
    if chance is None:
        return NO_VERDICT
    if chance == 0.5:
        return Preference(None, 0.5)
    return Preference(int(chance < 0.5), max(chance, 1 - chance))


def _by_logprobs(reply: Reply) -> float | None:
    """The chance of A by the likeliest first tokens; None if the two letters have less than LEAST_CHANCE together.

    >>> round(_by_logprobs(Reply("A 90", first=(("A", math.log(0.6)), (" B", math.log(0.2)), ("The", -2.0)))), 6)
    0.75
    """
    chances = {"A": 0.0, "B": 0.0}
    for token, logprob in reply.first:
        letter = re.sub(r"[\W_\u2581\u0120]", "", token).upper()
        if letter in chances and not math.isnan(logprob):
            chances[letter] += math.exp(min(logprob, 0.0))
    total = sum(chances.values())
    return chances["A"] / total if total >= LEAST_CHANCE else None


def _by_text(said: str) -> float | None:
    """The chance of A by what the judge wrote; 1 or 0 if it wrote a letter alone, None if it wrote none.

    >>> _by_text("A 80"), _by_text("**B** (75 %)"), _by_text("Answer A"), _by_text("A good question.")
    (0.8, 0.25, 1.0, None)
    """
    found = _VERDICT.fullmatch(said)
    if not found:
        return None
    confidence = min(max(int(found[2]) / 100, 0.5), 1.0) if found[2] else 1.0
    return confidence if found[1].upper() == "A" else 1 - confidence
