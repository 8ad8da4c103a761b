"""Interleaved, repeated measurements as medians with quartiles; a description of the machine."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import logging
import math
import os
import platform
import statistics
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

from tqdm import tqdm

from pasta_jax.memory import peak_of_process

PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "numpy", "transformers", "torch", "google-tunix")

LOG = logging.getLogger("pasta_jax")

LARGE_S = 0.1
"""Seconds. A program that takes longer to lower or to compile is worth a line in the log."""

Cell: TypeAlias = "str | int | float | bool | Quartiles | tuple[int, ...]"
TableRow: TypeAlias = dict[str, Cell]
"""One row of a table: cells by the name of their column, which ends with the unit."""

NOISE = "noise"
NOISE_MEANS = (
    "noise: a step's time is a difference, and was lost. Run without --quick, or on an idle machine."
)

Key = TypeVar("Key", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class Quartiles:
    """Median and quartiles of repeated measurements of one positive quantity.

    All three are NaN if a quartile is not positive, as where a difference of times was lost in noise.

    Attributes:
      low, high: the lower and the upper quartile.
      samples: all measurements.
    """

    median: float
    low: float
    high: float
    samples: tuple[float, ...]

    @staticmethod
    def of(samples: Sequence[float]) -> Quartiles:
        """The median and quartiles of some measurements.

        >>> Quartiles.of([3.0, 1.0, 2.0, 4.0, 5.0])
        Quartiles(median=3.0, low=2.0, high=4.0, samples=(3.0, 1.0, 2.0, 4.0, 5.0))
        """
        if len(samples) == 1:
            low = high = samples[0]
        else:
            low, _, high = statistics.quantiles(samples, method="inclusive")
        median = statistics.median(samples)
        if low <= 0:
            median = low = high = math.nan
        return Quartiles(median, low, high, tuple(samples))

    def __str__(self) -> str:
        return (
            NOISE
            if math.isnan(self.median)
            else f"{number(self.median)} [{number(self.low)}, {number(self.high)}]"
        )


def number(value: float) -> str:
    """A number with three significant digits; NaN is noise.

    >>> [number(x) for x in (0.01234, 12.34, 1234.5, math.nan)]
    ['0.0123', '12.3', '1234', 'noise']
    """
    if math.isnan(value):
        return NOISE
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def median_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """The ratio of the medians; NaN if either was lost in noise (`Quartiles`)."""
    return Quartiles.of(numerator).median / Quartiles.of(denominator).median


def interleaved(
    what: str, measured: Mapping[Key, Callable[[], float]], repeats: int, unit: str
) -> dict[Key, list[float]]:
    """Calls every function once to warm up, then all of them in turn, so that other load affects them alike.

    Args:
      what: names the progress bar, and the first measurements, which are logged as soon as they are there.
      measured: the functions, each of which returns one measurement.
      repeats: how often each is called after the first time.
      unit: of the measurements.

    Returns:
      The measurements of each function.
    """
    for call in measured.values():
        call()
    samples: dict[Key, list[float]] = {key: [] for key in measured}
    for repeat in tqdm(range(repeats), desc=what, unit="repeat", disable=not sys.stderr.isatty()):
        for key, call in measured.items():
            samples[key].append(call())
            if not repeat:
                log_first(f"{what}, {key}", f"{number(samples[key][0])} {unit}", repeats)
    return samples


def log_first(what: str, value: str, repeats: int) -> None:
    """Logs a figure as soon as it is there."""
    LOG.info("%s: %s (first of %d)", what, value, repeats)


def log_compiling() -> None:
    """From now on logs each large program when it is compiled, and the seconds that this takes."""
    import jax

    def log(event: str, duration_secs: float, **about: Any) -> None:
        name = about.get("fun_name", "a program")
        if event.endswith("/jaxpr_to_mlir_module_duration") and duration_secs > LARGE_S:
            LOG.info("compiling %s", name)
        elif event.endswith("/backend_compile_duration") and duration_secs > LARGE_S:
            LOG.info("compiled %s in %.1f s", name, duration_secs)

    jax.monitoring.register_event_duration_secs_listener(log)


def machine() -> dict[str, Any]:
    """The hardware and the versions of a measurement. Starts jax's backend."""
    import jax

    from pasta_jax.decoding.cpu import cores

    devices = jax.devices()
    return {
        "cpu": cpu_model(),
        "cores": cores(),
        "memory_gib": _memory_gib(),
        "platform": devices[0].platform,
        "accelerator": None if devices[0].platform == "cpu" else devices[0].device_kind,
        "devices": len(devices),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def provenance(command: str, time: str) -> dict[str, str]:
    """How a table was made, in words: what a reader needs to repeat it.

    Args:
      command: the module that was run; the arguments are this process's.
      time: how long it took, and what that includes.
    """
    from pasta_jax.checkpoints.about import versions

    here = machine()
    return {
        "command": " ".join(["python -m", command, *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "hardware": f"{here['cores']} cores of {here['cpu']}; jax on {here['accelerator'] or 'cpu'}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        "time": time,
        "peak memory": f"{peak_of_process() / 1e9:.1f} GB",
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
