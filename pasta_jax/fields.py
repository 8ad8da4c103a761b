"""Fields of configurations that carry their documentation and the range of their numbers."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Mapping
from typing import Any, TypeVar

from pasta_jax.arrays import LARGEST_INT
from pasta_jax.messages import shown

T = TypeVar("T")

_RULES = {
    "least": (operator.ge, "at least"),
    "above": (operator.gt, "above"),
    "most": (operator.le, "at most"),
    "below": (operator.lt, "below"),
}


class FieldError(ValueError):
    """A number outside the range of its field; the message begins with the field's name."""


def field(default: T, doc: str, **bounds: float) -> T:
    """A field of a dataclass with its default, and the line that `--print_config` shows beside it.

    Args:
      default: its value, if none is given.
      doc: the line.
      bounds: least, above, most or below: of a number, for `check_fields`. Else ints go up to LARGEST_INT, on
        either side of 0, and floats must be finite.
    """
    return dataclasses.field(default=default, metadata={"doc": doc, "bounds": bounds})


def check_fields(config: Any) -> None:
    """Refuses numbers outside the ranges of their fields, for `__post_init__`. Raises FieldError."""
    for each in dataclasses.fields(config):
        value = getattr(config, each.name)
        if type(value) not in (int, float):
            continue
        bounds: Mapping[str, float] = each.metadata.get("bounds", {})
        is_int = type(value) is int
        if not {"least", "above"} & bounds.keys():
            bounds = {**bounds, **({"least": -LARGEST_INT} if is_int else {"above": -math.inf})}
        if not {"most", "below"} & bounds.keys():
            bounds = {**bounds, **({"most": LARGEST_INT} if is_int else {"below": math.inf})}
        for name, bound in bounds.items():
            holds, words = _RULES[name]
            if not holds(value, bound):
                raise FieldError(f"{each.name} must be {words} {bound}, got {shown(value)}.")
