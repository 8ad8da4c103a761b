"""What any process asks for, known to all at the same step."""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pasta_jax.processes.launchers import ProcessError
from pasta_jax.processes.meeting import has_failed

if TYPE_CHECKING:
    import numpy as np


def several() -> bool:
    """Whether there are other processes."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


class Agreement:
    """The largest number that any process asks for, known to all at the same call.

    The result is one call late: waiting for this call's result would stall the device.
    """

    def __init__(self) -> None:
        self._before: Any = None

    def __call__(self, *asked: int, now: bool = False) -> tuple[int, ...]:
        """What any process asked for in the call before, or nothing: zeros. With `now` in this call.

        Args:
          asked: as many numbers in each call.
          now: waits for the others.
        """
        if not several():
            return asked
        before, self._before = self._before, _largest(asked)
        known = self._before if now else before
        if known is None:
            return (0,) * len(asked)
        import numpy as np

        return tuple(map(int, np.asarray(known)))

    def forget(self) -> None:
        """Drops what was asked and is not known yet: it was done."""
        self._before = None


def agreed(*asked: int) -> tuple[int, ...]:
    """The largest that any process asks for; waits for all of them."""
    return Agreement()(*asked, now=True)


def least(size: int) -> int:
    """The smallest of all processes' sizes, in bytes, to the MiB below; waits for all of them."""
    return size if not several() else -agreed(-(size >> 20))[0] << 20


def from_first(work: Callable[[], np.ndarray], like: np.ndarray) -> np.ndarray:
    """What the first process computes, known to all; the others wait for it, however long it takes.

    Args:
      work: called in the first process alone, in a thread of its own if there are others.
      like: an array of the shape and dtype that it returns, the same in all processes.

    Raises:
      BaseException: in the first process, what `work` raised.
    """
    if not several():
        return work()
    import jax
    import numpy as np

    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(np.ascontiguousarray(work(), like.dtype).reshape(like.shape))
        except BaseException as error:
            outcome.append(error)

    if jax.process_index() == 0:
        worker = threading.Thread(target=run, name="first", daemon=True)
        worker.start()
    # One collective call that waited for hours would be given up.
    while agreed(int(jax.process_index() == 0 and not outcome))[0]:
        time.sleep(0.2)
    found = outcome[0] if outcome else np.zeros_like(like)
    if isinstance(found, BaseException):
        raise found
    bits = found.view(np.int32).reshape(1, -1)
    sharding, _ = _reduction()
    given = jax.make_array_from_callback((jax.process_count(), bits.size), sharding, lambda _: bits)
    return np.asarray(_first()(given)).view(like.dtype).reshape(like.shape)


def check_shared(folder: str | os.PathLike[str], wait_s: float = 10.0) -> None:
    """Refuses a folder that is not the same one in all processes.

    Args:
      folder: there is one of this name in each process.
      wait_s: how long it may take until what one host writes is seen by another.

    Raises:
      ProcessError: in all processes; it says which ones have another folder.
    """
    if not several():
        return
    import jax

    own, mark = jax.process_index(), os.path.join(folder, ".shared")
    (token,) = agreed(0 if own else 1 + secrets.randbelow(2**30))
    if own == 0:
        with open(mark, "w", encoding="utf-8") as file:
            file.write(str(token))
    agreed(0)  # now it is there
    deadline, seen = time.monotonic() + wait_s, False
    while not seen and time.monotonic() < deadline:
        with contextlib.suppress(OSError), open(mark, encoding="utf-8") as file:
            seen = file.read() == str(token)
        time.sleep(0 if seen else 0.1)
    lacking = agreed(*(int(i == own and not seen) for i in range(jax.process_count())))
    if own == 0:
        os.remove(mark)
    if any(lacking):
        if own:
            has_failed(wait_s=5.0)  # the first says it for all: those that know that first end without a word
        others = ", ".join(str(i) for i, lacks in enumerate(lacking) if lacks)
        raise ProcessError(
            f"{os.fspath(folder)} of process {others} is not that of the first. The workdir must be on a file "
            "system that all hosts share, such as a bucket (--bucket of launch/tpu_run.sh)."
        )


def _largest(asked: tuple[int, ...]) -> Any:
    """The largest of all processes, being computed: int32, replicated."""
    import jax
    import numpy as np

    sharding, largest = _reduction()
    shape = (jax.process_count(), len(asked))
    own = np.array([asked], np.int32)
    return largest(jax.make_array_from_callback(shape, sharding, lambda index: own))


@functools.cache
def _first() -> Any:
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    everywhere = NamedSharding(_reduction()[0].mesh, PartitionSpec())
    return jax.jit(lambda numbers: numbers[0], out_shardings=everywhere)


@functools.cache
def _reduction() -> tuple[Any, Any]:
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    # One device of each process.
    first: dict[int, Any] = {}
    for device in jax.devices():
        first.setdefault(device.process_index, device)
    mesh = Mesh(np.array([first[i] for i in sorted(first)]), ("process",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    largest = jax.jit(lambda numbers: numbers.max(0), out_shardings=everywhere)
    return NamedSharding(mesh, PartitionSpec("process")), largest
