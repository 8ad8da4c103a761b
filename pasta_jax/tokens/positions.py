"""Position schemes: the position at which the parent continues after a promise.

The branch starts right after its promise, and the parent skips a gap for it. The length of the branch is not known
then; the paper compares several guesses (section 6.2) and adopts Pred-10X. Nothing is renumbered at a join, so a
wrong guess leaves a gap or an overlap, to which the model adapts. Visibility never reads positions.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

from pasta_jax.fields import check_fields, field
from pasta_jax.messages import shown

TAGS_OF_A_BLOCK = 2
"""`<async>` and `</async>` take a position each."""

Scheme = Literal["pred", "const", "oracle", "shared"]


@dataclasses.dataclass(frozen=True)
class Positions:
    """One scheme.

    Attributes:
      scheme: `pred`, by the promise's own `tokens` times `unit` (Pred-10X with unit 10, Pred-1X with 1);
        `const`, by `unit` whatever the promise says (Const-40); `oracle`, by the true length (training and replay
        only); `shared`, no gap: both threads continue from the same position.
      unit: tokens.

    >>> Positions().resume(start=8, tokens=2)
    30
    >>> Positions("shared").resume(start=8, tokens=2)
    8
    """

    scheme: Scheme = field("pred", "where a thread continues after a promise: pred is tokens * unit further")
    unit: int = field(10, "tokens; of pred and const", least=0)

    def __post_init__(self) -> None:
        if self.scheme not in get_args(Scheme):
            known = ", ".join(get_args(Scheme))
            raise ValueError(f"Position scheme {shown(self.scheme)} is unknown. Use one of {known}.")
        check_fields(self)

    def resume(self, start: Any, tokens: Any, length: int | None = None) -> Any:
        """The position of the parent's next token.

        Args:
          start: position of the branch's first token, one after the promise's ` />`; int or integer array.
          tokens: the number in the promise; int or integer array.
          length: true length of the branch's content in tokens, known in training only.
        """
        if self.scheme == "pred":
            return start + self.unit * tokens + TAGS_OF_A_BLOCK
        if self.scheme == "const":
            return start + self.unit + TAGS_OF_A_BLOCK
        if self.scheme == "shared":
            return start
        if length is None:
            raise ValueError(
                "The oracle position scheme needs the branch's true length: training and replay only."
            )
        return start + length + TAGS_OF_A_BLOCK
