"""What requests cost, and the budget that they must keep.

>>> meter = Meter(Prices(1.0, 4.0), dollars=0.01)
>>> with meter.sending(Usage(1000, 500)) as sent:
...     sent.used = Usage(1000, 250)
>>> print(meter)
1 request, $0.0020
>>> with meter.sending(Usage(1000, 2000)):
...     pass
Traceback (most recent call last):
    ...
pasta_jax.endpoint.cost.BudgetError: The budget is used up: $0.0020 of $0.01, and the next takes about $0.0090
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

BYTES_PER_TOKEN = 4
"""Of English text, for estimates; other scripts take more bytes for a character, and about as many for a token."""

TOKENS_PER_MESSAGE = 4


class BudgetError(ValueError):
    """The next request could exceed the budget."""


class Usage(NamedTuple):
    """Tokens of a request and its reply."""

    input: int
    output: int


@dataclasses.dataclass(frozen=True)
class Prices:
    """Dollars for a million tokens."""

    input: float = 0.0
    output: float = 0.0

    def dollars(self, usage: Usage) -> float:
        """What a request costs."""
        return (usage.input * self.input + usage.output * self.output) / 1e6


def estimated_tokens(text: str) -> int:
    """About how many tokens a text has, for any tokenizer: a quarter of its bytes in UTF-8."""
    return math.ceil(len(text.encode("utf-8", errors="replace")) / BYTES_PER_TOKEN)


def estimated_input(messages: Iterable[Mapping[str, str]]) -> int:
    """About how many tokens the messages of a request have."""
    return sum(estimated_tokens(message["content"]) + TOKENS_PER_MESSAGE for message in messages)


class Sent:
    """A request under way. `used` is what it turned out to cost; None: nothing."""

    used: Usage | None = None


class Meter:
    """Counts requests and dollars, for several threads at once."""

    def __init__(
        self, prices: Prices = Prices(), *, requests: int | None = None, dollars: float | None = None
    ):
        """`requests` and `dollars` are the budget; None: without end."""
        self._prices, self._most_requests, self._most_dollars = prices, requests, dollars
        self.requests = 0
        self.dollars = 0.0
        self._under_way = 0.0  # dollars that may be charged for requests that were sent
        self._changed = threading.Condition()

    def count(self, requests: int, usage: Usage) -> None:
        """Counts requests of earlier runs, and what they used together."""
        self.requests += requests
        self.dollars += self._prices.dollars(usage)

    @contextlib.contextmanager
    def sending(self, estimate: Usage) -> Iterator[Sent]:
        """Counts a request; waits for others while these may leave it enough.

        Raises:
          BudgetError: it could exceed the budget.
        """
        expected, sent = self._prices.dollars(estimate), Sent()
        with self._changed:
            if self._most_dollars is not None:
                self._changed.wait_for(lambda: not self._under_way or self._has(expected))
                if not self._has(expected):
                    raise BudgetError(
                        f"The budget is used up: ${self.dollars:.4f} of ${self._most_dollars:g}, and the next "
                        f"takes about ${expected:.4f}"
                    )
            if self._most_requests is not None and self.requests >= self._most_requests:
                raise BudgetError(f"The budget is used up: {self._most_requests:,} requests are sent")
            self.requests += 1
            self._under_way += expected
        try:
            yield sent
        finally:
            with self._changed:
                self._under_way = max(0.0, self._under_way - expected)
                if self._under_way < 1e-12:
                    self._under_way = 0.0  # of sums and differences nothing else is left
                self.dollars += self._prices.dollars(sent.used) if sent.used else 0.0
                self._changed.notify_all()

    def _has(self, dollars: float) -> bool:
        return self.dollars + self._under_way + dollars <= (self._most_dollars or 0.0)

    def __str__(self) -> str:
        plural = "s" * (self.requests != 1)
        return f"{self.requests:,} request{plural}" + (f", ${self.dollars:.4f}" if self.dollars else "")
