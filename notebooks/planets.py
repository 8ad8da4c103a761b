"""The subject of the notebooks: questions about the planets, and a judge that knows the facts.

    python notebooks/planets.py runs/planets

writes plain.jsonl, 2,000 questions with their answers, and questions.jsonl, twelve others, none of which is among
these. As a judge it is --judge=notebooks.planets:truer. The numbers are those of NASA's planetary fact sheet.
"""

from __future__ import annotations

import json
import pathlib
import random
import re
import sys
from collections.abc import Sequence
from typing import NamedTuple


class Planet(NamedTuple):
    """Diameter in kilometres, distance from the Sun in millions of them, year in days."""

    kind: str
    diameter: int
    distance: int
    year: int


PLANETS = {
    "Mercury": Planet("rocky planet", 4879, 58, 88),
    "Venus": Planet("rocky planet", 12104, 108, 225),
    "Earth": Planet("rocky planet", 12756, 150, 365),
    "Mars": Planet("rocky planet", 6792, 228, 687),
    "Jupiter": Planet("gas giant", 142984, 779, 4331),
    "Saturn": Planet("gas giant", 120536, 1432, 10747),
    "Uranus": Planet("ice giant", 51118, 2867, 30589),
    "Neptune": Planet("ice giant", 49528, 4515, 59800),
}


def statements(name: str) -> list[str]:
    """What an answer says of a planet."""
    it = PLANETS[name]
    return [
        f"It is {'an' if it.kind[0] == 'i' else 'a'} {it.kind}, {it.diameter} kilometres across.",
        f"It is {it.distance} million kilometres from the Sun.",
        f"Its year takes {it.year} days.",
    ]


def record(names: Sequence[str], asks_largest: bool) -> dict[str, str]:
    """A question about some planets, and its answer."""
    named = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    if len(names) == 1:
        return {"prompt": f"Describe {named}.", "response": " ".join(statements(names[0]))}
    answer = "\n".join(f"- **{name}**: {' '.join(statements(name))}" for name in names)
    if not asks_largest:
        return {"prompt": f"Describe {named}.", "response": answer}
    largest = max(names, key=lambda name: PLANETS[name].diameter)
    answer += f"\n\nIn summary, {largest} is the largest of these."
    return {"prompt": f"Describe {named}. Which is the largest?", "response": answer}


def records(count: int) -> list[dict[str, str]]:
    """Different records, the same in every run."""
    draw, found = random.Random(0), dict[str, dict[str, str]]()
    while len(found) < count:
        names = draw.sample(list(PLANETS), draw.choice([1, 2, 3, 3, 4]))
        made = record(names, asks_largest=draw.random() < 0.5)
        found[made["prompt"]] = made
    return list(found.values())


def truth(prompt: str, answer: str) -> float:
    """The share of what was asked for that the answer says, less a statement for each line too many."""
    names = [name for name in PLANETS if name in prompt]
    wanted = {name: statements(name) for name in names}
    said = dict.fromkeys(names, "")
    for line in answer.splitlines():
        found = re.match(r"- \*\*(\w+)\*\*: ", line)
        name = found[1] if found else names[0] if len(names) == 1 else ""
        if name in said:
            said[name] += line
    right = sum(each in said[name] for name, all_of_it in wanted.items() for each in all_of_it)
    asked = sum(map(len, wanted.values()))
    if "largest" in prompt:
        asked += 1
        right += f"{max(names, key=lambda name: PLANETS[name].diameter)} is the largest" in answer
    too_many = max(
        0, len([line for line in answer.splitlines() if line]) - len(names) - ("largest" in prompt)
    )
    return max(0.0, right - too_many) / asked


def truer(prompt: str, a: str, b: str) -> tuple[int | None, float]:
    """The judge: which answer says more of what was asked for, and how sure that is."""
    left, right = truth(prompt, a), truth(prompt, b)
    return (None, 0.9) if left == right else (int(right > left), 0.9)


def main(folder: pathlib.Path) -> None:
    """Writes the files."""
    folder.mkdir(parents=True, exist_ok=True)
    made = records(2012)
    for name, part in {"plain.jsonl": made[12:], "questions.jsonl": made[:12]}.items():
        text = "".join(f"{json.dumps(each)}\n" for each in part)
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
