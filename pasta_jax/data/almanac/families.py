"""Tasks: the seven families of prompts, each with the truth it asks for and the structure of its answer.

  list     independent, in list syntax            prose   independent, in one running paragraph
  compare  look-ups, a sync, then a conclusion    chain   a numbered list whose items need the ones before
  single   one fact                               report  headed sections of uneven length, or lists
  mixed    branches that each hold a chain

A prompt states exactly what is asked: the entities and the attributes. The plan of an answer is a Program
with the true independence marks; the plain answer is the same text without them. Sampling is by rejection, so
that a task's combination falls on its own side of the split (see `split`).

Examples:
  >>> task = list_task(("France", "Japan"), ("capital", "currency"))
  >>> print(task.prompt)
  List the capital and currency of France and Japan.
  >>> print(plain(task), end="")
  - France: Its capital is Paris. Its currency is the euro.
  - Japan: Its capital is Tokyo. Its currency is the yen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from pasta_jax.data.almanac import facts, split
from pasta_jax.data.almanac.facts import KIND_OF, KINDS, Fact, Kind, Superlative
from pasta_jax.lang.program import Node, Program, Promise, Sync, Text

FAMILIES = ("list", "prose", "compare", "chain", "single", "report", "mixed")
PARALLEL_FAMILIES = ("list", "prose", "compare", "report", "mixed")
"""The families whose answers have independent parts."""


class Step(NamedTuple):
    """Item `number` of the chain from `start`: after `before` comes `after`."""

    start: str
    number: int
    before: str
    after: str


@dataclasses.dataclass(frozen=True)
class Task:
    """A prompt, what a true answer states, and how one answer is built.

    Attributes:
      family: one of FAMILIES.
      prompt: the instruction.
      combination: what the split hashes; tasks with the same combination are on the same side.
      facts: every fact asked for.
      steps: every chain item asked for, in order.
      conclusion: the sentence that only the looked-up facts allow, or "".
      plan: the answer with the true independence marks. Every promise says tokens=1 until it is measured.
    """

    family: str
    prompt: str
    combination: str
    facts: tuple[Fact, ...]
    steps: tuple[Step, ...]
    conclusion: str
    plan: Program


def plain(task: Task) -> str:
    """The answer without marks."""
    return text_of(task.plan.nodes)


def text_of(nodes: Iterable[Node]) -> str:
    """The text of nodes, every block in its place."""
    return "".join(
        node.text if isinstance(node, Text) else text_of(node.block) if isinstance(node, Promise) else ""
        for node in nodes
    )


# ---------------------------------------------------------------------------------------- from parts to tasks


def list_task(entities: Sequence[str], nouns: Sequence[str], template: int = 0) -> Task:
    prompt = (
        f"List the {join(nouns)} of {join(entities)}.",
        f"Make a list of {join(entities)}: {join(nouns)}.",
    )[template]
    return _task("list", prompt, entities, product(entities, nouns), [_item(e, nouns) for e in entities])


def prose_task(entities: Sequence[str], nouns: Sequence[str], template: int = 0) -> Task:
    prompt = (
        f"Describe the {join(nouns)} of {join(entities)}.",
        f"Write about {join(entities)}: {join(nouns)}.",
    )[template]
    nodes = [
        _promise(e, (" " if i else "") + facts.introduce(e) + " " + _sentences(e, nouns))
        for i, e in enumerate(entities)
    ]
    return _task("prose", prompt, entities, product(entities, nouns), nodes)


def compare_task(
    entities: Sequence[str], nouns: Sequence[str], superlative: Superlative, template: int = 0
) -> Task:
    """The compared attribute must be among `nouns`, and its values distinct among `entities`."""
    prompt = (
        f"Compare the {join(nouns)} of {join(entities)}. Which {superlative.phrase}?",
        f"Which {superlative.phrase}: {join(entities)}? First give the {join(nouns)}.",
    )[template]
    conclusion = f"{winner(entities, superlative)} {superlative.phrase}."
    nodes = [*(_item(e, nouns) for e in entities), Sync(), Text(conclusion)]
    return _task("compare", prompt, entities, product(entities, nouns), nodes, conclusion=conclusion)


def chain_task(start: str, length: int, noun: str, template: int = 0) -> Task:
    kind = KIND_OF[start]
    prompt = (
        f"Name the {length} {kind.plural} after {start} with the {noun} of each.",
        f"Which {length} {kind.plural} come after {start}? Give the {noun} of each.",
    )[template]
    steps = chain(start, length)
    nodes = [Text(_numbered(step, facts.say(step.after, noun))) for step in steps]
    asked = product((step.after for step in steps), (noun,))
    combination = split.chain(kind.name, start, length)
    return Task("chain", prompt, combination, asked, steps, "", Program(tuple(nodes)))


def single_task(fact: Fact, template: int = 0) -> Task:
    entity, noun = fact
    prompt = (f"What is the {noun} of {entity}?", f"Give the {noun} of {entity}.")[template]
    plan = Program((Text(facts.say(entity, noun)),))
    return Task("single", prompt, split.fact(entity, noun), (fact,), (), "", plan)


class Section(NamedTuple):
    """A section of a report: about one entity, or a group of one kind (then with an inner list)."""

    entities: tuple[str, ...]
    nouns: tuple[str, ...]

    @property
    def heading(self) -> str:
        first = self.entities[0]
        return first if len(self.entities) == 1 else KIND_OF[first].plural.capitalize()


def report_task(sections: Sequence[Section], template: int = 0) -> Task:
    def ask(section: Section) -> str:
        group = "" if len(section.entities) == 1 else f" {join(section.entities)}"
        return f"{section.heading}{group}: {join(section.nouns)}."

    opening = ("Write a report.", "Write a report with these sections.")[template]
    prompt = "\n".join([opening, *map(ask, sections)])
    nodes = []
    for section in sections:
        if len(section.entities) == 1:
            body = _sentences(section.entities[0], section.nouns) + "\n"
        else:
            body = "".join(_item_text(e, section.nouns) for e in section.entities)
        nodes.append(_promise(section.heading, f"## {section.heading}\n{body}"))
    entities = [e for section in sections for e in section.entities]
    asked = [fact for section in sections for fact in product(section.entities, section.nouns)]
    return _task("report", prompt, entities, asked, nodes)


def mixed_task(starts: Sequence[str], lengths: Sequence[int], template: int = 0) -> Task:
    parts = join([f"{length} after {start}" for start, length in zip(starts, lengths, strict=True)])
    prompt = (f"Continue each chain: {parts}.", f"Name what comes next: {parts}.")[template]
    chains = [chain(start, length) for start, length in zip(starts, lengths, strict=True)]
    nodes = [
        _promise(start, f"From {start}:\n" + "".join(_numbered(step) for step in steps))
        for start, steps in zip(starts, chains, strict=True)
    ]
    steps = tuple(step for steps in chains for step in steps)
    return Task("mixed", prompt, split.chains(starts), (), steps, "", Program(tuple(nodes)))


# ---------------------------------------------------------------------------------------------- drawing parts

_KIND_WEIGHTS = np.array([max(len(kind.entities), 12) for kind in KINDS], np.float64)
"""Kinds are drawn by their size, so that every entity is seen about equally often; planets somewhat more."""
_ORDERED = tuple(kind for kind in KINDS if kind.in_order)
_COMPARED = tuple(kind for kind in KINDS if kind.superlatives)
_CHAIN_STARTS = tuple(e for kind in _ORDERED for e in kind.entities)


def _draw_list(rng: np.random.Generator, kinds: Sequence[Kind] = KINDS) -> Task:
    kind = _draw_kind(rng, kinds)
    return list_task(_draw_entities(rng, kind, 3, 6), _draw_nouns(rng, kind), _coin(rng))


def _draw_prose(rng: np.random.Generator) -> Task:
    kind = _draw_kind(rng, KINDS)
    return prose_task(_draw_entities(rng, kind, 3, 6), _draw_nouns(rng, kind), _coin(rng))


def _draw_compare(rng: np.random.Generator) -> Task | None:
    kind = _draw_kind(rng, _COMPARED)
    superlative = kind.superlatives[rng.integers(len(kind.superlatives))]
    entities = _draw_entities(rng, kind, 2, 4)
    if len({facts.value(e, superlative.noun) for e in entities}) < len(entities):
        return None
    nouns = _draw_nouns(rng, kind, must=superlative.noun)
    return compare_task(entities, nouns, superlative, _coin(rng))


def _draw_chain(rng: np.random.Generator) -> Task | None:
    start, length = _draw_start(rng), int(rng.integers(3, 7))
    nouns = KIND_OF[start].nouns
    if not chain(start, length):
        return None
    return chain_task(start, length, nouns[rng.integers(len(nouns))], _coin(rng))


def _draw_single(rng: np.random.Generator) -> Task:
    return single_task(facts.FACTS[rng.integers(len(facts.FACTS))], _coin(rng))


def _draw_report(rng: np.random.Generator) -> Task | None:
    sections: list[Section] = []
    for position in range(int(rng.integers(3, 5))):
        kind = _draw_kind(rng, KINDS)
        group = position == 0 or rng.random() < 0.3
        entities = _draw_entities(rng, kind, 2, 4) if group else _draw_entities(rng, kind, 1, 1)
        fewest = 2 if group else 1
        sections.append(Section(entities, _draw_nouns(rng, kind, fewest, 3 if group else 5)))
    order = rng.permutation(len(sections))
    sections = [sections[i] for i in order]
    entities = tuple(e for section in sections for e in section.entities)
    if len(set(entities)) < len(entities) or len({s.heading for s in sections}) < len(sections):
        return None
    return report_task(sections, _coin(rng))


def _draw_mixed(rng: np.random.Generator) -> Task | None:
    starts = _pick(rng, _CHAIN_STARTS, int(rng.integers(3, 6)))
    lengths = [int(n) for n in rng.integers(2, 5, len(starts))]
    if not all(chain(start, length) for start, length in zip(starts, lengths, strict=True)):
        return None
    return mixed_task(starts, lengths, _coin(rng))


_DRAW: dict[str, Callable[[np.random.Generator], Task | None]] = {
    "list": _draw_list,
    "prose": _draw_prose,
    "compare": _draw_compare,
    "chain": _draw_chain,
    "single": _draw_single,
    "report": _draw_report,
    "mixed": _draw_mixed,
}


def _sample(rng: np.random.Generator, family: str, *, held_out: bool) -> Task:
    while True:
        task = _DRAW[family](rng)
        if task is not None and split.held_out(task.combination) == held_out:
            return task


def training_task(rng: np.random.Generator, family: str | None = None) -> Task:
    """A fresh training task, of any family unless one is given; its combination is never held out."""
    return _sample(rng, family or FAMILIES[rng.integers(len(FAMILIES))], held_out=False)


def evaluation_tasks(n: int = 500, seed: int = 0) -> list[Task]:
    """`n` distinct prompts, families in turn, whose combinations never occur in training.

    Raises:
      ValueError: more are asked for than there are (the family `single` runs out first, near 1200).
    """
    rng = np.random.default_rng(seed)
    tasks: dict[str, Task] = {}
    tries = 0
    while len(tasks) < n:
        task = _sample(rng, FAMILIES[len(tasks) % len(FAMILIES)], held_out=True)
        tries = 0 if tasks.setdefault(task.prompt, task) is task else tries + 1
        if tries > 2000:
            raise ValueError(f"There are no {n} distinct held-out prompts; only about {len(tasks)}.")
    return list(tasks.values())


# ----------------------------------------------------------------------------------------------- small pieces


def join(names: Iterable[str]) -> str:
    """A list in words.

    >>> join(["Iron", "Neon", "Zinc"])
    'Iron, Neon and Zinc'
    """
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def product(entities: Iterable[str], nouns: Sequence[str]) -> tuple[Fact, ...]:
    return tuple(Fact(entity, noun) for entity in entities for noun in nouns)


def chain(start: str, length: int) -> tuple[Step, ...]:
    """The steps after `start`; empty if the order ends before."""
    steps: list[Step] = []
    here = start
    for number in range(1, length + 1):
        following = facts.successor(here)
        if following is None:
            return ()
        steps.append(Step(start, number, here, following))
        here = following
    return tuple(steps)


def winner(entities: Sequence[str], superlative: Superlative) -> str:
    best = max if superlative.largest else min
    return best(entities, key=lambda entity: int(facts.value(entity, superlative.noun)))


def say_step(before: str, after: str) -> str:
    return f"After {before} comes {after}."


def _numbered(step: Step, more: str = "") -> str:
    return f"{step.number}. {say_step(step.before, step.after)}{' ' + more if more else ''}\n"


def _sentences(entity: str, nouns: Iterable[str]) -> str:
    return " ".join(facts.say(entity, noun) for noun in nouns)


def _item_text(entity: str, nouns: Iterable[str]) -> str:
    return f"- {entity}: {_sentences(entity, nouns)}\n"


def _item(entity: str, nouns: Iterable[str]) -> Promise:
    return _promise(entity, _item_text(entity, nouns))


def _promise(topic: str, text: str) -> Promise:
    return Promise(topic, 1, (Text(text),))


def _task(
    family: str,
    prompt: str,
    entities: Iterable[str],
    asked: Iterable[Fact],
    nodes: Iterable[Node],
    conclusion: str = "",
) -> Task:
    return Task(family, prompt, split.entities(entities), tuple(asked), (), conclusion, Program(tuple(nodes)))


def _coin(rng: np.random.Generator) -> int:
    return int(rng.integers(2))


def _pick(rng: np.random.Generator, items: Sequence[str], count: int) -> tuple[str, ...]:
    return tuple(items[i] for i in rng.choice(len(items), count, replace=False))


def _draw_kind(rng: np.random.Generator, kinds: Sequence[Kind]) -> Kind:
    weights = np.array([_KIND_WEIGHTS[KINDS.index(kind)] for kind in kinds])
    return kinds[int(rng.choice(len(kinds), p=weights / weights.sum()))]


def _draw_start(rng: np.random.Generator) -> str:
    return _CHAIN_STARTS[rng.integers(len(_CHAIN_STARTS))]


def _draw_entities(rng: np.random.Generator, kind: Kind, fewest: int, most: int) -> tuple[str, ...]:
    return _pick(rng, kind.entities, int(rng.integers(fewest, most + 1)))


def _draw_nouns(
    rng: np.random.Generator, kind: Kind, fewest: int | None = None, most: int = 5, must: str | None = None
) -> tuple[str, ...]:
    """Some attributes in their fixed order, `must` among them; by default all but two or more."""
    fewest = max(2, len(kind.nouns) - 2) if fewest is None else fewest
    count = int(rng.integers(fewest, min(most, len(kind.nouns)) + 1))
    others = [noun for noun in kind.nouns if noun != must]
    chosen = {*_pick(rng, others, count - (must is not None)), must}
    return tuple(noun for noun in kind.nouns if noun in chosen)
