"""Random tasks: endless for training, distinct and held out for evaluation.

Kinds, entities, attributes, lengths and wordings are drawn at random. A task on the wrong side of the split is
drawn again.

Examples:
  >>> training_task(np.random.default_rng(0), "single").family
  'single'
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from pasta_jax.data.almanac import facts, split
from pasta_jax.data.almanac.facts import KIND_OF, KINDS, EntityKind
from pasta_jax.data.almanac.families import (
    FAMILIES,
    Section,
    Task,
    chain_task,
    compare_task,
    list_task,
    mixed_task,
    prose_task,
    report_task,
    single_task,
)

_KIND_WEIGHTS = np.array([max(len(kind.entities), 12) for kind in KINDS], np.float64)
"""Kinds are drawn in proportion to their size, so that entities occur about equally often; planets more often."""
_ORDERED = tuple(kind for kind in KINDS if kind.in_order)
_COMPARED = tuple(kind for kind in KINDS if kind.superlatives)
_CHAIN_STARTS = tuple(e for kind in _ORDERED for e in kind.entities)


def _draw_list(rng: np.random.Generator) -> Task:
    kind = _draw_kind(rng, KINDS)
    return list_task(_draw_entities(rng, kind, 3, 5), _draw_nouns(rng, kind), _coin(rng))


def _draw_prose(rng: np.random.Generator) -> Task:
    kind = _draw_kind(rng, KINDS)
    return prose_task(_draw_entities(rng, kind, 3, 5), _draw_nouns(rng, kind), _coin(rng))


def _draw_compare(rng: np.random.Generator) -> Task:
    kind = _draw_kind(rng, _COMPARED)
    superlative = kind.superlatives[rng.integers(len(kind.superlatives))]
    entities = _draw_entities(rng, kind, 2, 4)
    nouns = _draw_nouns(rng, kind, must=superlative.noun)
    return compare_task(entities, nouns, superlative, _coin(rng))


def _draw_chain(rng: np.random.Generator) -> Task:
    start, length = _draw_start(rng), int(rng.integers(3, 7))
    nouns = KIND_OF[start].nouns
    return chain_task(start, length, nouns[rng.integers(len(nouns))], _coin(rng))


def _draw_single(rng: np.random.Generator) -> Task:
    return single_task(facts.FACTS[rng.integers(len(facts.FACTS))], _coin(rng))


def _draw_report(rng: np.random.Generator) -> Task:
    """Two to four sections in random order, at least one of them a group."""
    sections: list[Section] = []
    for position in range(int(rng.integers(2, 5))):
        kind = _draw_kind(rng, KINDS)
        if position == 0 or rng.random() < 0.3:
            section = Section(_draw_entities(rng, kind, 2, 3), _draw_nouns(rng, kind, 2, 3))
        else:
            section = Section(_draw_entities(rng, kind, 1, 1), _draw_nouns(rng, kind, 1))
        sections.append(section)
    sections = [sections[i] for i in rng.permutation(len(sections))]
    return report_task(sections, _coin(rng))


def _draw_mixed(rng: np.random.Generator) -> Task:
    starts = _pick(rng, _CHAIN_STARTS, int(rng.integers(3, 5)))
    lengths = [int(n) for n in rng.integers(2, 5, len(starts))]
    return mixed_task(starts, lengths, _coin(rng))


def _draw_short_comparison(rng: np.random.Generator) -> Task:
    """A comparison by the deciding attribute alone."""
    kind = _draw_kind(rng, _COMPARED)
    superlative = kind.superlatives[rng.integers(len(kind.superlatives))]
    return compare_task(_draw_entities(rng, kind, 2, 4), (superlative.noun,), superlative, _coin(rng))


def _coin(rng: np.random.Generator) -> int:
    return int(rng.integers(2))


def _pick(rng: np.random.Generator, items: Sequence[str], count: int) -> tuple[str, ...]:
    return tuple(items[i] for i in rng.choice(len(items), count, replace=False))


def _draw_kind(rng: np.random.Generator, kinds: Sequence[EntityKind]) -> EntityKind:
    weights = np.array([_KIND_WEIGHTS[KINDS.index(kind)] for kind in kinds])
    return kinds[int(rng.choice(len(kinds), p=weights / weights.sum()))]


def _draw_start(rng: np.random.Generator) -> str:
    return _CHAIN_STARTS[rng.integers(len(_CHAIN_STARTS))]


def _draw_entities(rng: np.random.Generator, kind: EntityKind, low: int, high: int) -> tuple[str, ...]:
    return _pick(rng, kind.entities, int(rng.integers(low, high + 1)))


def _draw_nouns(
    rng: np.random.Generator, kind: EntityKind, low: int | None = None, high: int = 5, must: str | None = None
) -> tuple[str, ...]:
    """Some attributes in their fixed order, including `must`; by default at most two are left out."""
    low = max(2, len(kind.nouns) - 2) if low is None else low
    count = int(rng.integers(low, min(high, len(kind.nouns)) + 1))
    others = [noun for noun in kind.nouns if noun != must]
    chosen = {*_pick(rng, others, count - (must is not None)), must}
    return tuple(noun for noun in kind.nouns if noun in chosen)


_Draw = Callable[[np.random.Generator], Task]

_DRAW: dict[str, _Draw] = {
    "list": _draw_list,
    "prose": _draw_prose,
    "compare": _draw_compare,
    "chain": _draw_chain,
    "single": _draw_single,
    "report": _draw_report,
    "mixed": _draw_mixed,
}


_TRAINING_WEIGHTS = {"list": 4, "prose": 4, "compare": 4, "chain": 2, "single": 2, "report": 9, "mixed": 3}
_TOTAL_WEIGHT = sum(_TRAINING_WEIGHTS.values())
_TRAINING_SHARES = np.array([_TRAINING_WEIGHTS[family] / _TOTAL_WEIGHT for family in FAMILIES])
"""Training has more tasks of the difficult families; evaluation has equally many of all."""


def _sample(rng: np.random.Generator, draw: _Draw, *, held_out: bool) -> Task:
    while True:
        try:
            task = draw(rng)
        except ValueError:
            continue  # a tie, a chain beyond its end, ...: the builders refuse it
        if split.held_out(task.combination) == held_out:
            return task


def training_task(rng: np.random.Generator, family: str | None = None) -> Task:
    """A random training task of the family, or of any; its combination is never held out."""
    family = family or FAMILIES[int(rng.choice(len(FAMILIES), p=_TRAINING_SHARES))]
    return _sample(rng, _DRAW[family], held_out=False)


def short_comparison(rng: np.random.Generator) -> Task:
    """A training task that does not occur in evaluation: models learn to compare from many short ones."""
    return _sample(rng, _draw_short_comparison, held_out=False)


def evaluation_tasks(n: int = 500, seed: int = 0) -> list[Task]:
    """`n` distinct prompts, families in turn, with combinations that never occur in training.

    Raises:
      ValueError: there are fewer (the family `single` runs out first, near 1200).
    """
    rng = np.random.default_rng(seed)
    tasks: dict[str, Task] = {}
    tries = 0
    while len(tasks) < n:
        task = _sample(rng, _DRAW[FAMILIES[len(tasks) % len(FAMILIES)]], held_out=True)
        tries = 0 if tasks.setdefault(task.prompt, task) is task else tries + 1
        if tries > 1000:
            raise ValueError(f"There are no {n} distinct held-out prompts; only about {len(tasks)}.")
    return list(tasks.values())
