"""Measuring: in turn and repeatedly, as medians with quartiles, with a description of the machine."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from tqdm import tqdm

PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "numpy", "transformers", "torch")

Cell: TypeAlias = "str | int | float | bool | Spread | tuple[int, ...]"
Point: TypeAlias = dict[str, Cell]
"""One line of a table: numbers by name; a name ends with the unit."""


@dataclasses.dataclass(frozen=True)
class Spread:
    """Repeated measurements of one quantity.

    Attributes:
      low, high: the quartiles.
      samples: all measurements.
    """

    median: float
    low: float
    high: float
    samples: tuple[float, ...]

    @staticmethod
    def of(samples: Sequence[float]) -> Spread:
        """The spread of some measurements.

        >>> Spread.of([3.0, 1.0, 2.0, 4.0, 5.0])
        Spread(median=3.0, low=2.0, high=4.0, samples=(3.0, 1.0, 2.0, 4.0, 5.0))
        """
        if len(samples) == 1:
            low = high = samples[0]
        else:
            low, _, high = statistics.quantiles(samples, method="inclusive")
        return Spread(statistics.median(samples), low, high, tuple(samples))

    def __str__(self) -> str:
        return f"{number(self.median)} [{number(self.low)}, {number(self.high)}]"


def number(value: float) -> str:
    """A number with three significant digits.

    >>> [number(x) for x in (0.01234, 12.34, 1234.5)]
    ['0.0123', '12.3', '1234']
    """
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def ratio(one: Sequence[float], other: Sequence[float]) -> float:
    """The ratio of the medians; NaN if the denominator is not positive, which noise in a difference can cause."""
    below = statistics.median(other)
    return statistics.median(one) / below if below > 0 else math.nan


def in_turn(what: str, measured: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Calls every function once to warm up, then all of them in turn; the values by name.

    They take turns so that other load on the machine affects them alike.
    """
    for call in measured.values():
        call()
    samples: dict[str, list[float]] = {name: [] for name in measured}
    for _ in tqdm(range(repeats), desc=what, unit="repeat", disable=not sys.stderr.isatty()):
        for name, call in measured.items():
            samples[name].append(call())
    return samples


def machine() -> dict[str, Any]:
    """The hardware and the versions of a measurement. Starts jax's backend."""
    import jax

    devices = jax.devices()
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "platform": devices[0].platform,
        "accelerator": None if devices[0].platform == "cpu" else devices[0].device_kind,
        "devices": len(devices),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def load_average() -> list[float] | None:
    """The load average over the last 1, 5 and 15 minutes; None if the system has none."""
    return [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None


def cpu_model() -> str:
    """The name of the CPU."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
