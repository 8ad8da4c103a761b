"""Puts what `make demo` left into the pages: `make readme`, or `python -m tests.readme runs/demo`.

In docs, demo-table.md and demo-answers.jsonl become its table.md and answers.jsonl, as they are. README.md gets,
between its markers, the first answer, the table, and the other answers as their readers get them.
"""

from __future__ import annotations

import json
import pathlib
import re
import sys
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]


def refreshed(readme: str, table: str, answers: str) -> str:
    """README.md with the parts of a run.

    Args:
      readme: as it was.
      table: the run's table.md.
      answers: of its answers.jsonl.
    """
    first, *others = map(json.loads, answers.splitlines())
    facts = dict(re.findall(r"^- (.*?): (.*)$", table, re.MULTILINE))
    versions = re.findall(r"\b(python|jax) ([\d.]+)", facts["versions"])
    machine = [
        facts["hardware"].partition(";")[0],
        *(" ".join(version) for version in versions),
        facts["date"],
    ]
    parts = {
        "answer": f"```\n> {first['prompt']}\n\n{first['parallel']['annotated']}\n\n{first['chart']}\n```",
        "table": "\n\n".join([table.split("\n\n")[0], f"Measured on {', '.join(machine)}."]),
        "answers": "\n".join(["| prompt | answer |", "|:---|:---|", *map(row, others)]),
    }
    for name, part in parts.items():
        start, end = f"<!-- demo: {name} -->\n", f"<!-- /demo: {name} -->"
        head, found, rest = readme.partition(start)
        _, also, tail = rest.partition(end)
        if not (found and also):
            raise ValueError(f"README.md has no lines {start.strip()} and {end}.")
        readme = f"{head}{start}{part}\n{end}{tail}"
    return readme


def row(answer: dict[str, Any]) -> str:
    """A prompt and its answer in a row of a Markdown table."""
    cells = (text.strip().replace("|", "\\|") for text in (answer["prompt"], answer["parallel"]["text"]))
    return f"| {' | '.join(cells)} |".replace("\n", "<br>")


def main(folder: pathlib.Path) -> None:
    """Changes the pages."""
    readme = ROOT / "README.md"
    table, answers = ((folder / name).read_text(encoding="utf-8") for name in ("table.md", "answers.jsonl"))
    readme.write_text(refreshed(readme.read_text(encoding="utf-8"), table, answers), encoding="utf-8")
    (ROOT / "docs" / "demo-table.md").write_text(table, encoding="utf-8")
    (ROOT / "docs" / "demo-answers.jsonl").write_text(answers, encoding="utf-8")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
