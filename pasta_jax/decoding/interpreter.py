"""The interpreter of PASTA-LANG, as a pure transition on arrays: no model and no sampling in it.

    feed      choose up to S ready threads and put their next tokens into lanes
    record    write the lanes into the pool's entries, which are the row's trace
    (sample)  the model attends, the sampler draws one token a lane
    advance   let what was sampled happen: fork, hold, join, stop

Events happen when a token is *sampled* (docs/design.md, decision 2), so a promise's ` />` and the branch's
`<async>` are fed in the same step, and so are the last `</async>` and the sync that waited for it. The
specification in plain Python is `reference.py`; the two agree on everything, token for token and step for step.

Everything here is one row's; the loop maps it over rows.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pasta_jax.arrays import NO_DOC, Array
from pasta_jax.decoding.state import (
    Entries,
    Lanes,
    Limits,
    Phase,
    Request,
    RowState,
    Stop,
    ThreadTable,
    empty_row,
)
from pasta_jax.lang import grammar, tags
from pasta_jax.lang.grammar import Effect, Kind
from pasta_jax.tokens.positions import Positions
from pasta_jax.tokens.tokenizer import Vocabulary
from pasta_jax.visibility import reach

DOC = 1
"""A row holds one document."""

MAIN = 0


@dataclasses.dataclass(frozen=True)
class Rules:
    """What the interpreter knows besides a row's state. Arrays are traced, the rest is static."""

    kinds: Array  # int32 [V]  a grammar `Kind` for each id
    digit_values: Array  # int32 [V]  the value of ids that are one digit
    next_state: Array  # int32 [states, kinds]  the tag grammar
    event: Array  # int32 [states, kinds]
    legal: Array  # bool [states, kinds]
    limits: Limits
    positions: Positions
    async_open: int
    async_close: int
    ids: int  # how many of the V ids the tokenizer has; a model may have more


jax.tree_util.register_dataclass(
    Rules,
    ["kinds", "digit_values", "next_state", "event", "legal"],
    ["limits", "positions", "async_open", "async_close", "ids"],
)


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


def feed(state: RowState, request: Request, limits: Limits) -> Lanes:
    """The next tokens of up to S ready threads, lowest thread first (decision 3).

    A thread at a join takes its place right behind the last branch that it waits for: what it is about to
    see is in the pool before it, or beside it in the same step.
    """
    t = state.threads
    ready = (t.phase == Phase.READY) & (state.stop == Stop.RUNNING)
    places = limits.max_depth + 1  # between two threads, room for a chain of joins as deep as promises nest
    rank = jnp.arange(limits.threads) * places
    for _ in range(limits.max_depth):
        closing_child = _child_of(t) & (t.closing & ready)
        behind = jnp.max(jnp.where(closing_child, rank + 1, 0), axis=-1)
        rank = jnp.where(t.joining, jnp.maximum(rank, behind), rank)
    chosen = jnp.argsort(jnp.where(ready, rank, limits.threads * places))[: limits.lanes]
    active = jnp.arange(limits.lanes) < jnp.minimum(jnp.sum(ready), room(state, request, limits))
    return Lanes(
        active=active,
        thread=jnp.where(active, chosen, limits.threads),
        token=t.token[chosen],
        logprob=t.logprob[chosen],
        position=t.position[chosen],
        doc=jnp.where(active, DOC, NO_DOC),
        segment=t.segment[chosen],
        order=t.order[chosen],
        sees=t.sees[chosen],
    )


def room(state: RowState, request: Request, limits: Limits) -> Array:
    """How many more tokens the row may write: int32 []."""
    written = state.cursor - state.prompt_length
    return jnp.minimum(limits.pool - state.cursor, request.max_new_tokens - written)


def record(state: RowState, lanes: Lanes) -> RowState:
    """The lanes as pool entries; idle lanes leave unreal ones behind, which the next step overwrites."""
    step = state.step + (state.stop == Stop.RUNNING)
    written = Entries(
        token=lanes.token,
        position=lanes.position,
        doc=lanes.doc,
        segment=lanes.segment,
        order=lanes.order,
        sees=lanes.sees,
        thread=lanes.thread,
        step=jnp.full_like(lanes.token, step),
        logprob=lanes.logprob,
    )

    def write(entries: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(entries, new, state.cursor, axis=0)

    entries = jax.tree.map(write, state.entries, written)
    return dataclasses.replace(state, entries=entries, cursor=state.cursor + jnp.sum(lanes.active), step=step)


# -------------------------------------------------------------------------------------------------- sample


def legal_tokens(state: RowState, lanes: Lanes, rules: Rules) -> Array:
    """What each lane may sample next: bool [S, V]. Ids of the tokenizer, and only where the grammar has them."""
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
    legal &= ~(~_may_open(state, lanes.active, thread, limits)[:, None] & opens)
    # As bits of one number a lane: a look at a table for every id of V is ten times as slow on CPU.
    bits = jnp.sum(legal.astype(jnp.int32) << kind, axis=-1)
    return (bits[:, None] >> rules.kinds & 1 != 0) & known


def _may_open(state: RowState, active: Array, thread: Array, limits: Limits) -> Array:
    """Whether each lane may begin a promise: bool [S].

    Every tag that has begun, and every lane before that might begin one now, has a thread set aside: a promise
    that could be opened can be kept. (A bare promise is asked for no less, though it is opened and done at once.)
    """
    t = state.threads
    can_finish_tag = (t.depth == 0) | (t.budget > grammar.LONGEST_TAG)
    might = (t.tag_state == grammar.TEXT) & ~t.closing & (t.depth < limits.max_depth) & can_finish_tag
    might_S = might[thread] & active
    begun = jnp.sum(t.tag_state != grammar.TEXT)
    before = jnp.cumsum(might_S) - might_S
    return might_S & (state.used_threads + begun + before < limits.threads)


# ------------------------------------------------------------------------------------------------- advance


def advance(
    state: RowState, request: Request, lanes: Lanes, sampled: Array, logprob: Array, rules: Rules
) -> RowState:
    """One step of the interpreter: the lanes are in the pool, `sampled` is what they led to.

    Args:
      state: after `record`.
      request: of this row.
      lanes: what was fed.
      sampled: int32 [S]; what idle lanes and branches that end here sampled is not read.
      logprob: float32 [S], of the sampled tokens.
      rules: static rules and the grammar's tables.

    Returns:
      The state in which every live thread has a next token, is held, or is done.
    """
    threads = rules.limits.threads
    fed = jnp.zeros(threads, bool).at[lanes.thread].set(True, mode="drop")
    token = jnp.zeros(threads, jnp.int32).at[lanes.thread].set(sampled, mode="drop")
    logprob_T = jnp.zeros(threads, jnp.float32).at[lanes.thread].set(logprob, mode="drop")

    went_on = fed & ~state.threads.closing
    table = _move_on(state.threads, fed)
    table, event = _take(table, went_on, token, logprob_T, rules)
    state = dataclasses.replace(state, threads=table)
    state = _fork(state, event == Effect.FORK, request, rules)
    state = _hold_or_end(state, event)
    for _ in range(rules.limits.max_depth):
        state = _join(state, rules)
    return _stop_when_full(state, request, rules.limits)


def _move_on(t: ThreadTable, fed: Array) -> ThreadTable:
    """Threads whose token was fed stand at the place of their next one."""
    new_segment = fed & (t.segment_after != t.segment)
    position = jnp.where(fed, t.position_after, t.position)
    return dataclasses.replace(
        t,
        phase=jnp.where(fed & t.closing, Phase.DONE, t.phase),
        position=position,
        position_after=jnp.where(fed, position + 1, t.position_after),
        sees=jnp.where(new_segment[:, None], reach(t.sees, t.segment, jnp), t.sees),
        segment=jnp.where(fed, t.segment_after, t.segment),
        order=t.order + fed,
        joining=t.joining & ~fed,
    )


def _take(
    t: ThreadTable, went_on: Array, token: Array, logprob: Array, rules: Rules
) -> tuple[ThreadTable, Array]:
    """What was sampled becomes the threads' next token; also the event it is: int32 [T].

    In a branch, `</async>` takes the token's place when the budget is spent, or when an unconstrained model
    ends the answer there.
    """
    in_branch = t.depth > 0
    kind = rules.kinds[token]
    spent = (t.budget <= 0) & (kind != Kind.ASYNC_CLOSE)
    force = went_on & in_branch & (spent | (kind == Kind.END))
    token = jnp.where(force, rules.async_close, token)
    kind = jnp.where(force, Kind.ASYNC_CLOSE, kind)

    event = jnp.where(went_on, rules.event[t.tag_state, kind], Effect.NONE)
    event = jnp.where((event == Effect.FINISH) & ~in_branch, Effect.STRAY, event)
    digit = rules.digit_values[token]
    number = jnp.where((kind == Kind.TOKENS) | (kind == Kind.FORK), 0, t.number)
    number = jnp.where((kind == Kind.ZERO) | (kind == Kind.DIGIT), 10 * number + digit, number)
    table = dataclasses.replace(
        t,
        token=jnp.where(went_on, token, t.token),
        logprob=jnp.where(went_on, jnp.where(force, 0.0, logprob), t.logprob),
        tag_state=jnp.where(went_on, rules.next_state[t.tag_state, kind], t.tag_state),
        number=jnp.where(went_on, number, t.number),
        budget=t.budget - went_on,
        forced=t.forced | force,
    )
    return table, event


def _fork(state: RowState, promised: Array, request: Request, rules: Rules) -> RowState:
    """A completed promise starts a branch, unless no thread is free or it is nested too deep.

    The promise's last token is still to be fed, in its old segment; parent and branch go on in new ones.
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
    start = t.position[parent] + 1
    segment = state.used_segments + 2 * nth_new + 1
    born = dict(
        phase=Phase.READY,
        token=rules.async_open,
        logprob=0.0,
        position=start,
        position_after=start + 1,
        segment=segment,
        segment_after=segment,
        sees=reach(t.sees, t.segment, jnp)[parent],
        budget=request.max_branch_tokens,
        parent=parent,
        forked_at=t.order[parent],
        depth=t.depth[parent] + 1,
        path=t.path[parent] * limits.threads + t.children[parent] + 1,
    )
    resume = rules.positions.resume(t.position + 1, t.number)
    t = dataclasses.replace(
        t,
        position_after=jnp.where(forks, resume, t.position_after),
        segment_after=jnp.where(forks, state.used_segments + 2 * nth, t.segment_after),
        children=t.children + forks,
    )
    fields = {}
    for name, value in born.items():
        old = getattr(t, name)
        new = is_new.reshape(-1, *[1] * (old.ndim - 1))
        fields[name] = jnp.where(new, jnp.asarray(value, old.dtype), old)
    return dataclasses.replace(
        state,
        threads=dataclasses.replace(t, **fields),
        used_threads=state.used_threads + count,
        used_segments=state.used_segments + 2 * count,
    )


def _hold_or_end(state: RowState, event: Array) -> RowState:
    """At a sync or its end, a thread waits for the branches it has not joined; with none it goes on."""
    t = state.threads
    waits = (event == Effect.SYNC) | (event == Effect.FINISH) | (event == Effect.END)
    has_branches = jnp.any(_child_of(t) & ~t.joined, axis=-1)
    ends = ~has_branches & (event == Effect.FINISH)
    return dataclasses.replace(
        state,
        threads=dataclasses.replace(
            t, phase=jnp.where(waits & has_branches, Phase.HELD, t.phase), closing=t.closing | ends
        ),
        stop=jnp.where(jnp.any((event == Effect.END) & ~has_branches), Stop.EOS, state.stop),
    )


def _join(state: RowState, rules: Rules) -> RowState:
    """Held threads whose branches have all sampled their last token see them and are ready again."""
    t = state.threads
    branches = _child_of(t) & ~t.joined
    free = (t.phase == Phase.HELD) & ~jnp.any(branches & ~t.closing, axis=-1)
    members = branches & free[:, None]  # [parent, branch]
    reaches = reach(t.sees, t.segment, jnp)
    seen = jnp.where(members[:, :, None], reaches, jnp.uint32(0))
    seen = reaches | jax.lax.reduce(seen, np.uint32(0), jax.lax.bitwise_or, (1,))
    segment = state.used_segments + jnp.cumsum(free) - 1
    table = dataclasses.replace(
        t,
        phase=jnp.where(free, Phase.READY, t.phase),
        sees=jnp.where(free[:, None], seen, t.sees),
        segment=jnp.where(free, segment, t.segment),
        segment_after=jnp.where(free, segment, t.segment_after),
        joining=t.joining | free,
        joined=t.joined | jnp.any(members, axis=0),
        closing=t.closing | (free & (t.token == rules.async_close)),
    )
    ended = free[MAIN] & (rules.kinds[t.token[MAIN]] == Kind.END)
    return dataclasses.replace(
        state,
        threads=table,
        used_segments=state.used_segments + jnp.sum(free),
        stop=jnp.where(ended, Stop.EOS, state.stop),
    )


def _stop_when_full(state: RowState, request: Request, limits: Limits) -> RowState:
    """A row that may write no more stops; the others are untouched (decision 6)."""
    full = (state.stop == Stop.RUNNING) & (room(state, request, limits) <= 0)
    asked = state.cursor - state.prompt_length >= request.max_new_tokens
    return dataclasses.replace(
        state, stop=jnp.where(full, jnp.where(asked, Stop.LENGTH, Stop.CACHE_FULL), state.stop)
    )


def _child_of(t: ThreadTable) -> Array:
    """Bool [T parents, T branches]."""
    return t.parent == jnp.arange(t.parent.shape[0])[:, None]


# --------------------------------------------------------------------------------------------------- begin


def begin(limits: Limits, entries: int, prompt: Array, length: Array) -> tuple[RowState, Lanes]:
    """A row that has just been fed its prompt, and the lanes in which the prompt's last token was fed.

    Args:
      limits: sizes.
      entries: size of the entry arrays: P, and S more for what idle lanes leave behind.
      prompt: int32 [L], padded at the end.
      length: int32 [], tokens of the prompt; 0 makes an idle row, which is stopped.

    Returns:
      The state, to be advanced with what the prompt's last token led to; lane 0 is main.
    """
    row = empty_row(limits, entries)
    place = jnp.arange(prompt.shape[0])
    real = place < length

    def head(array: Array, value: Array) -> Array:
        return array.at[: prompt.shape[0]].set(jnp.where(real, value, 0))

    e, t = row.entries, row.threads
    e = dataclasses.replace(
        e,
        token=head(e.token, prompt),
        position=head(e.position, place),
        order=head(e.order, place),
        doc=head(e.doc, DOC),
    )
    last = jnp.maximum(length - 1, 0)
    t = dataclasses.replace(
        t,
        phase=t.phase.at[MAIN].set(Phase.READY),
        token=t.token.at[MAIN].set(prompt[last]),
        position=t.position.at[MAIN].set(last),
        position_after=t.position_after.at[MAIN].set(last + 1),
        order=t.order.at[MAIN].set(last),
    )
    stop = jnp.where(length > 0, Stop.RUNNING, Stop.EOS)
    row = dataclasses.replace(row, threads=t, entries=e, cursor=length, prompt_length=length, stop=stop)
    lane = jnp.arange(limits.lanes)
    lanes = Lanes(
        active=(lane == 0) & (length > 0),
        thread=jnp.where((lane == 0) & (length > 0), MAIN, limits.threads),
        token=jnp.full(limits.lanes, t.token[MAIN]),
        logprob=jnp.zeros(limits.lanes, jnp.float32),
        position=jnp.full(limits.lanes, last),
        doc=jnp.where((lane == 0) & (length > 0), DOC, NO_DOC),
        segment=jnp.zeros(limits.lanes, jnp.int32),
        order=jnp.full(limits.lanes, last),
        sees=jnp.zeros((limits.lanes, limits.words), jnp.uint32),
    )
    return row, lanes
