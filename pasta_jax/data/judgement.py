"""What a judge says of two answers."""

from __future__ import annotations

from typing import NamedTuple


class Preference(NamedTuple):
    """Which of two answers is better (0, 1; None for a tie), and the judge's confidence, 0.5 to 1.

    A confidence of 0 is no verdict: the judge failed, or what it said cannot be read.
    """

    winner: int | None
    confidence: float

    @property
    def is_verdict(self) -> bool:
        """Whether the judge said anything."""
        return self.confidence > 0

    def agrees(self, other: Preference) -> bool | None:
        """Whether both have the same winner; None if one is no verdict, or neither has a winner.

        >>> win, tie = Preference(0, 0.8), Preference(None, 0.5)
        >>> win.agrees(Preference(0, 0.6)), win.agrees(tie), tie.agrees(tie), win.agrees(NO_VERDICT)
        (True, False, None, None)
        """
        is_tie = self.winner is None and other.winner is None
        return None if is_tie or not (self.is_verdict and other.is_verdict) else self.winner == other.winner

    @property
    def swapped(self) -> Preference:
        """The same of the two answers in the other order.

        >>> Preference(0, 0.8).swapped
        Preference(winner=1, confidence=0.8)
        """
        return Preference(None if self.winner is None else 1 - self.winner, self.confidence)


NO_VERDICT = Preference(None, 0.0)
