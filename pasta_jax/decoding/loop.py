"""The compiled decode loop: B rows by S lanes, every shape static, nothing of it on the host.

while someone is running and steps are left:
    feed, record    interpreter: lanes from ready threads, entries into the trace
    attend          model: keys and values into the pool, hidden states out
    sample          one token a lane, tags under the grammar
    advance         interpreter: fork, hold, join, stop

A step is compiled for a few widths, and the state says which comes next: one loop for each width, inside one
that goes round them. (Loops, not a conditional: a loop's state stays where it is.)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pasta_jax.arrays import Array
from pasta_jax.decoding import interpreter, sampling
from pasta_jax.decoding.interpreter import Rules
from pasta_jax.decoding.script import FREE
from pasta_jax.decoding.state import (
    Lanes,
    Limits,
    Phase,
    Request,
    RowState,
    Stop,
    empty_row,
)
from pasta_jax.lang.grammar import Kind
from pasta_jax.model import ModelConfig, Pool, Transformer, empty_pool
from pasta_jax.visibility import visible


@functools.partial(jax.tree_util.register_dataclass, data_fields=["rows", "requests", "pool"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Batch:
    """B requests being answered: every leaf has a leading B. Donated to each call and returned."""

    rows: RowState
    requests: Request
    pool: Pool


def empty_batch(config: ModelConfig, limits: Limits, rows: int, request: Request) -> Batch:
    """B rows that stand idle, with a request that nobody reads. A step writes S entries: there are P + S."""
    entries = limits.pool + limits.lanes

    def each_row(leaf: Any) -> Array:
        return jnp.broadcast_to(leaf, (rows, *jnp.shape(leaf)))

    state, requests = jax.tree.map(each_row, (empty_row(limits, entries), request))
    return Batch(state, requests, empty_pool(config, rows, entries))


# ------------------------------------------------------------------------------------------------ new rows


def admit(
    model: Transformer,
    params: Any,
    rules: Rules,
    batch: Batch,
    slots: Array,
    requests: Request,
    prompts: Array,
    lengths: Array,
) -> Batch:
    """Feed n prompts, sample the first token of each answer, and put them into rows; the others stay as they are.

    Args:
      model, params: the model.
      rules: the interpreter's.
      batch: donated.
      slots: int32 [n], the row that each takes. With n = B they are not read: each takes its own.
      requests: [n].
      prompts: int32 [n, L], padded at the end; L is a bucket.
      lengths: int32 [n]; with n = B, 0 leaves the row as it is.
    """
    n, length = prompts.shape
    entries = rules.limits.pool + rules.limits.lanes
    rules = _with_lanes(rules, 1)
    rows, lanes = jax.vmap(functools.partial(interpreter.begin, rules.limits, entries))(prompts, lengths)
    prompt = jax.tree.map(lambda x: x[:, :length], rows.entries)
    out: Any = model.apply({"params": params}, prompt.token, prompt.position, visible(prompt, prompt))
    hidden, written = out
    last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)
    rows = _sample_and_advance(model, params, rules, rows, requests, lanes, last)

    def insert(old: Array, new: Array) -> Array:
        """The new rows' leading part of every dimension but B; what lies behind a prompt nobody sees."""
        if n < old.shape[0]:
            for i in range(n):
                old = jax.lax.dynamic_update_slice(old, new[i : i + 1], (slots[i], *[0] * (old.ndim - 1)))
            return old
        part = tuple(slice(size) for size in new.shape)
        is_new = (lengths > 0).reshape(-1, *[1] * (old.ndim - 1))
        return old.at[part].set(jnp.where(is_new, new, old[part]))

    return jax.tree.map(insert, batch, Batch(rows, requests, written))


def release(batch: Batch, stop: Array) -> Batch:
    """Rows that the host stops: `stop` int32 [B], a `Stop`, or RUNNING for those that it leaves alone."""
    stop = jnp.where(stop == Stop.RUNNING, batch.rows.stop, stop)
    return dataclasses.replace(batch, rows=dataclasses.replace(batch.rows, stop=stop))


def take(rows: RowState, row: Array) -> RowState:
    """One row, without B."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, row, keepdims=False), rows)


# --------------------------------------------------------------------------------------------------- steps


def decode_chunk(
    model: Transformer,
    params: Any,
    rules: Rules,
    batch: Batch,
    steps: Array,
    refill: Array,
    used: int | None = None,
    widths: tuple[int, ...] = (),
) -> Batch:
    """Decode steps until the host has something to do.

    That is when every row has stopped, when `steps` are done, when a row has stopped and a prompt waits for it,
    or when the next step might not fit into the used part of the pool.

    Args:
      model, params: the model.
      rules: the interpreter's.
      batch: donated.
      steps: int32 [], at most so many.
      refill: bool [], whether a prompt waits.
      used: entries of the pool that steps read; static. None is all.
      widths: lanes that a step may have, the fewest first and S last; static. None given is S alone.
    """
    limits = rules.limits
    widths = widths or (limits.lanes,)
    entries = limits.pool + limits.lanes
    used = min(used or entries, entries)
    at_first = jnp.sum(batch.rows.stop == Stop.RUNNING)
    alone = batch.rows.stop.shape[0] == 1

    def without_B(batch: Batch) -> Batch:
        """As the loops carry it: one row's pool is [K, P, H], for XLA on CPU would copy [1, K, P, H] each step."""
        return _with_pool(batch, lambda leaf: leaf[0]) if alone else batch

    def with_B(batch: Batch) -> Batch:
        return _with_pool(batch, lambda leaf: leaf[None]) if alone else batch

    def goes_on(carry: tuple[Array, Batch]) -> Array:
        done, batch = carry
        running = batch.rows.stop == Stop.RUNNING
        fits = (batch.rows.cursor + limits.lanes <= used) | ~running
        vacant = jnp.sum(running) < at_first
        return jnp.any(running) & (done < steps) & jnp.all(fits) & ~(refill & vacant)

    def at_width(lanes: int, fewer: int) -> Callable[[tuple[Array, Batch]], tuple[Array, Batch]]:
        narrow = _with_lanes(rules, lanes)

        def is_next(carry: tuple[Array, Batch]) -> Array:
            width = jnp.minimum(_width(carry[1].rows), limits.lanes)
            return goes_on(carry) & (width <= lanes) & (width > fewer)

        def step(carry: tuple[Array, Batch]) -> tuple[Array, Batch]:
            done, batch = carry
            return done + 1, without_B(decode_step(model, params, narrow, with_B(batch), used))

        return lambda carry: jax.lax.while_loop(is_next, step, carry)

    loops = [at_width(lanes, fewer) for fewer, lanes in zip((-1, *widths), widths)]

    def round_the_widths(carry: tuple[Array, Batch]) -> tuple[Array, Batch]:
        for steps_of_a_width in loops:
            carry = steps_of_a_width(carry)
        return carry

    start = (jnp.int32(0), without_B(batch))
    if len(loops) == 1:
        return with_B(loops[0](start)[1])
    return with_B(jax.lax.while_loop(goes_on, round_the_widths, start)[1])


def _with_pool(batch: Batch, change: Callable[[Array], Array]) -> Batch:
    return dataclasses.replace(batch, pool=jax.tree.map(change, batch.pool))


def _with_lanes(rules: Rules, lanes: int) -> Rules:
    return dataclasses.replace(rules, limits=dataclasses.replace(rules.limits, lanes=lanes))


def _width(rows: RowState) -> Array:
    """The most threads that are ready in a row: int32 []."""
    ready = (rows.threads.phase == Phase.READY) & (rows.stop == Stop.RUNNING)[:, None]
    return jnp.max(jnp.sum(ready, axis=1))


def decode_step(
    model: Transformer, params: Any, rules: Rules, batch: Batch, used: int | None = None
) -> Batch:
    """One step of every row, with as many lanes as the rules' limits say; `used` as in `decode_chunk`."""
    limits, requests = rules.limits, batch.requests
    start = batch.rows.cursor
    lanes = jax.vmap(functools.partial(interpreter.feed, limits=limits))(batch.rows, requests)
    rows = jax.vmap(interpreter.record)(batch.rows, lanes)
    keys = jax.tree.map(lambda x: x[:, :used], rows.entries)
    hidden, pool = run_model(model, params, lanes, keys, batch.pool, start)
    rows = _sample_and_advance(model, params, rules, rows, requests, lanes, hidden)
    return Batch(rows, requests, pool)


def run_model(
    model: Transformer, params: Any, queries: Any, keys: Any, pool: Pool, start: Array
) -> tuple[Array, Pool]:
    """The model over the pool.

    Args:
      model, params: the model.
      queries: what is fed: token, position and the fields that `visible` reads, [B, Q].
      keys: position and the fields that `visible` reads of the pool's entries, [B, P].
      pool, start: where the queries' keys and values are written.

    Returns:
      Hidden states [B, Q, D], and the pool.
    """
    may_attend = visible(queries, keys)
    places = (queries.token, queries.position, may_attend, pool, start, keys.position)
    out: Any = model.apply({"params": params}, *places)
    return out


def _sample_and_advance(
    model: Transformer,
    params: Any,
    rules: Rules,
    rows: RowState,
    requests: Request,
    lanes: Lanes,
    hidden: Array,
) -> RowState:
    """Hidden states [B, S, D] of what the lanes fed, to the next state of every row."""
    logits = model.apply({"params": params}, hidden, method="logits")  # float32 [B, S, V]
    sampled, logprob = choose(rules, rows, requests, lanes, logits)
    advance = functools.partial(interpreter.advance, rules=rules)
    return jax.vmap(advance)(rows, requests, lanes, sampled, logprob)


def choose(
    rules: Rules, rows: RowState, requests: Request, lanes: Lanes, logits: Array
) -> tuple[Array, Array]:
    """The next token of each lane, int32 [B, S], and the log-probability the model gave it, float32 [B, S].

    The log-probability is the model's own: before grammar, bias and temperature. A token of the request's script
    takes the place of the sampled one, whatever the grammar says of it.
    """
    B, S, V = logits.shape
    limits = rules.limits
    is_open = (rules.kinds == Kind.OPEN) | (rules.kinds == Kind.FORK)
    biased = jnp.where(is_open, logits + requests.open_bias[:, None, None], logits)
    legal = jax.vmap(functools.partial(interpreter.legal_tokens, rules=rules))(rows, lanes)
    biased = jnp.where(legal, biased, sampling.NEVER)
    thread = jnp.minimum(lanes.thread, limits.threads - 1)
    path = jnp.take_along_axis(rows.threads.path, thread, axis=1)

    def keys() -> Array:
        draw_keys = jax.vmap(jax.vmap(sampling.draw_key, (None, 0, 0)))
        return draw_keys(requests.key, path, lanes.order + 1).reshape(B * S, -1)

    def each_lane(per_row: Array) -> Array:
        return jnp.repeat(per_row, S)

    sampled = sampling.sample(
        biased.reshape(B * S, V),
        keys,
        each_lane(requests.temperature),
        each_lane(requests.top_k),
        each_lane(requests.top_p),
        each_lane(requests.min_p),
    ).reshape(B, S)
    if requests.script.shape[-1]:
        sampled = jax.vmap(_as_scripted)(requests, rows.prompt_length, path, lanes.order + 1, sampled)
    chosen = jnp.take_along_axis(logits, sampled[..., None], axis=-1)[..., 0]
    return sampled, chosen - jax.nn.logsumexp(logits, axis=-1)


def _as_scripted(request: Request, prompt_length: Array, path: Array, order: Array, sampled: Array) -> Array:
    """One row's tokens, int32 [S], as the request's script has them; those that it leaves free as sampled.

    Args:
      request: the row's.
      prompt_length: int32 [], which main's order counts in.
      path, order: int32 [S], of the thread and of the token in it.
      sampled: int32 [S].
    """
    mine = request.script_paths == path[:, None]  # [S, R]
    index = order - jnp.where(path == 0, prompt_length, 0)
    said = request.script.at[jnp.argmax(mine, axis=-1), index].get(mode="fill", fill_value=FREE)
    return jnp.where(jnp.any(mine, axis=-1) & (said != FREE), said, sampled)
