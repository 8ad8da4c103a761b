"""The TPU generations for which programs are compiled: memory, speed and network of each.

Sources: cloud.google.com/tpu/docs/v4, v5e, v5p, v6e and tpu7x (speeds are of one chip; "bidirectional" bandwidths
count both directions of all ports); `hbm` is what libtpu 0.0.51 says is available when a program takes too much.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from pasta_jax.memory import GIB


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation. All numbers are of a jax device: on TPU7x, half a chip.

    Attributes:
      name: as in --topology.
      kind: `jax.Device.device_kind`.
      flops: bfloat16 operations a second.
      hbm: bytes of main memory that a program may take.
      bandwidth: bytes a second to and from main memory.
      link: bytes a second that one port sends, and as many that it receives.
      axes: dimensions of the torus: each device has two ports in each.
      wraps: an axis of a multiple of this length is a ring, a shorter one a line.
      devices: of one chip.
    """

    name: str
    kind: str
    flops: float
    hbm: int
    bandwidth: float
    link: float
    axes: int
    wraps: int
    devices: int = 1


CHIPS = (
    Chip("v4", "TPU v4", 275e12, int(30.5 * GIB), 1200e9, 50e9, 3, 4),
    Chip("v5e", "TPU v5 lite", 197e12, int(15.75 * GIB), 819e9, 50e9, 2, 16),
    Chip("v5p", "TPU v5", 459e12, int(95.73 * GIB), 2765e9, 100e9, 3, 4),
    Chip("v6e", "TPU v6 lite", 918e12, int(31.24 * GIB), 1638e9, 100e9, 2, 16),
    Chip("v7x", "TPU7x", 2307e12 / 2, int(94.74 * GIB), 7380e9 / 2, 100e9, 3, 4, devices=2),
)


def chip_of(device: Any) -> Chip | None:
    """The generation of a jax device; None if it is none of these."""
    return next((chip for chip in CHIPS if chip.kind == device.device_kind), None)


def chip_named(topology: str) -> tuple[Chip, tuple[int, ...]]:
    """Generation and shape of a slice such as "v5e:2x4", in chips.

    Raises:
      ValueError: of another generation, or no shape.

    >>> chip_named("v5e:2x4")[0].name, chip_named("v5e:2x4")[1]
    ('v5e', (2, 4))
    """
    name, _, shape = topology.partition(":")
    chip = next((chip for chip in CHIPS if name in (chip.name, f"tpu{chip.name}")), None)
    if chip is None or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        names = ", ".join(chip.name for chip in CHIPS)
        raise ValueError(
            f"--topology={topology}: write a generation ({names}) and a shape, as v5e:2x4 or v5p:2x2x1."
        )
    return chip, tuple(int(size) for size in shape.split("x"))


def network(chip: Chip, shape: tuple[int, ...], devices: int) -> float:
    """Bytes a second at which each of a group of devices can receive what the others have.

    A group is laid along as few axes of the slice as hold it, the longest first. Along a ring data comes from both
    sides, along a line (which has an end) from one.
    """
    rate, held = 0.0, 1
    for size in sorted(shape, reverse=True):
        if held >= devices:
            break
        if size > 1:
            rate, held = rate + chip.link * (2 if size % chip.wraps == 0 else 1), held * size
    return rate or chip.link * 2 * chip.axes  # within a chip


def devices_in(chip: Chip, shape: tuple[int, ...]) -> int:
    """The number of jax devices of a slice."""
    return math.prod(shape) * chip.devices
