"""Labels beside points, each where it hides least. Nothing here is random: the same points, the same labels."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

INK = "#222222"

_DISTANCES = (7, 12, 19, 28, 39, 52, 68)
"""Tried between a point and its label, in points (1/72 inch)."""

_DEGREES = (45, 135, -45, -135, 90, -90, 0, 180, 22, 158, -22, -158, 68, 112, -68, -112)
_DIRECTIONS = [(math.cos(math.radians(a)), math.sin(math.radians(a))) for a in _DEGREES]
"""From a point to its label; the first is liked best."""

_MARKER = 4
"""Points from the middle of a marker to where it ends."""

_SWEEPS = 5
"""How often each label looks for its place."""

_STEP = 3
"""Pixels between the places at which a line is felt."""


@dataclasses.dataclass(frozen=True)
class Label:
    """Text for the point (x, y), in data coordinates."""

    x: float
    y: float
    text: str
    color: str = INK


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a label may go, in pixels.

    Attributes:
      box: float[2, 2], its lower left and upper right corner.
      leader: float[n, 2], places along the line to its point; n is 0 if it has none.
    """

    box: np.ndarray
    leader: np.ndarray

    @property
    def middle(self) -> np.ndarray:
        return self.box.mean(0)


def place(axes: Axes, labels: Sequence[Label], size: float = 9) -> list[Annotation]:
    """Writes the labels into axes whose other contents and limits are final.

    Each label tries places round its point, and takes that which covers the fewest markers, lines and other
    labels; several times over, as the others move too. A label that is far from its point, or nearer to
    another, gets a thin line to its own.
    """
    if not labels:
        return []
    figure = cast("Figure", axes.figure)
    figure.draw_without_rendering()  # lays out, so that data coordinates have pixels
    pixel = figure.dpi / 72
    drafts = [_write(axes, label, np.zeros(2), False, size) for label in labels]
    extents = [np.array([box.width, box.height]) for box in (draft.get_window_extent() for draft in drafts)]
    for draft in drafts:
        draft.remove()
    points = axes.transData.transform([(label.x, label.y) for label in labels])
    markers, obstacles, weights = _drawn(axes, pixel)
    frame = np.array([axes.bbox.p0, axes.bbox.p1])
    chosen: list[_Place | None] = [None] * len(labels)
    for _ in range(_SWEEPS):
        for i, (point, extent) in enumerate(zip(points, extents)):
            others = [place for j, place in enumerate(chosen) if j != i and place]
            tried = _places(point, extent, markers, pixel)
            costs = [c + _cost(place, others, frame, obstacles, weights) for c, place in tried]
            chosen[i] = tried[int(np.argmin(costs))][1]
    return [
        _write(axes, label, (place.middle - point) / pixel, len(place.leader) > 0, size)
        for label, point, place in zip(labels, points, chosen)
        if place
    ]


def _write(axes: Axes, label: Label, offset: np.ndarray, leader: bool, size: float) -> Annotation:
    from matplotlib import patheffects

    text = axes.annotate(
        label.text,
        (label.x, label.y),
        xytext=(float(offset[0]), float(offset[1])),
        textcoords="offset points",
        ha="center",
        va="center",
        fontsize=size,
        color=label.color,
        arrowprops=dict(arrowstyle="-", color="#777777", linewidth=0.7, shrinkA=0, shrinkB=1)
        if leader
        else None,
        path_effects=[patheffects.withStroke(linewidth=2.5, foreground="white")],
        zorder=5,
    )
    text.set_in_layout(False)
    return text


def _places(
    point: np.ndarray, extent: np.ndarray, markers: np.ndarray, pixel: float
) -> list[tuple[float, _Place]]:
    """Where a label of this extent may go, and what each place costs for being far or odd."""
    found = []
    for rank, distance in enumerate(_DISTANCES):
        for turn, direction in enumerate(_DIRECTIONS):
            beside = np.clip(
                1.5 * np.array(direction), -1, 1
            )  # on slanting ways the box's corner comes first
            middle = point + np.array(direction) * distance * pixel + beside * extent / 2
            box = np.array([middle - extent / 2 - pixel, middle + extent / 2 + pixel])
            strange = _is_nearer(markers, middle, point, pixel)
            leader = np.empty((0, 2))
            if rank >= 2 or strange:
                leader = _along(np.array([point, middle]))
            found.append((4.0 * rank + 0.1 * turn + 8.0 * strange, _Place(box, leader)))
    return found


def _cost(
    place: _Place, others: Sequence[_Place], frame: np.ndarray, obstacles: np.ndarray, weights: np.ndarray
) -> float:
    """How much a place hides: obstacles, other labels, lines to these; and what of it leaves the frame."""
    covered = weights[_inside(obstacles, place.box)].sum()
    area = np.prod(place.box[1] - place.box[0])
    hidden = sum(_overlap(place.box, other.box) for other in others) / area
    crossed = sum(
        _inside(place.leader, other.box).any() + _inside(other.leader, place.box).any() for other in others
    )
    outside = 1 - _overlap(place.box, frame) / area
    return float(covered + 400 * hidden + 60 * crossed + 400 * outside)


def _inside(places: np.ndarray, box: np.ndarray) -> np.ndarray:
    return np.all((places > box[0]) & (places < box[1]), axis=1)


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.prod(np.clip(np.minimum(a[1], b[1]) - np.maximum(a[0], b[0]), 0, None)))


def _is_nearer(markers: np.ndarray, middle: np.ndarray, point: np.ndarray, pixel: float) -> bool:
    """Whether a label in the middle given would rather seem to be that of another marker."""
    strangers = markers[np.linalg.norm(markers - point, axis=1) > pixel]
    if not len(strangers):
        return False
    return bool(np.linalg.norm(strangers - middle, axis=1).min() < np.linalg.norm(point - middle))


def _drawn(axes: Axes, pixel: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What is in the axes: markers [m, 2]; pixels [n, 2] that should not be covered, and how much each matters."""
    markers, caps, lines = [np.empty((0, 2))], [np.empty((0, 2))], [np.empty((0, 2))]
    for line in axes.lines:
        corners = line.get_transform().transform(np.asarray(line.get_xydata(), float))
        if line.get_zorder() < 1:
            continue  # background
        if line.get_linestyle() != "None":
            lines.append(_along(corners))
        else:  # small markers are the ends of intervals
            (markers if line.get_markersize() > _MARKER else caps).append(corners)
    for collection in axes.collections:
        for segment in getattr(collection, "get_segments", list)():
            lines.append(_along(axes.transData.transform(segment)))
    middles = np.concatenate(markers)
    disc = np.array([(0.0, 0.0), *_DIRECTIONS]) * _MARKER * pixel
    discs = (middles[:, None] + disc).reshape(-1, 2)
    felt = [discs, np.concatenate(caps), np.concatenate(lines)]
    return middles, np.concatenate(felt), np.repeat([4.0, 10.0, 2.0], [len(places) for places in felt])


def _along(corners: np.ndarray) -> np.ndarray:
    """Pixels along a line, _STEP apart."""
    pieces = [np.empty((0, 2))]
    for start, end in itertools.pairwise(corners):
        pieces.append(np.linspace(start, end, 2 + int(np.linalg.norm(end - start) // _STEP)))
    return np.concatenate(pieces)
