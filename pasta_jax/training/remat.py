"""What the backward pass computes again, chosen by what fits: an update's memory, estimated before it compiles.

The estimate counts what must be held at once on one device: weights and optimizer, what is computed from them (a
copy in the model's dtype, its layers stacked, and the gradient), what the forward pass keeps for the backward pass,
one layer's own work, and the logits of a part of each row. It needs no tracing, and is meant to be a little
too high: `python -m pasta_jax.compile` has what the compiler counts.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from pasta_jax.chips import chip_of
from pasta_jax.config import Config, Remat
from pasta_jax.memory import GIB, gib, host_size
from pasta_jax.model.config import ModelConfig
from pasta_jax.processes.agreement import least

SPARE = 0.1
"""The part of a device's memory that the estimate leaves free."""

LOGITS = 2**25
"""Maximum number of float32 logits of a row held at once: 128 MiB."""


@dataclasses.dataclass(frozen=True)
class Needs:
    """Bytes that an update takes on one device.

    Attributes:
      parameters: trained and frozen ones.
      optimizer: its state.
      activations: what the forward pass keeps for the backward pass.
      working: all else, gradients among it.
    """

    parameters: int
    optimizer: int
    activations: int
    working: int

    @property
    def total(self) -> int:
        return self.parameters + self.optimizer + self.activations + self.working


@dataclasses.dataclass(frozen=True)
class RematChoice:
    """What the backward pass computes again, and why.

    Attributes:
      remat: the policy, never "auto".
      needs: the estimate for it.
      capacity: bytes of a device; None if unknown.
      was_chosen: by memory; otherwise the configuration names it.
    """

    remat: Remat
    needs: Needs
    capacity: int | None
    was_chosen: bool

    def __str__(self) -> str:
        needs, has = self.needs.total, self.capacity
        chosen = ", chosen by memory" if self.was_chosen else ""
        of = f"{gib(needs)} GiB of a device's {gib(has)} GiB" if has else f"{gib(needs)} GiB of a device"
        way_out = ": it may not fit, and python -m pasta_jax.compile finds what does"
        return f"Remat: {self.remat}{chosen}. An update takes about {of}{way_out if has and needs > has else ''}."


def choose(config: Config, mesh: Any, state: Any, base: Any) -> RematChoice:
    """The policy of an experiment: its own, or for "auto" that which computes least again of those that fit.

    Args:
      config: of the experiment.
      mesh: of all arrays.
      state, base: the shapes of the training state and of frozen weights, with their shardings.
    """
    capacity = device_memory(mesh)
    names: tuple[Remat, ...] = ("none", "dots", "everything")
    if config.remat != "auto":
        names = (config.remat,)
    for name in names:
        needs = estimate(config, mesh, state, base, name)
        if capacity is None or needs.total <= (1 - SPARE) * capacity:
            break
    return RematChoice(name, needs, capacity, config.remat == "auto")


def estimate(config: Config, mesh: Any, state: Any, base: Any, remat: Remat) -> Needs:
    """Bytes of an update on one device; arguments as for `choose`."""
    c, compute = config.model, jnp.dtype(config.model.dtype).itemsize
    trained, frozen = bytes_of(state.params), bytes_of(base)
    numbers = bytes_of(state.params, 1)
    weights = base if config.lora.rank else state.params
    layers = {name: leaf for name, leaf in weights.items() if name.startswith("layer_")}
    copies = bytes_of(weights, 1) * compute  # in the model's dtype, their layers stacked
    gradients = numbers * compute + (numbers * 4 if config.microbatches > 1 else 0)
    rows = config.data.rows / config.microbatches / (mesh.shape["data"] * mesh.shape["fsdp"])
    tokens, tensor = rows * config.data.length, mesh.shape["tensor"]
    kept = c.num_layers * tokens * kept_by_layer(c, remat, tensor)
    one = (
        tokens * kept_by_layer(c, "none", tensor) + bytes_of(layers, 1, whole="fsdp") * compute / c.num_layers
    )
    logits = 3 * 4 * rows * min(config.data.length * c.vocab_size, LOGITS) / tensor
    table = c.vocab_size * c.model_dim * (compute if config.lora.rank else compute + 4)
    working = copies + gradients + one + logits + table / (tensor * mesh.shape["fsdp"])
    return Needs(trained + frozen, bytes_of(state.opt_state), round(kept), round(working))


def kept_by_layer(c: ModelConfig, remat: str, tensor: int = 1) -> float:
    """Bytes for each token that the backward pass needs of a layer; heads and the MLP are split over `tensor`."""
    size = jnp.dtype(c.dtype).itemsize
    D, N, H, F = c.model_dim, c.num_heads, c.head_dim, c.mlp_dim
    K = max(c.num_kv_heads, tensor) if c.num_kv_heads % tensor else c.num_kv_heads
    if remat == "everything":
        return size * D
    if remat == "dots":
        return (
            size * ((3 if c.post_norms else 2) * D + (2 * N * H + 2 * K * H + 2 * F) / tensor)
            + 4 * N / tensor
        )
    norms = 24 * D + (12 * D if c.post_norms else 0) + (12 * (N + K) * H / tensor if c.qk_norm else 0)
    return norms + size * (5 * D + (3 * N * H + 2 * K * H + 8 * F) / tensor)


def bytes_of(tree: Any, itemsize: int = 0, whole: str = "") -> int:
    """Bytes that arrays take on one device.

    Args:
      tree: shapes with shardings.
      itemsize: bytes of a number, if not that of its dtype.
      whole: a mesh axis over which the arrays are gathered.
    """
    total = 0
    for leaf in jax.tree.leaves(tree):
        size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * (itemsize or leaf.dtype.itemsize)
        spread = any(whole in (axis or ()) for axis in leaf.sharding.spec) if whole else False
        total += size * (leaf.sharding.mesh.shape[whole] if spread else 1)
    return total


def device_memory(mesh: Any) -> int | None:
    """Bytes of memory of one device of a mesh, which need not be there; None if unknown.

    The whole of it and not what is free now, so that a run that goes on chooses as before. Devices of a CPU share
    the machine's. Of several processes that with least decides for all.
    """
    device = mesh.devices.flat[0]
    if chip := chip_of(device):
        return chip.hbm
    if device.platform == "cpu":
        size = host_size()
        return size and least(size // len(jax.local_devices(backend="cpu")))
    stats = jax.local_devices()[0].memory_stats() or {}
    return least(stats["bytes_limit"] // GIB * GIB) if "bytes_limit" in stats else None
