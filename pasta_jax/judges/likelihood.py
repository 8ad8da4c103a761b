"""A reference model as a judge: it prefers the answer that it predicts better. It needs no endpoint.

    score(answer) = text + END_WEIGHT * end

  text   the mean log-probability of the answer's tokens in nats, each given the prompt and all before it. A token
         that ends a run of RUN tokens which stood in the answer before is repetition, and counts REPEATED at most.
  end    the log-probability of the answer's length, given its text: log(1 - p) at each token, where p is the
         probability that the answer ended before it, and log p at the end; LEAST_END at least. An answer that stops
         where more was to come, as one that was cut off, loses by the end; one that goes on and on loses by the
         ends that it passed over.

The higher score wins, with confidence 1 / (1 + exp(-difference / SCALE)); equal scores are a tie.

What it can be fooled by: it prefers what the reference would have said itself. It knows nothing of truth beyond
what that model knows, likes what is bland and usual, takes a fluent mistake for a good answer and a correct but
unusual one for a bad one, and cannot prefer an answer for being better than the reference's own: against the greedy
answer of that model, most others lose. It tells samples that fell apart from those that did not. For quality beyond
that, use a judge that reads: `llm`, or a function of your own.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence

import numpy as np

from pasta_jax.arrays import NO_TARGET, ThreadedTokens
from pasta_jax.data.records import Prompt, encode_prompt
from pasta_jax.decoding.model import Model
from pasta_jax.judges.protocol import NO_VERDICT, Comparison, JudgeError, Preference
from pasta_jax.lang.program import Program, Text
from pasta_jax.tokens.layout import layout
from pasta_jax.tokens.positions import Positions
from pasta_jax.tokens.tokenizer import TextError
from pasta_jax.training.logprobs import ending_pass, of_any_length

LOG = logging.getLogger("pasta_jax")

RUN, REPEATED = 8, -5.0
END_WEIGHT, LEAST_END = 0.1, -20.0
SCALE = 0.25

TOGETHER = 64
"""Comparisons whose answers are read before their verdicts are given, to be kept."""

ITS_OWN = (
    "The judge likelihood reads with %s, which gave the answers that it compares with: most others lose to what a "
    "model says itself. Name another reference model (judge_model)."
)
"""Said where reference and opponent are one model."""


class Likelihood:
    """The judge of a reference model.

    Both answers of a comparison are scored on their own, so swapping them swaps the winner and nothing else; an
    answer is scored once, however often it is compared.

    Args:
      model: the reference, such as the sequential baseline.
      rows, length, parts: of the batches of its forward pass, and their number of microbatches. An answer that is
        longer than a row, prompt included, is read in rows of the next power of two that holds it.

    Raises:
      JudgeError: no model.
    """

    takes_messages = on_all_devices = True

    def __init__(self, model: Model | None = None, *, rows: int = 8, length: int = 512, parts: int = 1):
        if model is None:
            raise JudgeError("The judge likelihood needs a reference model: name a checkpoint.")
        self.model, self.rows, self.length, self.parts = model, rows, length, parts
        self._forward = ending_pass(model.config, model.tokenizer.vocabulary.eos, model.mesh, parts)
        self._scores: dict[tuple[str, str], float] = {}

    def compare(self, prompt: Prompt, a: str, b: str, /) -> Preference:
        """Which of two answers the reference predicts better."""
        return self._compared([Comparison(prompt, a, b)])[0]

    def compare_all(self, comparisons: Sequence[Comparison]) -> Iterator[Preference]:
        """`compare` of each, in batches; no verdict where the reference has no ids for an answer or a prompt."""
        for first in range(0, len(comparisons), TOGETHER):
            yield from self._compared(comparisons[first : first + TOGETHER])

    def _compared(self, comparisons: Sequence[Comparison]) -> list[Preference]:
        keys = [(json.dumps(prompt), a, b) for prompt, a, b in comparisons]
        wanted = {
            (key, answer): (comparison.prompt, answer)
            for comparison, (key, a, b) in zip(comparisons, keys, strict=True)
            for answer in (a, b)
            if (key, answer) not in self._scores
        }
        read = {pair: asked for pair, asked in wanted.items() if self._reads(*asked)}
        if read:
            self._scores.update(zip(read, self.scores([*read.values()]), strict=True))
        pairs = [(self._scores.get((key, a)), self._scores.get((key, b))) for key, a, b in keys]
        return [NO_VERDICT if a is None or b is None else preferred(a, b) for a, b in pairs]

    def scores(self, answers: Sequence[tuple[Prompt, str]]) -> list[float]:
        """The score of each answer to its prompt, as above; higher is better."""
        documents = [self._document(prompt, answer) for prompt, answer in answers]
        passed = of_any_length(self._forward, self.model, documents, self.rows, self.length, self.parts)
        found = []
        for document, (logprob, end) in zip(documents, passed, strict=True):
            learnt = document.target != NO_TARGET
            found.append(score(document.target[learnt], logprob[learnt], end[learnt]))
        return found

    def _reads(self, prompt: Prompt, answer: str) -> bool:
        try:
            encode_prompt(self.model.tokenizer, prompt)
            self.model.tokenizer.encode(answer)
        except TextError as error:
            LOG.warning("A comparison has no verdict: %s", error)
            return False
        return True

    def _document(self, prompt: Prompt, answer: str) -> ThreadedTokens:
        tokenizer = self.model.tokenizer
        program = Program((Text(answer),) if answer else ())
        return layout(tokenizer, encode_prompt(tokenizer, prompt), program, Positions(), threads=1)


def score(tokens: np.ndarray, logprob: np.ndarray, end: np.ndarray) -> float:
    """The score of an answer, rounded to 1e-4 nats, so that what differs by rounding alone is a tie.

    Args:
      tokens: int [n], the answer's, the one that ends it included.
      logprob: float [n], of each token.
      end: float [n], the log-probability that the answer ended there instead; that of the last is `logprob` too.
    """
    counted = np.where(repeats(tokens, RUN), np.minimum(logprob, REPEATED), logprob).astype(np.float64)
    survived = np.log1p(-np.exp(np.minimum(end[:-1].astype(np.float64), -1e-6))).sum()
    ended = max(LEAST_END, float(survived + end[-1]))
    # The end itself is in both terms: it is a token as any other.
    return round(float(counted.mean()) + END_WEIGHT * ended, 4)


def repeats(tokens: np.ndarray, run: int) -> np.ndarray:
    """Whether each token ends a run of this many tokens that stood before: bool [n].

    >>> repeats(np.array([1, 2, 3, 1, 2, 3, 4]), 2).nonzero()[0].tolist()
    [4, 5]
    """
    seen: set[tuple[int, ...]] = set()
    found = np.zeros(len(tokens), bool)
    for last in range(run - 1, len(tokens)):
        these = tuple(tokens[last - run + 1 : last + 1].tolist())
        found[last] = these in seen
        seen.add(these)
    return found


def preferred(a: float, b: float) -> Preference:
    """The preference between two scores.

    >>> preferred(-1.0, -1.25), preferred(-1.0, -1.0)
    (Preference(winner=0, confidence=0.7310585786300049), Preference(winner=None, confidence=0.5))
    """
    if a == b:
        return Preference(None, 0.5)
    return Preference(int(b > a), 1.0 / (1.0 + math.exp(-abs(a - b) / SCALE)))
