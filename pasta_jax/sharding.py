"""Which dimension of which array is split over which mesh axis: one table of letters (docs/design.md, section 9).

The mesh has three axes, each of size 1 where it is not used: `data` (rows only), `fsdp` (rows, and parameters and
optimizer state by D), `tensor` (heads, mlp, vocabulary). This module only places arrays; the compiler inserts the
communication. Everything works on arrays and on shapes alike, and on meshes of absent devices
(`jax.experimental.topologies`, `AbstractMesh`), so programs compile ahead of time without devices.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from pasta_jax.rounding import round_up

AXES = {"B": ("data", "fsdp"), "D": ("fsdp",)} | dict.fromkeys("NKFV", ("tensor",))
"""Letter to mesh axis or axes. Other letters (H, L, P, Q, R; J, all of q, k and v) are never split."""

MATRICES = {
    "q_proj": ("D", "NH"),
    "k_proj": ("D", "KH"),
    "v_proj": ("D", "KH"),
    "o_proj": ("NH", "D"),
    "gate_proj": ("D", "F"),
    "up_proj": ("D", "F"),
    "down_proj": ("F", "D"),
}
"""Name of a layer's matrix to its input dimensions, which its product sums over, and its output dimensions."""

OUTPUTS = {name: columns for name, (_, columns) in MATRICES.items()}
OUTPUTS |= {"embedding": "V", "head": "V", "qkv_proj": "J"}
"""Name of a weight that multiplies hidden states to its output dimensions: those that int8 has scales for."""

PARAMETERS = {
    "embedding": "VD", "embedding_rows": "RD", "head": "DV", "head_rows": "DR", "scale": "D",
    "q_norm": "H", "k_norm": "H", "qkv_proj": "DJ",
    "q_proj_bias": "NH", "k_proj_bias": "KH", "v_proj_bias": "KH",
}  # fmt: skip
PARAMETERS |= {
    name + suffix: dims
    for name, (rows, columns) in MATRICES.items()
    for suffix, dims in {"": rows + columns, "_lora_a": rows + "R", "_lora_b": "R" + columns}.items()
}
"""Name of a parameter to its dimensions; R, a rank or a few vocabulary rows, is never split."""

POOL = "BKPH"

NEIGHBOURS = 8
"""Maximum devices among which `decoding_mesh` splits weights: what they exchange in each layer takes time too."""

NAMES = dict(B="rows", D="model_dim", N="num_heads", K="num_kv_heads", F="mlp_dim", V="vocab_size")
"""The letters' names in error messages."""

AnyMesh = Mesh | AbstractMesh


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices: Any = None) -> Mesh:
    """A mesh (data, fsdp, tensor); one of the three may be -1, the rest of the devices.

    Args:
      data, fsdp, tensor: sizes of the axes.
      devices: a sequence of devices, also of a topology; by default all of this job's.

    Raises:
      ValueError: the sizes do not use exactly the available devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    text = ", ".join(f"{name}={size}" for name, size in sizes.items())
    rest = [name for name, size in sizes.items() if size == -1]
    given = math.prod(size for size in sizes.values() if size != -1)
    if len(rest) > 1 or given < 1:
        raise ValueError(
            f"mesh {text}: sizes are positive, and one of them may be -1, the rest of the devices."
        )
    if len(devices) % given or (not rest and len(devices) != given):
        raise ValueError(
            f"mesh {text} needs {'a multiple of ' * bool(rest)}{given} devices; there are {len(devices)}."
        )
    for name in rest:
        sizes[name] = len(devices) // given
    slices = {getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}
    if len(slices) > 1:
        raise ValueError(
            f"mesh {text}: the devices are of {len(slices)} TPU slices. A mesh needs those of one."
        )
    # Not `jax.make_mesh`: on most slices that does not divide an axis of chips between two axes of the mesh.
    grid = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def decoding_mesh(mesh: Mesh, params: Any, memory: int | None = None) -> Mesh:
    """The devices of a mesh, arranged to decode: (data, 1, tensor).

    Split over fsdp, weights would be gathered, or sums exchanged, in every layer of every step. So they are split
    among neighbours by heads, mlp and vocabulary alone, and rows over the groups of these, each of which holds all
    weights. Neighbours are a multiple of the mesh's tensor that divides the weights: the largest up to NEIGHBOURS,
    or a larger one if their weights would take more than a third of the memory, for two models may lie there and
    their pools. If none fits, the mesh is returned.

    Args:
      mesh: as for training.
      params: arrays or `jax.ShapeDtypeStruct`s, for their shapes.
      memory: of a device, in bytes; None if it is unknown.

    Raises:
      ValueError: the mesh's own tensor does not divide the parameters.
    """
    devices, least = list(mesh.devices.flat), mesh.shape["tensor"]
    found: Mesh | None = None
    for tensor in range(least, len(devices) + 1, least):
        if len(devices) % tensor or (tensor > NEIGHBOURS and found and _leaves_room(params, found, memory)):
            continue
        arranged = make_mesh(-1, 1, tensor, devices)
        try:
            param_shardings(params, arranged)
        except ValueError:
            if tensor == least:
                raise
        else:
            found = arranged
    assert found is not None
    return found if _leaves_room(params, found, memory) else mesh


def _leaves_room(params: Any, mesh: Mesh, memory: int | None) -> bool:
    """Whether the weights take at most a third of each device's memory."""
    if memory is None:
        return True
    leaves = zip(jax.tree.leaves(params), jax.tree.leaves(param_shardings(params, mesh)), strict=True)
    parts = (math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, place in leaves)
    return 3 * sum(parts) <= memory


def sharding(dims: str, shape: tuple[int, ...], mesh: AnyMesh) -> NamedSharding:
    """The sharding of an array whose dimensions are named by letters, such as "DNH".

    Raises:
      ValueError: a mesh axis does not divide its dimension, or is used by two dimensions.
    """
    if len(dims) != len(shape):
        raise ValueError(f"{dims!r} names {len(dims)} dimensions; the array {list(shape)} has {len(shape)}.")
    spec = [_axes(letter, size, mesh) for letter, size in zip(dims, shape, strict=True)]
    used = [axis for axes in spec for axis in axes]
    twice = {axis for axis in used if used.count(axis) > 1}
    if twice:
        raise ValueError(f"{dims!r} puts two dimensions on mesh axis {', '.join(sorted(twice))}; see AXES.")
    return NamedSharding(mesh, PartitionSpec(*(axes or None for axes in spec)))


def param_shardings(params: Any, mesh: AnyMesh) -> Any:
    """Shardings of parameters, or of an optimizer state that mirrors their paths; same tree.

    Args:
      params: arrays or `jax.ShapeDtypeStruct`s. Scalars (counters) are replicated, and so is a leaf with a
        parameter's name but another number of dimensions (factored second moments).
      mesh: with the axes of `make_mesh`.

    Raises:
      ValueError: a leaf's name is not in PARAMETERS, or what `sharding` raises.
    """

    def place(path: Any, leaf: Any) -> NamedSharding:
        dims = _dims(path)
        if dims is None and leaf.ndim:
            raise ValueError(f"{jax.tree_util.keystr(path)} has no dimensions in sharding.PARAMETERS.")
        if dims is None or len(dims) != leaf.ndim:
            return replicated(mesh)
        return sharding(dims, leaf.shape, mesh)

    return jax.tree_util.tree_map_with_path(place, params)


def pool_shardings(pool: Any, mesh: AnyMesh) -> Any:
    """Shardings of a `Pool` of arrays or shapes; same tree. Rows are split as requests are, heads as k_proj's."""
    return jax.tree.map(lambda leaf: sharding(POOL, leaf.shape, mesh), pool)


def batch_sharding(mesh: AnyMesh, rows: int | None = None) -> NamedSharding:
    """For any array whose first dimension is B. Raises ValueError if the mesh does not divide `rows`, if given."""
    if rows is not None:
        return sharding("B", (rows,), mesh)
    return NamedSharding(mesh, PartitionSpec(AXES["B"]))


def place(array: Any, mesh: AnyMesh | None, *axes: Any) -> Any:
    """Within a program: an array each of whose dimensions is spread over these mesh axes; itself without a mesh."""
    if mesh is None or mesh.size == 1:
        return array
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, PartitionSpec(*axes)))


def by_rows(array: Any, mesh: AnyMesh | None) -> Any:
    """`place` for an array whose first dimension is B."""
    return place(array, mesh, AXES["B"])


def by_vocabulary(array: Any, dims: str, vocab_size: int, mesh: AnyMesh | None) -> Any:
    """`place` for an operand of logits, so that each device computes some ids for many rows.

    V is spread over fsdp and tensor, if these divide it, and rows over data alone. What devices then exchange are
    hidden states, and no table of all ids nor its gradient.
    """
    axes = {"V": ("fsdp", "tensor"), "B": ("data",)}
    if mesh is None or vocab_size % math.prod(mesh.shape[axis] for axis in axes["V"]):
        return array
    return place(array, mesh, *(axes.get(letter) for letter in dims))


def round_up_rows(rows: int, mesh: AnyMesh) -> int:
    """The smallest number of at least `rows` rows that the mesh divides."""
    parts = math.prod(mesh.shape[axis] for axis in AXES["B"])
    return round_up(rows, parts)


def replicated(mesh: AnyMesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def from_host(tree: Any, shardings: Any) -> Any:
    """Arrays of the host, the same in all processes, onto devices; each process copies what its own devices hold.

    Args:
      tree: NumPy arrays, numbers, or arrays of this process's devices.
      shardings: the same tree of shardings, or a prefix of it. None is the default device; what lies where other
        processes have devices too stays as it is.
    """
    if all(place.is_fully_addressable for place in jax.tree.leaves(shardings)):
        return jax.device_put(tree, shardings)

    def put(place: Any, part: Any) -> Any:
        return jax.tree.map(functools.partial(_put, place), part)

    return jax.tree.map(put, shardings, tree, is_leaf=lambda place: place is None)


def _put(place: Any, leaf: Any) -> Any:
    if place is None or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
        return leaf
    array = np.asarray(leaf)
    return jax.make_array_from_callback(array.shape, place, lambda index: array[index], dtype=array.dtype)


def on_host(tree: Any) -> Any:
    """Arrays to NumPy, also where some of their rows lie on other hosts: all processes call it then."""

    def fetch(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            leaf = _everywhere(replicated(leaf.sharding.mesh))(leaf)  # type: ignore[attr-defined]
        return np.asarray(leaf)

    return jax.tree.map(fetch, tree)


@functools.cache
def _everywhere(place: NamedSharding) -> Any:
    return jax.jit(lambda leaf: leaf, out_shardings=place)


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh over which arrays are spread, if it has more than one device."""
    for leaf in jax.tree.leaves(tree):
        placement = getattr(leaf, "sharding", None)
        if isinstance(placement, NamedSharding) and placement.mesh.size > 1:
            return placement.mesh  # type: ignore[return-value]
    return None


def abstract(tree: Any, shardings: Any) -> Any:
    """Arrays or shapes to shapes that know their sharding: arguments for `jax.jit(f).lower(...)`.

    Args:
      tree: arrays or `jax.ShapeDtypeStruct`s, as from `jax.eval_shape`.
      shardings: the same tree of shardings, or a prefix of it: one for all leaves of a part.
    """

    def place(sharding: Any, part: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), part)

    return jax.tree.map(place, shardings, tree)


def _axes(letter: str, size: int, mesh: AnyMesh) -> tuple[str, ...]:
    """The mesh axes of one dimension, none if it is not split."""
    axes = AXES.get(letter, ())
    parts = math.prod(mesh.shape[axis] for axis in axes)
    if size % parts == 0:
        return axes
    # Fewer kv heads than chips: heads are never cut, so each chip keeps all K. They are few then (1 in Gemma 2B);
    # query heads and the mlp stay split.
    if letter == "K" and parts % size == 0:
        return ()
    rows = f", or a multiple of {parts} rows" if letter == "B" else ""
    raise ValueError(
        f"{'*'.join(axes)}={parts} does not divide {NAMES[letter]} {letter}={size}. Use {_divisors(size)}{rows}."
    )


def _divisors(size: int) -> str:
    """The divisors of `size` in words, up to 256: 8 -> "1, 2, 4 or 8"."""
    divisors = [str(n) for n in range(1, min(size, 256) + 1) if size % n == 0]
    return " or ".join(filter(None, [", ".join(divisors[:-1]), divisors[-1]]))


def _dims(path: Any) -> str | None:
    """The dimensions of the parameter at a path, which ends in its name or in a field of `forms.Int8` below."""
    names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
    field = getattr(path[-1], "name", "values") if path else ""
    return {"values": PARAMETERS, "scale": OUTPUTS}.get(field, {}).get(names[-1] if names else "")
