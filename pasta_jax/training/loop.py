"""The training loop: one linear function for every stage; they differ in the data and the loss passed in."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from pasta_jax import sharding
from pasta_jax.arrays import Array, ThreadedTokens
from pasta_jax.checkpoints.about import About, Base, CheckpointError, find, read_about, write_about
from pasta_jax.checkpoints.fingerprint import fingerprint
from pasta_jax.checkpoints.load import load_params, load_parts
from pasta_jax.checkpoints.save import Checkpoints
from pasta_jax.config import Config, ConfigError
from pasta_jax.data.batches import batches, prefetch
from pasta_jax.data.packing import real_fraction
from pasta_jax.model.lora import Params
from pasta_jax.tokens.tokenizer import Tokenizer
from pasta_jax.training import losses
from pasta_jax.training.losses import Scores, Sums
from pasta_jax.training.metrics import MetricsWriter
from pasta_jax.training.signals import Stopped, stop_requests
from pasta_jax.training.state import TrainState
from pasta_jax.training.update import LossFn, Update, make_update

LOG = logging.getLogger("pasta_jax")


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient became NaN or infinite; says at which step, and which checkpoint is good."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """In what two stages of training differ.

    Attributes:
      record: what a batch is.
      loss_fn: from the scores of its targets and such a batch.
      batches: (source, index, rows, length) to batches, each with the index with which the next one begins.
    """

    record: type[ThreadedTokens]
    loss_fn: LossFn
    batches: Callable[[Any, int, int, int], Iterator[tuple[ThreadedTokens, int]]] = batches


def sft(scores: Scores, batch: ThreadedTokens) -> Sums:
    """The loss of supervised finetuning."""
    return losses.sft_loss(scores, batch.target)


SFT = Stage(ThreadedTokens, sft)


def train(
    config: Config,
    *,
    source: Any,
    tokenizer: Tokenizer,
    workdir: str | os.PathLike[str],
    stage: Stage = SFT,
    stop_after: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> TrainState:
    """Trains, from scratch, from `config.init_from`, or from where an earlier call with this workdir ended.

    Args:
      config: the experiment.
      source: the documents, endless and addressed by index (for other stages, what their batches are made of).
      tokenizer: goes into the checkpoints.
      workdir: gets config.json, env.json, metrics.jsonl and checkpoints/.
      stage: supervised finetuning, or another.
      stop_after: leave after this step as if the run had ended; a later call goes on.
      devices: those of the mesh, by default all.

    Returns:
      the state after the last step, which is saved.

    Raises:
      ConfigError: sizes that do not go together.
      CheckpointError: the workdir holds another experiment, or init_from another model.
      NonFiniteLoss: checkpoints up to the last good one are kept.
      Stopped: SIGTERM or Ctrl-C came; the state is saved.
    """
    # ----------------------------------------------------------------------------------- mesh and update

    workdir = os.fspath(workdir)
    config = with_rows(config, tokenizer)
    if config.model.weights != "plain":
        raise ConfigError(
            "config.model.weights: int8 is for decoding. Train plain weights, quantise at load."
        )
    try:
        mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)
        update = make_update(config, mesh, stage.loss_fn, stage.record)
    except ValueError as error:
        raise ConfigError(f"config.mesh: {error}") from error
    check_vocabulary(config, tokenizer)

    with Checkpoints(workdir, config, tokenizer) as checkpoints:
        # ------------------------------------------------------------- start, start from weights, or resume

        data_index = 0
        resumes = checkpoints.latest() is not None
        params, base, mark = starting_weights(config, tokenizer, update, mesh, only_base=resumes)
        if resumes:
            target = sharding.abstract(update.shapes, update.shardings)
            state, about = checkpoints.restore(target, mark)
            data_index = about.data_index
            LOG.info("Going on from step %d of %s.", about.step, workdir)
        else:
            state = update.start(params)
        del params
        step = int(state.step)
        write_about(workdir, config)

        # ---------------------------------------------------------------------------------------- loop

        last = min(config.steps, stop_after or config.steps)
        saved_at = time.monotonic()
        meter = Meter(checkpoints)
        made = stage.batches(source, data_index, config.data.rows, config.data.length)
        with (
            MetricsWriter(workdir, first_step=step, steps=config.steps, tb=config.log.tb) as metrics,
            prefetch(made) as ready,
            stop_requests() as request,
        ):
            leaving = None
            while step < last and not leaving:
                batch, data_index = next(ready)
                fields = jax.device_put(batch.fields(), update.batch_sharding)
                state, measured = update.step(state, base, fields)
                step += 1
                meter.add(step, measured, batch)
                metrics.progress(step)

                if step % config.log.every == 0 or step == last:
                    metrics.write(step, meter.summary())

                every = config.checkpoint
                is_due = bool(every.every_steps) and step % every.every_steps == 0
                is_due |= bool(every.every_minutes) and time.monotonic() - saved_at > 60 * every.every_minutes
                leaving = request.signal  # read once, so that none is left without saving
                if is_due or step == last or leaving:
                    meter.check(lag=0)  # what is saved is good
                    checkpoints.save(state, data_index, mark)
                    saved_at = time.monotonic()

    if leaving:
        LOG.warning("Saved at step %d. Run the same command again to go on.", step)
        raise Stopped(leaving)
    LOG.info("Step %d of %d of %s is done.", step, config.steps, workdir)
    return state


# ------------------------------------------------------------------------------------------------- its parts


class Meter:
    """Gathers measurements between two lines of metrics, and looks out for a loss or gradient not finite.

    The loss of a step is that of the weights before it; the gradient says whether those after it are good too.
    It looks one step late, so that the device never waits for the host.
    """

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints
        self._unseen: list[tuple[int, dict[str, Array]]] = []
        self._seen: list[dict[str, float]] = []
        self._fractions: list[float] = []
        self._tokens = 0
        self._since: float | None = None  # until the first step is done: compiling is no training

    def add(self, step: int, measured: dict[str, Array], batch: ThreadedTokens) -> None:
        """Takes what an update returned, which may still be under way."""
        self._unseen.append((step, measured))
        self._fractions.append(real_fraction(batch))
        if self._since is None:
            jax.block_until_ready(measured)
            self._since = time.monotonic()
        else:
            self._tokens += int(batch.doc.size * self._fractions[-1])
        self.check(lag=1)

    def check(self, lag: int) -> None:
        """Raises NonFiniteLoss; waits for all but the last `lag` steps."""
        while len(self._unseen) > lag:
            step, measured = self._unseen.pop(0)
            values = {name: float(value) for name, value in jax.device_get(measured).items()}
            for name, said in (("loss", "loss"), ("grad_norm", "norm of the gradient")):
                if not math.isfinite(values[name]):
                    raise NonFiniteLoss(
                        f"The {said} is {values[name]} at step {step}; {self._safe()}. Lower "
                        "--config.optimizer.lr or raise --config.optimizer.warmup_steps, in a new --workdir."
                    )
            self._seen.append(values)

    def _safe(self) -> str:
        latest = self._checkpoints.latest()
        if latest is None:
            return "no checkpoint was written before it"
        return f"step {latest} in {self._checkpoints.directory} is good, and is kept"

    def summary(self) -> dict[str, float]:
        """Means since the last summary, tokens per second and the share of real tokens."""
        self.check(lag=0)
        names = sorted(self._seen[0], key=lambda name: (name != "loss", name))
        means = {name: sum(m[name] for m in self._seen) / len(self._seen) for name in names}
        means["lr"] = self._seen[-1]["lr"]
        now = time.monotonic()
        if self._tokens and self._since is not None:
            means["tokens_per_s"] = self._tokens / max(now - self._since, 1e-9)
        means["packing"] = sum(self._fractions) / len(self._fractions)
        self._seen, self._fractions, self._tokens, self._since = [], [], 0, now
        return means


def with_rows(config: Config, tokenizer: Tokenizer) -> Config:
    """With adapters and no `lora.rows`: those of the tags, which the weights' own vocabulary never had."""
    if not config.lora.rank or config.lora.rows:
        return config
    rows = tuple(sorted(tokenizer.vocabulary.tag_ids.values()))
    return dataclasses.replace(config, lora=dataclasses.replace(config.lora, rows=rows))


def starting_weights(
    config: Config, tokenizer: Tokenizer, update: Update, mesh: Any, *, only_base: bool = False
) -> tuple[Params, Params, Base | None]:
    """What training starts from: what is trained, the base that adapters stand beside, and what that is.

    Adapters go on from those of `config.init_from` if it has such, on its base; beside any other model, adapters
    of other settings merged, they begin anew.

    Args:
      config: with its `lora.rows`, as `with_rows` gives it.
      tokenizer: of the data.
      update: its shapes, and where they lie.
      mesh: the same as the update's.
      only_base: for a run that goes on: what is trained, {}, is in its checkpoint.
    """
    lie = functools.partial(sharding.param_shardings, mesh=mesh)
    if not config.lora.rank:
        if only_base:
            return {}, {}, None
        if not config.init_from:
            return update.new_params(), {}, None
        return pretrained_params(config, tokenizer, update.shapes.params, lie)[0], {}, None
    about = read_about(find(config.init_from))
    if about.base is not None and (about.config.lora, about.config.model) == (config.lora, config.model):
        _check_tokenizer(config, tokenizer, about)
        base, trained, _ = load_parts(config.init_from, shardings=lie)
        trained = jax.tree.map(lambda x, like: x.astype(like.dtype), trained, update.shapes.params)
        LOG.info("The adapters of %s (step %d) go on.", about.path, about.step)
        return {} if only_base else trained, base, about.base
    base, about = pretrained_params(config, tokenizer, update.base_shapes, lie)
    trained = {} if only_base else update.new_adapters(base)
    return trained, base, Base(config.init_from, about.merged or fingerprint(base))


def pretrained_params(
    config: Config, tokenizer: Tokenizer, shapes: Params, shardings: Callable[[Params], Any]
) -> tuple[Params, About]:
    """The weights of `config.init_from`, which must be of this model and this tokenizer, in the shapes' dtypes."""
    params, about = load_params(config.init_from, shardings=shardings, expected=shapes)
    _check_tokenizer(config, tokenizer, about)
    LOG.info("Starting from the weights of %s (step %d).", about.path, about.step)
    return params, about


def _check_tokenizer(config: Config, tokenizer: Tokenizer, about: About) -> None:
    if not about.is_of(tokenizer):
        raise CheckpointError(
            f"{about.path} was trained with another tokenizer than {config.data.tokenizer!r}. "
            "Train with its own, or from scratch."
        )


def check_vocabulary(config: Config, tokenizer: Tokenizer) -> None:
    """Refuses a model that has no embedding for some id."""
    ids = len(tokenizer.vocabulary)
    if config.model.vocab_size < ids:
        raise ConfigError(
            f"model.vocab_size is {config.model.vocab_size}, the tokenizer has {ids} ids. "
            f"Set --config.model.vocab_size={ids} or more."
        )
