"""A pass over whole documents, as training makes it: one layer compiled, and run Z times by `jax.lax.scan`.

So compiling the pass takes as long for eighty layers as for nine. The layers' parameters, alike in shape, are
stacked for it within the program; checkpoints and all else hold them layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import struct

from pasta_jax.arrays import Array
from pasta_jax.model.blocks import ATTENDED, MayAttend, some
from pasta_jax.model.forms import Params
from pasta_jax.model.kernels import attention_of
from pasta_jax.model.layers import Layer
from pasta_jax.model.rotary import rotary_of
from pasta_jax.model.transformer import Transformer
from pasta_jax.sharding import by_rows, place

T = TypeVar("T")

UNROLLED = 8
"""Maximum number of layers that are compiled one by one: for so few that takes no longer, and a CPU, which computes
what does not depend on each other side by side, then takes a tenth less time."""


POLICIES: Mapping[str, Any] = {
    "none": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(ATTENDED),
    ),
    "everything": jax.checkpoint_policies.nothing_saveable,
}
"""What of a layer is kept for the backward pass: all; matrix products and attention; its input alone."""


def rematerialized(run: Callable[..., T], remat: str) -> Callable[..., T]:
    """The body of a loop over layers, of whose results the backward pass has only those that `remat` keeps."""
    return run if remat == "none" else jax.checkpoint(run, prevent_cse=False, policy=POLICIES[remat])


def stack(params: Params, layers: int) -> Params:
    """The parameters of all layers as one tree, whose leaves have a first dimension Z."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[f"layer_{z}"] for z in range(layers)))


@struct.dataclass
class Windowed:
    """`MayAttend` of local layers too, which see no key that is `window` or more positions before the query."""

    may_attend: Any  # MayAttend
    position: Array  # int32 [B, L]
    window: Array  # int32 []

    def block(self, start: Array | int, size: int, keys: int) -> Array:
        distance = some(self.position, start, size)[:, :, None] - self.position[:, None, :keys]
        return self.may_attend.block(start, size, keys) & (distance < self.window)


def hidden_states(
    model: Transformer,
    params: Params,
    tokens_BxL: Array,
    positions_BxL: Array,
    may_attend: MayAttend,
    remat: str = "none",
    mesh: Any = None,
) -> Array:
    """Hidden states [B, L, D] after the last norm, those of `Transformer.__call__` without a pool.

    Args:
      model: of the parameters.
      params: plain.
      tokens_BxL, positions_BxL: int32, vocabulary ids and rotary positions.
      may_attend: who may attend to whom; nobody to a later token.
      remat: what the backward pass computes again, a name in `POLICIES`.
      mesh: over which rows are spread, if any. Without being told, XLA would spread hidden states as the weights
        are, by D, and compute every layer for all rows on every device.
    """
    c = model.config
    rotary = rotary_of(c, positions_BxL)
    is_local_Z = jnp.array([kind == "local" for kind in c.kinds])
    endless = jnp.iinfo(jnp.int32).max
    layer = Layer(c, model.lora, attention_of(c, tokens_BxL.shape[1], mesh))
    # Unrolled, XLA would compute nothing again: it takes the second computation for the first.
    unroll = c.num_layers <= UNROLLED and remat == "none"

    def run(x_BxLxD: Array, of_layer: tuple[Params, Array]) -> tuple[Array, None]:
        weights, is_local = of_layer
        angles, sees = rotary.get("global", rotary.get("local")), may_attend
        if not unroll:  # or the masks of all blocks would be made before the loop, and kept: L x L of them
            x_BxLxD, sees = jax.lax.optimization_barrier((x_BxLxD, sees))
        if "local" in rotary:
            angles = jax.tree.map(
                lambda local, other: jnp.where(is_local, local, other), rotary["local"], angles
            )
            sees = Windowed(sees, positions_BxL, jnp.where(is_local, c.sliding_window, endless))
        return by_rows(layer.apply({"params": weights}, x_BxLxD, angles, sees, None, None)[0], mesh), None

    run = rematerialized(run, remat)
    embedded = model.apply({"params": params}, tokens_BxL, method=lambda m, tokens: m.embed(tokens))
    # Each device looks up its own columns of the table, and then they exchange them.
    embedded = by_rows(place(embedded, mesh, "data", None, "fsdp"), mesh)
    layers = stack(params, c.num_layers), is_local_Z
    hidden, _ = jax.lax.scan(run, embedded, layers, unroll=unroll)
    return model.apply({"params": params}, hidden, method=lambda m, x: m.final_norm(x))
