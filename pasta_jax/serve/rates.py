"""How often a client may ask: a bucket of tokens for each."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from pasta_jax.serve.errors import ApiError

MOST_CLIENTS = 10_000
"""Buckets that are kept: of more clients, the one that took a token longest ago is forgotten."""


class Rates:
    """The clients of a server.

    Args:
      rate: requests of one client in a minute, and the most at once; 0 is no limit.
      now: the time in seconds.
    """

    def __init__(self, rate: int, now: Callable[[], float] = time.monotonic):
        self.rate, self._now = rate, now
        self._full_at: dict[str, float] = {}  # when the bucket of a client is full again

    def check(self, client: str) -> None:
        """Takes a token of this client's. Raises ApiError if it has none."""
        if not self.rate:
            return
        now, each = self._now(), 60 / self.rate
        full_at = max(self._full_at.get(client, now), now) + each
        if (wait := full_at - now - 60) > 1e-6:
            message = f"More than {self.rate} requests in a minute. Try again in {math.ceil(wait)} s."
            headers = {"Retry-After": str(math.ceil(wait))}
            raise ApiError(429, message, "rate_limit_exceeded", headers=headers)
        self._full_at.pop(client, None)
        self._full_at[client] = full_at  # the last of all
        if len(self._full_at) > MOST_CLIENTS:
            del self._full_at[next(iter(self._full_at))]
