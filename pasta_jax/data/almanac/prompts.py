"""From a prompt back to its task: a prompt determines its task.

So a file of prompts and answers can be judged without knowing how the prompts were made.

Examples:
  >>> task = task_of("What is the capital of Peru?")
  >>> task.family, task.facts
  ('single', (Fact(entity='Peru', noun='capital'),))
  >>> task_of("What is the capital of Atlantis?")
  Traceback (most recent call last):
  ...
  ValueError: Not an almanac prompt: 'What is the capital of Atlantis?'
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from pasta_jax.data.almanac.facts import KIND_OF, KINDS, Fact
from pasta_jax.data.almanac.families import (
    TEMPLATES,
    Section,
    Task,
    chain_task,
    compare_task,
    join,
    list_task,
    mixed_task,
    prose_task,
    report_task,
    single_task,
)


def task_of(prompt: str) -> Task:
    """The task whose prompt this is.

    Raises:
      ValueError: it fits no template, or names an unknown entity or attribute.
    """
    for family, template, pattern in _PATTERNS:
        if match := pattern.fullmatch(prompt):
            try:
                task = _build(family, match.groupdict(), template)
            except (KeyError, ValueError, IndexError):
                continue  # it fits the template, but not the tables
            if task.prompt == prompt:
                return task
    raise ValueError(f"Not an almanac prompt: {prompt!r}")


def _pattern(template: str) -> re.Pattern[str]:
    named = re.sub(r"\\{(\w+)\\}", r"(?P<\1>.+)", re.escape(template))
    return re.compile(named, re.DOTALL)


_PATTERNS = [(f, i, _pattern(template)) for f, pair in TEMPLATES.items() for i, template in enumerate(pair)]


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the names, the longest first: a name may start with another one."""
    return re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)))


_ENTITY = _any_of(KIND_OF)
_NOUN = _any_of({noun for kind in KINDS for noun in kind.nouns})
_CHAIN = re.compile(rf"(\d) after ({_ENTITY.pattern})")


def _build(family: str, fields: dict[str, str], template: int) -> Task:
    if family == "single":
        return single_task(Fact(fields["entity"], fields["noun"]), template)
    if family == "chain":
        return chain_task(fields["start"], int(fields["length"]), fields["noun"], template)
    if family == "mixed":
        lengths, starts = zip(*_CHAIN.findall(fields["chains"]), strict=True)
        return mixed_task(starts, [int(length) for length in lengths], template)
    if family == "report":
        return report_task([_section(line) for line in fields["sections"].splitlines()], template)
    entities, nouns = _names(_ENTITY, fields["entities"]), _names(_NOUN, fields["nouns"])
    if family == "compare":
        superlatives = {s.phrase: s for s in KIND_OF[entities[0]].superlatives}
        return compare_task(entities, nouns, superlatives[fields["phrase"]], template)
    return {"list": list_task, "prose": prose_task}[family](entities, nouns, template)


def _names(known: re.Pattern[str], text: str) -> tuple[str, ...]:
    """The inverse of `join`."""
    names = tuple(known.findall(text))
    if not names or join(names) != text:
        raise ValueError(text)
    return names


def _section(line: str) -> Section:
    asked, _, nouns = line.removeprefix("- ").removesuffix(".").rpartition(": ")
    plurals = tuple(f"{kind.plural.capitalize()} " for kind in KINDS)
    group = next((plural for plural in plurals if asked.startswith(plural)), "")
    return Section(_names(_ENTITY, asked.removeprefix(group)), _names(_NOUN, nouns))
