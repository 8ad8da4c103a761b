"""The paper's own numbers (Jin et al., ICML 2025, arXiv 2502.11517): Gemma 7B on AlpacaEval, one H100.

The task and the model differ from Almanac's, so compare the shapes of curves, not their heights. *Read* numbers
are from the paper's text; *digitised* ones are measured in a figure, to about 0.01x and 0.2 points. Win rates are
length-controlled, against Baseline-SFT, from 0 to 1; the final ones by GPT-4, those of ablations by Gemini.
"""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Model:
    """A row of the comparison, Figure 4; geometric means over 805 prompts.

    Attributes:
      arithmetic: Figure 9: arithmetic means of realized speedup, theoretical speedup and parallelism.
      source: of the numbers.
    """

    name: str
    weight: float | None
    realized: float
    theoretical: float | None
    parallelism: float | None
    win_rate: float | None
    arithmetic: tuple[float, float, float] | None
    source: str


@dataclasses.dataclass(frozen=True)
class Point:
    """A point of an ablation's figure.

    Attributes:
      label: the round, position scheme or efficiency term.
      weight: lambda, if preference optimization took place.
    """

    label: str
    weight: float | None
    theoretical: float
    win_rate: float


_FIGURES = "digitised: Figures 4 and 9"
_READ = "realized and win rate read: section 5.2; others digitised: Figures 4 and 9"

COMPARISON = (
    Model("Pasta-SFT", None, 1.31, 1.90, 2.36, 0.327, (1.79, 2.46, 2.64), _FIGURES),
    Model("Pasta-BoN-1", 1.0, 1.93, 2.44, 2.33, 0.429, (2.60, 3.18, 2.70), _READ),
    Model("Pasta-BoN-2", 2.0, 1.62, 2.08, 2.08, 0.455, (2.15, 2.67, 2.45), _READ),
    Model("Pasta-BoN-4", 4.0, 1.54, 1.90, 1.91, 0.475, (2.10, 2.52, 2.28), _FIGURES),
    Model("Pasta-BoN-8", 8.0, 1.46, 1.78, 1.80, 0.487, (1.99, 2.38, 2.15), _FIGURES),
    Model("Pasta-BoN-∞", math.inf, 1.21, 1.40, 1.57, 0.523, (1.57, 1.82, 1.84), _READ),
    Model("APAR", None, 1.60, 1.79, 1.70, 0.412, (2.14, 2.40, 1.93), _READ),
    Model("SoT on Baseline-SFT", None, 0.73, 0.90, 1.14, 0.384, (1.04, 1.25, 1.19), _FIGURES),
    Model("SoT on Gemma-7B-it", None, 1.61, None, None, None, None, "read: section 5.2 (loses 12 points)"),
)

_SFT = ("SFT", None, 1.61, 0.300)

ROUNDS = (
    Point(*_SFT),
    Point("round 1, 10 %", 1.0, 2.66, 0.334),
    Point("round 1, 10 %", 2.0, 2.44, 0.356),
    Point("round 1, 10 %", 4.0, 2.01, 0.388),
    Point("round 1, 10 %", 8.0, 2.02, 0.391),
    Point("round 1", 1.0, 2.19, 0.357),
    Point("round 1", 2.0, 2.00, 0.393),
    Point("round 1", 4.0, 1.80, 0.406),
    Point("round 1", 8.0, 1.65, 0.446),
    Point("round 2, 10 %", 1.0, 2.09, 0.409),
    Point("round 2, 10 %", 2.0, 1.81, 0.446),
    Point("round 2, 10 %", 4.0, 1.63, 0.473),
    Point("round 2, 10 %", 8.0, 1.59, 0.487),
    Point("round 2, 60 %", 1.0, 2.30, 0.395),
    Point("round 2, 60 %", 2.0, 1.97, 0.441),
    Point("round 2, 60 %", 4.0, 1.76, 0.483),
    Point("round 2, 60 %", 8.0, 1.57, 0.498),
)
"""Figure 5, digitised. Its Pasta-SFT is not that of Figure 4 (1.61x, not 1.90x)."""

POSITIONS = (
    Point("Pred-10X", None, 1.61, 0.296),
    Point("Pred-1X", None, 1.73, 0.275),
    Point("Oracle", None, 1.67, 0.267),
    Point("Oracle-10X", None, 1.79, 0.265),
    Point("Const-40", None, 1.82, 0.257),
    Point("Oracle-1X", None, 1.72, 0.253),
)
"""Figure 6, digitised: models after SFT."""

EFFICIENCY = (
    Point("speedup", 8.0, 1.65, 0.445),
    Point("speedup", 4.0, 1.81, 0.407),
    Point("speedup", 2.0, 2.00, 0.393),
    Point("speedup", 1.0, 2.19, 0.357),
    Point("harmonic", 8.0, 1.53, 0.441),
    Point("harmonic", 4.0, 1.75, 0.426),
    Point("harmonic", 2.0, 1.76, 0.418),
    Point("harmonic", 1.0, 2.14, 0.329),
    Point("arithmetic", 8.0, 1.42, 0.459),
    Point("arithmetic", 4.0, 1.49, 0.428),
    Point("arithmetic", 2.0, 1.84, 0.386),
    Point("arithmetic", 1.0, 2.02, 0.313),
    Point("parallelism", 8.0, 1.27, 0.417),
    Point("parallelism", 4.0, 1.36, 0.392),
    Point("parallelism", 2.0, 1.57, 0.329),
    Point("parallelism", 1.0, 1.72, 0.307),
)
"""Figure 8, digitised: one round. The lambda of each point is taken from its order along the line."""
