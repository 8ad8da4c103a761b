"""AlpacaEval's length-controlled win rate, as version 0.6.6 of its package computes it ("length_controlled_v1").

A logistic model explains the judge's preferences for the model's answers:

    logit(preference) = w_length * tanh(d) + w_difficulty * difficulty + w_model * m

  d            characters of the baseline's answer less those of the model's, divided by the standard deviation of
               that difference (over n - 1)
  difficulty   of the instruction, by its place in the file, from df_gamed.csv
  m            1 for the model's rows, 0 for the rows of df_gamed.csv: judgements of the baseline's own answers,
               made longer and shorter, which keep w_length and w_difficulty near those of a model without gain.
               They weigh LAMBDA / 2 each, the model's rows 1.

The weights minimise |w|_1 + C * (weighted cross-entropy, summed); C is the best of ten in five-fold
cross-validation, whose folds are of whole rows. The length-controlled win rate is the mean over all instructions of
the preference that these weights predict for answers of equal length, d = 0.

The package minimises to 1e-4 with random steps, this module to the end. df_gamed.csv is in the data set
tatsu-lab/alpaca_eval of the Hugging Face hub; without it nothing is computed: what lacks its rows, or guesses
difficulties, is off by up to 19 points.
"""

from __future__ import annotations

import csv
import dataclasses
import os
from typing import NamedTuple

import numpy as np

LAMBDA = 0.2
FOLDS = 5
CS = np.logspace(-4, 4, 10)
CLIPPED = 1e-15
COLUMNS = ("index", "preference", "std_delta_len", "instruction_difficulty", "not_gamed_baseline")


class DifficultyError(ValueError):
    """The file of difficulties cannot be used for these annotations; the message says why."""


class Weights(NamedTuple):
    """The weights of the logistic model."""

    length: float
    difficulty: float
    model: float


@dataclasses.dataclass(frozen=True)
class Difficulties:
    """What df_gamed.csv holds.

    Attributes:
      difficulty: float [n], of each instruction in the order of the file of prompts.
      rows: float [g, 3], the columns of the logistic model for each judgement of a gamed answer.
      preference: float [g], 0 to 1.
    """

    difficulty: np.ndarray
    rows: np.ndarray
    preference: np.ndarray


def read_difficulties(path: str | os.PathLike[str]) -> Difficulties:
    """Reads df_gamed.csv. Raises DifficultyError."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            if missing := {*COLUMNS} - {*(reader.fieldnames or ())}:
                raise DifficultyError(
                    f"{os.fspath(path)} is not AlpacaEval's df_gamed.csv: it has no {', '.join(sorted(missing))}."
                )
            table = [[_number(line[name]) for name in COLUMNS] for line in reader]
    except OSError as error:
        raise DifficultyError(f"Cannot read {os.fspath(path)}: {error.strerror}.") from error
    except (ValueError, TypeError, csv.Error) as error:
        if isinstance(error, DifficultyError):
            raise
        raise DifficultyError(f"{os.fspath(path)} is damaged: {error}.") from error
    index, preference, delta, difficulty, is_model = np.array(table, np.float64).reshape(-1, len(COLUMNS)).T
    first: dict[int, float] = {}
    for place, value in zip(index, difficulty):
        first.setdefault(int(place), float(value))
    if [*first] != [*range(len(first))] or not first:
        raise DifficultyError(
            f"{os.fspath(path)}: its index does not count the instructions from 0 in order."
        )
    rows = np.stack([np.tanh(delta), difficulty, is_model], axis=1)
    known = np.isfinite(preference)
    return Difficulties(np.array([*first.values()]), rows[known], preference[known])


def _number(text: str) -> float:
    return {"True": 1.0, "False": 0.0, "": np.nan}[text] if text in ("True", "False", "") else float(text)


def length_controlled(
    preference: np.ndarray, baseline_length: np.ndarray, length: np.ndarray, difficulties: Difficulties
) -> np.ndarray:
    """The preference for the model at equal length, predicted for each instruction: float [n], 0 to 1.

    Its mean is the length-controlled win rate.

    Args:
      preference: float [n], 0 to 1, for the model's answers; nan where there is no judgement.
      baseline_length, length: characters of the two answers, [n].
      difficulties: difficulties of the same instructions in the same order, and the further rows.

    Raises:
      DifficultyError: the numbers of rows differ.
    """
    return predicted(fitted(preference, baseline_length, length, difficulties), difficulties.difficulty)


def predicted(weights: Weights, difficulty: np.ndarray) -> np.ndarray:
    """The preference at equal length, by known weights.

    >>> predicted(Weights(1.0, 2.0, -1.0), np.array([0.5, 0.0])).round(6).tolist()
    [0.5, 0.268941]
    """
    return _sigmoid(weights.model + weights.difficulty * difficulty)


def fitted(
    preference: np.ndarray, baseline_length: np.ndarray, length: np.ndarray, difficulties: Difficulties
) -> Weights:
    """The weights of the logistic model. Raises DifficultyError if the numbers of rows differ."""
    if len(preference) != len(difficulties.difficulty):
        raise DifficultyError(
            f"There are {len(preference)} annotations and difficulties of {len(difficulties.difficulty)} "
            "instructions. They belong together by their place, so none may be missing."
        )
    delta = np.asarray(baseline_length, np.float64) - np.asarray(length, np.float64)
    spread = delta.std(ddof=1) if len(delta) > 1 else 0.0
    own = np.stack(
        [np.tanh(delta / spread) if spread else delta, difficulties.difficulty, np.ones(len(delta))], axis=1
    )
    known = np.isfinite(preference)
    rows = np.concatenate([difficulties.rows, own[known]])
    target = np.concatenate([difficulties.preference, np.asarray(preference, np.float64)[known]])
    weight = np.where(rows[:, 2] == 1, 1.0, LAMBDA / 2)
    best = CS[np.argmax(_cross_validated(rows, target, weight))]
    return Weights(*map(float, minimum(rows, target, weight, best)))


def _cross_validated(rows: np.ndarray, target: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The sum over folds of the mean weighted log-likelihood of what each leaves out, for each C."""
    fold = (
        np.arange(len(target))[::-1] % FOLDS
    )  # the package deals rows to the lightest fold, from the last row on
    total = np.zeros(len(CS))
    for number in range(FOLDS):
        inside, outside = fold != number, fold == number
        for i, c in enumerate(CS):
            w = minimum(rows[inside], target[inside], weight[inside], c)
            chance = np.clip(_sigmoid(rows[outside] @ w), CLIPPED, 1 - CLIPPED)
            y = target[outside]
            total[i] += np.mean(weight[outside] * (y * np.log(chance) + (1 - y) * np.log(1 - chance)))
    return total


def minimum(rows: np.ndarray, target: np.ndarray, weight: np.ndarray, c: float) -> np.ndarray:
    """The w that minimises |w|_1 + c * sum(weight * cross-entropy(target, sigmoid(rows @ w))), by proximal Newton.

    Args:
      rows: float [n, k].
      target, weight: float [n]; targets from 0 to 1.
      c: above 0.
    """

    def objective(w: np.ndarray) -> float:
        z = rows @ w
        return float(np.abs(w).sum() + c * np.sum(weight * (np.logaddexp(0, z) - target * z)))

    w = np.zeros(rows.shape[1])
    value = objective(w)
    for _ in range(200):
        chance = _sigmoid(rows @ w)
        gradient = c * rows.T @ (weight * (chance - target))
        hessian = c * (rows * (weight * chance * (1 - chance))[:, None]).T @ rows
        step = _lasso_step(w, gradient, hessian)
        size = 1.0
        while size > 1e-10 and objective(w + size * step) > value:
            size /= 2
        new = objective(w + size * step)
        if new >= value or np.abs(step).max() < 1e-12:
            break
        w, value = w + size * step, new
    return w


def _lasso_step(w: np.ndarray, gradient: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """The d that minimises gradient d + d hessian d / 2 + |w + d|_1, by coordinate descent."""
    hessian = hessian + 1e-12 * np.eye(len(w))
    step = np.zeros_like(w)
    for _ in range(1000):
        largest = 0.0
        for i in range(len(w)):
            slope = gradient[i] + hessian[i] @ step - hessian[i, i] * step[i]
            # Of w_i + d_i = u: the minimum of hessian_ii / 2 * (u - w_i)^2 + slope * (u - w_i) + |u|.
            place = w[i] - slope / hessian[i, i]
            u = np.sign(place) * max(0.0, abs(place) - 1 / hessian[i, i])
            largest = max(largest, abs(u - w[i] - step[i]))
            step[i] = u - w[i]
        if largest < 1e-13:
            break
    return step


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(np.exp(-np.logaddexp(0, -x)))
