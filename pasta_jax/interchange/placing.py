"""Reads parameters and places them on a mesh one by one, so that the host never holds a model twice.

A `Reader` makes one parameter as a NumPy array on the host, from whatever format. The largest parameters are read
first, while most memory is free for reading.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from pasta_jax import sharding
from pasta_jax.interchange.errors import InterchangeError
from pasta_jax.memory import gib, shortage
from pasta_jax.model import ModelConfig, param_shapes
from pasta_jax.model.forms import quantize

Path = tuple[str, ...]

Reader = Callable[[], np.ndarray]
"""Reads one of our parameters, in its final dtype."""

Transform = Callable[[Path, np.ndarray], Any]
"""Replaces a parameter, given its path and array, by the leaf of the model."""


def place_params(
    readers: Mapping[Path, Reader],
    config: ModelConfig,
    *,
    what: str,
    piece: int,
    mesh: Mesh | None = None,
    transform: Transform | None = None,
    check: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Reads all parameters of a model onto its devices.

    Args:
      readers: of plain parameters, by path.
      config: of the model.
      what: the model's name in messages.
      piece: bytes that a reader allocates in addition to its result.
      mesh: from `sharding.make_mesh`; by default everything is placed on the first device.
      transform: applied to each parameter, on the host, to quantise it.
      check: a check that has to read tensors; called first, once it is known that the model fits.

    Raises:
      InterchangeError: it does not fit, with the arithmetic, before anything is read.
    """
    targets = target_shapes(config, mesh, quantized=transform is not None)
    sizes = {path: max(leaf.size for leaf in jax.tree.leaves(targets[path])) for path in readers}
    devices = {device for leaf in jax.tree.leaves(targets) for device in leaf.sharding.addressable_devices}
    # On a CPU the array that was read becomes the parameter itself, unless it is split or transformed.
    is_taken = transform is None and len(devices) == 1 and all(d.platform == "cpu" for d in devices)
    largest = max(sizes.values()) * np.dtype(config.dtype).itemsize
    check_fits(targets, staging=piece + (0 if is_taken else largest), what=what)
    if check is not None:
        check()
    leaves: dict[Path, Any] = {}
    for path in sorted(readers, key=lambda path: -sizes[path]):
        array = readers[path]()
        leaf = array if transform is None else transform(path, array)
        del array
        leaves[path] = jax.tree.map(_place, leaf, targets[path])
        del leaf
    if leaves.keys() != targets.keys():
        wrong = sorted("/".join(path) for path in leaves.keys() ^ targets.keys())
        raise ValueError(f"These parameters are not those of the model: {wrong}.")
    return unflatten_dict({path: leaves[path] for path in targets})


def check_fits(shapes: Mapping[Any, Any], *, staging: int, what: str, host_free: int | None = None) -> None:
    """Refuses a model for which the devices, or the host while it reads, have too little memory.

    Args:
      shapes: of the parameters, with their shardings and dtypes.
      staging: additional bytes that the host needs while it reads.
      what: the model's name in messages.
      host_free: bytes free on the host; by default those of this machine.

    Raises:
      InterchangeError: with the arithmetic, and what to try.
    """
    leaves = jax.tree.leaves(dict(shapes))
    lack = shortage(leaves, staging=staging, host_free=host_free)
    if lack is None:
        return
    count = sum(math.prod(leaf.shape) for leaf in leaves)
    total = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    dtypes = sorted({leaf.dtype for leaf in leaves}, key=lambda dtype: -dtype.itemsize)
    sizes = " or ".join(f"{dtype.itemsize} ({dtype.name})" for dtype in dtypes)
    devices = {device for leaf in leaves for device in leaf.sharding.device_set}
    ways = ["more devices (a mesh with fsdp)", 'int8 weights to decode (quantize="int8")', "a smaller model"]
    if dtypes and dtypes[0].itemsize > 2:
        ways.insert(0, "dtype bfloat16")
    raise InterchangeError(
        f"{what} does not fit: {count:,} parameters x {sizes} bytes = {gib(total)} GiB over {len(devices)} "
        f"device{'s' * (len(devices) > 1)}; {gib(lack.need)} GiB are needed {lack.place}, what reading takes "
        f"included, and {gib(lack.free)} GiB are free. Nothing was read. Try {', '.join(ways[:-1])}, or {ways[-1]}."
    )


def target_shapes(
    config: ModelConfig, mesh: Mesh | None = None, *, quantized: bool = False
) -> dict[Path, Any]:
    """Shape, dtype and sharding of each parameter, by path; with `quantized` those of `forms.quantize`.

    Raises:
      InterchangeError: the mesh does not divide the sizes.
    """
    shapes = param_shapes(config)
    shapes = jax.eval_shape(quantize, shapes) if quantized else shapes
    if mesh is None:
        one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings: Any = jax.tree.map(lambda _: one_device, shapes)
    else:
        try:
            shardings = sharding.param_shardings(shapes, mesh)
        except ValueError as error:
            raise InterchangeError(f"mesh: {error}") from error
    return flatten_dict(sharding.abstract(shapes, shardings))


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array, aligned so that a CPU device can use its memory without a copy."""
    size, step = math.prod(shape) * dtype.itemsize, 64
    memory = np.empty(size + step, np.uint8)
    skip = -memory.ctypes.data % step
    return memory[skip : skip + size].view(dtype).reshape(shape)


def _place(array: np.ndarray, target: jax.ShapeDtypeStruct) -> jax.Array:
    if array.shape != target.shape or array.dtype != target.dtype:
        raise ValueError(
            f"A parameter is {array.dtype}{list(array.shape)}, not {target.dtype}{list(target.shape)}."
        )
    if len(target.sharding.device_set) == 1:
        return jax.block_until_ready(jax.device_put(array, target.sharding))
    placed = jax.make_array_from_callback(target.shape, target.sharding, lambda index: array[index])
    return jax.block_until_ready(placed)
