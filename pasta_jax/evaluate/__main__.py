"""Evaluates a model against a sequential baseline on Almanac's held-out prompts.

    python -m pasta_jax.evaluate --ckpt=runs/pasta --baseline=runs/baseline --workdir=runs/evaluation

Both go through the same engine, prompt by prompt in turn, at batch 1; each request is decoded twice and the
second is timed (paper section 5.1). The workdir gets a JSONL file of answers for each model, and table.md.
Running the same command again goes on where it was cut off.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from absl import app, flags

from pasta_jax import verbs
from pasta_jax.evaluate.systems import (
    LIMITS,
    Measured,
    decoding,
    evaluate,
    geometric_mean,
    realized,
    win,
)
from pasta_jax.files import replacing
from pasta_jax.preference.score import parallelism, theoretical_speedup
from pasta_jax.terminal import markdown_table
from pasta_jax.verbs import define_loading, loading_options, refuse, show_log

HEADER = [
    "model",
    "family",
    "prompts",
    "truth: baseline",
    "truth",
    "win rate",
    "theoretical",
    "realized",
    "parallelism",
]


@dataclasses.dataclass(frozen=True)
class Summary:
    """One row of the table: a family, or all. Speeds are geometric means over prompts (paper section 5.1).

    Attributes:
      truth, baseline_truth: mean scores, 0 to 1.
      win_rate: against the baseline, 0 to 1; ties count half.
      theoretical: baseline's tokens / critical path of the test's answer.
      realized: baseline's seconds / test's seconds.
      parallelism: the test's tokens without tags / its critical path.
    """

    name: str
    prompts: int
    truth: float
    baseline_truth: float
    win_rate: float
    theoretical: float
    realized: float
    parallelism: float


def summarise(baseline: Sequence[Measured], test: Sequence[Measured]) -> list[Summary]:
    """A row for each family, and one for all of them together."""
    families = [*dict.fromkeys(answer.family for answer in test)]
    rows = []
    for name in (*families, "overall"):
        pairs = [(b, t) for b, t in zip(baseline, test, strict=True) if name in (t.family, "overall")]
        rows.append(
            Summary(
                name=name,
                prompts=len(pairs),
                truth=sum(t.truth for _, t in pairs) / len(pairs),
                baseline_truth=sum(b.truth for b, _ in pairs) / len(pairs),
                win_rate=sum(win(b, t) for b, t in pairs) / len(pairs),
                theoretical=geometric_mean([theoretical_speedup(b, t) for b, t in pairs]),
                realized=geometric_mean([realized(b, t) for b, t in pairs]),
                parallelism=geometric_mean([parallelism(t) for _, t in pairs]),
            )
        )
    return rows


def table(rows: Mapping[str, Sequence[Summary]]) -> str:
    """As Markdown, the rows of each model by its name."""
    return markdown_table(
        HEADER,
        [
            [
                model,
                row.name,
                str(row.prompts),
                f"{100 * row.baseline_truth:.1f} %",
                f"{100 * row.truth:.1f} %",
                f"{100 * row.win_rate:.1f} %",
                f"{row.theoretical:.2f}x",
                f"{row.realized:.2f}x",
                f"{row.parallelism:.2f}x",
            ]
            for model, summaries in rows.items()
            for row in summaries
        ],
    )


def compare(
    baseline: str,
    tests: Mapping[str, str],
    prompts: int,
    workdir: str,
    **options: Any,
) -> str:
    """Evaluates models against a baseline, writes everything to `workdir`, returns the table.

    Args:
      baseline: workdir or checkpoint of the sequential model.
      tests: the others', by name.
      prompts: how many.
      workdir: where answers and table go.
      options: of all models, as `load` takes them (dtype, quantize, base, ...).

    Raises:
      CheckpointError: a model that cannot be loaded.
      ValueError: more prompts than there are.
    """
    from pasta_jax.checkpoints.about import checkpoint_mark, find
    from pasta_jax.decoding.engine import Decoder
    from pasta_jax.loading import load

    checkpoints = {name: find(path) for name, path in {"baseline": baseline, **tests}.items()}
    models = {name: load(path, **options) for name, path in checkpoints.items()}
    engine = Decoder(models["baseline"], limits=LIMITS)
    systems = {name: decoding(model, like=engine) for name, model in models.items()}
    # The base of adapters is known by its fingerprint, wherever it is.
    loaded = {
        name: value
        for name, value in options.items()
        if name != "base" and value not in (None, False, "auto")
    }
    about = {name: checkpoint_mark(path) | loaded for name, path in checkpoints.items()}
    answers = evaluate(systems, prompts, workdir, about)
    text = table({name: summarise(answers["baseline"], answers[name]) for name in tests})
    with replacing(os.path.join(workdir, "table.md")) as file:
        file.write(text + "\n")
    return text


def main(argv: Sequence[str]) -> None:
    """The verb. Mistakes end in one line and status 2."""
    values = flags.FLAGS
    if len(argv) > 1 or not (values.ckpt and values.baseline):
        refuse("Name both models: --ckpt=runs/pasta --baseline=runs/baseline.")
    show_log()
    try:
        tests, options = {"PASTA": values.ckpt}, loading_options(values)
        print(compare(values.baseline, tests, values.prompts, values.workdir, **options))
    except (ValueError, OSError) as error:
        refuse(str(error))


def command() -> None:
    """Parses the command line and runs `main`."""
    flags.DEFINE_string("ckpt", None, "Workdir or checkpoint of the model to evaluate.")
    flags.DEFINE_string("baseline", None, "Workdir or checkpoint of the sequential baseline.")
    define_loading()
    flags.adopt_module_key_flags(verbs)  # so that --help shows them
    flags.DEFINE_string("workdir", "runs/evaluation", "Where answers and the table go.")
    flags.DEFINE_integer("prompts", 500, "How many held-out prompts.", lower_bound=1)
    app.run(main)


if __name__ == "__main__":
    command()
