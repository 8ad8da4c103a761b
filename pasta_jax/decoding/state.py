"""What a decode carries from step to step (docs/design.md, section 6). Threads carry state; lanes are stateless.

All of it is one row's, without the leading B; the loop maps over rows.
"""

from __future__ import annotations

import dataclasses
import enum
import typing
from typing import TypeVar

import jax
import jax.numpy as jnp

from pasta_jax.arrays import Array
from pasta_jax.visibility import max_segments, words_for


@dataclasses.dataclass(frozen=True)
class Limits:
    """The static sizes of a decode; another value is another compiled program.

    Attributes:
      lanes: S, threads fed in one step.
      threads: T, threads a row can hold, main included. When all are taken no promise can be opened.
      pool: P, tokens of prompt and answer that a row can hold.
      max_depth: how deep promises may nest; 1 is the paper.
      constrained: whether the tag grammar masks illegal tokens. Off, malformed pieces become literal text.
    """

    lanes: int = 8
    threads: int = 16
    pool: int = 1024
    max_depth: int = 1
    constrained: bool = True

    def __post_init__(self) -> None:
        for name in ("lanes", "threads", "pool", "max_depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.lanes > self.threads:
            raise ValueError(
                f"lanes={self.lanes} exceeds threads={self.threads}: a step feeds each thread once."
            )

    @property
    def words(self) -> int:
        """W."""
        return words_for(max_segments(self.threads))


class Phase(enum.IntEnum):
    """Where a thread is in its life."""

    EMPTY = 0  # no thread here yet
    READY = 1  # has a token to be fed
    HELD = 2  # stands at a sync, or at its end, until its branches are done
    DONE = 3  # its last token is in the pool


class Stop(enum.IntEnum):
    """Why a row stopped. The last two are the host's doing."""

    RUNNING = 0
    EOS = 1
    LENGTH = 2  # max_new_tokens
    CACHE_FULL = 3  # the pool
    STOP = 4  # a stop string
    CANCELLED = 5  # whoever asked went away

    @property
    def reason(self) -> str:
        """As `DecodeResult.stop_reason` says it."""
        return self.name.lower()


Class = TypeVar("Class")


@typing.dataclass_transform(frozen_default=True)
def _pytree(cls: type[Class]) -> type[Class]:
    """A frozen dataclass all of whose fields are leaves."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@_pytree
class Request:
    """What a caller asks of one row. Traced: no value of these recompiles anything."""

    max_new_tokens: Array  # int32 []   tokens written to the pool after the prompt
    max_branch_tokens: Array  # int32 []   content tokens of one branch; then `</async>` is forced
    open_bias: Array  # float32 [] added to the logit that opens a promise; -inf forbids promises
    temperature: Array  # float32 [] 0 is greedy
    top_k: Array  # int32 []   0 is all
    top_p: Array  # float32 [] 1 is all
    min_p: Array  # float32 [] 0 is all
    key: Array  # uint32 [2] the request's random key
    script_paths: Array  # int32 [R]    threads that say what is written for them (`script.Script`)
    script: (
        Array  # int32 [R, C] what they say; C = 0 in ordinary requests, for which nothing of it is compiled
    )


@_pytree
class ThreadTable:
    """The T threads of a row, each where its *next* token will go."""

    phase: Array  # int32 [T]     a Phase
    token: Array  # int32 [T]     the next token to feed: sampled, not yet in the pool
    logprob: Array  # float32 [T]   of that token, 0 if the interpreter wrote it
    position: Array  # int32 [T]     rotary position of the next token
    segment: Array  # int32 [T]     its segment
    sees: Array  # uint32 [T, W] its sees
    order: Array  # int32 [T]     its index in the thread
    position_after: Array  # int32 [T]     position of the token after it (it leaps at a promise)
    segment_after: Array  # int32 [T]     segment of the token after it (it is new at a promise)
    tag_state: Array  # int32 [T]     state of the tag grammar
    number: Array  # int32 [T]     the number being read in a tag
    budget: Array  # int32 [T]     content tokens that a branch may still sample
    closing: Array  # bool [T]      its last token has been sampled
    joining: Array  # bool [T]      its next token waits for the branches it has just joined to be fed
    forced: Array  # bool [T]      `</async>` was written by the interpreter, not by the model
    parent: Array  # int32 [T]     thread that made the promise; -1 for main
    forked_at: Array  # int32 [T]     order of the promise's ` />` in the parent
    children: Array  # int32 [T]     promises made so far
    joined: Array  # bool [T]      the parent already sees it
    depth: Array  # int32 [T]     0 for main
    path: Array  # int32 [T]     names the thread whatever the schedule; equals its number at depth 1


@_pytree
class Entries:
    """What the pool holds, entry by entry; the row's trace. [P], of which the first `cursor` are real."""

    token: Array  # int32 [P]
    position: Array  # int32 [P]
    doc: Array  # int32 [P]     1, or NO_DOC where nothing is
    segment: Array  # int32 [P]
    order: Array  # int32 [P]
    sees: Array  # uint32 [P, W]
    thread: Array  # int32 [P]
    step: Array  # int32 [P]     decode step that wrote it, from 1; 0 is the prompt
    logprob: Array  # float32 [P]   log-probability that the model gave it; 0 where it was not sampled


@_pytree
class RowState:
    """One request being answered."""

    threads: ThreadTable
    entries: Entries
    cursor: Array  # int32 []  pool entries written
    prompt_length: Array  # int32 []
    used_threads: Array  # int32 []
    used_segments: Array  # int32 []
    step: Array  # int32 []  decode steps done while running
    stop: Array  # int32 []  a Stop


@_pytree
class Lanes:
    """What one step feeds: S lanes, the active ones first."""

    active: Array  # bool [S]
    thread: Array  # int32 [S]  T where idle
    token: Array  # int32 [S]
    logprob: Array  # float32 [S]
    position: Array  # int32 [S]
    doc: Array  # int32 [S]
    segment: Array  # int32 [S]
    order: Array  # int32 [S]
    sees: Array  # uint32 [S, W]


def empty_row(limits: Limits, entries: int) -> RowState:
    """A row with no request, stopped. `entries` is the size of the entry arrays, at least P."""
    t, w = limits.threads, limits.words

    def ints(*shape: int) -> Array:
        return jnp.zeros(shape, jnp.int32)

    def bools() -> Array:
        return jnp.zeros(t, bool)

    threads = ThreadTable(
        phase=ints(t), token=ints(t), logprob=jnp.zeros(t, jnp.float32), position=ints(t), segment=ints(t),
        sees=jnp.zeros((t, w), jnp.uint32), order=ints(t), position_after=ints(t), segment_after=ints(t),
        tag_state=ints(t), number=ints(t), budget=ints(t), closing=bools(), joining=bools(), forced=bools(),
        parent=ints(t) - 1, forked_at=ints(t), children=ints(t), joined=bools(), depth=ints(t), path=ints(t),
    )  # fmt: skip
    pool = Entries(
        token=ints(entries), position=ints(entries), doc=ints(entries), segment=ints(entries), order=ints(entries),
        sees=jnp.zeros((entries, w), jnp.uint32), thread=ints(entries), step=ints(entries),
        logprob=jnp.zeros(entries, jnp.float32),
    )  # fmt: skip
    zero = jnp.int32(0)
    return RowState(threads, pool, zero, zero, zero + 1, zero + 1, zero, zero + Stop.EOS)
