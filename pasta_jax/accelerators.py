"""The accelerators of this machine and who holds them, by what the system's files say: no jax, no driver."""

from __future__ import annotations

import contextlib
import glob
import os
import re

GOOGLE = "0x1ae0"
"""The maker of PCI devices."""

TPUS = ("0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")
"""PCI devices of that maker that are TPU chips, as jax has them (`jax._src.hardware_utils`)."""


def tpu_chips(root: str = "/") -> int:
    """How many TPU chips are attached.

    Args:
      root: the folder that has /sys, /dev and /proc; another one in tests.
    """
    vendors = glob.glob(os.path.join(root, "sys/bus/pci/devices/*/vendor"))
    found = ((_read(file), _read(os.path.join(os.path.dirname(file), "device"))) for file in vendors)
    return sum(vendor == GOOGLE and device in TPUS for vendor, device in found)


def gpus(root: str = "/") -> int:
    """How many NVIDIA GPUs are attached."""
    return len(glob.glob(os.path.join(root, "dev/nvidia[0-9]*")))


def tpu_holder(root: str = "/") -> str | None:
    """The process that holds TPU chips, as in "pid 1234 (python train.py)".

    Only the processes of this user can be looked at, of all others only by root.

    Returns:
      None if there is none, or it is not seen.
    """
    for folder in glob.glob(os.path.join(root, "proc/[0-9]*")):
        pid = os.path.basename(folder)
        if pid == str(os.getpid()):
            continue
        for link in glob.glob(os.path.join(folder, "fd/*")):
            with contextlib.suppress(OSError):
                if re.fullmatch(r"/dev/(accel|vfio/)\d+", os.readlink(link)):
                    command = _read(os.path.join(folder, "cmdline")).replace("\0", " ").strip()
                    return f"pid {pid} ({command[:80]})" if command else f"pid {pid}"
    return None


def unused_tpu(backend: str | None, why: str = "", root: str = "/") -> str | None:
    """Says that there is a TPU and jax does not use it, why, and what to do; None if all is in order.

    Args:
      backend: what jax uses; None if that cannot be known, for it failed.
      why: the line of jax's own error, if it has one.
      root: as in `tpu_chips`.
    """
    if backend == "tpu" or not (chips := tpu_chips(root)):
        return None
    instead = f"jax uses the {backend.upper()}" if backend else "jax cannot use it"
    problem = f"This machine has {chips} TPU chip{'s' * (chips > 1)}, but {instead}"
    if holder := tpu_holder(root):
        return f"{problem}: {holder} holds it. Wait for it or stop it; JAX_PLATFORMS=cpu uses the CPU."
    cause = f" ({why})" if why else ""
    return (
        f'{problem}{cause}. If libtpu is not installed: pip install -e ".[tpu]" in a clone. If somebody '
        "else's process holds it, sudo lsof /dev/accel* /dev/vfio/* shows it. JAX_PLATFORMS=cpu uses the CPU."
    )


def _read(file: str) -> str:
    """The text of a file; "" if it cannot be read."""
    try:
        with open(file, encoding="utf-8", errors="replace") as opened:
            return opened.read().strip()
    except OSError:
        return ""
