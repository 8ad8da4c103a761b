"""The training loop: one linear function for every stage; they differ in the data and the loss passed in."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from pasta_jax import memory, sharding
from pasta_jax.arrays import Array, ThreadedTokens
from pasta_jax.checkpoints.about import (
    BaseWeights,
    CheckpointError,
    CheckpointMetadata,
    find_checkpoint,
    read_metadata,
    write_run_info,
)
from pasta_jax.checkpoints.fingerprint import fingerprint
from pasta_jax.checkpoints.load import load_params, load_parts
from pasta_jax.checkpoints.save import Checkpoints
from pasta_jax.config import Config, ConfigError
from pasta_jax.data.batches import batches, prefetch
from pasta_jax.data.packing import real_fraction
from pasta_jax.model import param_shapes
from pasta_jax.model.forms import Params
from pasta_jax.model.kernels import words_for
from pasta_jax.processes.agreement import Agreement, agreed
from pasta_jax.tokens.tokenizer import Tokenizer
from pasta_jax.training import losses
from pasta_jax.training.held_out import HeldOut
from pasta_jax.training.losses import Scores, Sums
from pasta_jax.training.metrics import MetricsWriter
from pasta_jax.training.microbatches import rows_sharding
from pasta_jax.training.profile import Profiler
from pasta_jax.training.signals import Stopped, stop_requests
from pasta_jax.training.state import TrainState
from pasta_jax.training.update import LossFn, Update, make_update

LOG = logging.getLogger("pasta_jax")


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient became NaN or infinite; says at which step, and which checkpoint is good."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """What distinguishes one training stage from another.

    Attributes:
      record: the class of a batch.
      loss_fn: from the scores of a batch's targets, and the batch, to sums.
      batches: (source, index, rows, length) to batches, each with the index at which the next batch begins; with
        end=n those of the first n examples only.
    """

    record: type[ThreadedTokens]
    loss_fn: LossFn
    batches: Callable[..., Iterator[tuple[ThreadedTokens, int]]] = batches

    def about(self) -> dict[str, Any]:
        """The fields by name."""
        return {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}


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
    data: Mapping[str, Mapping[str, Any]] | None = None,
    stage: Stage = SFT,
    stop_after: int | None = None,
    mesh: Mesh | None = None,
    held_out: tuple[Stage, Sequence[Any]] | None = None,
) -> TrainState:
    """Trains from scratch, from `config.init_from`, or from where an earlier call with this workdir stopped.

    Args:
      config: the experiment, as `experiment.resolve` returns it.
      source: the documents, endless and addressed by index (for other stages, whatever their batches need).
      tokenizer: of the documents; saved in the checkpoints.
      workdir: for config.json, env.json, metrics.jsonl and checkpoints/.
      data: what the files of `source` hold (`data.sources.contents`): a run goes on with no others.
      stage: supervised finetuning, or another.
      stop_after: stop after this step as if the run had ended; a later call resumes.
      mesh: by default that of `training_mesh(config)`.
      held_out: examples that are measured now and then, and the stage whose loss and batches they have.

    Returns:
      the state after the last step, which is saved.

    Raises:
      ConfigError: sizes that do not fit each other.
      CheckpointError: the workdir holds another experiment, or `init_from` another model; the data changed; a
        checkpoint cannot be written.
      NonFiniteLoss: checkpoints up to the last good one are kept.
      Stopped: on SIGTERM or Ctrl-C; what was trained is saved.
    """
    # ----------------------------------------------------------------------------------- mesh and update

    workdir = os.fspath(workdir)
    mesh = mesh or training_mesh(config)
    try:
        update = make_update(config, mesh, stage.loss_fn, stage.record)
    except ValueError as error:  # adapters that the mesh does not divide
        raise ConfigError(f"config.mesh: {error}") from error
    check_vocabulary(config, tokenizer)
    LOG.info("%s", update.remat)
    LOG.info("%s", words_for(config.model, config.data.length, mesh))

    with stop_requests() as request, Checkpoints(workdir, config, tokenizer, data) as checkpoints:
        # ------------------------------------------------------------- start, start from weights, or resume

        data_index, window = 0, dict[str, float]()
        resumes = checkpoints.latest() is not None
        params, base, base_mark = starting_weights(config, tokenizer, update, mesh, only_base=resumes)
        if resumes:
            target = sharding.abstract(update.shapes, update.shardings)
            state, metadata = checkpoints.restore(target, base_mark)
            data_index, window = metadata.data_index, metadata.window
            LOG.info("Going on from step %d of %s.", metadata.step, workdir)
        else:
            state = update.start(params)
        del params
        step = int(state.step)
        write_run_info(workdir, config)

        # ---------------------------------------------------------------------------------------- loop

        last = min(config.steps, stop_after or config.steps)
        schedule, saved_at = config.checkpoint, time.monotonic()
        meter, profiler, run = Meter(checkpoints, window), Profiler(config.log.profiled, workdir), None
        measure = None
        if held_out:
            measured_as, examples = held_out
            counted = f"{len(examples)} example{'s' * (len(examples) != 1)}"
            LOG.info("Held out: %s, every %d steps.", counted, config.log.held_out_every)
            measure = HeldOut(config, mesh, update, **measured_as.about(), examples=examples)
        agree = Agreement()
        batches = stage.batches(source, data_index, config.data.rows, config.data.length)
        with (
            MetricsWriter(workdir, first_step=step, config=config, owed="steps" in window) as metrics,
            contextlib.closing(profiler),
            prefetch(batches) as prefetched,
        ):

            def reported(step: int) -> bool:
                """Writes the step's line, if it has one; false if a request to stop cut its measurement off."""
                is_measured = measure and (step % config.log.held_out_every == 0 or step == last)
                if not (is_measured or step % config.log.every == 0 or step == last):
                    return True
                meter.check(lag=0)
                found: dict[str, float] | None = {}
                if measure and is_measured:
                    uncounted = metrics.not_counted() if measure.compiles else contextlib.nullcontext()
                    with meter.paused(), uncounted:
                        found = measure(state.params, base, lambda: agreed(request.signal or 0)[0])
                if found is not None:
                    metrics.write(step, meter.summary() | found)
                return found is not None

            if "lr" in meter.window:
                reported(step)  # if its line was cut off when the run was stopped
            (leaving,) = agreed(request.signal or 0)
            while step < last and not leaving:
                batch, data_index = next(prefetched)
                fields = sharding.from_host(batch.fields(), update.batch_sharding)
                first = run is None
                run = run or compiled(update, state, base, fields)
                step += 1
                with profiler(step) as computed:
                    state, measured = run(state, base, fields)
                    computed.append(measured)
                meter.add(step, measured, batch)
                if first:
                    LOG.info("%s", memory.measured(mesh.local_devices))
                metrics.progress(step)
                checkpoints.check()

                is_cut_off = not reported(step)
                is_due = bool(schedule.every_steps) and step % schedule.every_steps == 0
                minutes = (time.monotonic() - saved_at) / 60
                late = int(bool(schedule.every_minutes) and minutes > schedule.every_minutes)
                # The signal is read once: one that comes later waits for the next step. A save waits for all
                # processes anyway.
                now = is_due or step == last or is_cut_off
                late, leaving = agree(late, request.signal or 0, now=now)
                if is_due or late or step == last or leaving:
                    meter.check(lag=0)  # only finite states are saved
                    checkpoints.save(state, data_index, base_mark, meter.window)
                    saved_at = time.monotonic()
                    agree.forget()
                request.is_heeded = bool(leaving)

    if request.signal:
        LOG.warning("Stopped at step %d. Run the same command again to go on.", step)
        raise Stopped(request.signal)
    if step > config.steps:
        LOG.warning(
            "Nothing to train: %s is at step %d, past config.steps=%d. To go on, set --config.steps above %d.",
            *(workdir, step, config.steps, step),
        )
    else:
        LOG.info("Step %d of %d of %s is done.", step, config.steps, workdir)
    return state


# ---------------------------------------------------------------------------------------- parts of the loop


def compiled(update: Update, state: TrainState, base: Params, fields: dict[str, Array]) -> Any:
    """The compiled update, for arrays like these; logs the memory that it takes, before any of it is used."""
    executable = update.step.lower(state, base, fields).compile()
    LOG.info("%s", memory.predicted(executable, jax.local_devices()[0]))
    return executable


class Meter:
    """Gathers measurements between two lines of metrics, and stops at a loss or gradient that is not finite.

    The loss of a step is that of the weights before it; the gradient tells whether those after it are finite too.
    Measurements are read one step late, so that the device never waits for the host.

    Args:
      checkpoints: of the run, for the message about a good one.
      window: of the checkpoint with which a run resumes, so that its first line has the steps before it too.
    """

    def __init__(self, checkpoints: Checkpoints, window: Mapping[str, float]):
        self._checkpoints = checkpoints
        self._unread: list[tuple[int, dict[str, Any]]] = []
        self._sums = dict(window)
        self._tokens = 0
        self._since: float | None = None  # set after the first step, which compiles

    def add(self, step: int, measured: dict[str, Array], batch: ThreadedTokens) -> None:
        """Takes the measurements of an update, which may still be running."""
        packing = real_fraction(batch)
        self._unread.append((step, {**measured, "packing": packing}))
        if self._since is None:
            jax.block_until_ready(measured)
            self._since = time.monotonic()
        else:
            self._tokens += int(batch.doc.size * packing)
        self.check(lag=1)

    def check(self, lag: int) -> None:
        """Waits for all but the last `lag` steps. Raises NonFiniteLoss."""
        while len(self._unread) > lag:
            step, measured = self._unread.pop(0)
            values = {name: float(value) for name, value in jax.device_get(measured).items()}
            for name, words in (("loss", "loss"), ("grad_norm", "norm of the gradient")):
                if not math.isfinite(values[name]):
                    raise NonFiniteLoss(
                        f"The {words} is {values[name]} at step {step}; {self._safe()}. Lower "
                        "--config.optimizer.lr or raise --config.optimizer.warmup_steps, in a new --workdir."
                    )
            for name, value in {"steps": 1, **values}.items():
                self._sums[name] = self._sums.get(name, 0) + value
            self._sums["lr"] = values["lr"]

    def _safe(self) -> str:
        latest = self._checkpoints.latest()
        if latest is None:
            return "no checkpoint was written before it"
        return f"step {latest} in {self._checkpoints.directory} is good, and is kept"

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done meanwhile does not count as time of training."""
        began = time.monotonic()
        yield
        if self._since is not None:
            self._since += time.monotonic() - began

    @property
    def window(self) -> dict[str, float]:
        """Sums of what was read since the last summary, the number of their "steps", and the last step's lr."""
        return dict(self._sums)

    def summary(self) -> dict[str, float]:
        """Means since the last summary, tokens per second, and the fraction of tokens that are no padding."""
        self.check(lag=0)
        steps, lr = self._sums.pop("steps"), self._sums.pop("lr")
        means = {name: value / steps for name, value in self._sums.items()} | {"lr": lr}
        packing, now = means.pop("packing"), time.monotonic()
        means = {name: means[name] for name in sorted(means, key=lambda name: (name != "loss", name))}
        if self._tokens and self._since is not None:
            means["tokens_per_s"] = self._tokens / max(now - self._since, 1e-9)
        self._sums, self._tokens = {}, 0
        self._since = now if self._since is not None else None
        return means | {"packing": packing}


def training_mesh(config: Config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of an experiment, over all devices by default, which divides its batches and parameters.

    Raises:
      ConfigError: it does not.
    """
    try:
        mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)
        rows_sharding(mesh, config.data.rows, config.microbatches)
        sharding.param_shardings(param_shapes(config.model), mesh)
    except ValueError as error:
        raise ConfigError(f"config.mesh: {error}") from error
    return mesh


def starting_weights(
    config: Config, tokenizer: Tokenizer, update: Update, mesh: Mesh, *, only_base: bool = False
) -> tuple[Params, Params, BaseWeights | None]:
    """The weights that training starts from: the trained ones, and with adapters their base and its identity.

    Adapters continue those of `config.init_from` if it has adapters of the same settings, on the same base. Any
    other model, its adapters merged, becomes the base of new ones.

    Args:
      config: resolved, with its `lora.rows`.
      tokenizer: of the data.
      update: for shapes and shardings.
      mesh: the update's.
      only_base: for a run that resumes: the trained weights are {}, since they are in its checkpoint.
    """
    shardings = functools.partial(sharding.param_shardings, mesh=mesh)
    if not config.lora.rank:
        if only_base:
            return {}, {}, None
        if not config.init_from:
            return update.new_params(), {}, None
        return pretrained_params(config, tokenizer, update.shapes.params, shardings)[0], {}, None
    metadata = read_metadata(find_checkpoint(config.init_from))
    if metadata.base is not None and (metadata.config.lora, metadata.config.model) == (
        config.lora,
        config.model,
    ):
        _check_tokenizer(config, tokenizer, metadata)
        base, trained, _ = load_parts(config.init_from, shardings=shardings)
        trained = jax.tree.map(lambda x, like: x.astype(like.dtype), trained, update.shapes.params)
        LOG.info("The adapters of %s (step %d) go on.", metadata.path, metadata.step)
        return {} if only_base else trained, base, metadata.base
    base, metadata = pretrained_params(config, tokenizer, update.base_shapes, shardings)
    trained = {} if only_base else update.new_adapters(base)
    return trained, base, BaseWeights(config.init_from, metadata.merged_fingerprint or fingerprint(base))


def pretrained_params(
    config: Config, tokenizer: Tokenizer, shapes: Params, shardings: Callable[[Params], Any]
) -> tuple[Params, CheckpointMetadata]:
    """The weights of `config.init_from` in the dtypes of `shapes`; refused if model or tokenizer differ."""
    params, metadata = load_params(config.init_from, shardings=shardings, expected=shapes)
    _check_tokenizer(config, tokenizer, metadata)
    LOG.info("Starting from the weights of %s (step %d).", metadata.path, metadata.step)
    return params, metadata


def _check_tokenizer(config: Config, tokenizer: Tokenizer, metadata: CheckpointMetadata) -> None:
    if not metadata.matches_tokenizer(tokenizer):
        raise CheckpointError(
            f"{metadata.path} was trained with another tokenizer than {config.data.tokenizer!r}. "
            "Train with its own, or from scratch."
        )


def check_vocabulary(config: Config, tokenizer: Tokenizer) -> None:
    """Refuses a model with fewer embeddings than the tokenizer has ids. Raises ConfigError."""
    ids = len(tokenizer.vocabulary)
    if config.model.vocab_size < ids:
        raise ConfigError(
            f"model.vocab_size is {config.model.vocab_size}, the tokenizer has {ids} ids. "
            f"Set --config.model.vocab_size={ids} or more."
        )
