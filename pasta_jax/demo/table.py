"""What the demo leaves: its table, and the answers as they came."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from pasta_jax.decoding.request import SamplingParams
from pasta_jax.demo.show import Shown
from pasta_jax.evaluate.systems import geometric_mean
from pasta_jax.files import replacing, write_jsonl
from pasta_jax.preference.score import parallelism
from pasta_jax.terminal import markdown_table

WIDTH = 116
"""Of a line of text, as in the documents."""

HEADER = ["prompt", "branches", "steps", "tokens", "theoretical", "realized"]


def theoretical(pair: Shown) -> float:
    """Tokens of the parallel answer's text / the longest chain of its decode steps."""
    return parallelism(pair.parallel)


def realized(pair: Shown) -> float:
    """Seconds of its tokens at the sequential answer's pace / seconds of the parallel answer.

    So it does not matter which of the two answers is the longer one.
    """
    alone, parallel = pair.sequential, pair.parallel
    return alone.wall_s / max(1, alone.decode_steps) * max(1, parallel.text_tokens) / parallel.wall_s


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
        "of those with branches": [pair for pair in pairs if pair.parallel.promises],
    }
    for name, some in means.items():
        if some:
            speeds = (geometric_mean([speed(pair) for pair in some]) for speed in (theoretical, realized))
            rows.append([name, "", "", "", *(f"{speed:.2f}x" for speed in speeds)])
    return markdown_table(HEADER, rows)


def legend(baseline: str | None, sampling: SamplingParams) -> str:
    """What the columns mean.

    Args:
      baseline: the name of the model that answered sequentially; None is the same one.
      sampling: how both answered.
    """
    other = baseline or "the same model with promises forbidden"
    drawn = f"Temperature {sampling.temperature:g}, min_p {sampling.min_p:g}, seed {sampling.seed}"
    return textwrap.fill(
        "Tokens: of the text, tags not counted. Both speedups are over writing that text one token at a time. "
        "Theoretical: its tokens / the longest chain of decode steps. Realized: the seconds that its tokens would "
        f"take at the pace of a sequential answer to the same prompt, by {other}, / its seconds. "
        f"{drawn if sampling.temperature else 'Greedy'}, one prompt at a time, both through the same engine, when "
        "everything was compiled and had run once.",
        width=WIDTH,
    )


def page(pairs: Sequence[Shown], *, legend: str, about: Mapping[str, str]) -> str:
    """table.md: the table, what it means, and how it was made."""
    facts = "".join(f"- {name}: {fact}\n" for name, fact in about.items())
    return f"{table(pairs)}\n\n{legend}\n\n{facts}"


def answers(pairs: Sequence[Shown]) -> str:
    """answers.md: each prompt, the parallel answer with its tags as it came, and its threads over time."""
    return "\n".join(
        f"```\n> {pair.prompt}\n\n{pair.parallel.annotated}\n\n{pair.chart}\n```\n" for pair in pairs
    )


def write(workdir: Path, pairs: Sequence[Shown], *, legend: str, about: Mapping[str, str]) -> None:
    """Writes table.md, answers.md and answers.jsonl, a line for each prompt with both answers."""
    pages = {"table.md": page(pairs, legend=legend, about=about), "answers.md": answers(pairs)}
    for name, text in pages.items():
        with replacing(workdir / name) as file:
            file.write(text)
    write_jsonl(workdir / "answers.jsonl", map(dataclasses.asdict, pairs))
