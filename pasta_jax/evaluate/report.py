"""Reports on a user's own prompts: Markdown, HTML and JSON, and the plot of quality against speed."""

from __future__ import annotations

import base64
import dataclasses
import glob
import html
import json
import logging
import math
import os
from collections.abc import Sequence
from typing import Any

from pasta_jax.evaluate.alpaca_eval import Estimate
from pasta_jax.evaluate.summary import Quality, Ratio, Speed
from pasta_jax.figures import PALE, SERIES, Label, dress, new_figure, place, save
from pasta_jax.files import BROKEN, replacing, write_json
from pasta_jax.terminal import markdown_table

LOG = logging.getLogger("pasta_jax")

NO_LC = (
    "LC win rate not computed: df_gamed.csv is missing. Download it from the data set tatsu-lab/alpaca_eval of the \
Hugging Face hub and add --df_gamed=FILE."
)


@dataclasses.dataclass(frozen=True)
class Result:
    """One evaluation.

    Attributes:
      name, baseline: the models, for people.
      prompts: the file; sha256: of what it asks.
      max_new_tokens: of an answer.
      judge, opponent: for people; "" without a judge.
      speed, quality: the numbers.
      is_alpaca_eval: whether every prompt names its data set, as those of AlpacaEval do.
      alike: a hash of baseline, opponent and judge, whatever they are called.
      caution: what to know of the judge.
    """

    name: str
    baseline: str
    prompts: str
    sha256: str
    max_new_tokens: int
    judge: str
    opponent: str
    speed: Speed
    quality: Quality | None
    is_alpaca_eval: bool = False
    alike: str = ""
    caution: str = ""

    @property
    def compared_with(self) -> tuple[Any, ...]:
        """What another evaluation must share to stand in the same table."""
        return self.sha256, self.max_new_tokens, self.judge, self.opponent, self.baseline, self.alike


def write_reports(folder: str, workdir: str, result: Result) -> str:
    """Writes report.json, .md and .html and with a judge frontier.png to a folder; returns the Markdown.

    Args:
      folder: of this evaluation.
      workdir: of all; those in it that can be compared stand in the same table and figure.
      result: the evaluation.
    """
    write_json(os.path.join(folder, "report.json"), dataclasses.asdict(result))
    others = [each for each in read_results(workdir) if each.compared_with == result.compared_with]
    figure = os.path.join(folder, "frontier.png")
    drawn = result.quality is not None and _draw(others, figure)
    markdown = page(result, others, figure=drawn)
    with replacing(os.path.join(folder, "report.md")) as file:
        file.write(markdown)
    with replacing(os.path.join(folder, "report.html")) as file:
        file.write(as_html(result, others, figure if drawn else ""))
    return markdown


def read_results(workdir: str) -> list[Result]:
    """The evaluations of a workdir, by name; files that are no report are left out."""
    found = []
    pattern = os.path.join(glob.escape(workdir), "**", "report.json")
    for path in sorted(glob.glob(pattern, recursive=True)):
        try:
            with open(path, encoding="utf-8") as file:
                found.append(_result_of(json.load(file)))
        except (OSError, *BROKEN):
            continue
    return found


def _result_of(tree: dict[str, Any]) -> Result:
    speed = dict(tree["speed"])
    for name in ("theoretical", "realized", "parallelism"):
        speed[name] = Ratio(**speed[name])
    speed["promising"] = Estimate(**speed["promising"])
    quality = tree["quality"]
    if quality is not None:
        controlled = quality["length_controlled"]
        quality = Quality(
            **quality
            | {
                "win_rate": Estimate(**quality["win_rate"]),
                "length_controlled": controlled and Estimate(**controlled),
            }
        )
    return Result(**tree | {"speed": Speed(**speed), "quality": quality})


# ------------------------------------------------------------------------------------------------------ text

SPEEDS = [
    "theoretical",
    "realized",
    "parallelism",
    "tokens",
    "with promises",
    "cut off",
    "malformed",
    "failed",
]


def table(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the baseline, and each evaluation."""
    qualities = ["win rate", "LC win rate", "won, tied, lost"] if results[0].quality is not None else []
    if not any(each.quality and each.quality.length_controlled for each in results):
        qualities = [name for name in qualities if name != "LC win rate"]
    first = results[0].speed
    base = [f"{results[0].baseline} (baseline)", str(first.prompts)]
    is_opponent = results[0].opponent == results[0].baseline
    base += ["50.0 %" if name != "won, tied, lost" and is_opponent else "" for name in qualities]
    base += ["1.00x", "1.00x", "", f"{first.baseline_tokens:.0f}", "", str(first.baseline_cut), ""]
    rows = [[*base, str(first.baseline_failed)]]
    for result in results:
        speed, quality = result.speed, result.quality
        row = [result.name, str(speed.prompts)]
        if quality is not None:
            row += [
                {
                    "win rate": f"{quality.win_rate} %",
                    "LC win rate": f"{quality.length_controlled} %" if quality.length_controlled else "-",
                    "won, tied, lost": f"{quality.won}, {quality.tied}, {quality.lost}",
                }[name]
                for name in qualities
            ]
        row += [str(speed.theoretical), str(speed.realized), str(speed.parallelism), f"{speed.tokens:.0f}"]
        rows.append([*row, f"{speed.promising} %", *map(str, (speed.cut, speed.malformed, speed.failed))])
    return ["model", "prompts", *qualities, *SPEEDS], rows


def notes(result: Result) -> list[str]:
    """What the numbers mean, a sentence each."""
    said = [
        f"Every prompt is answered by {result.name} and by {result.baseline} in turn, at batch 1, with up to "
        f"{result.max_new_tokens} tokens; each is decoded twice and the second decode is timed.",
        "Theoretical: the baseline's tokens / the critical path. Realized: seconds / seconds. Parallelism: tokens "
        "without tags / the critical path. These are geometric means over prompts, +- one standard error.",
        "Answers that were cut off or malformed count as they are; a prompt that failed has no speed, and loses.",
    ]
    if (quality := result.quality) is not None:
        said.append(
            f"Win rate: the mean probability, by {result.judge}, that the answer is better than that of "
            f"{result.opponent}, in both orders; 50 % against equals; +- one standard error."
        )
        if result.caution:
            said.append(result.caution)
        if quality.same_winner is not None:
            said.append(
                f"The judge had the same verdict in both orders for {quality.same_winner:.1f} % of the "
                "pairs that it did not call ties."
            )
        if quality.unjudged:
            said.append(
                f"The judge gave no verdict on {quality.unjudged} of {result.speed.prompts} prompts, which are "
                "left out of the win rate; the same command asks for them again."
            )
        if quality.length_controlled is None and result.is_alpaca_eval:
            said.append(f"{NO_LC} Raw win rate {quality.win_rate}.")
    return said


def page(result: Result, others: Sequence[Result], *, figure: bool) -> str:
    """The report in Markdown."""
    parts = [f"# {result.name} on {result.prompts}", markdown_table(*table(others))]
    parts += ["![Quality against speed](frontier.png)"] * figure
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in notes(result))]) + "\n"


STYLE = """body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .55rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #d9dce1; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; }"""


def as_html(result: Result, others: Sequence[Result], figure: str) -> str:
    """The report as one HTML file, its figure in it."""
    header, rows = table(others)

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    image = ""
    if figure:
        with open(figure, "rb") as file:
            data = base64.b64encode(file.read()).decode()
        image = f'<p><img alt="Quality against speed" src="data:image/png;base64,{data}"></p>\n'
    title = html.escape(f"{result.name} on {result.prompts}")
    body = "\n".join(line(row, "td") for row in rows)
    points = "\n".join(f"<li>{html.escape(note)}</li>" for note in notes(result))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f"<style>\n{STYLE}\n</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
        f'<div class="wide"><table>\n<thead>{line(header, "th")}</thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>\n"
        f"{image}<ul>\n{points}\n</ul>\n</body>\n</html>\n"
    )


# ---------------------------------------------------------------------------------------------------- figure


def _draw(results: Sequence[Result], path: str) -> bool:
    """Win rate against realized and theoretical speedup; False, with a line in the log, without matplotlib."""
    try:
        figure = new_figure(9.5, 4.6)
    except ImportError as error:
        LOG.info("%s", error)
        return False
    first = results[0]
    told = f"{first.speed.prompts} prompts, against {first.opponent}, judged by {first.judge}"
    figure.suptitle(told if len(told) <= 120 else f"{told[:117]}...", fontsize=10, color=PALE)
    panels = figure.subplots(1, 2, sharey=True)
    is_baseline = results[0].opponent == results[0].baseline
    for axes, name in zip(panels, ("realized", "theoretical")):
        points = [(getattr(each.speed, name), each) for each in results if each.quality]
        points = [(speed, each) for speed, each in points if math.isfinite(speed.mean)]
        labels = []
        if is_baseline:
            axes.plot([1.0], [50.0], "s", color="#4d4d4d", markersize=7, zorder=3)
            labels.append(Label(1.0, 50.0, results[0].baseline, "#4d4d4d"))
        for number, (speed, each) in enumerate(points):
            assert each.quality is not None
            look, win = SERIES[number % len(SERIES)], each.quality.win_rate
            axes.errorbar(
                speed.mean,
                win.mean,
                xerr=None if math.isnan(speed.error) else speed.error,
                yerr=None if math.isnan(win.error) else win.error,
                fmt=look.marker,
                color=look.color,
                markersize=7,
                elinewidth=1.2,
                capsize=3,
                zorder=3,
            )
            labels.append(Label(speed.mean, win.mean, each.name, look.color))
        axes.axhline(50, color="#bbbbbb", linewidth=1, zorder=0)
        axes.axvline(1, color="#bbbbbb", linewidth=1, zorder=0)
        axes.margins(0.2)
        dress(
            axes, f"{name.capitalize()} speedup", f"Win rate by {results[0].judge} (%)" * (axes is panels[0])
        )
        place(axes, labels)
    save(figure, path)
    return True
