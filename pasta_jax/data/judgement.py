"""What a judge says of two answers."""

from __future__ import annotations

from typing import NamedTuple


class Preference(NamedTuple):
    """Which of two answers is better (0, 1; None for a tie), and the judge's confidence, 0.5 to 1."""

    winner: int | None
    confidence: float

    @property
    def swapped(self) -> Preference:
        """The same of the two answers in the other order.

        >>> Preference(0, 0.8).swapped
        Preference(winner=1, confidence=0.8)
        """
        return Preference(None if self.winner is None else 1 - self.winner, self.confidence)
