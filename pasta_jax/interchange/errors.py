"""Errors of importing and exporting models."""

from __future__ import annotations

from collections.abc import Sequence

SHOWN = 6


class InterchangeError(ValueError):
    """A folder or checkpoint that cannot be read or written. The message names file and tensor, and what to do."""


def listed(faults: Sequence[str]) -> str:
    """The first few faults, one on each line, and the number of the others."""
    more = f"\n  and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
    return "".join(f"\n  {fault}" for fault in faults[:SHOWN]) + more
