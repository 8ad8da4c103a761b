"""Loading: weights, adapters and their base, each with the shardings and dtypes that the caller asks for."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from pasta_jax import sharding
from pasta_jax.checkpoints.about import (
    BaseWeights,
    CheckpointError,
    CheckpointMetadata,
    absolute_path,
    find_checkpoint,
    read_metadata,
)
from pasta_jax.checkpoints.fingerprint import fingerprint
from pasta_jax.checkpoints.reading import restore_arrays, saved_shapes
from pasta_jax.model import lora, param_shapes
from pasta_jax.model.forms import Params


def load_params(
    path: str | os.PathLike[str],
    *,
    shardings: Callable[[Params], Any] | None = None,
    expected: Params | None = None,
    base: str | os.PathLike[str] | None = None,
    finish: Callable[[Params], Params] | None = None,
) -> tuple[Params, CheckpointMetadata]:
    """The weights of a checkpoint, with adapters merged into their base.

    Args:
      path: a workdir, its `checkpoints`, or one checkpoint.
      shardings: from the tree of shapes (`jax.ShapeDtypeStruct`) to one of shardings; by default everything is
        placed on the first device.
      expected: a tree of shapes that the weights must have, and of the dtypes to return; by default those saved.
      base: of adapters: where their base is now, if it has moved.
      finish: applied to each top-level part (embed, layer_0, ...) as soon as it is read, before the next is.

    Raises:
      CheckpointError: missing, foreign, damaged, or not as expected.
    """
    checkpoint = find_checkpoint(path)
    metadata = read_metadata(checkpoint)
    if metadata.base is not None:
        dtype = None if expected is None else jax.tree.leaves(expected)[0].dtype
        params, trained, _ = load_parts(checkpoint, shardings=shardings, base=base)
        if expected is not None:
            check_shapes(checkpoint, params, expected)
        # Not of the merged weights: sums round differently on other machines.
        merged = fingerprint({"base": {metadata.base.fingerprint: np.zeros(1)}, "adapters": trained})
        metadata = dataclasses.replace(metadata, merged_fingerprint=merged)
        params = lora.merge(lora.join(params, trained), metadata.config.lora, dtype=dtype, donate=True)
        return params if finish is None else _finished(params, params.pop, finish), metadata
    shapes = saved_shapes(checkpoint, "params")
    if expected is not None:
        check_shapes(checkpoint, shapes, expected)
    target = _placed(shapes, shardings)
    if finish is None and (expected is None or _dtypes(shapes) == _dtypes(expected)):
        return restore_arrays(checkpoint, "params", target, metadata), metadata

    def read(name: str) -> Params:
        """As it was saved, so that its checksum can be verified; then in the dtype that is wanted."""
        part = restore_arrays(checkpoint, "params", {name: target[name]}, metadata, partial=True)[name]
        if expected is not None:
            part = jax.tree.map(lambda x, like: x.astype(like.dtype), part, expected[name])
        return part

    return _finished(target, read, finish or (lambda part: part)), metadata


def load_parts(
    path: str | os.PathLike[str],
    *,
    shardings: Callable[[Params], Any] | None = None,
    base: str | os.PathLike[str] | None = None,
) -> tuple[Params, Params, CheckpointMetadata]:
    """The base of a checkpoint of adapters, in the model's dtype, and the adapters.

    Args:
      path, shardings, base: as in `load_params`.

    Raises:
      CheckpointError: as `load_params`; the base is missing, or its fingerprint differs.
    """
    checkpoint, saved, metadata = _read_adapters(path)
    base_path = os.fspath(base) if base else find_base(checkpoint, saved.path)
    expected = param_shapes(metadata.config.model)
    params, base_metadata = load_params(base_path, shardings=shardings, expected=expected)
    check_base(
        checkpoint, saved, BaseWeights(base_path, base_metadata.merged_fingerprint or fingerprint(params))
    )
    target = _placed(saved_shapes(checkpoint, "params"), shardings)
    return params, restore_arrays(checkpoint, "params", target, metadata), metadata


def load_adapters(path: str | os.PathLike[str]) -> tuple[Params, CheckpointMetadata]:
    """The adapters of a checkpoint without their base, on the first device. Raises CheckpointError."""
    checkpoint, _, metadata = _read_adapters(path)
    target = _placed(saved_shapes(checkpoint, "params"), None)
    return restore_arrays(checkpoint, "params", target, metadata), metadata


def _read_adapters(path: str | os.PathLike[str]) -> tuple[epath.Path, BaseWeights, CheckpointMetadata]:
    checkpoint = find_checkpoint(path)
    metadata = read_metadata(checkpoint)
    if metadata.base is None:
        raise CheckpointError(f"{checkpoint} holds a whole model, not adapters.")
    return checkpoint, metadata.base, metadata


def find_base(checkpoint: epath.Path, path: str) -> str:
    """Where the base of a checkpoint of adapters is.

    A relative path is looked up from the current directory, then from each folder above the checkpoint.

    Args:
      checkpoint: the directory, as `find_checkpoint` returns it.
      path: of the base, as the checkpoint names it.

    Raises:
      CheckpointError: in none of these.
    """
    candidates = [absolute_path(path)]
    if "://" not in path and not os.path.isabs(os.path.expanduser(path)):
        candidates += [parent / path for parent in checkpoint.parents]
    for candidate in candidates:
        if candidate.exists():
            return os.fspath(candidate)
    raise CheckpointError(
        f"{checkpoint} has adapters for the weights in {path}, which is not there. Say where those are now: "
        "base=DIRECTORY of load, --base=DIRECTORY of pasta_jax, evaluate and convert; or put a link there."
    )


def check_base(checkpoint: epath.Path, saved: BaseWeights, current: BaseWeights) -> None:
    """Refuses adapters that were trained beside other weights. Raises CheckpointError."""
    if saved.fingerprint != current.fingerprint:
        raise CheckpointError(
            f"{checkpoint} has adapters for other weights than those in {current.path}: it was trained beside "
            f"what was then in {saved.path}; their fingerprints differ. Give that one, or one converted from the "
            "same file: --base=DIRECTORY."
        )


def _finished(names: Any, part: Callable[[str], Params], finish: Callable[[Params], Params]) -> Params:
    """The top-level parts, each passed through `finish` before the next is read."""
    params: dict[str, Any] = {}
    for name in [*names]:
        params |= finish({name: part(name)})
    return params


def _dtypes(tree: Params) -> list[Any]:
    return [leaf.dtype for leaf in jax.tree.leaves(tree)]


def _placed(shapes: Params, shardings: Callable[[Params], Any] | None) -> Params:
    """Shapes with shardings; by default those of the first device."""
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return sharding.abstract(shapes, first if shardings is None else shardings(shapes))


def check_shapes(path: epath.Path, saved: Any, expected: Any) -> None:
    """Refuses a checkpoint of another model. Raises CheckpointError, which names the first difference."""
    have, want = _named_shapes(saved), _named_shapes(expected)
    for name in [*want, *have]:
        if have.get(name) != want.get(name):
            raise CheckpointError(
                f"{path} is of another model. First difference: {name} is {have.get(name, 'not there')} "
                f"in the checkpoint, {want.get(name, 'not there')} by the config. Use the configuration that it "
                "was trained with, or a new --workdir."
            )


def _named_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(x.shape) for path, x in leaves}
