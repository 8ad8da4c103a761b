"""The facts: 208 entities of six kinds, 842 facts, and the one sentence that states each fact.

The tables are the `.tsv` files in this folder: one row per entity, one column per attribute. The first row
names the attributes, the second has their sentences. The order of the rows is a fact itself if the kind is
`in_order` (elements by atomic number, states by date of joining, planets outward).

Ambiguous cases are left out: countries with several capitals, with co-official languages or on two continents;
elements beyond xenon (disputed groups); works without a unique year of publication or title. "Phase" is at room
temperature. Names are spelled in ASCII. A "main language" is official (or was never declared, as in Mexico) and the
most spoken. A year is that of the first book edition, or of the first performance.

Checked against:
  elements   `mendeleev` (name, number, symbol, period, group, phase at 20 °C) and `periodictable`: all agree,
             but for the spelling of aluminium, where the tables follow IUPAC.
  states     `us` (capital, postal code, year): all agree. The order follows from the years and, within a
             year, from general knowledge of the dates; of the two Dakotas, made states together, North is
             first by convention.
  countries  `countryinfo` with `pycountry` (capital, language, currency; region, which has one name for both
             Americas): all agree, but for accents, and for Croatia, where it predates the euro (2023).
  planets, novels, operas   general knowledge; some years (Robinson Crusoe, Oblomov, Tosca, Jenufa, Madama
             Butterfly, Peter Grimes) also against published chronologies.

Examples:
  >>> value("France", "capital"), say("France", "capital")
  ('Paris', 'Its capital is Paris.')
  >>> successor("Iron"), successor("Neptune")
  ('Cobalt', None)
"""

from __future__ import annotations

import csv
import dataclasses
import functools
from importlib import resources
from typing import NamedTuple


@dataclasses.dataclass(frozen=True)
class Attribute:
    """One column of a table: its noun, as in prompts, and the sentence that states its value."""

    noun: str
    sentence: str


@dataclasses.dataclass(frozen=True)
class Superlative:
    """A comparison of integers: the entity with the largest `noun` is the one that `phrase`.

    There is one direction only: a model of a million parameters that must also read the direction from the question
    learns neither.
    """

    noun: str
    phrase: str


@dataclasses.dataclass(frozen=True)
class EntityKind:
    """A kind of entity, with its table.

    Attributes:
      name: "country".
      article: the name with its article: "a country".
      plural: "countries".
      attributes: in the order of every answer.
      superlatives: the possible comparisons.
      in_order: whether the order of the rows is a fact ("After Iron comes Cobalt.").
      table: entity -> its values, one per attribute.
    """

    name: str
    article: str
    plural: str
    attributes: tuple[Attribute, ...]
    superlatives: tuple[Superlative, ...]
    in_order: bool
    table: dict[str, tuple[str, ...]]

    @property
    def nouns(self) -> tuple[str, ...]:
        return tuple(attribute.noun for attribute in self.attributes)

    @functools.cached_property
    def entities(self) -> tuple[str, ...]:
        return tuple(self.table)


class Fact(NamedTuple):
    """An entity and one of its attributes; the value is in the table."""

    entity: str
    noun: str


def _kind(names: str, *superlatives: Superlative, in_order: bool = False) -> EntityKind:
    """Reads a table: a row of nouns, a row of sentences (the first is the article), then the entities."""
    name, plural = names.split("/")
    text = (resources.files(__package__) / f"{plural}.tsv").read_text(encoding="utf-8")
    (_, *nouns), (article, *sentences), *rows = csv.reader(text.splitlines(), delimiter="\t")
    attributes = tuple(map(Attribute, nouns, sentences))
    if any(len(row) != 1 + len(attributes) for row in rows):
        raise ValueError(f"{plural}.tsv does not have a value for each of {', '.join(nouns)} in every row.")
    table = {entity: tuple(values) for entity, *values in rows}
    return EntityKind(name, article, plural, attributes, superlatives, in_order, table)


KINDS = (
    _kind("country/countries"),
    _kind("element/elements", Superlative("atomic number", "has the highest atomic number"), in_order=True),
    _kind("state/states", Superlative("state number", "has the highest state number"), in_order=True),
    _kind("planet/planets", Superlative("position", "is farthest from the Sun"), in_order=True),
    _kind("novel/novels", Superlative("year", "is the newest")),
    _kind("opera/operas", Superlative("year", "is the newest")),
)

KIND_OF: dict[str, EntityKind] = {entity: kind for kind in KINDS for entity in kind.entities}
"""The kind of each entity. No two kinds share a name."""

FACTS: tuple[Fact, ...] = tuple(Fact(entity, noun) for entity, kind in KIND_OF.items() for noun in kind.nouns)
"""Every fact, kind by kind."""


def value(entity: str, noun: str) -> str:
    kind = KIND_OF[entity]
    return kind.table[entity][kind.nouns.index(noun)]


def say(entity: str, noun: str) -> str:
    """The sentence that states a fact, the same wherever it is stated."""
    kind = KIND_OF[entity]
    i = kind.nouns.index(noun)
    return kind.attributes[i].sentence.format(kind.table[entity][i])


def introduce(entity: str) -> str:
    """The sentence that starts to speak of an entity: "Consider Iron, an element.".

    No sentence has a name at the start of a text or line, so a name is the same token everywhere.
    """
    return f"Consider {entity}, {KIND_OF[entity].article}."


def successor(entity: str) -> str | None:
    """What comes after an entity in the order of its kind; None after the last, or without an order."""
    kind = KIND_OF[entity]
    following = kind.entities.index(entity) + 1
    return kind.entities[following] if kind.in_order and following < len(kind.entities) else None
