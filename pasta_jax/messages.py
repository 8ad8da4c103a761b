"""What a message quotes: values, and errors of libraries, in one line and cut short."""

from __future__ import annotations

import reprlib
from typing import Any


class _Short(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        try:
            return super().repr_int(x, level)
        except ValueError:  # Python writes no more than 4300 digits
            return f"<int of {x.bit_length()} bits>"


_SHORT = _Short()
_SHORT.maxstring = _SHORT.maxother = 80


def shown(value: Any) -> str:
    """A value for a message: its `repr`, in one line and cut short."""
    text = _SHORT.repr(value).replace("\n", " ")
    return text if len(text) <= 160 else f"{text[:157]}..."


def name_shown(name: str) -> str:
    r"""A name for a message: as it is, unless it is long or has what cannot be printed.

    >>> name_shown("mlp"), name_shown("a\nb")
    ('mlp', "'a\\nb'")
    """
    return name if name.isprintable() and len(name) <= 80 else shown(name)


def message_of(error: BaseException) -> str:
    """What a library says of a file, for a message: in one line and cut short, since it may quote the file.

    >>> message_of(KeyError("head"))
    "KeyError: 'head'"
    """
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else f"{text[:297]}..."
