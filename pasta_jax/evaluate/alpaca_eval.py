"""AlpacaEval's files: outputs of models, and a judge's annotations of two models' outputs.

    model_outputs.json   [{"instruction", "output", "generator", "dataset"}, ...] in the order of the prompts
    annotations.json     [{"instruction", "output_1", "generator_1", "output_2", "generator_2", "dataset",
                           "annotator", "preference"}, ...]: 1 where the baseline's output_1 is better, 2 where
                         output_2 is, a number between where the judge is not sure

An instruction's difficulty goes by its place, so the order matters.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pasta_jax.evaluate.length_controlled import Difficulties, DifficultyError, length_controlled
from pasta_jax.files import BROKEN, write_json

OFFICIAL = {"helpful_base": 129, "koala": 156, "oasst": 188, "selfinstruct": 252, "vicuna": 80}
"""How many instructions of each data set AlpacaEval's file has, in its order."""


class AnnotationError(ValueError):
    """A file of annotations or outputs cannot be used; the message says why."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean in per cent, and its standard error; nan for less than two rows."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:.1f}" if math.isnan(self.error) else f"{self.mean:.1f} +- {self.error:.1f}"


def percent(values: np.ndarray) -> Estimate:
    """The mean of shares of 1, and the standard error of the mean, in per cent.

    >>> str(percent(np.array([1.0, 0.0, 0.5, 0.5])))
    '50.0 +- 20.4'
    """
    values = np.asarray(values, np.float64)
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(100 * float(values.mean()), 100 * error)


def read_list(path: str | os.PathLike[str], *keys: str) -> list[dict[str, Any]]:
    """A JSON list of objects that have these keys. Raises AnnotationError."""
    name = os.fspath(path)
    try:
        with open(path, encoding="utf-8") as file:
            rows = json.load(file)
    except OSError as error:
        raise AnnotationError(f"Cannot read {name}: {error.strerror}.") from error
    except BROKEN as error:
        raise AnnotationError(f"{name} is not JSON: {error}.") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise AnnotationError(f"{name} must be a JSON list of objects with {', '.join(keys)}.")
    for number, row in enumerate(rows):
        if missing := [key for key in keys if key not in row]:
            raise AnnotationError(f'{name}: row {number} has no "{missing[0]}".')
    return rows


def preferences(annotations: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """For the second output, 0 to 1: float64 [n], nan where there is no judgement. A 0 is a draw.

    Raises:
      AnnotationError: one is no number from 1 to 2.
    """
    found = []
    for number, row in enumerate(annotations):
        value = row["preference"]
        if value is not None and not (
            isinstance(value, int | float) and (value == 0 or 1 <= value <= 2 or value != value)
        ):
            raise AnnotationError(
                f'Row {number} of the annotations: "preference" is {value!r}, not from 1 to 2.'
            )
        found.append(math.nan if value is None else 0.5 if value == 0 else value - 1)
    return np.array(found, np.float64)


def win_rate(annotations: Sequence[Mapping[str, Any]]) -> Estimate:
    """The raw win rate of the second model, as on the leaderboard, over the rows that have a judgement.

    Raises:
      AnnotationError: as `preferences`, or none has one.
    """
    values = preferences(annotations)
    values = values[np.isfinite(values)]
    if not len(values):
        raise AnnotationError("No row of the annotations has a preference.")
    return percent(values)


def length_controlled_win_rate(
    annotations: Sequence[Mapping[str, Any]], difficulties: Difficulties, instructions: Sequence[str]
) -> Estimate:
    """The length-controlled win rate of the second model.

    Args:
      annotations: all of them, in the official order.
      difficulties: df_gamed.csv.
      instructions: those of AlpacaEval's file, in its order.

    Raises:
      AnnotationError: other instructions, or another order.
      DifficultyError: another number of rows than there are difficulties.
    """
    check_order([row["instruction"] for row in annotations], instructions)
    if len({row["generator_1"] for row in annotations} | {row["generator_2"] for row in annotations}) == 1:
        return Estimate(50.0, 0.0)  # a model against itself, by definition
    theirs, mine = (np.array([len(row[f"output_{i}"]) for row in annotations]) for i in (1, 2))
    return percent(length_controlled(preferences(annotations), theirs, mine, difficulties))


def check_order(found: Sequence[str], official: Sequence[str]) -> None:
    """Refuses instructions that are not those of the official file, each at its place. Raises AnnotationError."""
    if len(found) != len(official):
        raise AnnotationError(
            f"There are {len(found)} annotations of {len(official)} prompts. A difficulty belongs to a place in "
            "the file, so none may be missing."
        )
    for number, (mine, theirs) in enumerate(zip(found, official)):
        if mine != theirs:
            raise AnnotationError(
                f"Row {number} of the annotations is not that of the prompts: {mine[:60]!r}, expected "
                f"{theirs[:60]!r}. A difficulty belongs to a place in the file: keep the official order."
            )


def check_official(datasets: Sequence[str], difficulties: Difficulties) -> None:
    """Refuses prompts that are not AlpacaEval's, by the data set that each names, or not as many as difficulties.

    Raises:
      DifficultyError: in one line.
    """
    if len(datasets) != len(difficulties.difficulty):
        raise DifficultyError(
            f"There are {len(datasets)} prompts and difficulties of {len(difficulties.difficulty)}: they are not "
            "AlpacaEval's. Leave --df_gamed out."
        )
    found = [(name, len([*group])) for name, group in itertools.groupby(datasets)]
    if found != [*OFFICIAL.items()]:
        wanted = ", ".join(f"{count} of {name}" for name, count in OFFICIAL.items())
        raise DifficultyError(
            f'The prompts are not AlpacaEval\'s, whose records name their "dataset": {wanted}, in this order. Use '
            "its alpaca_eval.json as it is, or leave --df_gamed out."
        )


def write_outputs(path: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes model_outputs.json, or annotations.json."""
    write_json(path, rows)
