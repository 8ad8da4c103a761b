"""What goes wrong when models come in and go out."""

from __future__ import annotations

from collections.abc import Sequence

SHOWN = 6


class InterchangeError(ValueError):
    """A folder or checkpoint that cannot be taken or written; names file and tensor, and says what to do."""


def listed(faults: Sequence[str]) -> str:
    """Some faults as one text: a few in full and how many more there are."""
    more = f"\n  and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
    return "".join(f"\n  {fault}" for fault in faults[:SHOWN]) + more
