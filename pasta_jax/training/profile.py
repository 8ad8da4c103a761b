"""A profile of some steps, for `xprof`, TensorBoard or https://ui.perfetto.dev: WORKDIR/profile."""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax

from pasta_jax.config import ConfigError
from pasta_jax.files import is_writer

LOG = logging.getLogger("pasta_jax")

MAPPINGS = pathlib.Path("/proc/self/maps")
"""The files in this process's memory, on Linux."""


class Profiler:
    """Profiles the steps of a range, as far as the run makes them; the first process does.

    Args:
      steps: by number, from 1.
      workdir: of the run.

    Raises:
      ConfigError: profiling would crash here.
    """

    def __init__(self, steps: range, workdir: str):
        self._steps = steps if is_writer() else range(0)
        self._folder = os.path.join(workdir, "profile")
        self._running = False
        if self._steps and _has_lost_libtpu():
            raise ConfigError(
                "config.log.profile: libtpu is installed and there is no TPU; profiling would crash. Start with "
                "JAX_PLATFORMS=cpu, or JAX_PLATFORMS=cuda,cpu for a GPU."
            )

    @contextlib.contextmanager
    def __call__(self, step: int) -> Iterator[list[Any]]:
        """Around the step; what it computes is put into the list, and waited for at the end of the range."""
        if step in self._steps and not self._running:
            jax.profiler.start_trace(self._folder)
            self._running = True
        computed: list[Any] = []
        if not self._running:
            yield computed
            return
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield computed
        if step + 1 not in self._steps:
            jax.block_until_ready(computed)
            self.close()

    def close(self) -> None:
        """Writes the profile, if one is being made."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            LOG.info("The profile is in %s; docs/usage.md says how to open it.", self._folder)


def _has_lost_libtpu() -> bool:
    """Whether jax loaded libtpu and found no TPU: the profiler of libtpu then ends the process."""
    if jax.default_backend() == "tpu" or not MAPPINGS.exists():
        return False
    return b"libtpu" in MAPPINGS.read_bytes()
