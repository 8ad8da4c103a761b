"""One update of the weights, as a compiled function: the part of training that runs on the devices."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import optax

from pasta_jax import sharding
from pasta_jax.arrays import Array, ThreadedTokens
from pasta_jax.config import Config
from pasta_jax.model.transformer import Transformer, init_params
from pasta_jax.training.state import Params, TrainState, make_optimizer, make_schedule, new_state
from pasta_jax.visibility import visible

LossFn: TypeAlias = Callable[[Array, Any], tuple[Array, dict[str, Array]]]
"""From float32 logits [B, L, V] and the batch to the loss and measurements, "loss" among them."""


def logits_of(model: Transformer, params: Params, batch: ThreadedTokens) -> Array:
    """Of every token of a batch ([B, L] fields), all fed at once: float32 [B, L, V]."""
    out: Any = model.apply({"params": params}, batch.token, batch.position, visible(batch, batch))
    logits: Any = model.apply({"params": params}, out[0], method="logits")
    return logits


@dataclasses.dataclass(frozen=True)
class Update:
    """How a state is made and moved on a mesh.

    Attributes:
      step: jitted: state and the fields of a batch ([B, L] by name) to the next state and measurements; the
        state is donated. `.lower` compiles it ahead of time, from shapes.
      shapes: of a state, `jax.ShapeDtypeStruct`s.
      shardings: where its leaves lie.
      batch_sharding: where a batch's arrays lie.
      new_params: random weights, jitted.
      start: weights to a state before the first update, jitted.
    """

    step: Any
    shapes: TrainState
    shardings: TrainState
    batch_sharding: jax.sharding.NamedSharding
    new_params: Callable[[], Params]
    start: Callable[[Params], TrainState]


def make_update(
    config: Config, mesh: Any, loss_fn: LossFn, record: type[ThreadedTokens] = ThreadedTokens
) -> Update:
    """The update of an experiment, on a mesh of devices or of a topology.

    Args:
      config: sizes and the optimiser.
      mesh: where all lies.
      loss_fn: the loss.
      record: what a batch is, as the loss takes it.

    Raises:
      ValueError: the mesh does not divide what it should.
    """
    model = Transformer(config.model)
    optimizer = make_optimizer(config.optimizer, config.steps)
    schedule = make_schedule(config.optimizer, config.steps)
    new_params = functools.partial(init_params, config.model, jax.random.key(config.seed))
    shapes = jax.eval_shape(lambda: new_state(new_params(), optimizer))
    lie = sharding.param_shardings(shapes, mesh)  # the optimiser's moments have their parameters' names
    over_rows = sharding.batch_sharding(mesh, config.data.rows)

    @functools.partial(
        jax.jit,
        donate_argnums=0,
        in_shardings=(lie, over_rows),
        out_shardings=(lie, sharding.replicated(mesh)),
    )
    def step(state: TrainState, fields: dict[str, Array]) -> tuple[TrainState, dict[str, Array]]:
        batch = record(**fields)

        def loss_of(params: Params) -> tuple[Array, dict[str, Array]]:
            return loss_fn(logits_of(model, params, batch), batch)

        grads, measured = jax.grad(loss_of, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        measured |= {"lr": schedule(state.step), "grad_norm": optax.tree.norm(grads)}
        return TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1), measured

    start = jax.jit(functools.partial(new_state, optimizer=optimizer), out_shardings=lie)
    return Update(step, shapes, lie, over_rows, jax.jit(new_params, out_shardings=lie.params), start)
