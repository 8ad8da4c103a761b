"""Parameters onto a mesh, one after the other, so that no model is held twice.

Where they come from does not matter here: a `Reader` makes one of our parameters as a NumPy array on the host.
The largest go first, while there is most room for what reading takes besides.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from pasta_jax import sharding
from pasta_jax.interchange.errors import InterchangeError
from pasta_jax.interchange.memory import check_fits
from pasta_jax.model import ModelConfig, init_params
from pasta_jax.model.forms import quantize

Path = tuple[str, ...]

Reader = Callable[[], np.ndarray]
"""Reads one of our parameters, in the dtype that it shall have."""

Transform = Callable[[Path, np.ndarray], Any]
"""Changes a parameter on its way: from its path and array to the leaf that takes its place."""


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
    """Reads all parameters of a model and lays them where they belong.

    Args:
      readers: of plain parameters, by path.
      config: of the model that comes out.
      what: the model, for errors.
      piece: bytes that a reader takes besides its result.
      mesh: of `sharding.make_mesh`; by default the first device alone.
      transform: applied to each parameter, on the host, to quantise it.
      check: what has to be read to be found wrong; called first, when it is known that the model fits.

    Raises:
      InterchangeError: it does not fit, with the arithmetic, before anything is read.
    """
    places = target_shapes(config, mesh, quantized=transform is not None)
    sizes = {path: max(leaf.size for leaf in jax.tree.leaves(places[path])) for path in readers}
    devices = {device for leaf in jax.tree.leaves(places) for device in leaf.sharding.addressable_devices}
    # On a CPU the array that was read becomes the parameter, unless it is cut or changed on the way.
    is_taken = transform is None and len(devices) == 1 and all(d.platform == "cpu" for d in devices)
    largest = max(sizes.values()) * np.dtype(config.dtype).itemsize
    check_fits(places, staging=piece + (0 if is_taken else largest), what=what)
    if check is not None:
        check()
    leaves: dict[Path, Any] = {}
    for path in sorted(readers, key=lambda path: -sizes[path]):
        array = readers[path]()
        leaf = array if transform is None else transform(path, array)
        del array
        leaves[path] = jax.tree.map(_place, leaf, places[path])
        del leaf
    if leaves.keys() != places.keys():
        wrong = sorted("/".join(path) for path in leaves.keys() ^ places.keys())
        raise ValueError(f"These parameters are not those of the model: {wrong}.")
    return unflatten_dict({path: leaves[path] for path in places})


def target_shapes(
    config: ModelConfig, mesh: Mesh | None = None, *, quantized: bool = False
) -> dict[Path, Any]:
    """Shape, dtype and sharding of each parameter, by path; with `quantized` those of `forms.quantize`.

    Raises:
      InterchangeError: the mesh does not divide the sizes.
    """
    shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    shapes = jax.eval_shape(quantize, shapes) if quantized else shapes
    if mesh is None:
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings: Any = jax.tree.map(lambda _: here, shapes)
    else:
        try:
            shardings = sharding.param_shardings(shapes, mesh)
        except ValueError as error:
            raise InterchangeError(f"mesh: {error}") from error
    return flatten_dict(sharding.abstract(shapes, shardings))


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array at an address at which a CPU device takes it as it is, without a copy."""
    size, step = math.prod(shape) * dtype.itemsize, 64
    memory = np.empty(size + step, np.uint8)
    skip = -memory.ctypes.data % step
    return memory[skip : skip + size].view(dtype).reshape(shape)


def _place(array: np.ndarray, place: jax.ShapeDtypeStruct) -> jax.Array:
    if array.shape != place.shape or array.dtype != place.dtype:
        raise ValueError(
            f"A parameter is {array.dtype}{list(array.shape)}, not {place.dtype}{list(place.shape)}."
        )
    if len(place.sharding.device_set) == 1:
        return jax.block_until_ready(jax.device_put(array, place.sharding))
    placed = jax.make_array_from_callback(place.shape, place.sharding, lambda index: array[index])
    return jax.block_until_ready(placed)
