"""Counts and times of requests, in the text format of Prometheus."""

from __future__ import annotations

import bisect
import collections
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from pasta_jax.decoding.session import Load

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0)
"""Upper bounds of the histograms' buckets."""

Labels: TypeAlias = tuple[tuple[str, str], ...]

_COUNTERS = {
    "requests": "Requests, by endpoint and status; 499 are those whose client left.",
    "prompt_tokens": "Tokens of prompts that were answered.",
    "reused_tokens": "Tokens of prompts that were not fed, because an earlier prompt began alike.",
    "output_tokens": "Tokens of answers, tags included.",
    "text_tokens": "Tokens of answers, tags left out.",
    "decode_steps": "Decode steps of answers.",
    "branches": "Branches of answers.",
    "compilations": "Programs compiled since the server started; there should be none.",
}
_HISTOGRAMS = {
    "request_seconds": "From a request's arrival to the last byte of its reply.",
    "first_text_seconds": "From a request's arrival to the first text of a stream.",
}
_GAUGES = {
    "rows": "Requests that are decoded at once.",
    "running": "Requests that have a row.",
    "waiting": "Requests that wait for a row.",
    "kept_bytes": "Memory of the beginnings of prompts that are kept.",
    "draining": "1 while the server ends and takes no more requests.",
}


class Histogram:
    """Counts by upper bound."""

    def __init__(self) -> None:
        self.counts, self.total = [0] * (len(SECONDS) + 1), 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(SECONDS, seconds)] += 1
        self.total += seconds


class Metrics:
    """What has been counted since the server started.

    A counter belongs to one thread: `compilations` to that which decodes, all others to the event loop's.
    """

    def __init__(self) -> None:
        self._counts = collections.Counter[tuple[str, Labels]]()
        self._counts.update({(name, ()): 0 for name in _COUNTERS if name != "requests"})
        self._histograms = collections.defaultdict[tuple[str, Labels], Histogram](Histogram)

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Adds to a counter."""
        self._counts[name, (*labels.items(),)] += amount  # type: ignore[assignment]

    def time(self, name: str, seconds: float, **labels: str) -> None:
        """Adds to a histogram."""
        self._histograms[name, (*labels.items(),)].add(seconds)

    def text(self, load: Load, *, draining: bool) -> str:
        """All of it, with the decoder's load at this moment."""
        gauges = {
            "rows": load.rows,
            "running": load.running,
            "waiting": load.waiting,
            "kept_bytes": load.kept_bytes,
            "draining": int(draining),
        }
        return "".join(f"{line}\n" for line in (*self._lines(), *_gauge_lines(gauges)))

    def _lines(self) -> Iterator[str]:
        for name, what in _COUNTERS.items():
            yield from _about(f"{name}_total", "counter", what)
            for (_, labels), value in self._of(self._counts, name):
                yield _sample(f"{name}_total", labels, value)
        for name, what in _HISTOGRAMS.items():
            yield from _about(name, "histogram", what)
            for (_, labels), histogram in self._of(self._histograms, name):
                bounds = (*(f"{bound:g}" for bound in SECONDS), "+Inf")
                for bound, count in zip(bounds, itertools.accumulate(histogram.counts), strict=True):
                    yield _sample(f"{name}_bucket", (*labels, ("le", bound)), count)
                yield _sample(f"{name}_sum", labels, round(histogram.total, 6))
                yield _sample(f"{name}_count", labels, sum(histogram.counts))

    @staticmethod
    def _of(table: Mapping[tuple[str, Labels], Any], name: str) -> Sequence[tuple[tuple[str, Labels], Any]]:
        return sorted((entry for entry in table.items() if entry[0][0] == name), key=lambda entry: entry[0])


def _gauge_lines(values: Mapping[str, float]) -> Iterator[str]:
    for name, what in _GAUGES.items():
        yield from _about(name, "gauge", what)
        yield _sample(name, (), values[name])


def _about(name: str, kind: str, what: str) -> Iterator[str]:
    yield f"# HELP pasta_{name} {what}"
    yield f"# TYPE pasta_{name} {kind}"


def _sample(name: str, labels: Labels, value: float) -> str:
    inside = ",".join(f'{key}="{text}"' for key, text in labels)
    return f"pasta_{name}{{{inside}}} {value}" if inside else f"pasta_{name} {value}"
