"""What a decode carries from step to step (docs/design.md, section 6). Threads carry state; lanes are stateless.

Everything here is one row's, without the leading B; the loop maps over rows.
"""

from __future__ import annotations

import dataclasses
import enum

import jax.numpy as jnp
from flax import struct

from pasta_jax.arrays import LARGEST_INT, NO_DOC, Array, Tokens
from pasta_jax.decoding.options import switch, whole
from pasta_jax.decoding.sampling import Draw
from pasta_jax.visibility import max_segments, words_for

MAX_POOL = 2**30
"""Entries of the largest pool: their indices are int32."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """The static sizes of a decode. Each combination is a compiled program of its own.

    Attributes:
      lanes: S, threads fed in one step.
      threads: T, threads a row can hold, main included. When all are taken no promise can be opened.
      pool: P, tokens of prompt and answer that a row can hold.
      max_depth: how deep promises may nest; 1 is the paper.
      constrained: whether the tag grammar masks illegal tokens. Off, malformed pieces become literal text.

    Raises:
      ValueError: an option out of range or of the wrong type.
    """

    lanes: int = 8
    threads: int = 16
    pool: int = 1024
    max_depth: int = 1
    constrained: bool = True

    def __post_init__(self) -> None:
        for name in ("lanes", "threads", "pool", "max_depth"):
            most = MAX_POOL if name == "pool" else LARGEST_INT
            object.__setattr__(self, name, whole(name, getattr(self, name), 1, most))
        object.__setattr__(self, "constrained", switch("constrained", self.constrained))
        if self.lanes > self.threads:
            raise ValueError(
                f"lanes={self.lanes} exceeds threads={self.threads}: a step feeds each thread once."
            )

    @property
    def words(self) -> int:
        """W."""
        return words_for(max_segments(self.threads))


class Phase(enum.IntEnum):
    """The state of a thread."""

    EMPTY = 0  # there is no such thread yet
    READY = 1  # has a token to be fed
    HELD = 2  # waits for its branches, at a sync or at its end
    DONE = 3  # its last token is in the pool


class Stop(enum.IntEnum):
    """Why a row stopped. The host decides the last two."""

    RUNNING = 0
    EOS = 1
    LENGTH = 2  # max_new_tokens
    CACHE_FULL = 3  # the pool
    STOP = 4  # a stop string
    CANCELLED = 5  # the caller gave up

    @property
    def reason(self) -> str:
        """The value of `DecodeResult.stop_reason`."""
        return self.name.lower()


@struct.dataclass
class Request:
    """What a caller asks of one row. Traced: no value of these recompiles anything."""

    max_new_tokens: Array  # int32 []   tokens written to the pool after the prompt
    max_branch_tokens: Array  # int32 []   content tokens of one branch; then `</async>` is forced
    open_bias: Array  # float32 [] added to the logit that opens a promise; -inf forbids promises
    draw: Draw
    key: Array  # uint32 [2]    data of the request's random key
    script: Array  # int32 [R, C]  a thread's tokens in each line (`script.Script`); C = 0 without a script
    script_branches: Array  # int32 [R, C]  the line of the branch that each ` />` starts, or FREE


@struct.dataclass(frozen=True)
class DecodedTokens(Tokens):
    """Tokens of a row, wherever they are: next to be fed, in the lanes of a step, in the pool."""

    logprob: Array  # float32 [...]  log-probability that the model gave it; 0 if it was not sampled
    step: Array  # int32 [...]  decode step that fed it, from 1; 0 is the prompt, UNFED is none


UNFED = -1
"""In `step`: not fed yet, or never, as the tokens that end an answer."""


@struct.dataclass
class ThreadTable:
    """The T threads of a row."""

    next: DecodedTokens  # [T]   the token to be fed next: sampled, not yet in the pool
    phase: Array  # int32 [T]     a Phase
    position_after: Array  # int32 [T]     position of the token after the next (it leaps at a promise)
    segment_after: Array  # int32 [T]     segment of the token after the next (it is new at a promise)
    tag_state: Array  # int32 [T]     state of the tag grammar
    number: Array  # int32 [T]     the number being read in a tag
    budget: Array  # int32 [T]     content tokens that a branch may still sample
    closing: Array  # bool [T]      its last token has been sampled
    joining: Array  # bool [T]      its next token waits until the branches it has just joined are fed
    force_closed: Array  # bool [T]      the interpreter wrote its `</async>`, not the model
    parent: Array  # int32 [T]     thread that made the promise; -1 for main
    fork_order: Array  # int32 [T]     order of the promise's ` />` in the parent; -1 for main
    joined: Array  # bool [T]      the parent already sees it
    depth: Array  # int32 [T]     0 for main


@struct.dataclass
class RowState:
    """One request being answered."""

    threads: ThreadTable
    entries: DecodedTokens  # [P]  what the pool holds, the row's trace; the first `cursor` are real
    cursor: Array  # int32 []  pool entries written
    prompt_length: Array  # int32 []
    used_threads: Array  # int32 []
    used_segments: Array  # int32 []
    step: Array  # int32 []  decode steps done while running
    stop: Array  # int32 []  a Stop


DOC = 1
"""A row holds one document."""

MAIN = 0
"""The number of the main thread."""


def empty_tokens(count: int, words: int) -> DecodedTokens:
    """Padding: [count] fields, `sees` [count, words]."""
    zeros = jnp.zeros(count, jnp.int32)
    return DecodedTokens(
        token=zeros, position=zeros, doc=zeros + NO_DOC, segment=zeros, order=zeros,
        sees=jnp.zeros((count, words), jnp.uint32), thread=zeros, logprob=jnp.zeros(count, jnp.float32), step=zeros,
    )  # fmt: skip


def empty_row(limits: Limits, entries: int) -> RowState:
    """A row with no request, stopped. `entries` is the size of the pool: P, and S for what idle lanes write."""
    T = limits.threads
    zeros, no = jnp.zeros(T, jnp.int32), jnp.zeros(T, bool)
    following = dataclasses.replace(
        empty_tokens(T, limits.words),
        doc=zeros + DOC,
        thread=jnp.arange(T, dtype=jnp.int32),
        step=zeros + UNFED,
    )
    threads = ThreadTable(
        next=following, phase=zeros, position_after=zeros, segment_after=zeros, tag_state=zeros, number=zeros,
        budget=zeros, closing=no, joining=no, force_closed=no, parent=zeros - 1, fork_order=zeros - 1, joined=no,
        depth=zeros,
    )  # fmt: skip
    zero = jnp.int32(0)
    return RowState(
        threads=threads, entries=empty_tokens(entries, limits.words), cursor=zero, prompt_length=zero,
        used_threads=zero + 1, used_segments=zero + 1, step=zero, stop=zero + Stop.EOS,
    )  # fmt: skip
