"""The compiled decode loop: B rows by S lanes, every shape static, nothing of it on the host.

while a row is running and steps are left:
    feed        interpreter: lanes from ready threads
    record      interpreter: lanes into the pool's entries, which are the row's trace
    attend      model: keys and values into the pool, hidden states out
    sample      one token a lane, tags under the grammar
    advance     interpreter: fork, hold, join, stop

A step is compiled for a few widths, and the state says which comes next: that which feeds most threads for what it
costs. There is one loop for each width, inside a loop over the widths. (Loops, not a conditional: a loop's state
stays in its place.)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import struct

from pasta_jax.arrays import Array, Tokens
from pasta_jax.decoding import cpu, interpreter, sampling
from pasta_jax.decoding.interpreter import Rules
from pasta_jax.decoding.script import FREE
from pasta_jax.decoding.state import (
    DecodedTokens,
    Limits,
    Phase,
    Request,
    RowState,
    Stop,
    ThreadTable,
    empty_row,
)
from pasta_jax.lang.grammar import Kind
from pasta_jax.model import ModelConfig, Pool, Transformer, empty_pool, forward, logits
from pasta_jax.visibility import visible


@struct.dataclass
class Batch:
    """B requests being answered: every leaf has a leading B. Donated to each call and returned."""

    rows: RowState
    requests: Request
    pool: Pool


def empty_batch(config: ModelConfig, limits: Limits, rows: int, request: Request) -> Batch:
    """B idle rows with P + S entries each, since a step writes S; `request` fills the rows and is never read."""
    entries = limits.pool + limits.lanes

    def repeat(leaf: Any) -> Array:
        return jnp.broadcast_to(leaf, (rows, *jnp.shape(leaf)))

    state, requests = jax.tree.map(repeat, (empty_row(limits, entries), request))
    return Batch(state, requests, empty_pool(config, rows, entries))


# ------------------------------------------------------------------------------------------------ new rows


def admit(
    model: Transformer,
    params: Any,
    rules: Rules,
    batch: Batch,
    requests: Request,
    prompts: Array,
    lengths: Array,
    slot: Array | None = None,
) -> Batch:
    """Feeds prompts, samples the first token of each answer, and puts them into rows; the other rows stay.

    Args:
      model, params: the model.
      rules: the interpreter's.
      batch: donated.
      requests: [n].
      prompts: int32 [n, L], padded at the end; L is a bucket.
      lengths: int32 [n]. A length of 0 leaves the row as it is.
      slot: int32 [], the row of a single prompt, n = 1. Without it there is a prompt for each row, n = B.
    """
    length = prompts.shape[1]
    rules = _with_lanes(rules, 1)
    entries = batch.rows.entries.token.shape[1]
    rows = jax.vmap(functools.partial(interpreter.begin, rules.limits, entries))(prompts, lengths)
    lanes = jax.vmap(functools.partial(interpreter.feed, limits=rules.limits))(rows, requests)
    prompt = jax.tree.map(lambda x: x[:, :length], rows.entries)
    with jax.named_scope("attend"):
        hidden, written = run_model(model, params, prompt, prompt)
    last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)
    rows = _sample_and_advance(model, params, rules, rows, requests, lanes, last)
    new = Batch(rows, requests, written)
    if slot is None:
        return jax.tree.map(functools.partial(_put_rows, lengths > 0), batch, new)
    return jax.tree.map(functools.partial(_put_row, slot), batch, new)


def feed_part(
    model: Transformer,
    params: Any,
    rules: Rules,
    batch: Batch,
    requests: Request,
    prompt: Array,
    length: Array,
    slot: Array,
    start: Array,
    *,
    size: int,
) -> Batch:
    """`admit` of one prompt whose beginning is in its row's pool already: feeds what follows.

    Args:
      model, params: the model.
      rules: the interpreter's.
      batch: donated.
      requests: [1].
      prompt: int32 [1, L] with its beginning, padded at the end; L pool entries are read.
      length: int32 [1]. The answer begins after so many tokens: of a prompt that goes on, what begins here is
        replaced when its next part is fed.
      slot: int32 [], the row.
      start: int32 [], tokens that are in the pool.
      size: tokens that are fed, padding included, start + size <= L; static.
    """
    rules = _with_lanes(rules, 1)
    entries = batch.rows.entries.token.shape[1]
    rows = jax.vmap(functools.partial(interpreter.begin, rules.limits, entries))(prompt, length)
    lanes = jax.vmap(functools.partial(interpreter.feed, limits=rules.limits))(rows, requests)
    keys = jax.tree.map(lambda x: x[:, : prompt.shape[1]], rows.entries)
    part = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, axis=1), keys)
    pool = take_part(batch.pool, slot, jnp.int32(0), size=prompt.shape[1])
    with jax.named_scope("attend"):
        hidden, pool = run_model(model, params, part, keys, pool, start[None])
    last = jax.lax.dynamic_slice_in_dim(hidden, length[0] - 1 - start, 1, axis=1)
    rows = _sample_and_advance(model, params, rules, rows, requests, lanes, last)
    return jax.tree.map(functools.partial(_put_row, slot), batch, Batch(rows, requests, pool))


def take_part(pool: Pool, slot: Array, start: Array, *, size: int) -> Pool:
    """Some entries of a row's pool, copied: [1, K, size, H] in each layer."""

    def take(leaf: Array) -> Array:
        _, K, _, H = leaf.shape
        return jax.lax.dynamic_slice(leaf, (slot, 0, start, 0), (1, K, size, H))

    return jax.tree.map(take, pool)


def put_part(pool: Pool, part: Pool, slot: Array, start: Array) -> Pool:
    """`take_part` undone, in place."""
    return jax.tree.map(
        lambda old, new: jax.lax.dynamic_update_slice(old, new, (slot, 0, start, 0)), pool, part
    )


def _put_row(slot: Array, old: Array, new: Array) -> Array:
    """One row, [1, ...] or the leading part of each dimension of it: no query sees what is behind a prompt."""
    return jax.lax.dynamic_update_slice(old, new, (slot, *[0] * (old.ndim - 1)))


def _put_rows(is_new_B: Array, old: Array, new: Array) -> Array:
    """The rows that are new, likewise."""
    part = tuple(slice(size) for size in new.shape)
    is_new = is_new_B.reshape(-1, *[1] * (old.ndim - 1))
    return old.at[part].set(jnp.where(is_new, new, old[part]))


def release(batch: Batch, stop: Array) -> Batch:
    """Rows stopped by the host: `stop` int32 [B], a `Stop`, or RUNNING for rows that stay as they are."""
    stop = jnp.where(stop == Stop.RUNNING, batch.rows.stop, stop)
    return dataclasses.replace(batch, rows=dataclasses.replace(batch.rows, stop=stop))


def take(rows: RowState, row: Array) -> RowState:
    """One row, without B."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, row, keepdims=False), rows)


# --------------------------------------------------------------------------------------------------- steps


Carry: TypeAlias = tuple[Array, Batch]
"""What loops carry: how many steps are done, and the batch, its pool as `cpu.without_B` makes it."""


@dataclasses.dataclass(frozen=True)
class Until:
    """When a chunk of decode steps ends.

    Attributes:
      steps: int32 [], the most steps.
      refill: bool [], whether a prompt waits for a row.
      running: int32 [], rows that were running when the chunk began.
      used: entries of the pool that steps read.
      widths: lanes that a step may have, ascending. A step needs room for the last, which is S.
      costs: float32 [number of widths], what a step of each width costs.
    """

    steps: Array
    refill: Array
    running: Array
    used: int
    widths: tuple[int, ...]
    costs: Array

    def goes_on(self, carry: Carry) -> Array:
        """Whether there is another step: bool []."""
        done, batch = carry
        running = batch.rows.stop == Stop.RUNNING
        fits = (batch.rows.cursor + self.widths[-1] <= self.used) | ~running
        has_vacancy = jnp.sum(running) < self.running
        return jnp.any(running) & (done < self.steps) & jnp.all(fits) & ~(self.refill & has_vacancy)

    def choice(self, rows: RowState) -> Array:
        """The index of the width that comes next: int32 []. Of those that are equally good it is the first."""
        fed = jnp.minimum(_ready(rows)[:, None], jnp.array(self.widths))
        return jnp.argmax(jnp.sum(fed, axis=0) / self.costs)


def decode_chunk(
    model: Transformer,
    params: Any,
    rules: Rules,
    batch: Batch,
    steps: Array,
    refill: Array,
    costs: Array,
    *,
    used: int,
    widths: tuple[int, ...],
) -> Batch:
    """Decode steps until the host has something to do.

    That is when every row has stopped, when `steps` are done, when a row has stopped and a prompt waits for it,
    or when the next step might not fit into the used part of the pool.

    Args:
      model, params: the model.
      rules: the interpreter's.
      batch: donated.
      steps: int32 [], the most steps.
      refill: bool [], whether a prompt waits.
      costs: float32 [number of widths], what a step of each width costs: a step has that which feeds most threads
        for it. All ones feed all threads that are ready; infinity forbids a width.
      used: entries of the pool that steps read; static.
      widths: lanes that a step may have, ascending, S last; static.
    """
    until = Until(steps, refill, jnp.sum(batch.rows.stop == Stop.RUNNING), used, widths, costs)
    loops = [
        functools.partial(_steps_of_width, model, params, _with_lanes(rules, lanes), until, index)
        for index, lanes in enumerate(widths)
    ]

    def each_width(carry: Carry) -> Carry:
        for loop in loops:
            carry = loop(carry)
        return carry

    carry = jnp.int32(0), _with_pool(batch, cpu.without_B)
    carry = jax.lax.while_loop(until.goes_on, each_width, carry) if len(loops) > 1 else loops[0](carry)
    return _with_pool(carry[1], cpu.with_B)


def _steps_of_width(
    model: Transformer, params: Any, rules: Rules, until: Until, index: int, carry: Carry
) -> Carry:
    """Steps with the lanes of the rules, as long as that width comes next."""

    def is_next(carry: Carry) -> Array:
        if len(until.widths) == 1:
            return until.goes_on(carry)
        return until.goes_on(carry) & (until.choice(carry[1].rows) == index)

    def step(carry: Carry) -> Carry:
        done, batch = carry
        batch = decode_step(model, params, rules, _with_pool(batch, cpu.with_B), until.used)
        return done + 1, _with_pool(batch, cpu.without_B)

    return jax.lax.while_loop(is_next, step, carry)


def _with_pool(batch: Batch, change: Callable[[Pool], Pool]) -> Batch:
    return dataclasses.replace(batch, pool=change(batch.pool))


def _with_lanes(rules: Rules, lanes: int) -> Rules:
    return dataclasses.replace(rules, limits=dataclasses.replace(rules.limits, lanes=lanes))


def _ready(rows: RowState) -> Array:
    """How many threads of each row are ready: int32 [B]."""
    return jnp.sum((rows.threads.phase == Phase.READY) & (rows.stop == Stop.RUNNING)[:, None], axis=1)


def decode_step(model: Transformer, params: Any, rules: Rules, batch: Batch, used: int) -> Batch:
    """One step of every row, with as many lanes as the rules' limits say; `used` as in `decode_chunk`."""
    requests, start = batch.requests, batch.rows.cursor
    with jax.named_scope("feed"):
        lanes = jax.vmap(functools.partial(interpreter.feed, limits=rules.limits))(batch.rows, requests)
    with jax.named_scope("record"):
        rows = jax.vmap(interpreter.record)(batch.rows, lanes)
    with jax.named_scope("attend"):
        keys = jax.tree.map(lambda x: x[:, :used], rows.entries)
        hidden, pool = run_model(model, params, lanes, keys, batch.pool, start)
    rows = _sample_and_advance(model, params, rules, rows, requests, lanes, hidden)
    return Batch(rows, requests, pool)


def run_model(
    model: Transformer,
    params: Any,
    queries: Tokens,
    keys: Tokens,
    pool: Pool | None = None,
    start: Array | None = None,
) -> tuple[Array, Pool]:
    """The model over the pool, whose entries are the keys; without a pool the queries ([B, Q]) are their own keys.

    The queries' keys and values are written to the pool from start (int32 [B]) on. The results are those of
    `Transformer.__call__`.
    """
    may_attend = visible(queries, keys)
    return forward(model, params, queries.token, queries.position, may_attend, pool, start, keys.position)


def _sample_and_advance(
    model: Transformer,
    params: Any,
    rules: Rules,
    rows: RowState,
    requests: Request,
    lanes: DecodedTokens,
    hidden: Array,
) -> RowState:
    """The next state of every row, from the hidden states [B, S, D] of what the lanes fed."""
    with jax.named_scope("sample"):
        sampled, logprob = next_tokens(rules, rows, requests, lanes, logits(model, params, hidden))
    with jax.named_scope("advance"):
        advance = functools.partial(interpreter.advance, rules=rules)
        return jax.vmap(advance)(rows, requests, lanes, sampled, logprob)


def next_tokens(
    rules: Rules, rows: RowState, requests: Request, lanes: DecodedTokens, logits: Array
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
    table, order = rows.threads, lanes.order + 1

    def keys() -> Array:
        of_row = functools.partial(_draw_keys, max_depth=limits.max_depth)
        return jax.vmap(of_row)(requests, table, thread, order).reshape(B * S)

    biased = biased.reshape(B * S, V)
    how = jax.tree.map(lambda per_row: jnp.repeat(per_row, S), requests.draw)
    sampled = sampling.sample(biased, keys, how).reshape(B, S)
    if requests.script.shape[-1]:
        scripted = jax.vmap(functools.partial(_as_scripted, max_depth=limits.max_depth))
        sampled = scripted(requests, table, thread, order, sampled)
    chosen = jnp.take_along_axis(logits, sampled[..., None], axis=-1)[..., 0]
    return sampled, chosen - jax.nn.logsumexp(logits, axis=-1)


def _draw_keys(request: Request, table: ThreadTable, thread: Array, order: Array, max_depth: int) -> Array:
    """One row's typed keys for the tokens of this thread and order, int32 [S] each: key [S]."""
    main = jnp.broadcast_to(sampling.main_key(request.key), table.parent.shape)
    keys = interpreter.down_the_tree(table, main, jax.vmap(sampling.branch_key), max_depth)
    return jax.vmap(sampling.draw_key)(keys[thread], order)


def _as_scripted(
    request: Request, table: ThreadTable, thread: Array, order: Array, sampled: Array, max_depth: int
) -> Array:
    """One row's tokens, int32 [S], as the request's script has them; those that it leaves free as sampled."""
    no_line = request.script.shape[0]

    def look_up(lines: Array, line: Array, order: Array) -> Array:
        """FREE where there is no such line."""
        return lines.at[jnp.where(line == FREE, no_line, line), order].get(mode="fill", fill_value=FREE)

    branch_line = functools.partial(look_up, request.script_branches)
    line = interpreter.down_the_tree(table, jnp.zeros_like(table.parent), branch_line, max_depth)
    scripted = look_up(request.script, line[thread], order)
    return jnp.where(scripted == FREE, sampled, scripted)
