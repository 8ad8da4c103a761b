"""What training logs: `metrics.jsonl` always, TensorBoard and Weights & Biases if asked, a bar or lines."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from typing import Any

from tqdm import tqdm

from pasta_jax.config import Config, ConfigError
from pasta_jax.extras import optional
from pasta_jax.files import Lines, is_writer, json_line, read_jsonl, shows_progress, write_jsonl
from pasta_jax.messages import message_of
from pasta_jax.overrides import to_dict

LOG = logging.getLogger("pasta_jax")


class MetricsWriter:
    """Writes measurements by step.

    Args:
      workdir: an existing directory.
      first_step: where this run starts; later lines, of an interrupted run, are removed.
      owed: the line of that step was not written when it was saved, so it is removed too.
      config: of the run: its last step, and where else the measurements go.

    Raises:
      ConfigError: what `config.log` asks for is not installed, or does not start.
    """

    def __init__(self, workdir: str, *, first_step: int, config: Config, owed: bool = False):
        path = os.path.join(workdir, "metrics.jsonl")
        write_jsonl(path, [line for line in read_metrics(path) if line["step"] <= first_step - owed])
        self._file = Lines(path)
        self._tb = _tensorboard(workdir) if config.log.tb and is_writer() else None
        self._wandb = _wandb(workdir, config) if config.log.wandb and is_writer() else None
        self._steps = config.steps
        self._timed_from: tuple[int, float] | None = None  # step and time, when the first step is done
        self._bar = tqdm(initial=first_step, total=config.steps, unit="step", disable=not shows_progress())

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._bar.close()
        self._file.close()
        if self._tb:
            self._tb.close()
        if self._wandb:
            self._wandb.finish(exit_code=int(kind is not None))

    def progress(self, step: int) -> None:
        """Moves the progress bar, if one is shown. Time counts from the end of the first step, which compiles."""
        if self._timed_from is None:
            self._timed_from = step, time.monotonic()
            self._bar.initial = self._bar.n = step
            self._bar.unpause()
        self._bar.update(step - self._bar.n)

    @contextlib.contextmanager
    def not_counted(self) -> Iterator[None]:
        """What is done meanwhile does not count for the time left: it is not done again."""
        began = time.monotonic()
        yield
        if self._timed_from is not None:
            first, since = self._timed_from
            self._timed_from = first, since + time.monotonic() - began
            self._bar.unpause()

    def _left(self, step: int) -> str:
        """The time that the other steps will take, as "time left 1:02:03"; nothing before the second step."""
        first, since = self._timed_from or (step, 0.0)
        if step <= first:
            return ""
        seconds = (time.monotonic() - since) / (step - first) * (self._steps - step)
        return f"  time left {tqdm.format_interval(seconds)}"

    def write(self, step: int, measurements: Mapping[str, float]) -> None:
        """Writes one line."""
        self._file.write(json_line({"step": step, **measurements}))
        if self._tb:
            for name, value in measurements.items():
                self._tb.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(dict(measurements), step=step)
        text = "  ".join(f"{name} {_short(value)}" for name, value in measurements.items())
        if self._bar.disable:
            LOG.info("step %d  %s%s", step, text, self._left(step))
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


def _wandb(workdir: str, config: Config) -> Any:
    """A run of Weights & Biases; one that resumes goes on with its own."""
    wandb = optional("wandb", "wandb", "config.log.wandb", ConfigError)
    path = os.path.join(workdir, "wandb-run.json")
    known = read_jsonl(path, lambda fields: str(fields["id"]))
    run_id = known[0] if known else secrets.token_hex(8)
    try:
        run = wandb.init(
            project=config.log.wandb,
            name=os.path.basename(os.path.abspath(workdir)),
            id=run_id,
            resume="allow",
            dir=workdir,
            config=to_dict(config),
        )
    except Exception as error:  # no key, no network, no such project: whatever it raises, in one line
        raise ConfigError(
            f"config.log.wandb: {message_of(error)} (WANDB_MODE=offline needs no network.)"
        ) from error
    write_jsonl(path, [{"id": run_id}])
    return run


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
