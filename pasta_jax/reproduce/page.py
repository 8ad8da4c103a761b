"""The report of a reproduction: one page as Markdown, and the same as HTML that needs no other file.

The page is a list of blocks; each block is written twice, by `_markdown` and by `_html`.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from pasta_jax.files import replacing
from pasta_jax.reproduce import paper
from pasta_jax.reproduce import results as pick
from pasta_jax.reproduce.claims import Claim
from pasta_jax.reproduce.results import Estimate, Result, weight_label
from pasta_jax.terminal import markdown_table

TITLE = "pasta_jax: the paper's comparison, reproduced"
NOT_COMPARABLE = "another task, another model (Gemma 7B, AlpacaEval, H100): not comparable in absolute terms"

MISSING = "–"


@dataclasses.dataclass(frozen=True)
class Heading:
    """Level 1 is the page's title."""

    level: int
    text: str


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclasses.dataclass(frozen=True)
class Facts:
    """Names and what they are; commands are shown as such."""

    facts: Mapping[str, str]
    commands: tuple[str, ...] = ("command",)


@dataclasses.dataclass(frozen=True)
class Table:
    """The first column names the row."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Checklist:
    """Claims with their evidence."""

    claims: Sequence[Claim]


@dataclasses.dataclass(frozen=True)
class Picture:
    """A PNG file."""

    path: pathlib.Path
    caption: str


Block: TypeAlias = Heading | Text | Facts | Table | Checklist | Picture

Path: TypeAlias = str | os.PathLike[str]


def write_report(
    folder: Path,
    about: Mapping[str, Any],
    results: Sequence[Result],
    claims: Sequence[Claim] = (),
    figures: Sequence[tuple[Path, str]] = (),
) -> None:
    """Writes FOLDER/report.md and FOLDER/report.html.

    Args:
      folder: made if it is not there.
      about: what was run: command, hardware, versions, seeds, prompts, date, ...; values may be lists or dicts.
      results: of every model, ablations among them; each finds its table.
      claims: in the order in which they are listed.
      figures: PNG files and their captions. The Markdown page points at the files, the other holds them.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    page = blocks(about, results, claims, figures)
    for name, text in (("report.md", as_markdown(page, folder)), ("report.html", as_html(page))):
        with replacing(folder / name) as file:
            file.write(text)


def blocks(
    about: Mapping[str, Any],
    results: Sequence[Result],
    claims: Sequence[Claim],
    figures: Sequence[tuple[Path, str]],
) -> list[Block]:
    """The page."""
    shown = pick.headline(results)
    page: list[Block] = [Heading(1, TITLE), Facts({name: _said(value) for name, value in about.items()})]
    if claims:
        page += [
            Heading(2, "Claims, the paper's and our own bars"),
            Text(_verdict(claims)),
            Checklist(claims),
        ]
    page += [Heading(2, "All methods"), Text(_METHODS_TEXT), Table(["model", *_MEASURED], _rows(shown))]
    if figures:
        page.append(Heading(2, "Figures"))
        page += [Picture(pathlib.Path(path), caption) for path, caption in figures]
    page += _family_blocks(shown)
    page += _ablation_blocks(results, shown)
    page += _paper_blocks()
    return page


# What the tables say.

_METHODS_TEXT = (
    "Mean [95 % interval]. Win rate: share of prompts on which the judge prefers the answer to that of "
    "Baseline-SFT, a tie counting half. Truth: the judge's score of the answer alone. Speeds are geometric means "
    "over prompts: realized, the baseline's seconds / seconds; theoretical, the baseline's tokens / critical path; "
    "parallelism, tokens without tags / critical path. Realized / theoretical is the quotient of the two means."
)

_ABLATIONS_TEXT = (
    "The column seeds says of how many seeds a row is a mean: an ablation may have fewer than the rows of the "
    "main comparison beside which it stands."
)

_MEASURED = (
    "win rate, %",
    "truth, %",
    "realized, x",
    "theoretical, x",
    "parallelism, x",
    "realized / theoretical",
    "seeds",
    "prompts",
)


def _measured(result: Result) -> list[str]:
    """Cells under _MEASURED."""
    return [
        _number(result.win_rate.scaled(100), 1),
        _number(result.truth.scaled(100), 1),
        _number(result.realized, 2),
        _number(result.theoretical, 2),
        _number(result.parallelism, 2),
        f"{result.realized.mean / result.theoretical.mean:.2f}" if result.realized else MISSING,
        str(result.seeds),
        str(result.prompts),
    ]


def _rows(results: Sequence[Result], first: Callable[[Result], str] = lambda r: r.name) -> list[list[str]]:
    return [[first(result), *_measured(result)] for result in results]


def _number(estimate: Estimate | None, digits: int) -> str:
    if estimate is None:
        return MISSING
    mean = f"{estimate.mean:.{digits}f}"
    return (
        f"{mean} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]" if estimate.has_interval else mean
    )


def _family_blocks(shown: Sequence[Result]) -> list[Block]:
    """A table for each measure, families down, models across."""
    families = list(dict.fromkeys(name for result in shown for name in result.families))
    page: list[Block] = [Heading(2, "By family of prompts")] if families else []
    for measure, (title, factor) in pick.FAMILY_MEASURES.items():
        found = {name: [r.families.get(name, {}).get(measure) for r in shown] for name in families}
        if any(value is not None for values in found.values() for value in values):
            digits = 1 if factor == 100 else 2
            rows = [
                [name, *(MISSING if v is None else f"{factor * v:.{digits}f}" for v in values)]
                for name, values in found.items()
            ]
            page += [Heading(3, title), Table(["family", *(r.name for r in shown)], rows)]
    return page


def _ablation_blocks(results: Sequence[Result], shown: Sequence[Result]) -> list[Block]:
    """Whatever the main table leaves out, beside what of it belongs to the same comparison."""
    rounds = [r for line in pick.by_round(results).values() for r in line if r.weight is not None]
    positions = pick.by_positions(results)
    terms = [r for line in pick.by_efficiency(results).values() for r in line]
    tables = [
        ("Rounds", rounds, lambda r: f"{weight_label(r.weight)}, round {r.round}", lambda r: r.round),
        ("Position schemes", positions, lambda r: r.positions, lambda r: r.positions),
        (
            "Efficiency terms",
            terms,
            lambda r: f"{r.efficiency}, {weight_label(r.weight)}, round {r.round}",
            lambda r: r.efficiency,
        ),
    ]
    page: list[Block] = []
    told = list(shown)
    for title, group, first, differs in tables:
        if len(set(map(differs, group))) > 1:
            page += [Heading(3, title), Table(["model", *_MEASURED], _rows(group, first))]
            told += group
    rest = [r for r in results if not any(r is other for other in told)]
    if rest:
        page += [Heading(3, "Others"), Table(["model", *_MEASURED], _rows(rest, _full_name))]
    return [Heading(2, "Ablations"), Text(_ABLATIONS_TEXT), *page] if page else []


def _full_name(result: Result) -> str:
    return f"{result.name} ({result.positions}, {result.efficiency}, round {result.round})"


def _paper_blocks() -> list[Block]:
    def cell(value: float | None, digits: int = 2) -> str:
        return MISSING if value is None else f"{value:.{digits}f}"

    comparison = [
        [
            model.name,
            cell(model.win_rate and 100 * model.win_rate, 1),
            cell(model.realized),
            cell(model.theoretical),
            cell(model.parallelism),
            cell(model.theoretical and model.realized / model.theoretical),
            " / ".join(map(cell, model.arithmetic)) if model.arithmetic else MISSING,
            model.source,
        ]
        for model in paper.COMPARISON
    ]
    header = [
        "model",
        "win rate, %",
        "realized, x",
        "theoretical, x",
        "parallelism, x",
        "realized / theoretical",
        "arithmetic means, x",
        "source",
    ]
    page: list[Block] = [
        Heading(2, "The paper's own numbers"),
        Text(
            f"Jin et al., ICML 2025 (arXiv 2502.11517): {NOT_COMPARABLE}. Win rates are length-controlled. "
            "Quality was judged by GPT-4 in the comparison, by Gemini in rounds and ablations. Digitised numbers "
            "are good to about 0.01x and 0.2 points. Arithmetic means are of realized and theoretical speedup "
            "and parallelism."
        ),
        Table(header, comparison),
    ]
    for title, points in (
        ("Rounds (the paper's Figure 5, digitised)", paper.ROUNDS),
        ("Position schemes (the paper's Figure 6, digitised)", paper.POSITIONS),
        ("Efficiency terms (the paper's Figure 8, digitised)", paper.EFFICIENCY),
    ):
        rows = [
            [
                point.label if point.weight is None else f"{point.label}, {weight_label(point.weight)}",
                cell(100 * point.win_rate, 1),
                cell(point.theoretical),
            ]
            for point in points
        ]
        page += [Heading(3, title), Table(["model", "win rate, %", "theoretical, x"], rows)]
    return page


def _verdict(claims: Sequence[Claim]) -> str:
    counts = {said: sum(claim.holds is answer for claim in claims) for answer, said in _ANSWERS.items()}
    return (
        f"Of {len(claims)}: " + ", ".join(f"{said} {count}" for said, count in counts.items() if count) + "."
    )


_ANSWERS = {True: "holds", False: "does not hold", None: "not measured"}


def _said(value: Any) -> str:
    """A fact in words: {"jax": "0.10", "python": "3.12"} is `jax 0.10, python 3.12`."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_said(inner)}" for name, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_said, value))
    return str(value)


# As Markdown.


def as_markdown(page: Sequence[Block], folder: pathlib.Path) -> str:
    """The page, pointing at its pictures from `folder`."""
    return "\n\n".join(_markdown(block, folder) for block in page) + "\n"


def _markdown(block: Block, folder: pathlib.Path) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {_plain(text)}"
        case Text(text):
            return _plain(text)
        case Facts(facts, commands):
            said = {n: _code(v) if n in commands else _plain(v) for n, v in facts.items()}
            return "\n".join(f"- **{_plain(name)}**: {value}" for name, value in said.items())
        case Table(header, rows):
            return markdown_table([*map(_plain, header)], [[*map(_plain, row)] for row in rows])
        case Checklist(claims):
            return "\n".join(
                f"- [{'x' if c.holds else ' '}] **{_ANSWERS[c.holds]}**: {_plain(c.text)}  \n  {_plain(c.evidence)}"
                for c in claims
            )
        case Picture(path, caption):
            where = pathlib.Path(os.path.relpath(path, folder)).as_posix()
            return f"![{_plain(caption)}](<{where}>)\n\n{_plain(caption)}"


def _plain(text: str) -> str:
    """Without meaning to Markdown, on one line; underscores and brackets alone mean nothing."""
    for sign in ("\\", "`", "*", "<", "|", "]("):
        text = text.replace(sign, sign[:-1] + "\\" + sign[-1])
    return " ".join(text.split())


def _code(text: str) -> str:
    fence = "``" if "`" in text else "`"
    return fence + " ".join(text.split()) + fence


# As HTML.


def as_html(page: Sequence[Block]) -> str:
    """The page as one file, pictures and style within."""
    body = "\n".join(map(_html, page))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(TITLE)}</title>\n<style>\n{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _html(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Text(text):
            return f"<p>{html.escape(text)}</p>"
        case Facts(facts, commands):
            rows = (
                f"<dt>{html.escape(name)}</dt><dd>{_tagged('code' if name in commands else 'span', value)}</dd>"
                for name, value in facts.items()
            )
            return f"<dl>\n{chr(10).join(rows)}\n</dl>"
        case Table(header, rows):
            head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in header)
            lines = "\n".join(
                f'<tr><th scope="row">{html.escape(row[0])}</th>'
                + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
                + "</tr>"
                for row in rows
            )
            return (
                f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n'
                f"<tbody>\n{lines}\n</tbody></table></div>"
            )
        case Checklist(claims):
            items = (
                f'<li class="{_ANSWERS[claim.holds].replace(" ", "-")}"><b>{_ANSWERS[claim.holds]}</b> '
                f"{_tagged('span', claim.text)}{_tagged('small', claim.evidence)}</li>"
                for claim in claims
            )
            return f'<ul class="claims">\n{chr(10).join(items)}\n</ul>'
        case Picture(path, caption):
            data = path.read_bytes()
            width = (
                int.from_bytes(data[16:20], "big") * 2 // 3
            )  # drawn at 150 dots an inch, shown at about 100
            source = "data:image/png;base64," + base64.b64encode(data).decode("ascii")
            said = html.escape(caption)
            return (
                f'<figure><div class="wide"><img width="{width}" style="min-width: {width * 5 // 8}px" '
                f'src="{source}" alt="{said}"></div>\n'
                f"<figcaption>{said}</figcaption></figure>"
            )


def _tagged(tag: str, text: str) -> str:
    return f"<{tag}>{html.escape(text)}</{tag}>"


_STYLE = """\
:root { color-scheme: light dark; --ink: #1d1d1f; --paper: #ffffff; --pale: #5f6368; --line: #d9dce1;
  --band: #f4f6f8; --good: #00694a; --bad: #a83a00; --none: #5f6368; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #15171a; --pale: #a3a8ae; --line: #3a3f45;
  --band: #1f2226; --good: #4cc9a0; --bad: #ff9a5c; --none: #a3a8ae; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; }
h2 { font-size: 1.25rem; margin-top: 2.5rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .4rem; }
p, dl, ul { max-width: 46rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; }
dt { color: var(--pale); }
dd { margin: 0; overflow-wrap: anywhere; }
code { font: .9em ui-monospace, Menlo, Consolas, monospace; background: var(--band); padding: .1em .3em;
  border-radius: 4px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .55rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
th:first-child { position: sticky; left: 0; background: var(--paper); text-align: left; }
thead th { color: var(--pale); white-space: normal; vertical-align: bottom; }
.claims { list-style: none; padding: 0; }
.claims li { border-left: 4px solid var(--none); background: var(--band); margin: .5rem 0; padding: .5rem .8rem; }
.claims b { color: var(--none); margin-right: .4rem; }
.claims .holds { border-color: var(--good); }
.claims .holds b { color: var(--good); }
.claims .does-not-hold { border-color: var(--bad); }
.claims .does-not-hold b { color: var(--bad); }
.claims small { display: block; color: var(--pale); }
figure { margin: 1.5rem 0; }
figure .wide { background: #ffffff; border-radius: 6px; width: fit-content; max-width: 100%; }
img { display: block; max-width: 100%; height: auto; }
figcaption { color: var(--pale); font-size: .9rem; margin-top: .4rem; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; } }
@media print { .wide { overflow: visible; } img { min-width: 0 !important; } }
"""
