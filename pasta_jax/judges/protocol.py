"""What a judge is: an object that compares two answers to a prompt.

    class Shorter:
        def compare(self, prompt, a, b):
            return Preference(None if len(a) == len(b) else int(len(b) < len(a)), 0.9)

The second stage and the evaluation ask `compare_all`. A judge that works in batches, or asks an endpoint several
questions at once, has a method of that name as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from pasta_jax.data.judgement import NO_VERDICT, Preference
from pasta_jax.data.records import Prompt, prompt_text
from pasta_jax.messages import shown

__all__ = ["NO_VERDICT", "Comparison", "Judge", "JudgeError", "Preference", "Prompt", "compare_all"]


class JudgeError(ValueError):
    """A judge that cannot be made, or cannot judge; the message says what to do."""


class Comparison(NamedTuple):
    """A prompt and two answers to it."""

    prompt: Any  # a `Prompt`; its text for judges that take no messages
    a: str
    b: str


class Judge(Protocol):
    """Compares two answers to a prompt.

    A judge may also have

      compare_all(comparisons: Sequence[Comparison]) -> Iterable[Preference]   one for each in the same order; what
          it has yielded is kept if the run is cut off, so one that takes long yields early
      takes_messages = True   if it takes prompts of several messages as they are, not as one text
      on_all_devices = True   if it computes with a model that is spread over the devices of all processes
    """

    def compare(self, prompt: str, a: str, b: str, /) -> Preference:
        """Which answer is better: 0 for a, 1 for b, None for a tie, and how sure that is, 0.5 to 1.

        `NO_VERDICT` if it cannot say of these two: it is left out, and asked again by a later run. Raises
        JudgeError if it cannot say any more.
        """


def compare_all(judge: Judge, comparisons: Sequence[Comparison]) -> Iterator[Preference]:
    """What a judge says of each, in their order: all at once if it can.

    Raises:
      JudgeError: what it said is no preference, or there are too many or too few.
    """
    asked: Sequence[Any] = comparisons
    if not getattr(judge, "takes_messages", False):
        asked = [Comparison(prompt_text(prompt), a, b) for prompt, a, b in comparisons]
    at_once = getattr(judge, "compare_all", None)
    said: Iterable[object] = at_once(asked) if at_once else (judge.compare(*each) for each in asked)
    count = 0
    for count, preference in enumerate(said, start=1):
        if count <= len(comparisons):
            yield checked(preference)
    if count != len(comparisons):
        raise JudgeError(f"The judge was asked about {len(comparisons)} comparisons, and answered {count}.")


def checked(preference: Any) -> Preference:
    """What any judge said, as a `Preference`. Raises JudgeError if it is none."""
    try:
        winner, confidence = preference
        if winner is None and confidence == 0:
            return NO_VERDICT
        if (winner is None or winner in (0, 1)) and 0.5 <= confidence <= 1.0:
            return Preference(None if winner is None else int(winner), float(confidence))
    except (TypeError, ValueError):
        pass
    raise JudgeError(
        "A judge must return (winner, confidence): 0, 1 or None, and a number from 0.5 to 1. This one returned "
        f"{shown(preference)}."
    )
