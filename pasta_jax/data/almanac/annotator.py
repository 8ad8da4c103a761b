"""An imperfect annotator, standing in for the LLM that annotates training answers (paper section 4).

It takes the true plan of an answer and adds the errors of an LLM: it misses independent parts, promises parts
that are not independent, misjudges lengths, and forgets or adds syncs. It never changes the text. Preference
optimization can correct these errors later.

Most of the errors are rare, and greedy decoding of a finetuned model does not show them. One is systematic, as
errors of LLMs are: it takes every numbered list for a list of independent items. Only that one shows in a finetuned
model, and is left for the second stage to correct.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np

from pasta_jax.data.almanac.families import Task
from pasta_jax.lang.assemble import text_of
from pasta_jax.lang.program import MAX_TOKENS, MIN_TOKENS, Node, Program, Promise, Sync, Text, length_in_tens
from pasta_jax.lang.render import joined

CountTokens = Callable[[str], int]


@dataclasses.dataclass(frozen=True)
class Rates:
    """Probabilities of the annotator's errors.

    Attributes:
      miss_answer: an answer with independent parts is left without any annotation.
      miss_part: one independent part of an annotated answer is left to main.
      false_chain: a chain answer gets promises for its items, although each depends on the one before.
      false_item: an item of such an answer, other than the first, is promised; at least one is.
      false_single: a single fact is promised, although a single branch gains nothing.
      missing_sync: the sync before a conclusion is forgotten.
      stray_sync: an answer with several promises has a needless sync between two of them.
      wrong_length: a promise's `tokens` is one ten too few or too many.
    """

    miss_answer: float = 0.06
    miss_part: float = 0.08
    false_chain: float = 0.6
    false_item: float = 0.9
    false_single: float = 0.05
    missing_sync: float = 0.02
    stray_sync: float = 0.04
    wrong_length: float = 0.25


PERFECT = Rates(0, 0, 0, 0, 0, 0, 0, 0)


def annotate(
    task: Task, rng: np.random.Generator, count_tokens: CountTokens, rates: Rates = Rates()
) -> Program:
    """An annotated answer. `count_tokens` measures a block in tokens of the model's vocabulary.

    Examples:
      >>> from pasta_jax.data.almanac.families import list_task
      >>> task = list_task(("France", "Japan"), ("capital",))
      >>> program = annotate(task, np.random.default_rng(0), len, PERFECT)
      >>> [(promise.topic, promise.tokens) for promise in program.promises()]
      [('France', 3), ('Japan', 3)]
    """
    nodes = list(task.plan.nodes)
    if task.family == "chain":
        if rng.random() < rates.false_chain:
            nodes = _promise_items(nodes, rng, rates.false_item)
    elif task.family == "single":
        if rng.random() < rates.false_single:
            nodes = [Promise(task.facts[0].entity, 1, tuple(nodes))]
    elif rng.random() < rates.miss_answer:
        nodes = [Text(text_of(nodes))]
    else:
        nodes = _careless_sync(_miss_parts(nodes, rng, rates.miss_part), rng, rates)
    return Program(joined(_measure(nodes, rng, count_tokens, rates.wrong_length)))


def annotate_exactly(task: Task, count_tokens: CountTokens) -> Program:
    """The annotated answer without errors."""
    return annotate(task, np.random.default_rng(0), count_tokens, PERFECT)


def _miss_parts(nodes: list[Node], rng: np.random.Generator, rate: float) -> list[Node]:
    def missed(node: Node) -> bool:
        return isinstance(node, Promise) and rng.random() < rate

    return [Text(text_of([node])) if missed(node) else node for node in nodes]


def _promise_items(nodes: list[Node], rng: np.random.Generator, rate: float) -> list[Node]:
    """Chain items as branches. The topic numbers the item but cannot name it: that depends on the one before."""
    chosen = rng.random(len(nodes)) < rate
    chosen[0] = False  # the first item depends on no other
    if not chosen.any():
        chosen[rng.integers(1, len(nodes))] = True
    return [Promise(f"item {i}", 1, (n,)) if c else n for i, (n, c) in enumerate(zip(nodes, chosen), start=1)]


def _careless_sync(nodes: list[Node], rng: np.random.Generator, rates: Rates) -> list[Node]:
    if not any(isinstance(node, Promise) for node in nodes):
        return [node for node in nodes if not isinstance(node, Sync)]
    if rng.random() < rates.missing_sync:
        nodes = [node for node in nodes if not isinstance(node, Sync)]
    promised = [i for i, node in enumerate(nodes) if isinstance(node, Promise)]
    if len(promised) > 1 and rng.random() < rates.stray_sync:
        nodes.insert(int(rng.choice(promised[1:])), Sync())
    return nodes


def _measure(
    nodes: Iterable[Node], rng: np.random.Generator, count_tokens: CountTokens, wrong: float
) -> Iterable[Node]:
    for node in nodes:
        if isinstance(node, Promise):
            tens = length_in_tens(count_tokens(text_of(node.block)))
            if rng.random() < wrong:
                tens += 1 if tens == MIN_TOKENS or rng.random() < 0.5 else -1
            node = dataclasses.replace(node, tokens=min(tens, MAX_TOKENS))
        yield node
