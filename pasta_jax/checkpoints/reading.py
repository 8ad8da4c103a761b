"""Reading arrays of a checkpoint, and telling damage from what could not be read this time."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath

from pasta_jax.checkpoints.about import CheckpointError, CheckpointMetadata, DamagedCheckpoint, unread
from pasta_jax.checkpoints.fingerprint import checksums
from pasta_jax.processes.agreement import agreed

T = TypeVar("T")


def saved_shapes(path: epath.Path, item: str) -> Any:
    """The tree of shapes and dtypes of an item ("params", "optimizer") of a checkpoint.

    Raises:
      DamagedCheckpoint, CheckpointError: as `restore_arrays`.
    """
    try:
        metadata = ocp.PyTreeCheckpointHandler().metadata(path / item)
        tree = metadata.tree if hasattr(metadata, "tree") else metadata
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
    except Exception as error:  # whatever a damaged file makes Orbax raise
        raise _unreadable(path, item, error) from error


def restore_arrays(
    path: epath.Path,
    item: str,
    target: Any,
    saved: CheckpointMetadata,
    *,
    partial: bool = False,
) -> Any:
    """Arrays as they were saved, with the shardings of `target`.

    Args:
      path: of the checkpoint.
      item: "params" or "optimizer".
      target: `jax.ShapeDtypeStruct`s with the shapes and dtypes that were saved. Where they lie on devices of
        several processes, all of these call this.
      saved: its metadata, for the checksums that the arrays must have.
      partial: `target` is a part of what was saved.

    Raises:
      DamagedCheckpoint: they cannot be read, here or in another process, or are not what was saved.
      CheckpointError: they cannot be read this time, as without memory or permission.
    """

    def read() -> Any:
        try:
            restore_args = ocp.checkpoint_utils.construct_restore_args(target)
            arguments = ocp.args.PyTreeRestore(
                item=target, restore_args=restore_args, partial_restore=partial
            )
            # Not by `ocp.Checkpointer`, which would wait for processes that fail.
            return ocp.PyTreeCheckpointHandler().restore(path / item, args=arguments)
        except Exception as error:  # whatever a damaged file makes Orbax raise
            raise _unreadable(path, item, error) from error

    places = [leaf.sharding for leaf in jax.tree.leaves(target) if leaf.sharding is not None]
    is_here = all(place.is_fully_addressable for place in places)
    arrays = read() if is_here else together(path, read)
    if sums := saved.checksums.get(item):
        wrong = [name for name, found in checksums(arrays).items() if sums.get(name, found) != found]
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            reason = f"{item}: {wrong[0]}{more}: not what was saved, by its checksum"
            raise DamagedCheckpoint(path, reason, item)
    return arrays


def together(path: epath.Path, read: Callable[[], T]) -> T:
    """What `read` returns, if it does in every process; all of them call this.

    Raises:
      DamagedCheckpoint: in all of them, if in one.
      CheckpointError: in one; the others wait until they are told of its end (`processes.meeting`).
    """
    result, failure = None, None
    try:
        result = read()
    except DamagedCheckpoint as error:
        failure = error
    if agreed(int(failure is not None)) != (0,):
        raise failure or DamagedCheckpoint(path, "another process cannot read it")
    return result  # type: ignore[return-value]


TRANSIENT = (
    "RESOURCE_EXHAUSTED",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "ABORTED",
    "CANCELLED",
)
"""Statuses of TensorStore that say nothing about the file: another time it may be read."""

MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
"""Errors of the system that mean that the file is not there. All others may pass."""


def is_transient(error: BaseException | None) -> bool:
    """Whether a file that could not be read for this reason may be in order."""
    if error is None:
        return False
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno not in MISSING
    codes = map(int, re.findall(r"OS[ _]error(?:_code)?[ =:'\"]*(\d+)", str(error), re.IGNORECASE))
    return (
        isinstance(error, MemoryError)
        or any(status in str(error) for status in TRANSIENT)
        or any(code not in MISSING for code in codes)
        or any(map(is_transient, getattr(error, "exceptions", ())))
        or is_transient(error.__cause__ or error.__context__)
    )


def _unreadable(path: epath.Path, item: str, error: Exception) -> CheckpointError:
    """What is to be said of a checkpoint when reading an item of it raised this."""
    if is_transient(error):
        return unread(path / item, error)
    return DamagedCheckpoint(path, f"{item}: {error}", item)
