"""The forms in which a weight may be held, and its product in each: the leaf of the parameters knows its form.

A plain array [contracted..., outputs...] is what is trained and saved. To decode, parameters may become

    Int8          whole numbers and a scale for each output, a quarter of the bytes of float32     `quantize`
    OutputsFirst  the outputs first, because XLA on CPU multiplies few rows faster so              `outputs_first`
    qkv_proj      q_proj, k_proj and v_proj of a layer as one matrix, plain or Int8: on an
                  accelerator one product instead of three                                         `fuse`

docs/lab-log.md says what each of them gains. All of them are functions of the nested dict of parameters, which
`jax.eval_shape` can apply to shapes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from flax.traverse_util import flatten_dict, path_aware_map, unflatten_dict

from pasta_jax import sharding
from pasta_jax.arrays import Array

LARGEST = 127

TINIEST = 1e-30
"""A column without a larger entry counts as zero: its scale could be too small for a float."""

FEW_ROWS = 64
"""With more rows the order of the operands makes no difference."""


@struct.dataclass
class Int8:
    """A weight of about `values * scale`, rounded to nearest and symmetric about zero."""

    values: Array  # int8, shape of the weight; between -127 and 127
    scale: Array  # float32, one for each output: shape of the weight without the contracted dimensions


@struct.dataclass
class OutputsFirst:
    """A weight as [outputs..., contracted...], the left operand of its product."""

    array: Array


Weight = Array | Int8 | OutputsFirst
"""A matrix, an embedding or a head in any of its forms."""

Params = Any
"""A nested dict of weights and other arrays; `transformer` names them."""


# ------------------------------------------------------------------------------------------------------ products


def project(x: Array, weight: Any, inner: int = 1) -> Array:
    """The product of x [..., contracted...] with a weight, in x's dtype: [..., outputs...].

    Args:
      x: its last `inner` dimensions are contracted.
      weight: a `Weight`; its first `inner` dimensions are those that are contracted.
      inner: how many.

    >>> project(jnp.ones((2, 5, 3)), jnp.ones((3, 4, 8))).shape
    (2, 5, 4, 8)
    >>> project(jnp.ones((2, 5, 3)), OutputsFirst(jnp.ones((4, 8, 3)))).shape
    (2, 5, 4, 8)
    """
    match weight:
        case Int8(values, scale):
            return (_product(x, values.astype(x.dtype), inner) * scale).astype(x.dtype)
        case OutputsFirst(array):
            return _product_outputs_first(x, array, inner, x.dtype)
        case _:
            return _product(x, weight, inner)


def project_fused(x: Array, weight: Any, heads: tuple[int, ...]) -> list[Array]:
    """The products of x [B, Q, D] with the matrices in a `qkv_proj`: [B, Q, n, H] for each n of `heads`."""
    y = project(x, weight)
    # Without the barrier XLA multiplies by parts of the matrix, and lays each out anew.
    y_BxQxJxH = jax.lax.optimization_barrier(y).reshape(*y.shape[:-1], sum(heads), -1)
    return jnp.split(y_BxQxJxH, np.cumsum(heads)[:-1].tolist(), axis=-2)


def look_up(table: Any, ids: Array, dtype: Any) -> Array:
    """Rows of an embedding [V, D] in any form: [..., D] for ids [...]; `dtype` is what int8 becomes."""
    match table:
        case Int8(values, scale):
            return (values[ids] * scale[ids][..., None]).astype(dtype)
        case OutputsFirst(array):
            return array[ids]
        case _:
            return table[ids]


def unembed(hidden: Array, table: Any, dims: str) -> Array:
    """Hidden states [..., D] to float32 logits [..., V], by an embedding (`dims` is "VD") or a head ("DV")."""
    match table:
        case Int8(values, scale):
            return unembed(hidden, values, dims) * scale
        case OutputsFirst(array):
            return _product_outputs_first(hidden, array, 1, jnp.float32)
        case _:
            return _unembed(hidden, table.astype(hidden.dtype), dims)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _unembed(hidden: Array, table: Array, dims: str) -> Array:
    """The backward pass rounds the cotangents of logits to the dtype of the operands.

    In float32 they would make float32 products of all three: on a GPU a fraction of the speed.
    """
    return jnp.einsum(f"...D,{dims}->...V", hidden, table, preferred_element_type=jnp.float32)


def _unembed_forward(hidden: Array, table: Array, dims: str) -> tuple[Array, tuple[Array, Array]]:
    return _unembed(hidden, table, dims), (hidden, table)


def _unembed_backward(dims: str, operands: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    hidden, table = operands
    D, V = hidden.shape[-1], cotangent.shape[-1]
    g_XxV, hidden_XxD = cotangent.reshape(-1, V).astype(hidden.dtype), hidden.reshape(-1, D)
    of_hidden = jnp.einsum(f"XV,{dims}->XD", g_XxV, table, preferred_element_type=jnp.float32)
    of_table = jnp.einsum(f"XV,XD->{dims}", g_XxV, hidden_XxD, preferred_element_type=jnp.float32)
    return of_hidden.astype(hidden.dtype).reshape(hidden.shape), of_table.astype(table.dtype)


_unembed.defvjp(_unembed_forward, _unembed_backward)


def _product(x: Array, weight: Array, inner: int) -> Array:
    # One plain matrix product: the gradient of an einsum over [B, Q, D] takes two and a half times as long on CPU.
    rows, columns, size = x.shape[:-inner], weight.shape[inner:], math.prod(weight.shape[:inner])
    return (x.reshape(-1, size) @ weight.reshape(size, -1)).reshape(*rows, *columns)


def _product_outputs_first(x: Array, weight: Array, inner: int, dtype: Any) -> Array:
    """For few rows the weight is the left operand.

    XLA's CPU products of 2 to 8 rows then take little longer than that of one; in the other order they take twice
    as long. The barrier keeps XLA from swapping the operands again.
    """
    outputs, size = weight.shape[:-inner], math.prod(weight.shape[-inner:])
    x_XxD, weight_FxD = x.reshape(-1, size), weight.reshape(-1, size)
    if len(x_XxD) > FEW_ROWS:
        y_XxF = jnp.einsum("XD,FD->XF", x_XxD, weight_FxD, preferred_element_type=dtype)
    else:
        y_FxX = jnp.einsum("FD,XD->FX", weight_FxD, x_XxD, preferred_element_type=dtype)
        y_XxF = jax.lax.optimization_barrier(y_FxX).T
    return y_XxF.reshape(*x.shape[:-inner], *outputs)


# --------------------------------------------------------------------------------------------- from form to form


def is_plain(params: Any) -> bool:
    """Whether every parameter is a plain array, as training, checkpoints and exports need them."""
    return not any(isinstance(leaf, Int8 | OutputsFirst) for leaf in flatten_dict(params).values())


def contracted(name: str) -> tuple[int, ...] | None:
    """The dimensions of a plain parameter that its product sums over; None if it is no weight of a product.

    >>> contracted("o_proj"), contracted("embedding"), contracted("head"), contracted("q_proj_bias")
    ((0, 1), (1,), (0,), None)
    """
    if name not in sharding.OUTPUTS:
        return None
    dims = sharding.PARAMETERS[name]
    return tuple(i for i, letter in enumerate(dims) if letter not in sharding.OUTPUTS[name])


def quantize(params: Any, *, donate: bool = False) -> Any:
    """All matrices, the embedding and the head in int8, leaf by leaf; norms and biases stay.

    Args:
      params: plain weights, adapters merged.
      donate: use up the arrays of `params`, each as soon as it is quantised: never more than one is held twice.
    """

    def quantize_one(path: tuple[Any, ...], leaf: Any) -> Any:
        quantized = quantize_leaf(path[-1], leaf)
        if donate and quantized is not leaf and isinstance(leaf, jax.Array):
            jax.block_until_ready(quantized)
            leaf.delete()
        return quantized

    return path_aware_map(quantize_one, params)


def quantize_leaf(name: str, leaf: Any) -> Any:
    """The parameter `name` as `Int8`, or as it is if it is no weight of a product, or in int8 already.

    NumPy arrays give NumPy arrays; jax arrays are quantised on their devices.
    """
    over = contracted(name)
    if over is None or isinstance(leaf, Int8):
        return leaf
    if isinstance(leaf, np.ndarray):
        return _quantized(np, leaf, over)
    return _quantizer(name, leaf.shape, getattr(leaf, "sharding", None))(leaf)


def outputs_first(params: Any, *, donate: bool = False) -> Any:
    """All matrices, the embedding and the head as `OutputsFirst`.

    The embedding is so already and is shared; of all else that changes, both copies are held in memory.

    Args:
      params: plain weights, adapters merged.
      donate: use up the arrays that change, each as soon as it has: never more than one is held twice.

    Raises:
      ValueError: weights that are not plain.
    """
    if not is_plain(params):
        raise ValueError("Only plain weights can have their outputs first.")

    def turn(path: tuple[Any, ...], leaf: Any) -> Any:
        over = contracted(path[-1])
        if over is None:
            return leaf
        order = (*(i for i in range(leaf.ndim) if i not in over), *over)
        if order == tuple(range(leaf.ndim)):
            return OutputsFirst(leaf)
        turned = _transpose(leaf, order)
        if donate and isinstance(leaf, jax.Array):
            jax.block_until_ready(turned)
            leaf.delete()
        return OutputsFirst(turned)

    return path_aware_map(turn, params)


def fuse(params: Any) -> Any:
    """Each layer's q_proj, k_proj and v_proj side by side as `qkv_proj` [D, (N + 2 K) H]; all else is shared.

    Raises:
      ValueError: there are none, or their outputs are first.
    """
    flat, fused = flatten_dict(params), {}
    for q_path in [path for path in flat if path[-1] == "q_proj"]:
        layer = q_path[:-1]
        qkv = [flat.pop((*layer, name)) for name in ("q_proj", "k_proj", "v_proj")]
        if not any(isinstance(weight, OutputsFirst) for weight in qkv):
            fused[*layer, "qkv_proj"] = jax.tree.map(_side_by_side, *qkv)
    if not fused:
        raise ValueError("There is nothing to fuse: no q_proj with its outputs last.")
    return unflatten_dict(flat | fused)


def _side_by_side(*arrays: Array) -> Array:
    """[..., N or K, H] each, to [..., J]."""
    return jnp.concatenate([jnp.reshape(x, (*x.shape[:-2], -1)) for x in arrays], axis=-1)


_transpose = jax.jit(jnp.transpose, static_argnums=1)


def _quantized(xp: Any, array: Any, over: tuple[int, ...]) -> Int8:
    values = array.astype(xp.float32)
    largest = xp.max(xp.abs(values), axis=over, keepdims=True)
    is_zero = largest <= TINIEST
    # A product, because quotients round differently on other machines.
    steps = xp.where(is_zero, 0.0, LARGEST / xp.where(is_zero, 1.0, largest)).astype(xp.float32)
    scale = xp.where(is_zero, 1.0, largest / LARGEST).astype(xp.float32)
    return Int8(xp.rint(values * steps).astype(xp.int8), xp.squeeze(scale, axis=over))


@functools.lru_cache(maxsize=64)
def _quantizer(name: str, shape: tuple[int, ...], placement: Any) -> Callable[[Array], Int8]:
    """Jitted once for all layers alike; on a mesh a scale is placed with its columns."""
    over = contracted(name)
    assert over is not None
    out: Any = None
    if isinstance(placement, jax.sharding.NamedSharding):
        columns = tuple(size for axis, size in enumerate(shape) if axis not in over)
        out = Int8(placement, sharding.sharding(sharding.OUTPUTS[name], columns, placement.mesh))
    return jax.jit(functools.partial(_quantized, jnp, over=over), out_shardings=out)
