"""What training logs: `metrics.jsonl` always, TensorBoard if asked, and a progress bar or log lines."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from pasta_jax.config import ConfigError
from pasta_jax.extras import optional
from pasta_jax.files import appending, is_writer, json_line, read_jsonl, write_jsonl

LOG = logging.getLogger("pasta_jax")


class MetricsWriter:
    """Writes measurements by step.

    Args:
      workdir: an existing directory.
      first_step: where this run starts; later lines, of an interrupted run, are removed.
      steps: the last step.
      tb: TensorBoard too.

    Raises:
      ConfigError: `tb`, and tensorboardX is not installed.
    """

    def __init__(self, workdir: str, *, first_step: int, steps: int, tb: bool = False):
        path = os.path.join(workdir, "metrics.jsonl")
        write_jsonl(path, [line for line in read_metrics(path) if line["step"] <= first_step])
        self._file = appending(path)
        self._tb = _tensorboard(workdir) if tb and is_writer() else None
        self._bar = tqdm(initial=first_step, total=steps, unit="step", disable=not sys.stderr.isatty())

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self._file.close()
        if self._tb:
            self._tb.close()

    def progress(self, step: int) -> None:
        """Moves the progress bar, if one is shown."""
        self._bar.update(step - self._bar.n)

    def write(self, step: int, measurements: Mapping[str, float]) -> None:
        """Writes one line."""
        self._file.write(json_line({"step": step, **measurements}))
        if self._tb:
            for name, value in measurements.items():
                self._tb.add_scalar(name, value, step)
        text = "  ".join(f"{name} {_short(value)}" for name, value in measurements.items())
        if self._bar.disable:
            LOG.info("step %d  %s", step, text)
        else:
            self._bar.set_postfix_str(text)


def read_metrics(path: str) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl that have a step: not those that a crash cut short, nor what others wrote."""

    def line_of(fields: dict[str, Any]) -> dict[str, Any]:
        if type(fields["step"]) is not int:
            raise TypeError("no step")
        return fields

    return read_jsonl(path, line_of, skip=True)


def _tensorboard(workdir: str) -> Any:
    return optional("tensorboardX", "tb", "config.log.tb", ConfigError).SummaryWriter(workdir)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
