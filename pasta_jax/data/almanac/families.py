"""Tasks: the seven families of prompts, with the facts they ask for and the structure of their answers.

  list     independent, in list syntax            prose   independent, in one running paragraph
  compare  look-ups, a sync, then a conclusion    chain   a numbered list, each item depends on the last
  single   one fact                               report  headed sections of uneven length, or lists
  mixed    branches that each hold a chain

A prompt names exactly the entities and attributes it asks for. The plan of an answer is a Program with the true
independence marks; the plain answer is the same text without them. See `draw` for random tasks.

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
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pasta_jax.data.almanac import facts, split
from pasta_jax.data.almanac.facts import KIND_OF, Fact, Superlative
from pasta_jax.lang.assemble import assemble, text_of
from pasta_jax.lang.program import Node, Program, Promise, Sync, Text

FAMILIES = ("list", "prose", "compare", "chain", "single", "report", "mixed")
PARALLEL_FAMILIES = ("list", "prose", "compare", "report", "mixed")
"""The families whose answers have independent parts."""


TEMPLATES = {
    "list": ("List the {nouns} of {entities}.", "Make a list of {entities}: {nouns}."),
    "prose": ("Describe the {nouns} of {entities}.", "Write about {entities}: {nouns}."),
    "compare": (
        "Compare the {nouns} of {entities}. Which {phrase}?",
        "Which {phrase}: {entities}? First give the {nouns}.",
    ),
    "chain": (
        "Name the {length} {plural} after {start} with the {noun} of each.",
        "Which {length} {plural} come after {start}? Give the {noun} of each.",
    ),
    "single": ("What is the {noun} of {entity}?", "Give the {noun} of {entity}."),
    "report": ("Write a report.\n{sections}", "Write a report with these sections.\n{sections}"),
    "mixed": ("Continue each chain: {chains}.", "Name what comes next: {chains}."),
}
"""The two wordings of each family's prompts; `prompts` reads them back."""


class Step(NamedTuple):
    """Item `number` of the chain from `start`: after `before` comes `after`."""

    start: str
    number: int
    before: str
    after: str


@dataclasses.dataclass(frozen=True)
class Task:
    """A prompt, the statements of a true answer, and the structure of one such answer.

    Attributes:
      family: one of FAMILIES.
      prompt: the instruction.
      combination: the key of the split; tasks with the same combination are on the same side.
      facts: every fact asked for.
      steps: every chain item asked for, in order.
      conclusion: the sentence that depends on the looked-up facts, or "".
      plan: the answer with the true independence marks. Every promise has tokens=1 until it is measured.
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
    return assemble(task.plan)


def points(task: Task) -> list[tuple[str, str]]:
    r"""The answer as named points with their texts, in order; the texts joined are the plain answer.

    >>> points(list_task(("France", "Japan"), ("capital",)))[0]
    ('France', '- France: Its capital is Paris.\n')
    """
    steps = iter(task.steps)

    def name(node: Node) -> str:
        if isinstance(node, Promise):
            return node.topic
        if task.family == "chain":
            return next(steps).after
        return "conclusion" if task.conclusion else task.facts[0].entity

    return [(name(node), text_of([node])) for node in task.plan.nodes if not isinstance(node, Sync)]


# ---------------------------------------------------------------------------------------- from parts to tasks


def list_task(entities: Sequence[str], nouns: Sequence[str], template: int = 0) -> Task:
    prompt = TEMPLATES["list"][template].format(nouns=join(nouns), entities=join(entities))
    return _task("list", prompt, entities, product(entities, nouns), [_item(e, nouns) for e in entities])


def prose_task(entities: Sequence[str], nouns: Sequence[str], template: int = 0) -> Task:
    prompt = TEMPLATES["prose"][template].format(nouns=join(nouns), entities=join(entities))
    nodes = [
        _promise(e, (" " if i else "") + facts.introduce(e) + " " + _sentences(e, nouns))
        for i, e in enumerate(entities)
    ]
    return _task("prose", prompt, entities, product(entities, nouns), nodes)


def compare_task(
    entities: Sequence[str], nouns: Sequence[str], superlative: Superlative, template: int = 0
) -> Task:
    """The compared attribute must be among `nouns`, and its values must differ (else ValueError)."""
    values = {facts.value(entity, superlative.noun) for entity in entities}
    if superlative.noun not in nouns or len(values) < len(entities):
        raise ValueError(f"It is not decidable which of {join(entities)} {superlative.phrase}.")
    fields = {"nouns": join(nouns), "entities": join(entities), "phrase": superlative.phrase}
    prompt = TEMPLATES["compare"][template].format(**fields)
    conclusion = f"Which {superlative.phrase}? {winner(entities, superlative)}."
    nodes: list[Node] = [*(_item(e, nouns) for e in entities), Sync(), Text(conclusion)]
    return _task("compare", prompt, entities, product(entities, nouns), nodes, conclusion=conclusion)


def chain_task(start: str, length: int, noun: str, template: int = 0) -> Task:
    kind = KIND_OF[start]
    prompt = TEMPLATES["chain"][template].format(length=length, plural=kind.plural, start=start, noun=noun)
    steps = chain(start, length)
    if not steps:
        raise ValueError(f"There are no {length} {kind.plural} after {start}.")
    nodes = [Text(_numbered(step, facts.say(step.after, noun))) for step in steps]
    asked = product((step.after for step in steps), (noun,))
    combination = split.chain(kind.name, start, length)
    return Task("chain", prompt, combination, asked, steps, "", Program(tuple(nodes)))


def single_task(fact: Fact, template: int = 0) -> Task:
    entity, noun = fact
    prompt = TEMPLATES["single"][template].format(noun=noun, entity=entity)
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
        return f"- {section.heading}{group}: {join(section.nouns)}."

    prompt = TEMPLATES["report"][template].format(sections="\n".join(map(ask, sections)))
    nodes: list[Node] = []
    for section in sections:
        if len(section.entities) == 1:
            body = _sentences(section.entities[0], section.nouns) + "\n"
        else:
            body = "".join(_item_text(e, section.nouns) for e in section.entities)
        nodes.append(_promise(section.heading, f"## {section.heading}\n{body}"))
    entities = [e for section in sections for e in section.entities]
    if len(set(entities)) < len(entities) or len({s.heading for s in sections}) < len(sections):
        raise ValueError("No two sections of a report may share an entity or a heading.")
    asked = [fact for section in sections for fact in product(section.entities, section.nouns)]
    return _task("report", prompt, entities, asked, nodes)


def mixed_task(starts: Sequence[str], lengths: Sequence[int], template: int = 0) -> Task:
    parts = join([f"{length} after {start}" for start, length in zip(starts, lengths, strict=True)])
    prompt = TEMPLATES["mixed"][template].format(chains=parts)
    chains = [chain(start, length) for start, length in zip(starts, lengths, strict=True)]
    if not all(chains):
        raise ValueError(f"Not all of these chains exist: {parts}.")
    nodes = [
        _promise(start, f"From {start}:\n" + "".join(_numbered(step) for step in steps))
        for start, steps in zip(starts, chains, strict=True)
    ]
    steps = tuple(step for steps in chains for step in steps)
    return Task("mixed", prompt, split.chains(starts), (), steps, "", Program(tuple(nodes)))


# ----------------------------------------------------------------------------------------------- small pieces


def join(names: Iterable[str]) -> str:
    """A list in words.

    >>> join(["Iron", "Neon", "Zinc"])
    'Iron, Neon and Zinc'
    """
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def product(entities: Iterable[str], nouns: Sequence[str]) -> tuple[Fact, ...]:
    return tuple(Fact(entity, noun) for entity in entities for noun in nouns)


def chain(start: str, length: int) -> tuple[Step, ...]:
    """The steps after `start`; empty if the order ends before that many."""
    steps: list[Step] = []
    before = start
    for number in range(1, length + 1):
        following = facts.successor(before)
        if following is None:
            return ()
        steps.append(Step(start, number, before, following))
        before = following
    return tuple(steps)


def winner(entities: Sequence[str], superlative: Superlative) -> str:
    return max(entities, key=lambda entity: int(facts.value(entity, superlative.noun)))


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
