"""The state of training, and the optimizer that updates it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from pasta_jax.arrays import Array
from pasta_jax.config import OptimizerConfig
from pasta_jax.model.forms import Params


@struct.dataclass
class TrainState:
    """Everything that an update reads and writes; a pytree."""

    params: Params
    opt_state: optax.OptState
    step: Array  # int32, number of updates made


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by update: linear warm-up to `lr`, then down to `final_lr * lr` at the end of `steps`."""
    warmup = min(config.warmup_steps, steps)
    rest = max(1, steps - warmup)
    after = {
        "constant": lambda: optax.constant_schedule(config.lr),
        "linear": lambda: optax.linear_schedule(config.lr, config.lr * config.final_lr, rest),
        "cosine": lambda: optax.cosine_decay_schedule(config.lr, rest, config.final_lr),
    }[config.schedule]()
    # The first update is made with lr / warmup: at a rate of zero it would be lost.
    warm = optax.linear_schedule(config.lr / max(1, warmup), config.lr, max(1, warmup - 1))
    return optax.join_schedules([warm, after], [warmup])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW, gradients clipped by their global norm."""
    adamw = optax.adamw(
        make_schedule(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decays,
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw) if config.clip_norm else adamw


def decays(params: Params) -> Params:
    """True for parameters that weight decay pulls to zero: all but norms and biases, by their names."""

    def is_decayed(path: tuple[Any, ...], _: Array) -> bool:
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        return not ("norm" in "/".join(names) or names[-1].endswith(("scale", "bias")))

    return jax.tree_util.tree_map_with_path(is_decayed, params)


def new_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Before the first update."""
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))
