r"""Skeleton-of-Thought (Ning et al. 2023): first the points of an answer, then every point at the same time.

A prompting scheme over any model that knows the two prompts: the *skeleton* prompt asks for the points, one
numbered line each; a *point* prompt shows question and skeleton and asks for one point's text. All points are
asked at once; none sees another, and nothing is written after they are done. The answer is their texts, joined.

In our favour would have been the authors' long prompts; these are as short as can be. Training puts both
prompts into the base model's mix and again into the finetuning of the model that this scheme uses, which the
authors do without.

Examples:
  >>> print(point_prompt("Compare tea and coffee.", ["tea", "coffee"], 1))
  Compare tea and coffee.
  1. tea
  2. coffee
  Write only 2. coffee
  >>> read_points("1. tea\n2. coffee\n")
  ['tea', 'coffee']
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Protocol

MOST_POINTS = 8
"""More points than these are not expanded: as many as the engine decodes at once."""

_LINE = re.compile(r"\d+\. (.+)")


class Reply(Protocol):
    """What a model said to one prompt."""

    @property
    def text(self) -> str: ...
    @property
    def steps(self) -> int:
        """Decode steps that the reply needs."""


@dataclasses.dataclass(frozen=True)
class SkeletonAnswer:
    """An answer in two rounds.

    Attributes:
      text: the points' texts, joined.
      points: what the skeleton named; empty if it was none, and then `text` is the skeleton itself.
      steps: of the skeleton, and of the longest point: the critical path.
      tokens: of everything, skeleton included.
    """

    text: str
    points: tuple[str, ...]
    steps: int
    tokens: int


def skeleton_prompt(question: str) -> str:
    """Asks for the points of an answer."""
    return f"{question}\nGive only the points."


def point_prompt(question: str, points: Sequence[str], index: int) -> str:
    """Asks for the text of the point at `index`."""
    return f"{question}\n{skeleton(points)}Write only {index + 1}. {points[index]}"


def skeleton(points: Sequence[str]) -> str:
    """Points as the skeleton spells them: one numbered line each."""
    return "".join(f"{number}. {point}\n" for number, point in enumerate(points, start=1))


def read_points(text: str) -> list[str]:
    """The points of a skeleton, as a model wrote it; lines that are no points are passed over."""
    return [match[1] for line in text.splitlines() if (match := _LINE.fullmatch(line.strip()))][:MOST_POINTS]


def answer(ask: Callable[[list[str]], Sequence[Reply]], question: str) -> SkeletonAnswer:
    """Answers a question in two rounds.

    Args:
      ask: decodes prompts, all of them at the same time.
      question: the user's.
    """
    (outline,) = ask([skeleton_prompt(question)])
    points = read_points(outline.text)
    if not points:
        return SkeletonAnswer(outline.text, (), outline.steps, outline.steps)
    parts = ask([point_prompt(question, points, index) for index in range(len(points))])
    return SkeletonAnswer(
        text="".join(part.text for part in parts),
        points=tuple(points),
        steps=outline.steps + max(part.steps for part in parts),
        tokens=outline.steps + sum(part.steps for part in parts),
    )
