"""Attention of documents to themselves by a kernel of tokamax: the extra [kernels] of setup.py.

The same values as `blocks.attend_to_earlier`, where the kernel takes the case: scores never leave the chip, and
blocks of scores in which nobody may attend to anybody are skipped. It needs who may attend to whom as a matrix, L x
L bytes of a row, of which a few are held at a time: those of one layer.
"""

from __future__ import annotations

import functools
import importlib.metadata
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from pasta_jax.arrays import Array
from pasta_jax.chips import chip_of
from pasta_jax.extras import optional
from pasta_jax.model.blocks import ATTENDED, attend_to_earlier
from pasta_jax.model.config import ModelConfig
from pasta_jax.sharding import AXES

TESTED = "0.0.17"
"""The version of tokamax whose inner functions these are; setup.py names it too."""

SPLASH = "tokamax._src.ops.experimental.tpu.splash_attention.splash_attention_kernel"
"""tokamax's public `dot_product_attention` has tiles of 128, and a device to look at, which is not there when a
program is compiled for another machine."""

BLOCKS = (512, 256, 128)
"""Queries, and keys, of a block: the first that divides the length, four times or more; or else the last. Large
ones take fewer steps, small ones compute less above the diagonal."""

LONGEST = 8192
"""Maximum length: a row's matrix of 16,384 tokens would take 256 MiB, and it is held three times."""


def attention_of(config: ModelConfig, length: int, mesh: Any) -> Callable[..., Array]:
    """How documents of this length attend to themselves: the kernel where it takes the case, or else blocks."""
    return attend_to_earlier if why_not(config, length, mesh) else functools.partial(attend_by_kernel, mesh)


def words_for(config: ModelConfig, length: int, mesh: Any) -> str:
    """What `attention_of` chooses, and why not the kernel, in a sentence."""
    reason = why_not(config, length, mesh)
    return f"Attention: by blocks of queries ({reason})." if reason else "Attention: by tokamax's kernel."


def why_not(config: ModelConfig, length: int, mesh: Any) -> str:
    """Why the kernel does not take the case, empty if it does; tokamax is imported for nothing but a TPU.

    Args:
      config: of the model.
      length: L, of the rows.
      mesh: on which the program runs; None is the default device.
    """
    if isinstance(mesh, AbstractMesh):
        return "of no known device"
    chip = chip_of(jax.devices()[0] if mesh is None else mesh.devices.flat[0])
    if chip is None or chip.name == "v4":
        return "the kernel is for TPUs from v5 on"
    try:
        optional(SPLASH, "kernels", "the kernel")
    except ImportError as error:
        return str(error).removesuffix(".")
    version = importlib.metadata.version("tokamax")
    if version != TESTED:
        return f"the kernel is that of tokamax {TESTED}, and {version} is installed"
    if config.head_dim % 64:
        return f"the kernel takes heads of 64 or a multiple of it, and these are of {config.head_dim}"
    if length % BLOCKS[-1] or length > LONGEST:
        return (
            f"the kernel takes a multiple of {BLOCKS[-1]} tokens up to {LONGEST:,}, and a row has {length:,}"
        )
    return ""


@jax.named_scope("attend")
def attend_by_kernel(
    mesh: Any,
    q_BxLxNxH: Array,
    k_BxKxLxH: Array,
    v_BxKxLxH: Array,
    may_attend: Any,
    query_scale: float = 0.0,
    softcap: float = 0.0,
    interpret: bool = False,
) -> Array:
    """`attend_to_earlier` by the kernel; rows and heads are spread over the mesh, if any, as AXES says.

    With `interpret` it runs anywhere, slowly.
    """
    attend_here = functools.partial(_attend, query_scale=query_scale, softcap=softcap, interpret=interpret)
    # The matrix is made again in the backward pass: layers keep what they would without a kernel.
    keep = jax.checkpoint_policies.save_only_these_names(ATTENDED)
    run: Callable[..., Array] = jax.checkpoint(attend_here, policy=keep, prevent_cse=False)
    if mesh is None or mesh.size == 1:
        return run(q_BxLxNxH, k_BxKxLxH, v_BxKxLxH, may_attend)
    rows, [heads] = AXES["B"], AXES["N"]
    copies = mesh.shape[heads] // math.gcd(mesh.shape[heads], k_BxKxLxH.shape[1])
    k_BxKxLxH, v_BxKxLxH = (jnp.repeat(x, copies, axis=1) for x in (k_BxKxLxH, v_BxKxLxH))
    by_head = P(rows, None, heads), P(rows, heads), P(rows, heads)
    by_row = jax.tree.map(lambda x: P(rows) if jnp.ndim(x) else P(), may_attend)
    spread: Callable[..., Array] = jax.shard_map(
        run, mesh=mesh, in_specs=(*by_head, by_row), out_specs=by_head[0], check_vma=False
    )
    return spread(q_BxLxNxH, k_BxKxLxH, v_BxKxLxH, may_attend)


def _attend(
    q_BxLxNxH: Array,
    k_BxKxLxH: Array,
    v_BxKxLxH: Array,
    may_attend: Any,
    *,
    query_scale: float,
    softcap: float,
    interpret: bool,
) -> Array:
    """`attend_by_kernel` on one device."""
    splash = optional(SPLASH, "kernels", "the kernel")
    L, N, H = q_BxLxNxH.shape[1:]
    size = next((size for size in BLOCKS if L % size == 0 and 4 * size <= L), BLOCKS[-1])
    forward, backward = _costs(L, N, H, size, q_BxLxNxH.dtype.itemsize)
    config = splash.SplashConfig(
        **dict.fromkeys(("block_q", "block_kv", "block_q_dkv", "block_kv_dkv"), size),
        attn_logits_soft_cap=softcap or None,
        residual_checkpoint_name=ATTENDED,
        fwd_cost_estimate=forward,
        bwd_cost_estimate=backward,
        interpret=interpret,
    )
    may_attend_BxLxL = may_attend.block(0, L, L)

    def attend_row(may_attend_LxL: Array, *qkv: Array) -> Array:
        out: Array = splash.make_dynamic_splash_mha(may_attend_LxL, config=config)(*qkv)
        return out

    q_BxNxLxH = (q_BxLxNxH / math.sqrt(query_scale or H)).swapaxes(1, 2)
    out_BxNxLxH = jax.vmap(attend_row)(may_attend_BxLxL, q_BxNxLxH, k_BxKxLxH, v_BxKxLxH)
    # For a block of queries that may attend to nothing the kernel writes nothing at all.
    is_alone_BxLx1x1 = ~may_attend_BxLxL.any(-1)[..., None, None]
    return jnp.where(is_alone_BxLx1x1, 0, out_BxNxLxH.swapaxes(1, 2))


def _costs(L: int, N: int, H: int, size: int, itemsize: int) -> tuple[Any, Any]:
    """What the kernel costs for a row, forward and backward, if no block up to the diagonal is skipped.

    For the compiler, and for who reads programs. A block of scores reads its part of the matrix, keys and values,
    in the backward pass also queries and cotangents, and adds to the gradient of queries; all else moves once.
    """
    from jax.experimental.pallas import CostEstimate

    blocks = N * (L // size) * (L // size + 1) // 2
    part, whole = size * H * itemsize, N * L * H * itemsize
    forward = 4 * blocks * size**2 * H, blocks * size**2, blocks * (size**2 + 2 * part) + 2 * whole
    backward = 10 * blocks * size**2 * H, blocks * size**2, blocks * (size**2 + 4 * part) + 4 * whole
    return CostEstimate(*forward), CostEstimate(*backward)
