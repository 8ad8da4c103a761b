"""The interpreter of PASTA-LANG, as a pure transition on arrays: no model and no sampling in it.

    feed      put the next tokens of up to S ready threads into the lanes
    record    write the lanes to the pool's entries, which are the row's trace
    (sample)  the model attends, the sampler draws one token per lane
    advance   apply what was sampled: fork, hold, join, stop

Events happen when a token is *sampled* (docs/design.md, decision 2), so a promise's ` />` and the branch's
`<async>` are fed in the same step, and so are the last `</async>` and the sync that waited for it. The
specification in plain Python is `reference.py`; the two agree on everything, token for token and step for step.

Everything here is for one row; the loop maps it over rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from pasta_jax.arrays import NO_DOC, Array
from pasta_jax.decoding.state import (
    DOC,
    MAIN,
    UNFED,
    DecodedTokens,
    Limits,
    Phase,
    Request,
    RowState,
    Stop,
    ThreadTable,
    empty_row,
    empty_tokens,
)
from pasta_jax.lang import grammar, tags
from pasta_jax.lang.grammar import Effect, Kind
from pasta_jax.tokens.positions import Positions
from pasta_jax.tokens.tokenizer import Vocabulary
from pasta_jax.visibility import reach

assert len(Kind) < 32, "a set of kinds is the bits of an int32"


@struct.dataclass
class Rules:
    """What the interpreter knows besides a row's state. Arrays are traced, the rest is static."""

    kinds: Array  # int32 [V]  a grammar `Kind` for each id
    digit_values: Array  # int32 [V]  the value of ids that are one digit
    next_state: Array  # int32 [states, kinds]  the tag grammar
    event: Array  # int32 [states, kinds]
    legal: Array  # bool [states, kinds]
    limits: Limits = struct.field(pytree_node=False)
    positions: Positions = struct.field(pytree_node=False)
    async_open: int = struct.field(pytree_node=False)
    async_close: int = struct.field(pytree_node=False)
    ids: int = struct.field(pytree_node=False)  # ids of the tokenizer; the V of a model may be more


def rules_for(
    vocabulary: Vocabulary, limits: Limits, positions: Positions = Positions(), vocab_size: int | None = None
) -> Rules:
    """The rules of decoding with a tokenizer's vocabulary, for a model with V = `vocab_size` logits."""
    ids = len(vocabulary)
    spare = (vocab_size or ids) - ids
    if spare < 0:
        raise ValueError(
            f"The tokenizer has {ids} ids, the model logits for {vocab_size}: they do not belong together."
        )
    return Rules(
        kinds=jnp.pad(jnp.asarray(vocabulary.kinds), (0, spare), constant_values=Kind.CONTROL),
        digit_values=jnp.pad(jnp.asarray(vocabulary.digit_values), (0, spare)),
        next_state=jnp.array(grammar.NEXT, jnp.int32),
        event=jnp.array(grammar.EFFECT, jnp.int32),
        legal=jnp.array(grammar.LEGAL, bool),
        limits=limits,
        positions=positions,
        async_open=vocabulary.tag_ids[tags.ASYNC_OPEN],
        async_close=vocabulary.tag_ids[tags.ASYNC_CLOSE],
        ids=ids,
    )


# ---------------------------------------------------------------------------------------- feed and record


def feed(state: RowState, request: Request, limits: Limits) -> DecodedTokens:
    """The lanes of a step: the next tokens of up to S ready threads, lowest thread first (decision 3).

    A thread at a join comes right after the last branch that it waits for: what it is about to see is in the pool
    before it, or beside it in the same step.

    Returns:
      [S] fields, the active lanes first. An idle lane has `doc` NO_DOC and `thread` T; its token means nothing.
    """
    t = state.threads
    ready = (t.phase == Phase.READY) & (state.stop == Stop.RUNNING)
    spacing = limits.max_depth + 1  # between two threads, room for a chain of joins as deep as promises nest
    rank = jnp.arange(limits.threads) * spacing
    for _ in range(limits.max_depth):
        closing_child = _child_of(t) & (t.closing & ready)
        behind = jnp.max(jnp.where(closing_child, rank + 1, 0), axis=-1)
        rank = jnp.where(t.joining, jnp.maximum(rank, behind), rank)
    chosen = jnp.argsort(jnp.where(ready, rank, limits.threads * spacing))[: limits.lanes]
    active = jnp.arange(limits.lanes) < jnp.minimum(jnp.sum(ready), room(state, request, limits))
    lanes = jax.tree.map(lambda field: field[chosen], t.next)
    return dataclasses.replace(
        lanes,
        doc=jnp.where(active, lanes.doc, NO_DOC),
        thread=jnp.where(active, lanes.thread, limits.threads),
        step=jnp.full_like(lanes.step, state.step + 1),
    )


def room(state: RowState, request: Request, limits: Limits) -> Array:
    """How many more tokens the row may write: int32 []."""
    written = state.cursor - state.prompt_length
    return jnp.minimum(limits.pool - state.cursor, request.max_new_tokens - written)


def record(state: RowState, lanes: DecodedTokens) -> RowState:
    """The lanes written to the pool's entries. The next step overwrites what idle lanes wrote."""

    def write(entries: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(entries, new, state.cursor, axis=0)

    return dataclasses.replace(
        state,
        entries=jax.tree.map(write, state.entries, lanes),
        cursor=state.cursor + jnp.sum(lanes.is_real),
        step=state.step + (state.stop == Stop.RUNNING),
    )


# -------------------------------------------------------------------------------------------------- sample


def legal_tokens(state: RowState, lanes: DecodedTokens, rules: Rules) -> Array:
    """Which ids each lane may sample next: bool [S, V]. They are ids of the tokenizer, and legal in the grammar."""
    t, limits = state.threads, rules.limits
    V = rules.kinds.shape[0]
    known = jnp.broadcast_to(jnp.arange(V) < rules.ids, (limits.lanes, V))
    if not limits.constrained:
        return known
    thread = jnp.minimum(lanes.thread, limits.threads - 1)
    in_branch = (t.depth[thread] > 0)[:, None]
    kind = jnp.arange(len(Kind))
    legal = rules.legal[t.tag_state[thread]]
    legal &= ~(in_branch & (kind == Kind.END))
    legal &= ~(~in_branch & (kind == Kind.ASYNC_CLOSE))
    opens = (kind == Kind.OPEN) | (kind == Kind.FORK)
    legal &= ~(~_may_open(state, lanes.is_real, thread, limits)[:, None] & opens)
    # As bits of one number per lane: looking up every one of V ids in a table is ten times as slow on CPU.
    bits = jnp.sum(legal.astype(jnp.int32) << kind, axis=-1)
    return (bits[:, None] >> rules.kinds & 1 != 0) & known


def _may_open(state: RowState, active: Array, thread: Array, limits: Limits) -> Array:
    """Whether each lane may open a promise: bool [S].

    A thread is reserved for every open tag, and for every earlier lane that might open one in this step, so what
    was opened can be kept. (The same holds for a bare promise, although it is complete at once.)
    """
    t = state.threads
    can_finish_tag = (t.depth == 0) | (t.budget > grammar.LONGEST_TAG)
    might = (t.tag_state == grammar.TEXT) & ~t.closing & (t.depth < limits.max_depth) & can_finish_tag
    might_S = might[thread] & active
    open_tags = jnp.sum(t.tag_state != grammar.TEXT)
    earlier = jnp.cumsum(might_S) - might_S
    return might_S & (state.used_threads + open_tags + earlier < limits.threads)


# ------------------------------------------------------------------------------------------------- advance


def advance(
    state: RowState, request: Request, lanes: DecodedTokens, sampled: Array, logprob: Array, rules: Rules
) -> RowState:
    """One step of the interpreter: the lanes are in the pool, `sampled` are the tokens that follow them.

    Args:
      state: after `record`.
      request: of this row.
      lanes: what was fed.
      sampled: int32 [S]; those of idle lanes and of threads whose last token was fed are not read.
      logprob: float32 [S], of the sampled tokens.
      rules: static rules and the grammar's tables.

    Returns:
      The state in which every live thread has a next token, is held, or is done.
    """
    threads = rules.limits.threads
    fed = jnp.zeros(threads, bool).at[lanes.thread].set(True, mode="drop")
    token = jnp.zeros(threads, jnp.int32).at[lanes.thread].set(sampled, mode="drop")
    logprob_T = jnp.zeros(threads, jnp.float32).at[lanes.thread].set(logprob, mode="drop")

    continues = fed & ~state.threads.closing
    table = _move_on(state.threads, fed)
    table, event = _take(table, continues, token, logprob_T, rules)
    state = dataclasses.replace(state, threads=table)
    state = _fork(state, event == Effect.FORK, request, rules)
    state = _hold_or_end(state, event)
    for _ in range(rules.limits.max_depth):
        state = _join(state, rules)
    return _stop_when_full(state, request, rules.limits)


def _move_on(t: ThreadTable, fed: Array) -> ThreadTable:
    """Threads whose token was fed move to the segment, order and position of the token after it."""
    new_segment = fed & (t.segment_after != t.next.segment)
    position = jnp.where(fed, t.position_after, t.next.position)
    following = dataclasses.replace(
        t.next,
        position=position,
        sees=jnp.where(new_segment[:, None], reach(t.next.sees, t.next.segment), t.next.sees),
        segment=jnp.where(fed, t.segment_after, t.next.segment),
        order=t.next.order + fed,
    )
    return dataclasses.replace(
        t,
        next=following,
        phase=jnp.where(fed & t.closing, Phase.DONE, t.phase),
        position_after=jnp.where(fed, position + 1, t.position_after),
        joining=t.joining & ~fed,
    )


def _take(
    t: ThreadTable, continues: Array, token: Array, logprob: Array, rules: Rules
) -> tuple[ThreadTable, Array]:
    """The sampled tokens become the threads' next tokens. Also returns their events: int32 [T].

    In a branch, `</async>` replaces the token when the budget is spent, or when an unconstrained model ends the
    answer there.
    """
    in_branch = t.depth > 0
    kind = rules.kinds[token]
    spent = (t.budget <= 0) & (kind != Kind.ASYNC_CLOSE)
    force = continues & in_branch & (spent | (kind == Kind.END))
    token = jnp.where(force, rules.async_close, token)
    kind = jnp.where(force, Kind.ASYNC_CLOSE, kind)

    event = jnp.where(continues, rules.event[t.tag_state, kind], Effect.NONE)
    event = jnp.where((event == Effect.FINISH) & ~in_branch, Effect.STRAY, event)
    digit = rules.digit_values[token]
    number = jnp.where((kind == Kind.TOKENS) | (kind == Kind.FORK), 0, t.number)
    number = jnp.where((kind == Kind.ZERO) | (kind == Kind.DIGIT), 10 * number + digit, number)
    following = dataclasses.replace(
        t.next,
        token=jnp.where(continues, token, t.next.token),
        logprob=jnp.where(continues, jnp.where(force, 0.0, logprob), t.next.logprob),
    )
    table = dataclasses.replace(
        t,
        next=following,
        tag_state=jnp.where(continues, rules.next_state[t.tag_state, kind], t.tag_state),
        number=jnp.where(continues, number, t.number),
        budget=t.budget - continues,
        force_closed=t.force_closed | force,
    )
    return table, event


def _fork(state: RowState, promised: Array, request: Request, rules: Rules) -> RowState:
    """A complete promise starts a branch, unless no thread is free or the promise is nested too deep.

    The promise's last token is still to be fed, in its old segment; parent and branch continue in new segments.
    """
    t, limits = state.threads, rules.limits
    forks = promised & (t.depth < limits.max_depth)
    nth = jnp.cumsum(forks) - 1
    forks &= state.used_threads + nth < limits.threads
    count = jnp.sum(forks)

    number = jnp.arange(limits.threads)
    is_new = (number >= state.used_threads) & (number < state.used_threads + count)
    nth_new = jnp.clip(number - state.used_threads, 0, limits.threads - 1)
    parent = jnp.argsort(~forks, stable=True)[nth_new]
    segment = state.used_segments + 2 * nth_new + 1
    start = t.next.position[parent] + 1
    first = dataclasses.replace(
        t.next,
        token=rules.async_open,
        logprob=0.0,
        position=start,
        segment=segment,
        sees=reach(t.next.sees, t.next.segment)[parent],
    )
    resume = rules.positions.resume(t.next.position + 1, t.number)
    t = dataclasses.replace(
        t,
        position_after=jnp.where(forks, resume, t.position_after),
        segment_after=jnp.where(forks, state.used_segments + 2 * nth, t.segment_after),
    )
    branch = dataclasses.replace(
        t,
        next=first,
        phase=Phase.READY,
        position_after=start + 1,
        segment_after=segment,
        budget=request.max_branch_tokens,
        parent=parent,
        fork_order=t.next.order[parent],
        depth=t.depth[parent] + 1,
    )

    def choose(old: Array, new: Array) -> Array:
        return jnp.where(is_new.reshape(-1, *[1] * (old.ndim - 1)), jnp.asarray(new, old.dtype), old)

    return dataclasses.replace(
        state,
        threads=jax.tree.map(choose, t, branch),
        used_threads=state.used_threads + count,
        used_segments=state.used_segments + 2 * count,
    )


def _hold_or_end(state: RowState, event: Array) -> RowState:
    """At a sync or at its end, a thread waits for the branches that it has not joined; without any it continues."""
    t = state.threads
    waits = (event == Effect.SYNC) | (event == Effect.FINISH) | (event == Effect.END)
    has_branches = jnp.any(_child_of(t) & ~t.joined, axis=-1)
    ends = ~has_branches & (event == Effect.FINISH)
    phase = jnp.where(waits & has_branches, Phase.HELD, t.phase)
    return dataclasses.replace(
        state,
        threads=dataclasses.replace(t, phase=phase, closing=t.closing | ends),
        stop=jnp.where(jnp.any((event == Effect.END) & ~has_branches), Stop.EOS, state.stop),
    )


def _join(state: RowState, rules: Rules) -> RowState:
    """Held threads whose branches have all sampled their last token see these branches, and are ready again."""
    t = state.threads
    branches = _child_of(t) & ~t.joined
    free = (t.phase == Phase.HELD) & ~jnp.any(branches & ~t.closing, axis=-1)
    members = branches & free[:, None]  # [parent, branch]
    reaches = reach(t.next.sees, t.next.segment)
    seen = jnp.where(members[:, :, None], reaches, jnp.uint32(0))
    seen = reaches | jax.lax.reduce(seen, np.uint32(0), jax.lax.bitwise_or, (1,))
    segment = state.used_segments + jnp.cumsum(free) - 1
    following = dataclasses.replace(
        t.next,
        sees=jnp.where(free[:, None], seen, t.next.sees),
        segment=jnp.where(free, segment, t.next.segment),
    )
    table = dataclasses.replace(
        t,
        next=following,
        phase=jnp.where(free, Phase.READY, t.phase),
        segment_after=jnp.where(free, segment, t.segment_after),
        joining=t.joining | free,
        joined=t.joined | jnp.any(members, axis=0),
        closing=t.closing | (free & (t.next.token == rules.async_close)),
    )
    ended = free[MAIN] & (rules.kinds[t.next.token[MAIN]] == Kind.END)
    return dataclasses.replace(
        state,
        threads=table,
        used_segments=state.used_segments + jnp.sum(free),
        stop=jnp.where(ended, Stop.EOS, state.stop),
    )


def _stop_when_full(state: RowState, request: Request, limits: Limits) -> RowState:
    """A row that may write no more tokens stops (decision 6)."""
    full = (state.stop == Stop.RUNNING) & (room(state, request, limits) <= 0)
    as_asked = state.cursor - state.prompt_length >= request.max_new_tokens
    why = jnp.where(as_asked, Stop.LENGTH, Stop.CACHE_FULL)
    return dataclasses.replace(state, stop=jnp.where(full, why, state.stop))


def _child_of(t: ThreadTable) -> Array:
    """Bool [T parents, T branches]."""
    return t.parent == jnp.arange(t.parent.shape[0])[:, None]


def down_the_tree(
    t: ThreadTable, main: Array, branch: Callable[[Array, Array], Array], max_depth: int
) -> Array:
    """A value for each thread that does not depend on the schedule: [T].

    Args:
      t: a row's threads.
      main: [T], main's value, repeated.
      branch: from the parents' values, and the orders of the promises' ` />` in the parents: [T], [T] -> [T].
      max_depth: how deep promises may nest.
    """
    values = main
    for _ in range(max_depth):
        values = jnp.where(t.parent < 0, main, branch(values[t.parent], t.fork_order))
    return values


# --------------------------------------------------------------------------------------------------- begin


def begin(limits: Limits, entries: int, prompt: Array, length: Array) -> RowState:
    """A row whose prompt is in the pool.

    Its next token is the last one of the prompt: what `feed` returns is in the pool already, is not to be recorded,
    and leads to the first token of the answer.

    Args:
      limits: sizes.
      entries: size of the pool: P, and S for what idle lanes write.
      prompt: int32 [L], padded at the end.
      length: int32 [], tokens of the prompt; 0 makes an idle row, which is stopped.
    """
    row = empty_row(limits, entries)
    index = jnp.arange(prompt.shape[0], dtype=jnp.int32)
    tokens = dataclasses.replace(
        empty_tokens(prompt.shape[0], limits.words),
        token=prompt,
        position=index,
        doc=jnp.where(index < length, DOC, NO_DOC),
        order=index - length,
    )
    last = jax.tree.map(lambda field: field[jnp.maximum(length - 1, 0)], tokens)
    last = dataclasses.replace(last, step=UNFED)
    t = row.threads
    t = dataclasses.replace(
        t,
        next=jax.tree.map(lambda field, value: field.at[MAIN].set(value), t.next, last),
        phase=t.phase.at[MAIN].set(Phase.READY),
        position_after=t.position_after.at[MAIN].set(length),
    )
    return dataclasses.replace(
        row,
        threads=t,
        entries=jax.tree.map(lambda field, new: field.at[: len(new)].set(new), row.entries, tokens),
        cursor=length,
        prompt_length=length,
        stop=jnp.where(length > 0, Stop.RUNNING, Stop.EOS),
    )
