"""What a caller may pass as an option: one check for every number and switch, which names the option."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from pasta_jax.arrays import LARGEST_INT
from pasta_jax.messages import shown

LARGEST_FLOAT = float(np.finfo(np.float32).max)


def whole(name: str, value: Any, least: int, most: int = LARGEST_INT) -> int:
    """A whole number, of Python or of an array library. Raises ValueError."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or not least <= number <= most:
        raise _wrong(name, value, number is None, f"a whole number from {least} to {most}")
    return number


def real(name: str, value: Any, least: float, most: float = LARGEST_FLOAT, *, above: bool = False) -> float:
    """A number; with `above`, it must exceed `least`. Raises ValueError, also for nan."""
    try:
        number = None if isinstance(value, str | bytes | bool | np.bool_) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or not (least < number if above else least <= number) or not number <= most:
        limits = f"{'above' if above else 'from'} {least:g} {'up ' * above}to {most:.2g}"
        raise _wrong(name, value, number is None, f"a number {limits}")
    return number


def switch(name: str, value: Any) -> bool:
    """True or False. Raises ValueError."""
    if not isinstance(value, bool | np.bool_):
        raise _wrong(name, value, True, "True or False")
    return bool(value)


def _wrong(name: str, value: Any, is_type: bool, expected: str) -> ValueError:
    """What is wrong with an option."""
    problem = "of the wrong type" if is_type else "out of range"
    return ValueError(f"{name}={shown(value)} is {problem}. Give {expected}.")
