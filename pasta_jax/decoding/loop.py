"""The compiled decode loop: B rows by S lanes, every shape static, nothing of it on the host.

while someone is running and steps are left:
    feed, record    interpreter: lanes from ready threads, entries into the trace
    attend          model: keys and values into the pool, hidden states out
    sample          one token a lane, tags under the grammar
    advance         interpreter: fork, hold, join, stop
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pasta_jax.arrays import Array
from pasta_jax.decoding import interpreter, sampling
from pasta_jax.decoding.interpreter import Rules
from pasta_jax.decoding.script import FREE
from pasta_jax.decoding.state import Lanes, Request, RowState, Stop
from pasta_jax.lang.grammar import Kind
from pasta_jax.model import Pool, Transformer
from pasta_jax.visibility import visible


@functools.partial(jax.tree_util.register_dataclass, data_fields=["rows", "requests", "pool"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Batch:
    """B requests being answered: every leaf has a leading B. Donated to each call and returned."""

    rows: RowState
    requests: Request
    pool: Pool


def prefill(
    model: Transformer,
    params: Any,
    rules: Rules,
    pool: Pool,
    requests: Request,
    prompts: Array,
    lengths: Array,
) -> Batch:
    """Feed the prompts and sample the first token of each answer.

    Args:
      model, params: the model.
      rules: the interpreter's.
      pool: empty, [B, P + S, K, H] a layer.
      requests: [B].
      prompts: int32 [B, L], padded at the end; L is a bucket.
      lengths: int32 [B]; 0 is an idle row.
    """
    limits = rules.limits
    begin = functools.partial(interpreter.begin, limits, limits.pool + limits.lanes)
    rows, lanes = jax.vmap(begin)(prompts, lengths)
    length = prompts.shape[1]
    prompt = jax.tree.map(lambda x: x[:, :length], rows.entries)
    start = jnp.zeros_like(lengths)
    hidden, pool = attend(model, params, prompt, prompt, pool, start)
    last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)
    hidden = jnp.broadcast_to(last, (last.shape[0], limits.lanes, last.shape[2]))
    rows = _sample_and_advance(model, params, rules, rows, requests, lanes, hidden)
    return Batch(rows, requests, pool)


def decode_chunk(model: Transformer, params: Any, rules: Rules, batch: Batch, steps: Array) -> Batch:
    """Up to `steps` decode steps: fewer when every row has stopped."""

    def someone_is_running_and_steps_are_left(carry: tuple[Array, Batch]) -> Array:
        done, batch = carry
        return jnp.any(batch.rows.stop == Stop.RUNNING) & (done < steps)

    def step(carry: tuple[Array, Batch]) -> tuple[Array, Batch]:
        done, batch = carry
        return done + 1, decode_step(model, params, rules, batch)

    _, batch = jax.lax.while_loop(someone_is_running_and_steps_are_left, step, (jnp.int32(0), batch))
    return batch


def decode_step(model: Transformer, params: Any, rules: Rules, batch: Batch) -> Batch:
    """One step of every row."""
    limits, requests = rules.limits, batch.requests
    start = batch.rows.cursor
    lanes = jax.vmap(functools.partial(interpreter.feed, limits=limits))(batch.rows, requests)
    rows = jax.vmap(interpreter.record)(batch.rows, lanes)
    hidden, pool = attend(model, params, lanes, rows.entries, batch.pool, start)
    rows = _sample_and_advance(model, params, rules, rows, requests, lanes, hidden)
    return Batch(rows, requests, pool)


def attend(
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
    keys = jax.vmap(jax.vmap(sampling.draw_key, (None, 0, 0)))(requests.key, path, lanes.order + 1)

    def each_lane(per_row: Array) -> Array:
        return jnp.repeat(per_row, S)

    sampled = sampling.sample(
        biased.reshape(B * S, V),
        keys.reshape(B * S, -1),
        each_lane(requests.temperature),
        each_lane(requests.top_k),
        each_lane(requests.top_p),
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
