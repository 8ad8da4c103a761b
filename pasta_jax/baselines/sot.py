r"""Skeleton-of-Thought (Ning et al. 2023): first the points of an answer, then all points at the same time.

A prompting scheme for any model that knows two prompts: the *skeleton* prompt asks for the points, one numbered
line each; a *point* prompt shows question and skeleton and asks for one point's text. All points are requested at
once; none sees another, and nothing is written after them. The answer is their texts, joined.

The authors' prompts are long, which would favour PASTA; ours are as short as possible. We train the base model, and
again the model that uses this scheme, on both prompts; the authors do not train.

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

MAX_POINTS = 8
"""More points are not expanded: the engine decodes this many at once."""

_LINE = re.compile(r"\d+\. (.+)")


@dataclasses.dataclass(frozen=True)
class Reply:
    """A model's answer to one prompt, and its decode steps."""

    text: str
    steps: int


@dataclasses.dataclass(frozen=True)
class SkeletonAnswer:
    """An answer in two rounds.

    Attributes:
      text: the points' texts, joined.
      points: the points of the skeleton; if it has none, `text` is the skeleton itself.
      steps: decode steps of the skeleton and of the longest point: the critical path.
      tokens: tokens of all replies, including the skeleton.
    """

    text: str
    points: tuple[str, ...]
    steps: int
    tokens: int


def skeleton_prompt(question: str) -> str:
    """The prompt for the points of an answer."""
    return f"{question}\nGive only the points."


def point_prompt(question: str, points: Sequence[str], index: int) -> str:
    """The prompt for the text of the point at `index`."""
    return f"{question}\n{skeleton(points)}Write only {index + 1}. {points[index]}"


def skeleton(points: Sequence[str]) -> str:
    """The points as a skeleton: one numbered line each."""
    return "".join(f"{number}. {point}\n" for number, point in enumerate(points, start=1))


def read_points(text: str) -> list[str]:
    """The points of a skeleton that a model wrote; other lines are ignored."""
    return [match[1] for line in text.splitlines() if (match := _LINE.fullmatch(line.strip()))][:MAX_POINTS]


def answer(ask: Callable[[list[str]], Sequence[Reply]], question: str) -> SkeletonAnswer:
    """Answers a question in two rounds.

    Args:
      ask: decodes prompts, all at the same time.
      question: the user's prompt.
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
