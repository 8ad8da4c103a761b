"""Saving: all that is needed to decode from a checkpoint, or to resume training bit for bit."""

from __future__ import annotations

import base64
import dataclasses
import os
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from pasta_jax import overrides
from pasta_jax.checkpoints.about import (
    FORMAT,
    FORMAT_VERSION,
    BaseWeights,
    CheckpointError,
    CheckpointMetadata,
    absolute_path,
    damage_message,
    read_metadata,
    versions,
)
from pasta_jax.checkpoints.load import check_base, check_shapes, restore_arrays, saved_shapes
from pasta_jax.config import Config
from pasta_jax.messages import message_of
from pasta_jax.model.forms import Params
from pasta_jax.tokens.tokenizer import Tokenizer

State = TypeVar("State", bound=Any)
"""A frozen dataclass with `params`, `opt_state` and `step`, as `training.state.TrainState`."""

MAY_CHANGE = ("steps", "epochs", "mesh.", "microbatches", "remat", "checkpoint.", "log.")
"""Fields that a rerun may change without being another experiment."""


class Checkpoints:
    """The checkpoints of one training run. Saving runs in the background; leaving the context waits for it.

    Raises:
      CheckpointError: Orbax cannot open them, as where what it keeps beside a step is damaged.
    """

    def __init__(self, workdir: str | os.PathLike[str], config: Config, tokenizer: Tokenizer):
        self._config, self._tokenizer = config, tokenizer
        self.directory = absolute_path(workdir) / "checkpoints"
        # Weights compress by less than a tenth, and while they are compressed Orbax holds them twice.
        handlers = {
            "pasta": ocp.JsonCheckpointHandler("pasta.json"),
            "params": ocp.PyTreeCheckpointHandler(use_compression=False),
            "optimizer": ocp.PyTreeCheckpointHandler(use_compression=False),
        }
        options = ocp.CheckpointManagerOptions(max_to_keep=config.checkpoint.keep, create=True)
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

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

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
        """
        step = int(state.step)
        if step == self.latest():
            return
        self._save(
            step,
            data_index,
            base,
            window or {},
            params=ocp.args.PyTreeSave(state.params),
            optimizer=ocp.args.PyTreeSave(state.opt_state),
        )

    def save_weights(self, params: Params) -> None:
        """Saves, as step 0, weights that were not trained here, to decode with or to start from."""
        self._save(0, 0, None, {}, params=ocp.args.PyTreeSave(params))

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
            "config": overrides.to_dict(self._config),
            "versions": versions(),
            "tag_ids": self._tokenizer.vocabulary.tag_ids,
            "tokenizer": base64.b64encode(self._tokenizer.to_bytes()).decode("ascii"),
        }
        if base:
            metadata["base"] = dataclasses.asdict(base)
        items = ocp.args.Composite(pasta=ocp.args.JsonSave(metadata), **arrays)
        self._manager.save(step, args=items, force=True)

    def restore(self, target: State, base: BaseWeights | None = None) -> tuple[State, CheckpointMetadata]:
        """The newest state.

        Args:
          target: `jax.ShapeDtypeStruct`s with the shardings that the arrays should have.
          base: the weights that training starts from now, if the parameters are adapters.

        Raises:
          CheckpointError: damaged, or of another experiment.
        """
        path = self.directory / str(self.latest())
        metadata = read_metadata(path)
        if metadata.step and not (path / "optimizer").exists():
            reason = f"optimizer: not there; a new --workdir with --config.init_from={path} starts from its weights"
            raise CheckpointError(damage_message(path, reason, "optimizer"))
        if not (path / "optimizer").exists():
            raise CheckpointError(
                f"{self.directory.parent} holds weights alone, of a model that was not trained there. "
                f"Use a new --workdir; --config.init_from={self.directory.parent} starts from them."
            )
        changed = [
            name
            for name in overrides.differences(metadata.config, self._config)
            if not name.startswith(MAY_CHANGE)
            and not (metadata.base and name == "init_from")  # a base may move: its fingerprint is compared
        ]
        if changed:
            raise CheckpointError(
                f"{self.directory.parent} already has step {metadata.step} of a different config "
                f"({', '.join(changed)}). Use a new --workdir; --config.init_from starts from its weights."
            )
        if not metadata.matches_tokenizer(self._tokenizer):
            raise CheckpointError(
                f"{path} was trained with another tokenizer than {self._config.data.tokenizer!r} is now. "
                "Use a new --workdir."
            )
        if metadata.base and base:
            check_base(path, metadata.base, base)
        check_shapes(path, saved_shapes(path, "params"), target.params)
        params = restore_arrays(path, "params", target.params)
        opt_state = restore_arrays(path, "optimizer", target.opt_state)
        step = jax.device_put(jnp.int32(metadata.step), target.step.sharding)
        return dataclasses.replace(target, params=params, opt_state=opt_state, step=step), metadata
