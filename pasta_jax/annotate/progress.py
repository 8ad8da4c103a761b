"""How far a run is, for the person who waits."""

from __future__ import annotations

import logging
import time

from tqdm import tqdm

from pasta_jax.annotate.protocol import Estimating
from pasta_jax.files import LOG_EVERY_S, shows_progress

LOG = logging.getLogger("pasta_jax")


class Progress:
    """A bar on a terminal, elsewhere a line in the log now and then: records so far, their rate, the time left.

    Of an annotator that asks others, also what it asked and what that cost.
    """

    def __init__(self, done: int, total: int | None, annotator: object):
        self._first, self._total = done, total
        self._bar = tqdm(unit="record", initial=done, total=total, disable=not shows_progress())
        self._status = annotator.status if isinstance(annotator, Estimating) else None
        self._count, self._annotated = 0, 0
        self._start = self._logged = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self._bar.disable:
            self._log()

    @property
    def done(self) -> str:
        """How many records are done, of how many."""
        done = f"{self._first + self._count:,}"
        return done if self._total is None else f"{done} of {self._total:,}"

    def add(self, annotated: bool) -> None:
        """Counts a record, of which an answer was annotated or none."""
        self._count += 1
        self._annotated += annotated
        if self._status and not self._bar.disable:
            self._bar.set_postfix_str(self._status(), refresh=False)
        self._bar.update()
        if self._bar.disable and time.monotonic() - self._logged > LOG_EVERY_S:
            self._log()

    def _log(self) -> None:
        self._logged = time.monotonic()
        rate = self._count / max(self._logged - self._start, 1e-9)
        parts = [f"{self.done} records, {rate:.1f} a second; {self._annotated:,} of these are annotated"]
        if self._status:
            parts.append(self._status())
        if self._total is not None and self._count and (left := self._total - self._first - self._count) > 0:
            parts.append(f"time left {tqdm.format_interval(left / rate)}")
        LOG.info("; ".join(parts))
