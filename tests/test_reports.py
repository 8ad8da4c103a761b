"""Figures hold the numbers given, pages hold all that was found; made-up results, some of them odd."""

from __future__ import annotations

import html
import math
import re
import struct
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from pasta_jax import figures
from pasta_jax.figures import Label, place
from pasta_jax.reproduce import page, paper, plots
from pasta_jax.reproduce import results as pick
from pasta_jax.reproduce.page import Claim, write_report
from pasta_jax.reproduce.results import METHODS, Estimate, Result
from tests.helpers import full

FAMILIES = ("list", "chain")


def estimate(mean: float, half: float) -> Estimate:
    return Estimate(mean, mean - half, mean + half)


def result(method: str, speed: float, win: float, weight: float | None = None, **fields: Any) -> Result:
    """With a speed (x) and a win rate (%)."""
    family = {"truth": win / 100, "theoretical": speed, "realized": 0.9 * speed, "promises": 2.0}
    given: dict[str, Any] = dict(
        name=method if weight is None else f"{method}-{weight:g}",
        seeds=3,
        prompts=500,
        round=0 if weight is None else 1,
        win_rate=estimate(win / 100, 0.01),
        truth=estimate(0.9, 0.01),
        theoretical=estimate(speed, 0.05),
        parallelism=estimate(1.1 * speed, 0.05),
        realized=estimate(0.9 * speed, 0.05),
        families=dict.fromkeys(FAMILIES, family),
    )
    return Result(method=method, weight=weight, **(given | fields))


BASELINE = result("Baseline-SFT", 1.0, 50.0)
SFT = result("PASTA-SFT", 1.45, 38.0)
APAR = result("APAR", 1.2, 35.0)
SOT = result("SoT", 0.9, 40.0)
FIRST = [result("PASTA-BoN", x, y, w) for w, x, y in ((1, 2.1, 42), (4, 1.75, 45), (math.inf, 1.4, 48))]
SECOND = [replace(r, round=2, win_rate=estimate(r.win_rate.mean + 0.04, 0.01)) for r in FIRST]
OTHER_POSITIONS = [
    result("PASTA-SFT", 1.44 + 0.03 * i, 37.0 - i, name=f"PASTA-SFT {label}", positions=label)
    for i, label in enumerate(("Pred-1X", "Const-40", "Shared"))
]
OTHER_TERMS = [
    result("PASTA-BoN", x, y, w, name=f"PASTA-BoN-{w} {term}", efficiency=term)
    for term, x in (("harmonic", 1.6), ("parallelism", 1.3))
    for w, y in ((1, 40), (4, 44))
]
RESULTS = [BASELINE, SFT, *FIRST, *SECOND, APAR, SOT, *OTHER_POSITIONS, *OTHER_TERMS]

DRAW = (plots.frontier, plots.rounds, plots.positions, plots.efficiency_terms, plots.families)


SPEEDS = (lambda r: r.realized, lambda r: r.theoretical, lambda r: r.parallelism)


def at(result: Result, speed: Any = SPEEDS[1]) -> tuple[float, float]:
    """Where a result is drawn."""
    return round(speed(result).mean, 6), round(100 * result.win_rate.mean, 6)


def corners(line: Any) -> list[tuple[float, float]]:
    return [(round(x, 6), round(y, 6)) for x, y in line.get_xydata().tolist()]


def markers(axes: Any) -> set[tuple[float, float]]:
    """Points drawn; not the caps of intervals."""
    points = [line for line in axes.lines if line.get_linestyle() == "None" and line.get_markersize() > 4]
    return {corner for line in points for corner in corners(line)}


def texts(axes: Any) -> list[str]:
    return sorted(text.get_text() for text in axes.texts)


def test_the_frontier_holds_every_method_and_the_last_round() -> None:
    for axes, speed in zip(plots.frontier(RESULTS).axes, SPEEDS, strict=True):
        assert markers(axes) == {(1.0, 50.0), *(at(r, speed) for r in (SFT, *SECOND, APAR, SOT))}
        assert texts(axes) == ["λ=1", "λ=4", "λ=∞"]
        lines = list(map(corners, axes.lines))
        assert pick.upper_hull([(1.0, 50.0), *(at(r, speed) for r in SECOND)]) in lines
        assert [(1.0, 50.0), at(APAR, speed)] in lines
        bars: list[Any] = list(axes.collections)
        intervals = np.concatenate([np.round(bar.get_segments(), 6) for bar in bars]).tolist()
        x, _ = at(SOT, speed)
        assert [[x, 39.0], [x, 41.0]] in intervals


def test_a_speed_that_nobody_measured() -> None:
    untimed = [BASELINE, *(replace(r, realized=None) for r in RESULTS[1:])]
    realized, theoretical, _ = plots.frontier(untimed).axes
    assert texts(realized) == ["not measured"] and not markers(realized)
    assert len(markers(theoretical)) == 7


def test_rounds_start_at_sft() -> None:
    (axes,) = plots.rounds(RESULTS).axes
    for first, second in zip(FIRST, SECOND):
        assert [at(SFT), at(first), at(second)] in list(map(corners, axes.lines))
    assert texts(axes) == ["R1"] * 3 + ["R2"] * 3 + ["SFT"]


def test_efficiency_terms_are_compared_after_equally_many_rounds() -> None:
    (axes,) = plots.efficiency_terms(RESULTS).axes
    assert markers(axes) == {at(r) for r in (*FIRST, *OTHER_TERMS)}
    _, names = axes.get_legend_handles_labels()
    assert names == ["speedup", "harmonic", "parallelism"]


def test_positions_are_labelled() -> None:
    (axes,) = plots.positions(RESULTS).axes
    labels: list[Any] = list(axes.texts)
    drawn = {(label.get_text(), *label.xy) for label in labels}
    assert drawn == {
        (r.positions, r.theoretical.mean, 100 * r.win_rate.mean) for r in (SFT, *OTHER_POSITIONS)
    }


def test_family_bars() -> None:
    """PASTA-BoN is shown by its fastest model that wins at least half: here that of infinite lambda."""
    assert pick.chosen(RESULTS) is SECOND[2]
    truth, theoretical, realized = plots.families(RESULTS).axes
    shown = [BASELINE, SFT, SECOND[2], APAR, SOT]
    panels = ((truth, "truth", 100), (theoretical, "theoretical", 1), (realized, "realized", 1))
    for axes, measure, factor in panels:
        heights = [[bar.get_height() for bar in group] for group in axes.containers]
        expected = [[factor * r.families[name][measure] for name in FAMILIES] for r in shown]
        assert heights == [pytest.approx(row) for row in expected]
    assert [t.get_text() for t in realized.get_xticklabels()] == list(FAMILIES)


def all_at(speed: Estimate, win: Estimate) -> list[Result]:
    return [
        replace(r, theoretical=speed, parallelism=speed, realized=speed, win_rate=win, name=f"{r.name} {i}")
        for i, r in enumerate(RESULTS)
    ]


def nearly_equal() -> list[Result]:
    equal = all_at(estimate(1.0, 0.02), estimate(0.5, 0.04))
    return [replace(r, theoretical=estimate(1 + 0.001 * i, 0.02)) for i, r in enumerate(equal)]


ODD = {
    "as usual": RESULTS,
    "all nearly equal": nearly_equal(),
    "all equal, no intervals": all_at(Estimate.exact(1.0), Estimate.exact(1.0)),
    "one lambda, no APAR": [BASELINE, SFT, SECOND[1], SOT],
    "intervals wider than all": [replace(r, win_rate=estimate(r.win_rate.mean, 0.5)) for r in RESULTS],
    "not a number": [BASELINE, replace(SFT, win_rate=Estimate.exact(math.nan)), replace(SOT, families={})],
    "the baseline only": [BASELINE],
    "nothing": [],
}


FEW = ("as usual", "all nearly equal", "not a number", "nothing")


@pytest.mark.slow
@pytest.mark.parametrize(
    "results", [ODD[name] if name in FEW else full(ODD[name]) for name in ODD], ids=[*ODD]
)
@pytest.mark.parametrize("draw", DRAW, ids=lambda draw: draw.__name__)
def test_every_figure_of_every_result(draw, results, tmp_path):
    figure = draw(results)
    figures.save(figure, tmp_path / "figure.png")
    data = (tmp_path / "figure.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    size = tuple(round(figures.DPI * inches) for inches in figure.get_size_inches())
    assert struct.unpack(">II", data[16:24]) == size
    figure.draw_without_rendering()
    panels: list[Any] = figure.axes
    for legend in figure.legends:
        box = legend.get_window_extent()
        assert not any(box.overlaps(axes.get_tightbbox()) for axes in panels), "the legend hides something"
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and figure.bbox.y0 <= box.y0
    for axes in panels:
        points = [axes.transData.transform(xy) for xy in markers(axes) if all(map(math.isfinite, xy))]
        assert all(axes.bbox.contains(*point) for point in points), "every point is within its panel"


@pytest.mark.parametrize("draw", [d for d in DRAW if d is not plots.families], ids=lambda draw: draw.__name__)
@pytest.mark.parametrize("name", ["as usual", "all nearly equal", "intervals wider than all"])
def test_labels_hide_no_other(draw, name):
    figure = draw(ODD[name])
    figure.draw_without_rendering()
    for axes in figure.axes:
        boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the line to the point
        points = [axes.transData.transform(xy) for xy in markers(axes)]
        assert len(boxes) > 2
        for i, box in enumerate(boxes):
            assert axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
            assert not any(box.overlaps(other) for other in boxes[:i]), "two labels lie on each other"
            if name == "as usual":
                assert not any(box.contains(*point) for point in points), "a label hides a point"


@pytest.mark.parametrize(
    ("point", "line", "side"),
    [
        ((0.5, 0.5), [(0.1, 0.1), (0.1, 0.9)], (1, 1)),  # nothing is near: to the upper right
        ((0.5, 0.5), [(0.5, 0.5), (0.9, 0.9)], (-1, 1)),  # where a line is, no label
        ((0.99, 0.99), [(0.1, 0.1), (0.1, 0.9)], (-1, -1)),  # nor beyond the frame
    ],
)
def test_a_label_goes_where_it_hides_nothing(point, line, side):
    figure = Figure()
    axes = figure.subplots()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.plot(*zip(*line))
    axes.plot(*point, "o")
    (label,) = place(axes, [Label(point[0], point[1], "label")])
    assert tuple(np.sign(label.xyann)) == side


def test_figures_leave_matplotlib_as_it_was(tmp_path):
    code = (
        "import sys, pasta_jax.reproduce.page, pasta_jax.reproduce.plots as plots\n"
        "from pasta_jax.figures import save\n"
        "assert 'matplotlib' not in sys.modules and 'jax' not in sys.modules\n"
        "import matplotlib\n"
        "before = dict(matplotlib.rcParams.copy())\n"
        f"save(plots.frontier([]), {str(tmp_path / 'a.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert dict(matplotlib.rcParams.copy()) == before\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=page.__file__.rsplit("/pasta_jax/", 1)[0])


def test_the_same_results_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        figures.save(plots.frontier(RESULTS), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_without_matplotlib(monkeypatch, caplog):
    class Without:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name.partition(".")[0] == "matplotlib":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Without, *sys.meta_path])
    with pytest.raises(ImportError, match=r'pip install -e "\.\[plot\]"'):
        plots.frontier(RESULTS)
    with caplog.at_level("WARNING", "pasta_jax"):
        assert not figures.can_draw("The report's figure")
    assert caplog.messages == [
        'The report\'s figure needs matplotlib: pip install matplotlib, or in a clone: pip install -e ".[plot]".'
    ]


# Pages.

CLAIMS = [
    Claim("Stage 2 beats stage 1.", True, "49.0 % > 38.0 % | at 1.75x"),
    Claim("A <script>alert(1)</script> claim & more", False, "a < b, *not* bold"),
    Claim("Realized is near theoretical.", None, "no times"),
]
ABOUT: dict[str, Any] = {
    "command": "python -m pasta_jax.reproduce --out='<b>' `date`",
    "versions": {"python": "3.11", "jax": "0.10.2"},
    "seeds": [0, 1, 2],
}


class Reader(HTMLParser):
    """Tags with their attributes, text, and whether all that is opened is closed."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    (folder / "figures").mkdir()
    figures.save(plots.positions(RESULTS), folder / "figures" / "positions.png")
    write_report(folder, ABOUT, RESULTS, CLAIMS, [(folder / "figures" / "positions.png", 'Positions "<i>"')])
    return folder


def test_pages_hold_everything(report):
    text = (report / "report.md").read_text(encoding="utf-8")
    web = (report / "report.html").read_text(encoding="utf-8")
    reader = Reader(web)
    for page_text in (text, reader.text):
        assert all(method in page_text for method in METHODS)
        for shown in (SFT, *SECOND, APAR, SOT):
            assert shown.name in page_text
        for shown in RESULTS:
            mean, low, high = (100 * getattr(shown.win_rate, side) for side in ("mean", "low", "high"))
            assert f"{mean:.1f} [{low:.1f}, {high:.1f}]" in page_text, "every model is in some table"
        assert all(
            label in page_text for label in ("Pred-1X", "Const-40", "Shared", "harmonic, λ=4, round 1")
        )
        assert "λ=4, round 2" in page_text
        assert page.NOT_COMPARABLE in page_text
        assert all(model.name in page_text for model in paper.COMPARISON)
        assert "Of 3: holds 1, does not hold 1, not measured 1." in page_text
        assert "python 3.11, jax 0.10.2" in page_text and "0, 1, 2" in page_text
    for claim in CLAIMS:
        assert claim.text in reader.text and claim.evidence in reader.text
    assert "| SFT   " in text and "| 1.00 [0.95, 1.05] |" in text
    assert ABOUT["command"] in reader.text and f"``{ABOUT['command']}``" in text
    assert "- [x] **holds**: Stage 2 beats stage 1." in text and "49.0 % > 38.0 % \\| at 1.75x" in text
    assert "- [ ] **does not hold**: A \\<script>" in text and "a \\< b, \\*not\\* bold" in text
    assert "(<figures/positions.png>)" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(
        len(re.findall(r"(?<!\\)\|", row)) == len(re.findall(r"(?<!\\)\|", rows[0])) for row in rows[:9]
    )


def test_the_page_needs_no_other_file(report):
    reader = Reader((report / "report.html").read_text(encoding="utf-8"))
    names = [name for name, _ in reader.tags]
    assert not {"script", "link", "iframe", "i"} & set(names)
    assert names.count("b") == len(CLAIMS), "bold is what the page says, not what was given"
    (image,) = [attributes for name, attributes in reader.tags if name == "img"]
    assert image["src"].startswith("data:image/png;base64,iVBOR")
    assert image["alt"] == 'Positions "<i>"'
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in reader.tags
    assert "prefers-color-scheme: dark" in reader.text and "url(" not in reader.text
    assert html.escape(CLAIMS[1].text) in (report / "report.html").read_text(encoding="utf-8")


def test_a_report_of_very_little(tmp_path):
    write_report(tmp_path / "new", {}, [replace(BASELINE, realized=None, families={})])
    text = (tmp_path / "new" / "report.md").read_text(encoding="utf-8")
    assert not any(f"## {title}" in text for title in ("Ablations", "Figures", "Claims", "By family"))
    assert "| Baseline-SFT |" in text and page.MISSING in text
    Reader((tmp_path / "new" / "report.html").read_text(encoding="utf-8"))


def test_a_family_measure_that_is_missing(tmp_path):
    untimed = replace(SOT, families={"list": {"truth": 0.5}})
    write_report(tmp_path, {}, [BASELINE, untimed])
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    table = text.split("### Realized speedup (x)")[1].split("#")[0]
    assert [line.split() for line in table.strip().splitlines()[2:]] == [
        ["|", name, "|", "0.90", "|", page.MISSING, "|"] for name in FAMILIES
    ]


def test_what_no_table_expects_is_still_listed(tmp_path):
    odd = result("PASTA-BoN", 1.23, 47.0, 2, positions="Shared", efficiency="harmonic")
    write_report(tmp_path, {}, [BASELINE, odd])
    assert "PASTA-BoN-2 (Shared, harmonic, round 1)" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_results_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="Method 'PASTA' is unknown"):
        result("PASTA", 1, 50)
    with pytest.raises(ValueError, match="PASTA-BoN has a weight"):
        result("PASTA-BoN", 1, 50)
    with pytest.raises(ValueError, match="nothing else has"):
        result("APAR", 1, 50, 2)


# The paper's numbers.


def test_numbers_of_the_paper() -> None:
    models = {model.name: model for model in paper.COMPARISON}
    assert [(m.realized, m.win_rate) for m in (models["Pasta-BoN-∞"], models["Pasta-BoN-1"])] == [
        (1.21, 0.523),
        (1.93, 0.429),
    ]
    assert models["Pasta-SFT"].theoretical == 1.90 and models["APAR"].win_rate == 0.412
    assert models["SoT on Baseline-SFT"].parallelism == 1.14
    trained = [m.realized / m.theoretical for m in paper.COMPARISON if m.weight and m.theoretical]
    assert sum(trained) / len(trained) == pytest.approx(0.81, abs=0.005)
    for model in paper.COMPARISON:
        if model.arithmetic and model.theoretical and model.parallelism:  # arithmetic means are larger
            geometric = model.realized, model.theoretical, model.parallelism
            assert all(a > g for a, g in zip(model.arithmetic, geometric, strict=True)), model.name
    assert max(paper.POSITIONS, key=lambda p: p.win_rate).label == "Pred-10X"
    after_one = {(p.weight, p.theoretical, p.win_rate) for p in paper.ROUNDS if p.label == "round 1"}
    speedup = {(p.weight, p.theoretical, p.win_rate) for p in paper.EFFICIENCY if p.label == "speedup"}
    assert len(after_one & speedup) >= 2, "Figures 5 and 8 share their models"
