"""What a judge is: an object that compares two answers to a prompt.

    class Shorter:
        def compare(self, prompt, a, b):
            return Preference(None if len(a) == len(b) else int(len(b) < len(a)), 0.9)

The second stage and the evaluation ask `compare_all`. A judge that works in batches, or asks an endpoint several
questions at once, has a method of that name as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

from pasta_jax.data.judgement import Preference

__all__ = ["Comparison", "Judge", "JudgeError", "Preference", "compare_all"]


class JudgeError(ValueError):
    """A judge that cannot be made, or cannot judge; the message says what to do."""


class Comparison(NamedTuple):
    """A prompt and two answers to it."""

    prompt: str
    a: str
    b: str


class Judge(Protocol):
    """Compares two answers to a prompt.

    A judge may also have `compare_all(comparisons: Sequence[Comparison]) -> Iterable[Preference]`, one for each in
    the same order. What it has yielded is kept, so a judge that takes long yields early.
    """

    def compare(self, prompt: str, a: str, b: str, /) -> Preference:
        """Which answer is better: 0 for a, 1 for b, None for a tie, and how sure that is, 0.5 to 1.

        Raises JudgeError if it cannot say, and cannot for other answers either.
        """


def compare_all(judge: Judge, comparisons: Sequence[Comparison]) -> Iterator[Preference]:
    """What a judge says of each, in their order: all at once if it can.

    Raises:
      JudgeError: what it said is no preference, or there are too many or too few.
    """
    asked = getattr(judge, "compare_all", None)
    said: Iterable[Preference] = (
        asked(comparisons) if asked else (judge.compare(*each) for each in comparisons)
    )
    count = 0
    for preference in said:
        yield checked(preference)
        count += 1
    if count != len(comparisons):
        raise JudgeError(f"The judge was asked {len(comparisons)} comparisons and answered {count}.")


def checked(preference: object) -> Preference:
    """A preference that any judge gave, as a `Preference`. Raises JudgeError if it is none."""
    try:
        winner, confidence = preference  # type: ignore[misc]
        if winner in (0, 1, None) and 0.5 <= confidence <= 1.0:
            return Preference(None if winner is None else int(winner), float(confidence))
    except (TypeError, ValueError):
        pass
    raise JudgeError(
        f"A judge must return (winner, confidence): 0, 1 or None, and a number from 0.5 to 1; got {preference!r}."
    )
