"""Which dimension of which array lies on which mesh axis: one table of letters (docs/design.md, section 9).

The mesh has three axes, each 1 where it is not used: `data` (rows only), `fsdp` (rows, and parameters and
optimiser by D), `tensor` (heads, mlp, vocabulary). Placing arrays is all that is done here; the compiler
finds the communication. Everything works on arrays and on shapes alike, and on meshes of devices that are not
there (`jax.experimental.topologies`, `AbstractMesh`), so programs compile ahead of time without devices.
"""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from pasta_jax.rounding import round_up

AXES: dict[str, str | tuple[str, ...]] = {
    "B": ("data", "fsdp"),
    "D": "fsdp",
    "N": "tensor",
    "K": "tensor",
    "F": "tensor",
    "V": "tensor",
}
"""Letter to mesh axis or axes. A letter that is not here (H, L, P, Q, R; J, all of q, k and v) is never split."""

MATRICES = {
    "q_proj": ("D", "NH"),
    "k_proj": ("D", "KH"),
    "v_proj": ("D", "KH"),
    "o_proj": ("NH", "D"),
    "gate_proj": ("D", "F"),
    "up_proj": ("D", "F"),
    "down_proj": ("F", "D"),
}
"""Name of a layer's matrix to the dimensions that it contracts, and those that it makes."""

PARAMETERS = {
    "embedding": "VD",
    "embedding_scale": "V",
    "embedding_rows": "RD",
    "head": "DV",
    "head_scale": "V",
    "head_rows": "DR",
    "scale": "D",
    "q_norm": "H",
    "k_norm": "H",
    "qkv_proj": "DJ",
    "qkv_proj_scale": "J",
    "q_proj_bias": "NH",
    "k_proj_bias": "KH",
    "v_proj_bias": "KH",
} | {
    name + suffix: dims
    for name, (rows, columns) in MATRICES.items()
    for suffix, dims in {
        "": rows + columns,
        "_scale": columns,
        "_lora_a": rows + "R",
        "_lora_b": "R" + columns,
    }.items()
}
"""Name of a parameter, the last of its path, to its dimensions; R, a rank or a few rows, is never split."""

POOL = "BKPH"

NAMES = {
    "B": "rows",
    "D": "model_dim",
    "N": "num_heads",
    "K": "num_kv_heads",
    "F": "mlp_dim",
    "V": "vocab_size",
}
"""What error messages call the letters."""

AnyMesh = Mesh | AbstractMesh


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices: Any = None) -> Mesh:
    """A mesh (data, fsdp, tensor); one of the three may be -1, the rest of the devices.

    Args:
      data, fsdp, tensor: sizes of the axes.
      devices: a sequence of devices, those of a topology included; default all of this job's.

    Raises:
      ValueError: the sizes do not use exactly the devices there are.
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
    axis_types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=axis_types, devices=devices)


def sharding(dims: str, shape: tuple[int, ...], mesh: AnyMesh) -> NamedSharding:
    """Where an array goes whose dimensions are named by letters, such as "DNH".

    Raises:
      ValueError: a dimension that its axis does not divide, or one axis wanted by two dimensions.
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
    """Shardings of parameters, or of an optimiser state that mirrors their paths; same tree.

    Args:
      params: arrays or `jax.ShapeDtypeStruct`s. Scalars (counters) are replicated, and so is what has a
        parameter's name but another number of dimensions (factored second moments).
      mesh: with the axes of `make_mesh`.

    Raises:
      ValueError: a leaf without a place in PARAMETERS, or what `sharding` raises.
    """

    def place(path: Any, leaf: Any) -> NamedSharding:
        dims = PARAMETERS.get(_last_name(path))
        if dims is None and leaf.ndim:
            raise ValueError(f"{jax.tree_util.keystr(path)} has no dimensions in sharding.PARAMETERS.")
        if dims is None or len(dims) != leaf.ndim:
            return replicated(mesh)
        return sharding(dims, leaf.shape, mesh)

    return jax.tree_util.tree_map_with_path(place, params)


def pool_shardings(pool: Any, mesh: AnyMesh) -> Any:
    """Shardings of a `Pool` of arrays or shapes; same tree. Rows with their requests, heads with q_proj's."""
    return jax.tree.map(lambda leaf: sharding(POOL, leaf.shape, mesh), pool)


def batch_sharding(mesh: AnyMesh, rows: int | None = None) -> NamedSharding:
    """For any array whose first dimension is B rows; `rows`, if given, must be divisible."""
    if rows is not None:
        return sharding("B", (rows,), mesh)
    return NamedSharding(mesh, PartitionSpec(AXES["B"]))


def round_up_rows(rows: int, mesh: AnyMesh) -> int:
    """At least so many rows, divisible among the devices that rows go over."""
    parts = math.prod(mesh.shape[axis] for axis in AXES["B"])
    return round_up(rows, parts)


def replicated(mesh: AnyMesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh on which arrays lie, if it has more than one device."""
    for leaf in jax.tree.leaves(tree):
        lies = getattr(leaf, "sharding", None)
        if isinstance(lies, NamedSharding) and lies.mesh.size > 1:
            return lies.mesh  # type: ignore[return-value]
    return None


def abstract(tree: Any, shardings: Any) -> Any:
    """Arrays or shapes to shapes that know their sharding: arguments for `jax.jit(f).lower(...)`.

    Args:
      tree: arrays or `jax.ShapeDtypeStruct`s, as from `jax.eval_shape`.
      shardings: the same tree of shardings, or one for all.
    """
    if isinstance(shardings, NamedSharding):
        one = shardings
        shardings = jax.tree.map(lambda _: one, tree)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def _axes(letter: str, size: int, mesh: AnyMesh) -> tuple[str, ...]:
    """Mesh axes of one dimension; empty if it is not split."""
    axes = AXES.get(letter, ())
    axes = (axes,) if isinstance(axes, str) else axes
    parts = math.prod(mesh.shape[axis] for axis in axes)
    if size % parts == 0:
        return axes
    # Fewer kv heads than chips: a head is not cut, and every chip's query heads need the whole of theirs, so
    # each chip keeps all K. They are few then (1 in Gemma 2B), and the query heads and the mlp stay split.
    if letter == "K" and parts % size == 0:
        return ()
    raise ValueError(
        f"{'*'.join(axes)}={parts} does not divide {NAMES[letter]} {letter}={size}. Use {_divisors(size)}."
    )


def _divisors(size: int) -> str:
    """The divisors of `size` that a mesh may have, in words: 8 -> "1, 2, 4 or 8"."""
    divisors = [str(n) for n in range(1, min(size, 256) + 1) if size % n == 0]
    return " or ".join(filter(None, [", ".join(divisors[:-1]), divisors[-1]]))


def _last_name(path: Any) -> str:
    """The last key of a path that is a name: of a dict, or the field of a record."""
    last = path[-1] if path else None
    return str(getattr(last, "key", getattr(last, "name", "")))
