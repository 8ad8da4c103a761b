"""Saving: all that is needed to decode from a checkpoint, or to resume training bit for bit."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from pasta_jax import overrides, sharding
from pasta_jax.checkpoints.about import (
    FORMAT,
    FORMAT_VERSION,
    BaseWeights,
    CheckpointError,
    CheckpointMetadata,
    DamagedCheckpoint,
    absolute_path,
    checkpoints_in,
    is_there,
    read_metadata,
    versions,
)
from pasta_jax.checkpoints.fingerprint import checksums
from pasta_jax.checkpoints.load import check_base, check_shapes
from pasta_jax.checkpoints.reading import restore_arrays, saved_shapes, together
from pasta_jax.config import Config
from pasta_jax.files import is_writer, unwritten
from pasta_jax.messages import message_of
from pasta_jax.model.forms import Params
from pasta_jax.processes.agreement import agreed
from pasta_jax.tokens.tokenizer import Tokenizer

LOG = logging.getLogger("pasta_jax")

State = TypeVar("State", bound=Any)
"""A frozen dataclass with `params`, `opt_state` and `step`, as `training.state.TrainState`."""

REMOVED = "removed"
"""Folder beside the checkpoints of those that are being deleted."""

MAY_CHANGE = ("steps", "epochs", "mesh.", "microbatches", "remat", "checkpoint.", "log.", "data.max_unusable")
"""Fields that a rerun may change without being another experiment."""


class Checkpoints:
    """The checkpoints of one training run. Saving runs in the background; leaving the context waits for it.

    Whatever saving raises is a CheckpointError of one line, at the next `save`, `check`, or on leaving.

    Args:
      workdir: of the run.
      config: its configuration.
      tokenizer: of its data.
      data: its files of examples (`data.sources.contents`).

    Raises:
      CheckpointError: Orbax cannot open them, as where what it keeps beside a step is damaged.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        config: Config,
        tokenizer: Tokenizer,
        data: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        self._config, self._tokenizer, self._data = config, tokenizer, dict(data or {})
        self._saving: int | None = None  # a step
        self._failed = False
        self.directory = absolute_path(workdir) / "checkpoints"
        # Weights compress by less than a tenth, and while they are compressed Orbax holds them twice.
        handlers = {
            "pasta": ocp.JsonCheckpointHandler("pasta.json"),
            "params": ocp.PyTreeCheckpointHandler(use_compression=False),
            "optimizer": ocp.PyTreeCheckpointHandler(use_compression=False),
        }
        # A kill while an old step is deleted would leave half of it: it is renamed first (on a local disk).
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.checkpoint.keep,
            create=True,
            cleanup_tmp_directories=True,
            todelete_subdir=REMOVED,
        )
        try:
            self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)
        except OSError:
            raise
        except Exception as error:  # whatever a damaged file makes Orbax raise
            first_line = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}"
            cause = message_of(error) if isinstance(error, RecursionError) else first_line
            raise CheckpointError(
                f"Orbax cannot open {self.directory}: {cause}; if a step's _CHECKPOINT_METADATA is "
                "damaged, delete it."
            ) from error

        self._remove_old()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._failed:
            return  # threads of Orbax may wait for each other without end
        try:
            self._wait()
            with self._reported():
                self._manager.close()
        except CheckpointError as failure:
            if error is None:
                raise
            LOG.error("%s", failure)  # what ended the run counts

    def check(self) -> None:
        """Raises CheckpointError if the save in the background has failed."""
        if self._saving is not None and not self._manager.is_saving_in_progress():
            self._wait()

    def _wait(self) -> None:
        """Waits for the save in the background. Raises CheckpointError."""
        with self._reported():
            self._manager.wait_until_finished()
            self._remove_old()
        self._saving = None

    def _remove_old(self) -> None:
        """Deletes the steps that are no longer kept; what cannot be deleted now is tried again at the next save."""
        removed = self.directory / REMOVED
        with contextlib.suppress(OSError):  # as where another process still reads a step from a network disk
            if is_writer() and removed.exists():
                removed.rmtree()

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        """Whatever saving raises, as a CheckpointError."""
        try:
            yield
        except Exception as error:
            self._failed = True
            whole = [int(path.name) for path in checkpoints_in(self.directory)]
            kept = f"Step {max(whole)} is whole and kept." if whole else "No step was saved before it."
            what = f"Step {self._saving} in {self.directory}"
            raise CheckpointError(f"{unwritten(what, error)} {kept}") from error

    def latest(self) -> int | None:
        """The newest step, if any."""
        return self._manager.latest_step()

    def save(
        self,
        state: State,
        data_index: int,
        base: BaseWeights | None = None,
        window: Mapping[str, float] | None = None,
    ) -> None:
        """Saves a state under its step, unless that step is saved already.

        Args:
          state: parameters, optimizer and step.
          data_index: the document with which the next batch begins.
          base: the weights that the parameters belong to, if those are adapters.
          window: what was measured since the last line of metrics (`training.loop.Meter`).

        Raises:
          CheckpointError: it cannot be written, or the step before could not.
        """
        step = int(state.step)
        if step == self.latest():
            return
        self._save(
            step,
            data_index,
            base,
            window or {},
            params=state.params,
            optimizer=state.opt_state,
        )

    def save_weights(self, params: Params, *, step: int = 0, base: BaseWeights | None = None) -> None:
        """Saves weights that were not trained here, to decode with or to start from.

        Args:
          params: a whole model, or adapters.
          step: number of optimizer steps that they have had elsewhere.
          base: the weights that they belong to, if they are adapters.
        """
        self._save(step, 0, base, {}, params=params)

    def _save(
        self,
        step: int,
        data_index: int,
        base: BaseWeights | None,
        window: Mapping[str, float],
        **arrays: Any,
    ) -> None:
        metadata = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "step": step,
            "data_index": data_index,
            "window": dict(window),
            "data": self._data,
            "config": overrides.to_dict(self._config),
            "versions": versions(),
            "tag_ids": self._tokenizer.vocabulary.tag_ids,
            "tokenizer": base64.b64encode(self._tokenizer.to_bytes()).decode("ascii"),
        }
        if base:
            metadata["base"] = dataclasses.asdict(base)
        metadata["checksums"] = {item: checksums(tree) for item, tree in arrays.items()}
        trees = {item: ocp.args.PyTreeSave(tree) for item, tree in arrays.items()}
        items = ocp.args.Composite(pasta=ocp.args.JsonSave(metadata), **trees)
        self._wait()
        self._saving = step
        with self._reported():
            self._manager.save(step, args=items, force=True)

    def restore(self, target: State, base: BaseWeights | None = None) -> tuple[State, CheckpointMetadata]:
        """The newest state that is whole. Damaged ones after it are reported, and renamed to STEP.damaged.

        Args:
          target: `jax.ShapeDtypeStruct`s with the shardings that the arrays should have.
          base: the weights that training starts from now, if the parameters are adapters.

        Raises:
          CheckpointError: all are damaged, or the run is of another experiment.
        """
        damaged: list[DamagedCheckpoint] = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                found = self._restore(self.directory / str(step), target, base)
            except DamagedCheckpoint as error:
                damaged.append(error)
                continue
            if damaged:
                for each in damaged:
                    _set_aside(each)
                LOG.warning("Going back to step %d.", step)
                agreed(0)  # waits until the first process has renamed them
                self._manager.reload()
            return found
        newest = damaged[0]
        raise CheckpointError(
            f"{newest.path} is damaged. There is no whole one beside it: start again in a new --workdir. "
            f"({newest.reason})"
        ) from newest

    def _restore(
        self, path: epath.Path, target: State, base: BaseWeights | None
    ) -> tuple[State, CheckpointMetadata]:
        metadata, has_optimizer, shapes = together(path, lambda: _described(path))
        if not has_optimizer:
            raise CheckpointError(
                f"{self.directory.parent} holds weights alone, of a model that was not trained there. "
                f"Use a new --workdir; --config.init_from={self.directory.parent} starts from them."
            )
        check_config(self.directory.parent, metadata, self._config)
        if not metadata.matches_tokenizer(self._tokenizer):
            raise CheckpointError(
                f"{path} was trained with another tokenizer than {self._config.data.tokenizer!r} is now. "
                "Use a new --workdir."
            )
        self._check_data(metadata)
        if metadata.base and base:
            check_base(path, metadata.base, base)
        check_shapes(path, shapes, target.params)
        params = restore_arrays(path, "params", target.params, metadata)
        opt_state = restore_arrays(path, "optimizer", target.opt_state, metadata)
        step = sharding.from_host(jnp.int32(metadata.step), target.step.sharding)
        return dataclasses.replace(target, params=params, opt_state=opt_state, step=step), metadata

    def _check_data(self, metadata: CheckpointMetadata) -> None:
        """Refuses data that changed: the order of the documents, and what was seen of them, would be another."""
        if self._data and not metadata.data:
            LOG.info("Whether the data changed is not known: an older version wrote %s.", metadata.path)
            return
        for name, now in self._data.items():
            then = metadata.data.get(name, {})
            if then == now:
                continue
            was, count = then.get("examples"), now["examples"]
            numbers = f"{was} usable examples then, {count} now"
            if was == count:
                numbers = f"{count} usable examples then and now, but not the same"
            workdir = self.directory.parent
            raise CheckpointError(
                f"{name} has changed since step {metadata.step} of {workdir}: {numbers}. A run goes on with the "
                "data that it began with. Put the file back, or use a new --workdir: "
                f"--config.init_from={workdir} starts from its weights."
            )


def check_config(folder: epath.Path, metadata: CheckpointMetadata, config: Config) -> None:
    """Refuses to go on in a workdir of another experiment. Raises CheckpointError, which names what differs."""
    changed = [
        name
        for name in overrides.differences(metadata.config, config)
        if not name.startswith(MAY_CHANGE)
        and not (metadata.base and name == "init_from")  # a base may move: its fingerprint is compared
    ]
    if changed:
        raise CheckpointError(
            f"{folder} already has step {metadata.step} of a different config ({', '.join(changed)}). Use a new "
            "--workdir; --config.init_from starts from its weights."
        )


def _described(path: epath.Path) -> tuple[CheckpointMetadata, bool, Any]:
    """The metadata, whether there is an optimizer, and the shapes of the weights. Raises CheckpointError."""
    metadata, has_optimizer = read_metadata(path), is_there(path / "optimizer")
    had_one = not metadata.checksums or "optimizer" in metadata.checksums  # imported adapters had none
    if metadata.step and had_one and not has_optimizer:
        reason = "optimizer: not there; --config.init_from starts from its weights, in a new --workdir"
        raise DamagedCheckpoint(path, reason, "optimizer")
    return metadata, has_optimizer, saved_shapes(path, "params")


def _set_aside(damaged: DamagedCheckpoint) -> None:
    """Renames a damaged checkpoint, so that the run can save its step again."""
    path = damaged.path
    names = (f"{path.name}.damaged{number}" for number in ("", *range(2, 1000)))
    aside = next(free for name in names if not (free := path.with_name(name)).exists())
    if is_writer():
        LOG.warning("%s is damaged, and renamed to %s. (%s)", path, aside.name, damaged.reason)
        path.rename(aside)
