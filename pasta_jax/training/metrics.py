"""What a run writes down: `metrics.jsonl` always, TensorBoard if asked, and a line for whoever watches."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Mapping
from typing import Any, TextIO

from tqdm import tqdm

from pasta_jax.files import replacing

LOG = logging.getLogger("pasta_jax")


class MetricsWriter:
    """Writes measurements by step.

    Args:
      workdir: directory, which exists.
      first_step: of this run; lines of that step and later are of a run that was cut off, and go.
      steps: the last step.
      tb: TensorBoard too; needs tensorboardX.
    """

    def __init__(self, workdir: str, *, first_step: int, steps: int, tb: bool = False):
        self._file = _open_at(os.path.join(workdir, "metrics.jsonl"), first_step)
        self._tb = _tensorboard(workdir) if tb else None
        self._bar = tqdm(initial=first_step, total=steps, unit="step", disable=not sys.stderr.isatty())

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self._file.close()
        if self._tb:
            self._tb.close()

    def progress(self, step: int) -> None:
        """Moves the bar, if there is one."""
        self._bar.update(step - self._bar.n)

    def write(self, step: int, measurements: Mapping[str, float]) -> None:
        """One line."""
        self._file.write(json.dumps({"step": step, **measurements}) + "\n")
        self._file.flush()
        if self._tb:
            for name, value in measurements.items():
                self._tb.add_scalar(name, value, step)
        said = "  ".join(f"{name} {_short(value)}" for name, value in measurements.items())
        if self._bar.disable:
            LOG.info("step %d  %s", step, said)
        else:
            self._bar.set_postfix_str(said)


def read_metrics(path: str) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; one that a crash cut short is left out."""
    found = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            with contextlib.suppress(json.JSONDecodeError):
                found.append(json.loads(line))
    return found


def _open_at(path: str, first_step: int) -> TextIO:
    kept = [m for m in read_metrics(path) if m["step"] <= first_step] if os.path.exists(path) else []
    with replacing(path) as file:
        file.writelines(json.dumps(m) + "\n" for m in kept)
    return open(path, "a", encoding="utf-8")


def _tensorboard(workdir: str) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ImportError("log.tb needs tensorboardX: pip install 'pasta_jax[tb]'.") from None
    return SummaryWriter(workdir)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
