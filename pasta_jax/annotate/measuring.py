"""`--measure`: the form of the annotated answers of a file (`lang.form`), each measure with its 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pasta_jax.data.records import Example, Problem
from pasta_jax.files import write_json
from pasta_jax.intervals import Values
from pasta_jax.lang.form import SHARES, Form, form_of
from pasta_jax.terminal import markdown_table


def forms_of(
    examples: Iterable[Example | Problem], tokens_of: Callable[[str], int]
) -> tuple[list[Form], int]:
    """The form of each answer, and how many records cannot be read."""
    forms, problems = list[Form](), 0
    for example in examples:
        if isinstance(example, Example):
            forms.append(form_of(example.program, tokens_of))
        else:
            problems += 1
    return forms, problems


def figures_of(forms: Sequence[Form]) -> dict[str, Any]:
    """For each measure its title, mean and interval, and of how much it is a share."""
    found = {}
    for name, share in SHARES.items():
        values = Values.counted(forms, share.above, share.below)
        if values.below.sum():
            mean, low, high = values.share if share.is_part else values.interval
            of = f"{values.below.sum():,.0f} {share.of}"
            found[name] = {"title": share.title, "mean": mean, "low": low, "high": high, "of": of}
    return found


def report(forms: Sequence[Form], problems: int, output: str = "") -> str:
    """The table of a file, in Markdown. `output`: the same as JSON, if that is no empty name."""
    figures = figures_of(forms)
    promising = sum(each.promises > 0 for each in forms)
    if output:
        write_json(output, {"answers": len(forms), "promising": promising, "measures": figures})
    rows = [
        [each["title"], *(_percent(each[key]) for key in ("mean", "low", "high")), each["of"]]
        for each in figures.values()
    ]
    unusable = f" {problems:,} records cannot be read." * (problems > 0)
    told = f"{len(forms):,} answers, {promising:,} with promises, {sum(each.promises for each in forms):,} in all."
    return f"{told}{unusable}\n\n{markdown_table(['', 'mean', 'from', 'to (95 %)', 'of'], rows)}"


def _percent(share: float) -> str:
    return "" if math.isnan(share) else f"{100 * share:.1f} %"
