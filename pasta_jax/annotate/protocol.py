"""What every annotator is: a prompt and an answer in, a Program of the same text out.

An annotator only inserts tags. The command checks it for all of them: `assemble(program) == answer`, byte for byte,
or the record is listed and stays plain.

A plain function with the signature of `Annotator` is one. An annotator that asks a server, or runs a model on many
answers at once, has `annotate_all` as well and may return results in any order; `annotate_all` of this module is
what the command calls for both kinds.
"""

from __future__ import annotations

import dataclasses
import os
import traceback
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol, TypeAlias, runtime_checkable

from pasta_jax.endpoint.post import EndpointError
from pasta_jax.lang.assemble import assemble
from pasta_jax.lang.program import Program

Messages: TypeAlias = tuple[Mapping[str, str], ...]
"""A conversation that ends with the user's message, each {"role": ..., "content": ...}."""


class Declined(Exception):
    """An annotator cannot annotate this answer; the reason is one line for the report."""


@dataclasses.dataclass(frozen=True)
class Annotated:
    """An annotated answer.

    Attributes:
      program: the answer with its tags; its text is the answer's, unaltered. Without promises it stays plain. The
        command counts the lengths of blocks by the tokenizer and shortens topics, so 1 and any name will do.
      notes: why blocks stayed in main, one short reason each; equal ones are counted together in the report.
    """

    program: Program
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Item:
    """An answer to annotate; `key` names it among those of a run."""

    key: str
    prompt: str | Messages
    answer: str


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of an item: `annotated`, or the reason why it was declined."""

    key: str
    annotated: Annotated | None
    declined: str = ""


class Annotator(Protocol):
    """Annotates one answer. Raises Declined; whatever else it raises, this answer is listed with it."""

    def __call__(self, prompt: str | Messages, answer: str) -> Annotated: ...


@runtime_checkable
class ManyAnnotator(Protocol):
    """An annotator of many answers at once: one result for each item, in any order. Raises nothing for an item."""

    def annotate_all(self, items: Iterable[Item]) -> Iterator[Result]: ...


@runtime_checkable
class Estimating(Protocol):
    """An annotator that asks others, which may take hours and cost money."""

    def estimate(self, items: Iterable[Item], *, shown: int) -> str:
        """What annotating the items would take, for people, with the first requests in full; asks nothing."""

    def status(self) -> str:
        """What it asked so far, and what that cost, in a few words."""


def annotate_all(annotator: Annotator | ManyAnnotator, items: Iterable[Item]) -> Iterator[Result]:
    """A checked result for each item: one whose text was altered, or whose annotator failed, is declined.

    >>> from pasta_jax.lang.program import Text
    >>> shout = lambda prompt, answer: Annotated(Program((Text(answer.upper()),)))
    >>> [result.declined for result in annotate_all(shout, [Item("1", "Who?", "Ada."), Item("2", "?", "OK")])]
    ['the annotator altered the text at character 2', '']
    """
    answers: dict[str, str] = {}

    def noted() -> Iterator[Item]:
        for item in items:
            answers[item.key] = item.answer
            yield item

    results = (
        annotator.annotate_all(noted()) if isinstance(annotator, ManyAnnotator) else _each(annotator, noted())
    )
    for result in results:
        yield _checked(annotator, result, answers.pop(result.key))


def _each(annotator: Annotator, items: Iterable[Item]) -> Iterator[Result]:
    for item in items:
        try:
            yield Result(item.key, annotator(item.prompt, item.answer))
        except Declined as declined:
            yield Result(item.key, None, str(declined))
        except EndpointError:  # no other answer would fare better
            raise
        except Exception as error:  # one answer does not stop the others
            yield Result(item.key, None, _failure(annotator, error))


def _failure(annotator: object, error: Exception) -> str:
    """What happened in the user's code, and where, in a line."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return f"{_name(annotator)} failed: {what} ({os.path.basename(place.filename)}, line {place.lineno})"


def _name(annotator: object) -> str:
    named = annotator if hasattr(annotator, "__qualname__") else type(annotator)
    return f"{named.__module__}:{named.__qualname__}"


def _checked(annotator: object, result: Result, answer: str) -> Result:
    if result.annotated is None:
        return result
    if not isinstance(result.annotated, Annotated):
        kind = type(result.annotated).__name__
        return Result(result.key, None, f"{_name(annotator)} returned a {kind}, and not an Annotated")
    try:
        text = assemble(result.annotated.program)
    except Exception as error:  # it holds anything
        return Result(result.key, None, _failure(annotator, error))
    if text == answer:
        return result
    same = next((i for i, (a, b) in enumerate(zip(text, answer)) if a != b), min(len(text), len(answer)))
    return Result(result.key, None, f"the annotator altered the text at character {same + 1}")
