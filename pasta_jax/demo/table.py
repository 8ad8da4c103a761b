"""What the demo leaves: its table, and the answers as they came."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from pasta_jax.demo.show import Shown
from pasta_jax.evaluate.systems import geometric_mean
from pasta_jax.files import replacing, write_jsonl
from pasta_jax.preference.score import theoretical_speedup
from pasta_jax.terminal import markdown_table

WIDTH = 116
"""Of a line of text, as in the documents."""

HEADER = ["prompt", "branches", "steps", "tokens", "theoretical", "realized"]


def theoretical(pair: Shown) -> float:
    """Tokens of the sequential answer / the longest chain of decode steps of the parallel one."""
    return theoretical_speedup(pair.sequential, pair.parallel)


def realized(pair: Shown) -> float:
    """Seconds of the sequential answer / those of the parallel one."""
    return pair.sequential.wall_s / pair.parallel.wall_s


def table(pairs: Sequence[Shown]) -> str:
    """A Markdown table: a row for each prompt, then geometric means."""
    rows = [
        [
            pair.prompt,
            str(pair.parallel.promises),
            str(pair.parallel.decode_steps),
            str(pair.parallel.text_tokens),
            f"{theoretical(pair):.2f}x",
            f"{realized(pair):.2f}x",
        ]
        for pair in pairs
    ]
    means = {
        "geometric mean": pairs,
        "with branches alone": [pair for pair in pairs if pair.parallel.promises],
    }
    for name, some in means.items():
        if some:
            speeds = (geometric_mean([speed(pair) for pair in some]) for speed in (theoretical, realized))
            rows.append([name, "", "", "", *(f"{speed:.2f}x" for speed in speeds)])
    return markdown_table(HEADER, rows)


def legend(baseline: str | None) -> str:
    """What the columns mean.

    Args:
      baseline: the name of the model that answered sequentially; None is the same one.
    """
    other = baseline or "the same model with promises forbidden"
    return textwrap.fill(
        f"Sequentially the prompts were answered by {other}. Tokens: of the text, tags not counted. "
        "Theoretical: tokens of the sequential answer / the longest chain of decode steps of the parallel one. "
        "Realized: seconds of the sequential answer / those of the parallel one. Greedy, one prompt at a time, "
        "both through the same engine, when everything was compiled and had run once.",
        width=WIDTH,
    )


def page(pairs: Sequence[Shown], *, baseline: str | None, about: Mapping[str, str]) -> str:
    """table.md: the table, what it means, and how it was made."""
    facts = "".join(f"- {name}: {fact}\n" for name, fact in about.items())
    return f"{table(pairs)}\n\n{legend(baseline)}\n\n{facts}"


def answers(pairs: Sequence[Shown]) -> str:
    """answers.md: each prompt, the parallel answer with its tags as it came, and its threads over time."""
    return "\n".join(
        f"```\n> {pair.prompt}\n\n{pair.parallel.annotated}\n\n{pair.chart}\n```\n" for pair in pairs
    )


def write(workdir: Path, pairs: Sequence[Shown], *, baseline: str | None, about: Mapping[str, str]) -> None:
    """Writes table.md, answers.md and answers.jsonl, a line for each prompt with both answers."""
    pages = {"table.md": page(pairs, baseline=baseline, about=about), "answers.md": answers(pairs)}
    for name, text in pages.items():
        with replacing(workdir / name) as file:
            file.write(text)
    write_jsonl(workdir / "answers.jsonl", map(dataclasses.asdict, pairs))
