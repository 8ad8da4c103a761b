"""How figures look, whichever command draws them: colours, axes, labels beside points, PNG files.

Figures are made without pyplot: no window, no backend chosen, no setting of matplotlib changed. Nothing is
random: the same data give the same bytes.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import warnings
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np

from pasta_jax.extras import optional

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.path import Path
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

LOG = logging.getLogger("pasta_jax")

DPI = 150

INK = "#222222"
PALE = "#666666"

FONTS = (
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "Source Han Sans",
    "WenQuanYi Zen Hei",
    "Hiragino Sans",
    "PingFang SC",
    "Yu Gothic",
    "Microsoft YaHei",
    "Malgun Gothic",
    "Arial Unicode MS",
    "Noto Sans Devanagari",
    "Noto Sans Arabic",
)
"""Where they are installed, they have the letters that matplotlib's own font lacks."""


@dataclasses.dataclass(frozen=True)
class Look:
    """How one kind of point is drawn. The colours are Okabe and Ito's, safe for colour-blind readers."""

    color: str
    marker: str
    line: Any = "-"


SERIES = (
    Look("#0072b2", "o", "-"),
    Look("#d55e00", "^", "--"),
    Look("#009e73", "D", "-."),
    Look("#cc79a7", "s", ":"),
    Look("#e69f00", "v", (0, (5, 1, 1, 1, 1, 1))),
    Look("#56b4e9", "P", "-"),
)
"""Looks of a figure's lines or bars, in order of use."""


def can_draw(what: str) -> bool:
    """Whether matplotlib is there; if not, a line of the log says that `what` needs it, and how to install it."""
    try:
        optional("matplotlib.backends.backend_agg", "plot", what)
    except ImportError as error:
        LOG.warning("%s", error)
        return False
    return True


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this many inches. Raises ImportError without matplotlib."""
    agg = optional("matplotlib.backends.backend_agg", "plot", "A figure")
    kind = optional("matplotlib.figure", "plot", "A figure").Figure
    figure: Figure = kind(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    agg.FigureCanvasAgg(figure)
    return figure


def fonts() -> list[str]:
    """The fonts of a text that a user or a model wrote: matplotlib's own, and what is installed of `FONTS`."""
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    return ["sans-serif", *(name for name in FONTS if name in installed)]


def dress(axes: Axes, x_label: str, y_label: str) -> None:
    """Labels the axes and gives them ticks and a grid, alike in all figures."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(x_label, fontsize=11, color=INK)
    axes.set_ylabel(y_label, fontsize=11, color=INK)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10]))
    axes.tick_params(labelsize=10, colors=INK)
    axes.grid(visible=True, color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, path: str | os.PathLike[str] | IO[bytes]) -> None:
    """Writes a PNG file, or to one that is open.

    It names no software version, so that the same figure gives the same bytes. A letter that no font has is an
    empty box, without matplotlib's warning for each.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing from")
        figure.savefig(path, format="png", dpi=DPI, metadata={"Software": None})


# ---------------------------------------------------------------------------------------------------- labels

_OFFSETS = [
    (radius * math.cos(math.radians(angle)), radius * math.sin(math.radians(angle)))
    for radius in (7, 12, 19, 28, 39, 52, 68, 86)
    for angle in (45, 135, -45, -135, 90, -90, 0, 180, 22, 158, -22, -158, 68, 112, -68, -112)
]
"""Offsets tried between a point and its label, in points (1/72 inch), the preferred ones first."""

_NEAR = 15
"""Points up to which a label needs no line to its point."""


@dataclasses.dataclass(frozen=True)
class Label:
    """A text for the point (x, y), in data coordinates."""

    x: float
    y: float
    text: str
    color: str = INK


def place(axes: Axes, labels: Sequence[Label], size: float = 9) -> list[Annotation]:
    """Writes each label at the offset where it covers least; far from its point, with a thin line to it.

    The limits and all other contents of the axes must be final.
    """
    if not labels:
        return []
    from matplotlib import patheffects

    style: dict[str, Any] = dict(
        textcoords="offset points", ha="center", va="center", fontsize=size, zorder=5
    )
    style["arrowprops"] = dict(arrowstyle="-", color="#777777", linewidth=0.7, shrinkA=0, shrinkB=1)
    style["path_effects"] = [patheffects.withStroke(linewidth=2.5, foreground="white")]
    figure = cast("Figure", axes.figure)
    figure.draw_without_rendering()  # the layout decides which pixel a point in data coordinates has
    pixel = figure.dpi / 72
    markers, lines = _contents(axes)
    annotations: list[Annotation] = []
    taken: list[Bbox] = []
    for label in labels:
        text = axes.annotate(label.text, (label.x, label.y), xytext=(0, 0), color=label.color, **style)
        text.set_in_layout(False)
        start = text.get_window_extent()  # its line has no length yet
        half = np.array([start.width, start.height]) / 2
        shifts = [pixel * o + np.clip(1.5 * o / np.linalg.norm(o), -1, 1) * half for o in np.array(_OFFSETS)]
        costs = []
        for rank, (x, y) in enumerate(shifts):
            box = start.translated(x, y).padded(pixel)
            outside = not (axes.bbox.contains(*box.p0) and axes.bbox.contains(*box.p1))
            covered = 10 * box.padded(3 * pixel).count_contains(markers)
            crossed = sum(line.intersects_bbox(box, filled=False) for line in lines)
            costs.append(0.02 * rank + covered + 3 * crossed + 500 * (box.count_overlaps(taken) + outside))
        best = int(np.argmin(costs))
        text.xyann = tuple(shifts[best] / pixel)
        if text.arrow_patch is not None:
            text.arrow_patch.set_visible(bool(np.hypot(*_OFFSETS[best]) > _NEAR))
        taken.append(start.translated(*shifts[best]).padded(pixel))
        annotations.append(text)
    return annotations


def _contents(axes: Axes) -> tuple[np.ndarray, list[Path]]:
    """The markers [n, 2] and the lines that labels should not cover, in pixels."""
    from matplotlib.path import Path

    markers, lines = [np.empty((0, 2))], []
    for line in axes.lines:
        path = line.get_transform().transform_path(line.get_path())
        if line.get_linestyle() == "None":
            markers.append(np.asarray(path.vertices, float))  # the ends of error bars too
        elif line.get_zorder() >= 1:  # what lies lower is background
            lines.append(path)
    for collection in axes.collections:
        for segment in getattr(collection, "get_segments", list)():
            lines.append(Path(axes.transData.transform(segment)))
    return np.concatenate(markers), lines
