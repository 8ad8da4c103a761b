"""Models against a sequential baseline: one table, a row for each family of prompts and one for all."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from pasta_jax.evaluate.names import name_of, sha256
from pasta_jax.evaluate.systems import LIMITS, Measured, decoding, evaluate, geometric_mean, realized, win
from pasta_jax.files import replacing
from pasta_jax.preference.score import parallelism, theoretical_speedup
from pasta_jax.terminal import markdown_table

LOG = logging.getLogger("pasta_jax")

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
class FamilySummary:
    """One row of the table. Speeds are geometric means over prompts (paper section 5.1).

    Attributes:
      name: of the family, or `overall`.
      truth, baseline_truth: mean scores, 0 to 1.
      win_rate: against the baseline, 0 to 1; ties count half.
      theoretical: the baseline's tokens / the model's critical path.
      realized: the baseline's seconds / the model's seconds.
      parallelism: the model's tokens without tags / its critical path.
    """

    name: str
    prompts: int
    truth: float
    baseline_truth: float
    win_rate: float
    theoretical: float
    realized: float
    parallelism: float


def summarise(baseline: Sequence[Measured], test: Sequence[Measured]) -> list[FamilySummary]:
    """A row for each family, and one for all of them together."""
    families = [*dict.fromkeys(answer.family for answer in test)]
    rows = []
    for name in (*families, "overall"):
        pairs = [(b, t) for b, t in zip(baseline, test, strict=True) if name in (t.family, "overall")]
        rows.append(
            FamilySummary(
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


def table(rows: Mapping[str, Sequence[FamilySummary]]) -> str:
    """A Markdown table of the models' rows, by name of the model."""
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


def overview(rows: Mapping[str, Sequence[FamilySummary]]) -> str:
    """A Markdown table of the baseline and of every model over all prompts."""
    overall = {model: summaries[-1] for model, summaries in rows.items()}
    baseline_truth = next(iter(overall.values())).baseline_truth
    lines = [["sequential baseline", f"{100 * baseline_truth:.1f} %", "50.0 %", "1.00x", "1.00x"]]
    lines += [
        [
            model,
            f"{100 * row.truth:.1f} %",
            f"{100 * row.win_rate:.1f} %",
            f"{row.theoretical:.2f}x",
            f"{row.realized:.2f}x",
        ]
        for model, row in overall.items()
    ]
    return markdown_table(["model", "truth", "win rate", "theoretical", "realized"], lines)


def compare(
    baseline: str, tests: Mapping[str, str], prompts: int, workdir: str, **options: Any
) -> dict[str, list[FamilySummary]]:
    """Evaluates models against a baseline, writes answers and table.md to `workdir`, returns the rows of the table.

    Args:
      baseline: workdir or checkpoint of the sequential model.
      tests: workdirs or checkpoints of the others, by name.
      prompts: number of held-out prompts.
      workdir: folder of the output. Answers of an interrupted call to the same models are kept.
      options: keyword arguments of `load` for all models (dtype, quantize, base, ...).

    Raises:
      CheckpointError: a model cannot be loaded.
      ValueError: there are fewer prompts.
    """
    from pasta_jax.decoding.engine import Decoder
    from pasta_jax.loading import given_of, identity_of, load, place_of

    checkpoints = {name: place_of(path) for name, path in {"baseline": baseline, **tests}.items()}
    models = {name: load(path, **options) for name, path in checkpoints.items()}
    engine = Decoder(models["baseline"], limits=LIMITS)
    systems = {name: decoding(model, like=engine) for name, model in models.items()}
    about = {name: identity_of(path) | given_of(options) for name, path in checkpoints.items()}
    answers = evaluate(systems, prompts, workdir, about)
    rows = {name: summarise(answers["baseline"], answers[name]) for name in tests}
    with replacing(os.path.join(workdir, "table.md")) as file:
        file.write(table(rows) + "\n")
    return rows


def folder_of(test: str, baseline: str, options: Mapping[str, Any]) -> str:
    """The name of a folder for a model against a baseline, other for other checkpoints or options of `load`.

    Raises:
      CheckpointError: there is none.
    """
    from pasta_jax.loading import given_of, identity_of, place_of

    checkpoint = place_of(test)
    identities = [identity_of(path) for path in (checkpoint, baseline)]
    return f"{name_of(checkpoint)}-{sha256([*identities, given_of(options)])[:8]}"


def warn_of_strangers(*paths: str) -> None:
    """Says which of these models never saw Almanac, as far as their checkpoints tell. Raises CheckpointError."""
    for path in paths:
        if not saw_almanac(path):
            LOG.warning(
                "%s was not trained on Almanac, so its answers to Almanac's prompts say little. For prompts of "
                "your own add --prompts=FILE.",
                path,
            )


def saw_almanac(path: str, most: int = 8) -> bool:
    """Whether a model was trained on Almanac, by its checkpoint or by those it started from, where they are there.

    Raises:
      CheckpointError: there is none.
    """
    from pasta_jax.checkpoints.about import find_checkpoint, has_checkpoint, read_metadata
    from pasta_jax.interchange.importing import kind_of

    if kind_of(path)[0] == "peft":
        return False  # such a folder does not name its data
    metadata = read_metadata(find_checkpoint(path))
    config = metadata.config
    if config.stage == "preference":
        saw = config.preference.prompts == "almanac"
    else:
        saw = any(name.startswith("almanac:") for name, _ in config.data.sources)
    if saw and metadata.step:
        return True
    if config.init_from and has_checkpoint(config.init_from) and most:
        return saw_almanac(config.init_from, most - 1)
    return False
