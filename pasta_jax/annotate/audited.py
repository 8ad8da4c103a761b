"""The audit of a file of annotated answers, and its report.

    FOLDER/audit.jsonl   a line for each answer: its blocks, and what each loses
           audit.md      how much blocks lose in all, and those that lose most
           audit.png     the histogram
           about.json    what was audited, with which model

An audit that was interrupted goes on where it was, if file, model and options are the same.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from tqdm import tqdm

from pasta_jax.annotate.audit import Auditor, Part
from pasta_jax.arrays import ThreadedTokens
from pasta_jax.data.records import Example, Problem
from pasta_jax.figures import INK, SERIES, can_draw, dress, new_figure, save
from pasta_jax.files import Lines, Stamp, json_line, locked, read_jsonl, replacing, shows_progress
from pasta_jax.lang.program import Program
from pasta_jax.terminal import markdown_table

LOG = logging.getLogger("pasta_jax")

Place: TypeAlias = tuple[int, int]
"""Line and turn of an answer in its file."""

CHUNK = 64
"""Answers audited together, and written at once."""

SHOWN = 20
"""Blocks that the report lists."""


@dataclasses.dataclass(frozen=True)
class Audited:
    """An answer of the file.

    Attributes:
      line, turn: as in `data.records.Example`.
      parts: its blocks and the texts beside them.
      fault: why it could not be audited, or "".
    """

    line: int
    turn: int
    parts: tuple[Part, ...] = ()
    fault: str = ""

    @property
    def measured(self) -> tuple[Part, ...]:
        """The parts that do not see everything before them; the others can lose nothing."""
        return tuple(part for part in self.parts if part.unseen and part.tokens)


def audit_file(
    auditor: Auditor, examples: Iterable[Example | Problem], folder: str, about: Mapping[str, Any]
) -> list[Audited]:
    """Audits the answers of a file that have promises, and writes them to FOLDER/audit.jsonl as they come.

    Args:
      auditor: the model that reads.
      examples: of the file; answers without promises are left out.
      folder: of the output.
      about: identifies file, model and options, as JSON can hold it.

    Raises:
      ValueError: the folder has the audit of something else.
    """
    with locked(folder):
        path, stamp = os.path.join(folder, "audit.jsonl"), Stamp(os.path.join(folder, "about.json"))
        if changed := stamp.check(about):
            if os.path.exists(path):
                raise ValueError(
                    f"{folder} has another audit: {changed[0]}. Remove it, or give another --output."
                )
            stamp.write(about)
        done = read_jsonl(path, _from_json)
        with replacing(path) as file:  # without a line that was cut short
            file.writelines(json_line(dataclasses.asdict(each)) for each in done)
        places = {(each.line, each.turn) for each in done}
        if places:
            LOG.info("%d answers were audited before.", len(places))
        found = (
            each
            for each in examples
            if (each.line, each.turn if isinstance(each, Example) else 0) not in places
            and (isinstance(each, Problem) or any(True for _ in each.program.promises()))
        )
        quiet = not shows_progress()
        with Lines(path) as lines, tqdm(unit="answer", initial=len(done), disable=quiet) as bar:
            while chunk := [*itertools.islice(found, CHUNK)]:
                for each in _audit(auditor, chunk):
                    lines.write(json_line(dataclasses.asdict(each)))
                    done.append(each)
                    bar.update()
                if quiet:
                    LOG.info("%d answers", len(done))
    return done


def _audit(auditor: Auditor, found: Sequence[Example | Problem]) -> list[Audited]:
    examples = [each for each in found if isinstance(each, Example)]
    documents: dict[Place, tuple[ThreadedTokens, Program]] = {}
    faults: dict[Place, str] = {}
    for each in examples:
        try:
            document = auditor.document(each.prompt, each.program)
            documents[each.line, each.turn] = document, each.program
        except ValueError as error:
            faults[each.line, each.turn] = str(error)
    parts = dict(zip(documents, auditor.audit([*documents.values()]), strict=True))
    places = [(each.line, each.turn) for each in examples]
    audited = [Audited(*place, tuple(parts.get(place, ())), faults.get(place, "")) for place in places]
    problems = [each for each in found if isinstance(each, Problem)]
    return audited + [
        Audited(each.line, 0, fault=f"not readable: {each.reason or each.message}") for each in problems
    ]


def _from_json(fields: dict[str, Any]) -> Audited:
    return Audited(**fields | {"parts": tuple(Part(**part) for part in fields["parts"])})


# --------------------------------------------------------------------------------------------------- report


def write_report(audited: Sequence[Audited], folder: str, max_loss: float, title: str) -> str:
    """Writes FOLDER/audit.md, and with matplotlib audit.png if there is something to draw. Returns the text."""
    text = report(audited, max_loss, title)
    if any(each.measured for each in audited) and can_draw("The audit's figure"):
        draw(audited, max_loss, os.path.join(folder, "audit.png"))
        text += "\n![What blocks lose](audit.png)\n"
    with replacing(os.path.join(folder, "audit.md")) as file:
        file.write(text)
    return text


def report(audited: Sequence[Audited], max_loss: float, title: str) -> str:
    """The report in Markdown.

    Args:
      audited: the answers.
      max_loss: nats per token; the parts that lose more are counted and listed.
      title: names file and model.
    """
    blocks, texts = (
        [part for each in audited for part in each.measured if part.is_block == is_block]
        for is_block in (True, False)
    )
    read = sum(not each.fault for each in audited)
    first = sum(part.is_block and not part.unseen for each in audited for part in each.parts)
    lines = [
        f"# Independence audit: {title}",
        "",
        f"{read:,} answers with promises were audited. {len(blocks):,} of their blocks have siblings before them "
        f"that they do not see; {first:,} have none, and lose nothing.",
        "",
        markdown_table(
            [
                "nats lost per token",
                "parts",
                "5 %",
                "median",
                "95 %",
                "mean",
                f"above {max_loss:g}",
                "in all",
            ],
            [_row("blocks", blocks, max_loss), _row("text beside open branches", texts, max_loss)],
        ),
    ]
    worst = sorted(
        ((part, each) for each in audited for part in each.measured if part.per_token > max_loss),
        key=lambda pair: -pair[0].per_token,
    )
    if worst:
        rows = [
            [
                f"{each.line}" + f", turn {each.turn + 1}" * bool(each.turn),
                f"{part.branch} {_cell(part.topic)}" + ", text after" * (not part.is_block),
                f"{part.per_token:.2f}",
                f"{part.loss:.1f}",
                _cell(part.worst.replace("\n", "⏎")),
            ]
            for part, each in worst[:SHOWN]
        ]
        lines += [
            "",
            f"{len(worst):,} parts lose more than {max_loss:g} nats per token. Those that lose most:",
            "",
        ]
        lines += [markdown_table(["line", "promise", "per token", "in all", "most at"], rows)]
    if faults := collections.Counter(each.fault for each in audited if each.fault):
        lines += ["", f"{faults.total():,} answers could not be audited:", ""]
        lines += [f"- {count:,}: {fault}" for fault, count in faults.most_common(SHOWN)]
    return "\n".join([*lines, ""])


def _row(name: str, parts: Sequence[Part], max_loss: float) -> list[str]:
    if not parts:
        return [name, "0", *["-"] * 6]
    loss = np.array([part.per_token for part in parts])
    low, median, high = np.percentile(loss, [5, 50, 95])
    numbers = [f"{value:.2f}" for value in (low, median, high, loss.mean())]
    total = sum(part.loss for part in parts)
    return [name, f"{len(parts):,}", *numbers, f"{(loss > max_loss).mean():.1%}", f"{total:,.0f}"]


def _cell(text: str) -> str:
    """A text in a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def draw(audited: Sequence[Audited], max_loss: float, path: str) -> None:
    """Writes the histogram of what parts lose, as a PNG."""
    groups = {
        "blocks": [part.per_token for each in audited for part in each.measured if part.is_block],
        "text beside open branches": [
            part.per_token for each in audited for part in each.measured if not part.is_block
        ],
    }
    losses = np.concatenate([*map(np.asarray, groups.values())])
    low, high = np.percentile(losses, [0.5, 99.5])
    edges = np.linspace(min(low, 0), max(high, 1.2 * max_loss), 41)
    figure = new_figure(6.5, 4.2)
    axes = figure.subplots()
    shown = {name: np.clip(loss, edges[0], edges[-1]) for name, loss in groups.items() if loss}
    labels = [f"{name}, {len(loss):,}" for name, loss in shown.items()]
    colors = [SERIES[i].color for i in range(len(shown))]
    axes.hist([*shown.values()], bins=list(edges), stacked=True, label=labels, color=colors)
    axes.axvline(max_loss, color=INK, linestyle="--", linewidth=1, label=f"limit, {max_loss:g}")
    dress(axes, "Nats per token lost without sight of the blocks before (ends: and beyond)", "Parts")
    axes.legend(frameon=False)
    save(figure, path)
