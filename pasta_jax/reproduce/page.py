"""The report of a reproduction: one page as Markdown, and as HTML that needs no other file.

A page is a list of sections; each of the two files in `templates/` writes all of them.
"""

from __future__ import annotations

import base64
import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from pasta_jax.extras import optional
from pasta_jax.files import replacing
from pasta_jax.reproduce import paper
from pasta_jax.reproduce import results as pick
from pasta_jax.reproduce.claims import VERDICTS, Claim
from pasta_jax.reproduce.results import Result, weight_label
from pasta_jax.terminal import markdown_table

TITLE = "pasta_jax: the paper's comparison, reproduced"
NOT_COMPARABLE = "another task, another model (Gemma 7B, AlpacaEval, H100): not comparable in absolute terms"

MISSING = "–"

Path: TypeAlias = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading and what follows it, in this order.

    Attributes:
      header, rows: a table; the first column names the row.
      claims: shown with their verdicts and evidence.
      figures: PNG files with captions.
    """

    title: str
    text: str = ""
    level: int = 2
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    claims: Sequence[Claim] = ()
    figures: Sequence[tuple[Path, str]] = ()


def write_report(
    folder: Path,
    about: Mapping[str, Any],
    results: Sequence[Result],
    claims: Sequence[Claim] = (),
    figures: Sequence[tuple[Path, str]] = (),
) -> None:
    """Writes FOLDER/report.md and FOLDER/report.html.

    Args:
      folder: created if it is missing.
      about: what was run: command, hardware, versions, seeds, prompts, date, ...; values may be lists or dicts.
      results: of every model, ablations included; each goes into the tables it belongs to.
      claims: in the order in which they are listed.
      figures: PNG files with captions. The Markdown file links to them, the HTML file contains them.

    Raises:
      ImportError: jinja2 is not installed.
    """
    jinja2 = optional("jinja2", "plot", "A report")
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent / "templates"),
        autoescape=jinja2.select_autoescape(["html"]),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters |= {
        "md": _escaped,
        "code": _code,
        "table": _markdown_table,
        "inline": _data_url,
        "width": _width,
        "relative": lambda path: pathlib.Path(os.path.relpath(path, folder)).as_posix(),
    }
    page = {
        "title": TITLE,
        "about": [(name, _phrase(value)) for name, value in about.items()],
        "sections": sections(results, claims, figures),
    }
    for name in ("report.md", "report.html"):
        with replacing(folder / name) as file:
            file.write(templates.get_template(name).render(page))


def sections(
    results: Sequence[Result], claims: Sequence[Claim], figures: Sequence[tuple[Path, str]]
) -> list[Section]:
    """The page."""
    main = pick.headline(results)
    page = []
    if claims:
        page.append(Section("Claims, the paper's and our own bars", _counts(claims), claims=claims))
    page.append(_models("All methods", main, text=_METHODS_TEXT, level=2))
    if figures:
        page.append(Section("Figures", figures=figures))
    return [*page, *_family_sections(main), *_ablation_sections(results, main), *_paper_sections()]


_METHODS_TEXT = (
    "Mean [95 % interval]. Win rate: share of prompts on which the judge prefers the answer to that of "
    "Baseline-SFT, a tie counting half. Truth: the judge's score of the answer alone. Speeds are geometric means "
    "over prompts: realized, the baseline's seconds / seconds; theoretical, the baseline's tokens / critical path; "
    "parallelism, tokens without tags / critical path. Realized / theoretical is the quotient of the two means."
)

_ABLATIONS_TEXT = "Each row gives its number of seeds: an ablation may have fewer than the main comparison."

_PAPER_TEXT = (
    f"Jin et al., ICML 2025 (arXiv 2502.11517): {NOT_COMPARABLE}. Win rates are length-controlled. Quality was "
    "judged by GPT-4 in the comparison, by Gemini in rounds and ablations. Digitised numbers are good to about "
    "0.01x and 0.2 points. Arithmetic means are of realized and theoretical speedup and parallelism."
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
    realized = result.realized
    return [
        result.win_rate.scaled(100).text(1),
        result.truth.scaled(100).text(1),
        realized.text(2) if realized else MISSING,
        result.theoretical.text(2),
        result.parallelism.text(2),
        _plain(realized.mean / result.theoretical.mean if realized else None),
        str(result.seeds),
        str(result.prompts),
    ]


def _models(
    title: str,
    results: Sequence[Result],
    name: Callable[[Result], str] = lambda r: r.name,
    text: str = "",
    level: int = 3,
) -> Section:
    """A table with a model in each row."""
    return Section(title, text, level, ["model", *_MEASURED], [[name(r), *_measured(r)] for r in results])


def _family_sections(main: Sequence[Result]) -> list[Section]:
    """A table for each measure: families down, models across."""
    families = list(dict.fromkeys(name for result in main for name in result.families))
    header = ["family", *(result.name for result in main)]
    page = [Section("By family of prompts")] if families else []
    for measure, (title, factor) in pick.FAMILY_MEASURES.items():
        values = {name: [r.families.get(name, {}).get(measure) for r in main] for name in families}
        if all(value is None for row in values.values() for value in row):
            continue
        digits = 1 if factor == 100 else 2
        rows = [[name, *(_plain(v and factor * v, digits) for v in row)] for name, row in values.items()]
        page.append(Section(title, "", 3, header, rows))
    return page


def _plain(value: float | None, digits: int = 2) -> str:
    return MISSING if value is None else f"{value:.{digits}f}"


def _ablation_sections(results: Sequence[Result], main: Sequence[Result]) -> list[Section]:
    """Every result that the main table leaves out, with the main results it is compared with."""
    rounds = [r for line in pick.by_round(results).values() for r in line if r.weight is not None]
    terms = [r for line in pick.by_efficiency(results).values() for r in line]

    def name(r: Result) -> str:
        return f"{weight_label(r.weight)}, round {r.round}"

    tables: list[tuple[str, list[Result], Callable[[Result], str], str]] = [
        ("Rounds", rounds, name, "round"),
        ("Position schemes", pick.by_positions(results), lambda r: r.positions, "positions"),
        ("Efficiency terms", terms, lambda r: f"{r.efficiency}, {name(r)}", "efficiency"),
    ]
    page: list[Section] = []
    listed = list(main)
    for title, group, label, varied in tables:
        if len({getattr(result, varied) for result in group}) > 1:
            page.append(_models(title, group, label))
            listed += group
    rest = [r for r in results if not any(r is other for other in listed)]
    if rest:
        others = _models(
            "Others", rest, lambda r: f"{r.name} ({r.positions}, {r.efficiency}, round {r.round})"
        )
        page.append(others)
    return [Section("Ablations", _ABLATIONS_TEXT), *page] if page else []


def _paper_sections() -> list[Section]:
    header = (
        "model",
        "win rate, %",
        "realized, x",
        "theoretical, x",
        "parallelism, x",
        "realized / theoretical",
        "arithmetic means, x",
        "source",
    )
    comparison = [
        [
            model.name,
            _plain(model.win_rate and 100 * model.win_rate, 1),
            _plain(model.realized),
            _plain(model.theoretical),
            _plain(model.parallelism),
            _plain(model.theoretical and model.realized / model.theoretical),
            " / ".join(map(_plain, model.arithmetic)) if model.arithmetic else MISSING,
            model.source,
        ]
        for model in paper.COMPARISON
    ]
    ablations = {
        "Rounds (the paper's Figure 5, digitised)": paper.ROUNDS,
        "Position schemes (the paper's Figure 6, digitised)": paper.POSITIONS,
        "Efficiency terms (the paper's Figure 8, digitised)": paper.EFFICIENCY,
    }

    def row(point: paper.Point) -> list[str]:
        label = point.label if point.weight is None else f"{point.label}, {weight_label(point.weight)}"
        return [label, _plain(100 * point.win_rate, 1), _plain(point.theoretical)]

    return [
        Section("The paper's own numbers", _PAPER_TEXT, 2, header, comparison),
        *(
            Section(title, "", 3, ["model", "win rate, %", "theoretical, x"], list(map(row, points)))
            for title, points in ablations.items()
        ),
    ]


def _counts(claims: Sequence[Claim]) -> str:
    verdicts = [claim.verdict for claim in claims]
    counts = [f"{v} {verdicts.count(v)}" for v in VERDICTS.values() if v in verdicts]
    return f"Of {len(claims)}: {', '.join(counts)}."


def _phrase(value: Any) -> str:
    """A fact in words: {"jax": "0.10", "python": "3.12"} is `jax 0.10, python 3.12`."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_phrase(inner)}" for name, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_phrase, value))
    return str(value)


# Filters of the templates.


def _escaped(text: str) -> str:
    """Text on one line without Markdown's markup; lone underscores and brackets need no escape."""
    for sign in ("\\", "`", "*", "<", "|", "]("):
        text = text.replace(sign, sign[:-1] + "\\" + sign[-1])
    return " ".join(text.split())


def _code(text: str) -> str:
    fence = "``" if "`" in text else "`"
    return fence + " ".join(text.split()) + fence


def _markdown_table(section: Section) -> str:
    return markdown_table([*map(_escaped, section.header)], [[*map(_escaped, row)] for row in section.rows])


def _data_url(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(pathlib.Path(path).read_bytes()).decode("ascii")


def _width(path: Path) -> int:
    """Pixels across of a PNG file, from its header."""
    return int.from_bytes(pathlib.Path(path).read_bytes()[16:20], "big")
