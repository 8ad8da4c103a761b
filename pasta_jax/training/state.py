"""What training carries from step to step, and the optimiser that moves it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from pasta_jax.arrays import Array
from pasta_jax.config import OptimizerConfig

Params = Any
"""A nested dict of arrays with stable names."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """A plain pytree: all that an update reads and writes."""

    params: Params
    opt_state: optax.OptState
    step: Array  # int32, how many updates were made


def make_schedule(config: OptimizerConfig, steps: int, peak: float | None = None) -> optax.Schedule:
    """Learning rate by update: linear warm-up to the peak (`lr`), then down to a fraction of it after `steps`."""
    peak = config.lr if peak is None else peak
    warmup = min(config.warmup_steps, steps)
    rest = max(1, steps - warmup)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, peak * config.final_lr, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, config.final_lr),
    }[config.schedule]()
    # The first update is made with peak / warmup: at a rate of zero it would be lost.
    warm = optax.linear_schedule(peak / max(1, warmup), peak, max(1, warmup - 1))
    return optax.join_schedules([warm, after], [warmup])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW or Muon, gradients clipped by their global norm."""
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, {"adamw": _adamw, "muon": _muon}[config.name](config, steps))


def _adamw(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    return optax.adamw(
        make_schedule(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decays,
    )


def _muon(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Muon for the projections, each as the matrix that it multiplies with; AdamW for embeddings and norms."""
    return optax.contrib.muon(
        make_schedule(config, steps, config.muon_lr),
        weight_decay=config.weight_decay,
        adam_learning_rate=make_schedule(config, steps),
        adam_b1=config.b1,
        adam_b2=config.b2,
        muon_weight_dimension_numbers=matrix_dims,
    )


def matrix_dims(params: Params) -> Params:
    """Of each projection, which dimensions are the matrix's rows and which its columns; None for the others."""
    one_in = {name: optax.contrib.MuonDimensionNumbers(0, (1, 2)) for name in ("q_proj", "k_proj", "v_proj")}
    plain = {name: optax.contrib.MuonDimensionNumbers(0, 1) for name in ("gate_proj", "up_proj", "down_proj")}
    dims = {**one_in, **plain, "o_proj": optax.contrib.MuonDimensionNumbers((0, 1), 2)}

    def dims_here(path: tuple[Any, ...], _: Array) -> Any:
        return dims.get(jax.tree_util.keystr(path[-1:], simple=True))

    return jax.tree_util.tree_map_with_path(dims_here, params)


def decays(params: Params) -> Params:
    """True for parameters that weight decay pulls to zero: all but norms and biases, told by their names."""

    def decays_here(path: tuple[Any, ...], _: Array) -> bool:
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        return not ("norm" in "/".join(names) or names[-1] in ("scale", "bias"))

    return jax.tree_util.tree_map_with_path(decays_here, params)


def new_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Before the first update."""
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))
