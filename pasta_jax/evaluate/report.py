"""Reports on a user's own prompts: Markdown, HTML and JSON, and the plot of quality against speed."""

from __future__ import annotations

import base64
import dataclasses
import glob
import html
import json
import os
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np

from pasta_jax.evaluate.alpaca_eval import Estimate
from pasta_jax.evaluate.measures import Measures, measure_of, measure_table, pair_table
from pasta_jax.evaluate.names import slug
from pasta_jax.evaluate.summary import Quality, Ratio, Speed
from pasta_jax.figures import PALE, SERIES, Label, can_draw, dress, new_figure, place, save
from pasta_jax.files import BROKEN, json_line, replacing, write_json
from pasta_jax.intervals import Interval
from pasta_jax.terminal import markdown_table

MEASURES = "measures.json"

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
      rows: prompts that were answered together in a second pass; 1: none.
      timed: how many of the first were answered at batch 1.
      measures, baseline_measures: of the answers, prompt by prompt.
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
    rows: int = 1
    timed: int = 0
    measures: Measures = dataclasses.field(default_factory=dict)
    baseline_measures: Measures = dataclasses.field(default_factory=dict)

    @property
    def compared_with(self) -> tuple[Any, ...]:
        """What another evaluation must share to stand in the same table."""
        same = self.sha256, self.max_new_tokens, self.judge, self.opponent, self.baseline, self.alike
        return *same, self.rows, self.timed


def write_reports(folder: str, workdir: str, result: Result) -> str:
    """Writes report.json, .md and .html and with a judge frontier.png to a folder; returns the Markdown.

    The workdir gets summary-PROMPTS.md, .html and .png: the same of all that can be compared.

    Args:
      folder: of this evaluation.
      workdir: of all; those in it that can be compared stand in the same tables and figure.
      result: the evaluation.
    """
    tree = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    measures = {"model": tree.pop("measures"), "baseline": tree.pop("baseline_measures")}
    tree |= {name: tree[name] and dataclasses.asdict(tree[name]) for name in ("speed", "quality")}
    with replacing(os.path.join(folder, MEASURES)) as file:
        file.write(
            json_line({key: {k: each.as_json() for k, each in of.items()} for key, of in measures.items()})
        )
    write_json(os.path.join(folder, "report.json"), tree)
    others = [each for each in read_results(workdir) if each.compared_with == result.compared_with]
    title = f"{result.name} on {result.prompts}"
    figure = os.path.join(folder, "frontier.png")
    figure = figure if result.quality is not None and _draw(others, figure) else ""
    markdown = _write_page(os.path.join(folder, "report"), figure, title, notes(result), others)
    if figure:
        figure = shutil.copyfile(figure, f"{summary_of(workdir, result.prompts)}.png")
    title = f"{len(others)} models on {result.prompts}" if len(others) > 1 else title
    told = notes(result, of_one=len(others) == 1)
    _write_page(summary_of(workdir, result.prompts), figure, title, told, others)
    return markdown


def summary_of(workdir: str, prompts: str) -> str:
    """The summary of the models that answered a file of prompts, without an ending.

    >>> summary_of("runs/evaluation", "data/held_out.jsonl")
    'runs/evaluation/summary-held_out'
    """
    return os.path.join(workdir, f"summary-{slug(os.path.basename(prompts).partition('.')[0])}")


def _write_page(path: str, figure: str, title: str, told: Sequence[str], others: Sequence[Result]) -> str:
    """Writes PATH.md and PATH.html, with the figure of their folder, "" without one; returns the Markdown."""
    markdown = page(title, told, others, os.path.basename(figure))
    with replacing(f"{path}.md") as file:
        file.write(markdown)
    with replacing(f"{path}.html") as file:
        file.write(as_html(title, told, others, figure))
    return markdown


def read_results(workdir: str) -> list[Result]:
    """The evaluations of a workdir, by name; files that are no report are left out."""
    found = []
    pattern = os.path.join(glob.escape(workdir), "**", "report.json")
    for path in sorted(glob.glob(pattern, recursive=True)):
        try:
            with open(path, encoding="utf-8") as file:
                result = _result_of(json.load(file))
            with open(os.path.join(os.path.dirname(path), MEASURES), encoding="utf-8") as file:
                both = json.load(file)
            of = {key: {name: measure_of(each) for name, each in tree.items()} for key, tree in both.items()}
            found.append(dataclasses.replace(result, measures=of["model"], baseline_measures=of["baseline"]))
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
                "chances": tuple(quality["chances"]),
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


def notes(result: Result, *, of_one: bool = True) -> list[str]:
    """What the numbers mean, a sentence each; what is so of one model's answers alone only for one."""
    name = result.name if of_one else "each model"
    said = [
        f"{_asked(result)} answered by {name} and by {result.baseline} in turn, at batch 1, with up to "
        f"{result.max_new_tokens} tokens; each is decoded twice and the second decode is timed.",
        "Theoretical: the baseline's tokens / the critical path. Realized: seconds / seconds. Parallelism: tokens "
        "without tags / the critical path. These are geometric means over prompts, +- one standard error.",
        "Answers that were cut off or malformed count as they are; a prompt that failed has no speed, and loses.",
    ]
    if result.rows > 1:
        said.insert(
            1,
            f"All prompts are answered {result.rows} at once, too, once, in turn: their seconds are "
            f"those of batch {result.rows}, of full batches."
            + " The answers to the prompts that were not asked at batch 1 are those of this pass: the same up to "
            "rounding, and without seconds of their own." * (result.timed < result.speed.prompts),
        )
    said.append(
        "Measures: a mean over prompts with its 95 % interval, of shares of answers (and of other shares at 0 "
        "and 100 %) Wilson's, else Student's, by the delta method where a sum is divided by another. "
        "Differences are taken prompt by prompt; of speeds they are ratios. n: prompts, of batches full ones, "
        "that count, where not all do. Efficiency: realized / theoretical. Doubled: four of five words in "
        "common with an earlier item or paragraph. Neat: one marker style, numbers in order. Promised "
        "lengths: in shares of the tokens of blocks, without answers that were cut off."
    )
    if (quality := result.quality) is not None:
        said.append(
            f"Win rate: the mean probability, by {result.judge}, that the answer is better than that of "
            f"{result.opponent}, in both orders; 50 % against equals; +- one standard error."
        )
        if result.caution:
            said.append(result.caution)
        if quality.same_winner is not None and of_one:
            said.append(
                f"The judge had the same verdict in both orders for {quality.same_winner:.1f} % of the "
                "pairs that it did not call ties."
            )
        if quality.unjudged and of_one:
            said.append(
                f"The judge gave no verdict on {quality.unjudged} of {result.speed.prompts} prompts, which are "
                "left out of the win rate; the same command asks for them again."
            )
        if quality.length_controlled is None and result.is_alpaca_eval:
            said.append(NO_LC + f" Raw win rate {quality.win_rate}." * of_one)
    return said


def _asked(result: Result) -> str:
    """Which prompts were asked at batch 1, and the verb."""
    if result.timed < result.speed.prompts:
        return f"The first {result.timed} of {result.speed.prompts} prompts are"
    return "Every prompt is"


def tables(results: Sequence[Result]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, header and rows of each table."""
    found = [("", *table(results))]
    named: dict[str, Measures] = {f"{results[0].baseline} (baseline)": results[0].baseline_measures}
    for result in results:
        count = sum(result.name == each.name for each in results[: results.index(result)])
        named[f"{result.name} ({count + 1})" if count else result.name] = result.measures
    found.append(("Measures", *measure_table(named)))
    if len(results) > 1:
        found.append(("Differences", *pair_table(dict([*named.items()][1:]))))
    return found


def page(title: str, told: Sequence[str], others: Sequence[Result], figure: str) -> str:
    """The report in Markdown, with notes. `figure`: the name of its figure, "" without one."""
    parts = [f"# {title}"]
    for heading, header, rows in tables(others):
        parts += [f"## {heading}"] * bool(heading) + [markdown_table(header, rows)]
        parts += [f"![Quality against speed]({figure})"] * bool(figure and not heading)
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in told)]) + "\n"


STYLE = """body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem; }
h2 { font-size: 1.1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .55rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #d9dce1; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; }"""


def as_html(title: str, told: Sequence[str], others: Sequence[Result], figure: str) -> str:
    """The report as one HTML file, its figure in it."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    title = html.escape(title)
    parts = []
    for heading, header, rows in tables(others):
        body = "\n".join(line(row, "td") for row in rows)
        parts += [f"<h2>{heading}</h2>"] * bool(heading)
        parts.append(
            f'<div class="wide"><table>\n<thead>{line(header, "th")}</thead>\n'
            f"<tbody>\n{body}\n</tbody>\n</table></div>"
        )
        if figure and not heading:
            with open(figure, "rb") as file:
                data = base64.b64encode(file.read()).decode()
            parts.append(f'<p><img alt="Quality against speed" src="data:image/png;base64,{data}"></p>')
    points = "\n".join(f"<li>{html.escape(note)}</li>" for note in told)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f"<style>\n{STYLE}\n</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
        + "\n".join(parts)
        + f"\n<ul>\n{points}\n</ul>\n</body>\n</html>\n"
    )


# ---------------------------------------------------------------------------------------------------- figure


def _draw(results: Sequence[Result], path: str) -> bool:
    """Win rate against realized and theoretical speedup; False, with a line in the log, without matplotlib."""
    if not can_draw("The report's figure"):
        return False
    figure = new_figure(9.5, 4.6)
    first = results[0]
    told = f"{first.speed.prompts} prompts, against {first.opponent}, judged by {first.judge}; 95 % intervals"
    figure.suptitle(told if len(told) <= 120 else f"{told[:117]}...", fontsize=10, color=PALE)
    panels = figure.subplots(1, 2, sharey=True)
    is_baseline = results[0].opponent == results[0].baseline
    for axes, name in zip(panels, ("realized", "theoretical")):
        points = [
            (SERIES[number % len(SERIES)], each)
            for number, each in enumerate(results)
            if each.quality and {name, "win rate"} <= each.measures.keys()
        ]
        labels = []
        if is_baseline:
            axes.plot([1.0], [50.0], "s", color="#4d4d4d", markersize=7, zorder=3)
            labels.append(Label(1.0, 50.0, results[0].baseline, "#4d4d4d"))
        for look, each in points:
            speed, win = each.measures[name].interval, each.measures["win rate"].interval
            axes.errorbar(
                speed.mean,
                100 * win.mean,
                xerr=_bars(speed),
                yerr=100 * _bars(win),
                fmt=look.marker,
                color=look.color,
                markersize=7,
                elinewidth=1.2,
                capsize=3,
                zorder=3,
            )
            labels.append(Label(speed.mean, 100 * win.mean, each.name, look.color))
        axes.axhline(50, color="#bbbbbb", linewidth=1, zorder=0)
        axes.axvline(1, color="#bbbbbb", linewidth=1, zorder=0)
        axes.margins(0.2)
        counts = sorted({each.measures[name].values.count for _, each in points})
        told = f"{name.capitalize()} speedup, {' or '.join(map(str, counts))} prompts"
        dress(axes, told, "Win rate (%)" * (axes is panels[0]))
        place(axes, labels)
    save(figure, path)
    return True


def _bars(interval: Interval) -> np.ndarray:
    """What an interval adds to each side of its mean, [2, 1]; nothing where it is not known."""
    sides = np.array([[interval.mean - interval.low], [interval.high - interval.mean]])
    return np.where(np.isfinite(sides), np.maximum(sides, 0.0), 0.0)
