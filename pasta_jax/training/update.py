"""One update of the weights, as a compiled function: the part of training that runs on the devices."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import AbstractMesh

from pasta_jax import sharding
from pasta_jax.arrays import NO_TARGET, Array, ThreadedTokens
from pasta_jax.config import Config
from pasta_jax.model import lora as adapters
from pasta_jax.model.blocks import some
from pasta_jax.model.forms import Params
from pasta_jax.model.scan import hidden_states
from pasta_jax.model.transformer import Transformer, init_params, logits, param_shapes, uncapped
from pasta_jax.rounding import ceil_div
from pasta_jax.training.losses import Scores, Sums, score
from pasta_jax.training.microbatches import rows_sharding, sum_over_parts
from pasta_jax.training.remat import LOGITS, RematChoice, choose
from pasta_jax.training.scores import score_hidden
from pasta_jax.training.state import TrainState, make_optimizer, make_schedule, new_state
from pasta_jax.visibility import visible

LossFn: TypeAlias = Callable[[Scores, Any], Sums]
"""From the scores of a batch's targets and the batch, or a part of it, to the loss and measurements, "loss" among
them."""


CACHED_LOGITS = 2**23
"""Maximum number of logits that a CPU scores at once."""


@struct.dataclass
class Documents:
    """`model.blocks.MayAttend` by `visible`: of tokens with these fields."""

    doc: Array
    segment: Array
    order: Array
    sees: Array

    def block(self, start: Array | int, size: int, keys: int) -> Array:
        """Bool [B, size, keys]: the queries from `start` on, and the first keys."""
        queries = jax.tree.map(lambda x: some(x, start, size), self)
        return visible(queries, jax.tree.map(lambda x: x[:, :keys], self))


def scores_of(
    model: Transformer, params: Params, batch: ThreadedTokens, remat: str = "none", mesh: Any = None
) -> Scores:
    """The scores of every target of a batch ([B, L] fields), all tokens fed at once.

    Logits of a large vocabulary are computed, and recomputed in the backward pass, for some tokens of each row at a
    time: a row of 2,048 tokens has 2 GB of them in Gemma, and gradients of the same size.
    """
    return scores_at(model, params, hidden_of(model, params, batch, remat, mesh), batch.target, mesh)


def hidden_of(
    model: Transformer, params: Params, batch: ThreadedTokens, remat: str = "none", mesh: Any = None
) -> Array:
    """The hidden states of a batch ([B, L] fields), all tokens fed at once: [B, L, D]."""
    sees = Documents(batch.doc, batch.segment, batch.order, batch.sees)
    return hidden_states(model, params, batch.token, batch.position, sees, remat, mesh)


def scores_at(
    model: Transformer, params: Params, hidden_BxLxD: Array, target_BxL: Array, mesh: Any = None
) -> Scores:
    """The scores of targets, int32 [B, L], from the hidden states; as `scores_of`."""
    B, L, D = hidden_BxLxD.shape
    V = model.config.vocab_size
    size = min(L, max(1, LOGITS // V))
    computes_again, is_on_cpu = size < L, on_cpu(mesh)
    if not computes_again and is_on_cpu:  # what is computed from some logits finds them in cache
        size = min(L, max(8, CACHED_LOGITS // (B * V)))
    count = ceil_div(L, size)

    place = functools.partial(sharding.by_vocabulary, vocab_size=model.config.vocab_size, mesh=mesh)
    tables = {name: params[name] for name in ("embed", "head", "head_rows") if name in params}
    if "head" in tables:
        tables["head"] = place(tables["head"], "DV")
    else:
        tables["embed"] = {**tables["embed"], "embedding": place(tables["embed"]["embedding"], "VD")}

    product, softcap = functools.partial(uncapped, model), model.config.final_softcap

    def score_some(tables: Params, hidden_BxCxD: Array, target_BxC: Array) -> Scores:
        if is_on_cpu:
            return score_hidden(product, softcap, tables, hidden_BxCxD, target_BxC)
        return score(logits(model, tables, place(hidden_BxCxD, "BCD")), target_BxC)

    if count == 1:
        return score_some(tables, hidden_BxLxD, target_BxL)
    padding = count * size - L
    hidden_BxLxD = jnp.pad(hidden_BxLxD, ((0, 0), (0, padding), (0, 0)))
    target_BxL = jnp.pad(target_BxL, ((0, 0), (0, padding)), constant_values=NO_TARGET)
    hidden = jnp.moveaxis(hidden_BxLxD.reshape(B, count, size, D), 1, 0)
    target = jnp.moveaxis(target_BxL.reshape(B, count, size), 1, 0)

    # The gradients of all parts are added up in float32; frozen weights have none.
    frozen, trained = adapters.split(tables) if model.lora.rank else ({}, tables)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), trained)

    @jax.checkpoint
    def score_part(part: tuple[Array, Array]) -> Scores:
        narrow = jax.tree.map(lambda x, like: x.astype(like.dtype), wide, trained)
        return score_some(adapters.join(frozen, narrow), *part)

    if computes_again:
        scores = jax.lax.map(score_part, (hidden, target))
    else:
        scores = score_hidden(product, softcap, tables, hidden, target)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(B, -1)[:, :L], scores)


def on_cpu(mesh: Any) -> bool:
    """Whether a program for this mesh, or for the default device, runs on one CPU."""
    if mesh is None:
        return jax.default_backend() == "cpu"
    return mesh.size == 1 and not isinstance(mesh, AbstractMesh) and mesh.devices.flat[0].platform == "cpu"


@dataclasses.dataclass(frozen=True)
class Update:
    """The compiled functions of training on a mesh, and the shapes and shardings of their arrays.

    With adapters the state holds them alone, and the frozen weights are the `base`. Without, the base is empty and
    the state holds all weights.

    Attributes:
      step: jitted: state, base and the fields of a batch ([B, L] by name) to the next state and measurements;
        the state is donated. `.lower` compiles it ahead of time, from shapes.
      shapes: of a state, `jax.ShapeDtypeStruct`s.
      shardings: of a state.
      base_shapes, base_shardings: of the base, which is in the model's dtype.
      batch_sharding: of a batch's arrays.
      new_params: random weights of a model without adapters.
      new_adapters: the base to new adapters, which change nothing yet.
      start: trained parameters to a state before the first update, which holds these same arrays.
      remat: what the backward pass computes again, and the memory that it needs by estimate.
    """

    step: Any
    shapes: TrainState
    shardings: TrainState
    base_shapes: Params
    base_shardings: Params
    batch_sharding: jax.sharding.NamedSharding
    new_params: Callable[[], Params]
    new_adapters: Callable[[Params], Params]
    start: Callable[[Params], TrainState]
    remat: RematChoice


def make_update(
    config: Config, mesh: Any, loss_fn: LossFn, record: type[ThreadedTokens] = ThreadedTokens
) -> Update:
    """The update of an experiment, on a mesh of devices or of a topology.

    Args:
      config: sizes and the optimizer.
      mesh: of all arrays.
      loss_fn: the loss.
      record: the class of a batch, as the loss takes it.

    Raises:
      ValueError: the mesh does not divide what it should.
    """
    model = Transformer(config.model, config.lora)
    optimizer = make_optimizer(config.optimizer, config.steps)
    schedule = make_schedule(config.optimizer, config.steps)
    key, dtype = jax.random.key(config.seed), jnp.dtype(config.trained_dtype)
    masters = dataclasses.replace(config.model, dtype=config.trained_dtype)
    new_adapters = functools.partial(adapters.start, lora=config.lora, key=key, dtype=dtype)
    base_shapes: Params = {}
    if config.lora.rank:
        base_shapes = param_shapes(config.model)
        trained = jax.eval_shape(new_adapters, base_shapes)
    else:
        trained = param_shapes(masters)
    shapes = jax.eval_shape(functools.partial(new_state, optimizer=optimizer), trained)
    shardings = sharding.param_shardings(shapes, mesh)  # the optimizer's moments have their parameters' names
    base_shardings = sharding.param_shardings(base_shapes, mesh)
    batch_sharding = rows_sharding(mesh, config.data.rows, config.microbatches)
    placed = sharding.abstract(shapes, shardings), sharding.abstract(base_shapes, base_shardings)
    remat = choose(config, mesh, *placed)

    @functools.partial(
        jax.jit,
        donate_argnums=0,
        in_shardings=(shardings, base_shardings, batch_sharding),
        out_shardings=(shardings, sharding.replicated(mesh)),
    )
    def step(
        state: TrainState, base: Params, fields: dict[str, Array]
    ) -> tuple[TrainState, dict[str, Array]]:
        def loss_of(params: Params, part: dict[str, Array]) -> tuple[Array, Sums]:
            batch = record(**part)
            sums = loss_fn(scores_of(model, adapters.join(base, params), batch, remat.remat, mesh), batch)
            return sums.values["loss"], sums

        computed = jax.tree.map(lambda x: x.astype(config.model.dtype), state.params)
        grads, sums = sum_over_parts(
            lambda part: jax.grad(loss_of, has_aux=True)(computed, part),
            fields,
            config.microbatches,
            mesh,
            lambda both: (jax.lax.with_sharding_constraint(both[0], shardings.params), both[1]),
        )
        grads = jax.tree.map(lambda g, p: (g * sums.share).astype(p.dtype), grads, state.params)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        _, measured = sums.mean()
        measured |= {"lr": schedule(state.step), "grad_norm": optax.tree.norm(grads)}
        return TrainState(params, opt_state, state.step + 1), measured

    return Update(
        step,
        shapes,
        shardings,
        base_shapes,
        base_shardings,
        batch_sharding,
        functools.partial(init_params, masters, key, shardings=shardings.params),
        functools.partial(new_adapters, shardings=shardings.params),
        lambda params: sharding.from_host(new_state(params, optimizer), shardings),
        remat,
    )


def make_measure(
    config: Config, mesh: Any, loss_fn: LossFn, record: type[ThreadedTokens], update: Update
) -> Callable[[Params, Params, dict[str, Array]], Sums]:
    """A jitted function of trained parameters, base and the fields of a batch: the sums of the loss, no gradient.

    Args:
      config, mesh, loss_fn, record: as for `make_update`.
      update: whose arrays it takes.
    """
    model = Transformer(config.model, config.lora)
    shardings = update.shardings.params, update.base_shardings, update.batch_sharding

    @functools.partial(jax.jit, in_shardings=shardings, out_shardings=sharding.replicated(mesh))
    def measure(params: Params, base: Params, fields: dict[str, Array]) -> Sums:
        weights = adapters.join(base, jax.tree.map(lambda x: x.astype(config.model.dtype), params))

        def of_part(part: dict[str, Array]) -> Sums:
            batch = record(**part)
            return loss_fn(scores_of(model, weights, batch, mesh=mesh), batch)

        return sum_over_parts(of_part, fields, config.microbatches, mesh, lambda sums: sums)

    return measure
