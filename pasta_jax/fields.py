"""Fields of configurations that carry their documentation."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

T = TypeVar("T")


def field(default: T, doc: str) -> T:
    """A field of a dataclass with its default, and the line that `--print_config` shows beside it."""
    return dataclasses.field(default=default, metadata={"doc": doc})
