"""Traces of random scripted answers, as the engine would read them, whole and as they are after some steps."""

from __future__ import annotations

import dataclasses
import functools
import random

import numpy as np

from pasta_jax.arrays import ThreadedTokens
from pasta_jax.decoding import reference
from pasta_jax.decoding.state import UNFED, Limits, Stop
from pasta_jax.decoding.trace import Trace
from pasta_jax.tokens.positions import Positions
from tests.helpers import scripted
from tests.helpers.scripted import random_script

SETTINGS = (
    Limits(lanes=8, threads=16, pool=160),
    Limits(lanes=2, threads=6, pool=120, max_depth=3),
    Limits(lanes=3, threads=12, pool=160, max_depth=2, constrained=False),
    Limits(lanes=8, threads=24, pool=240, max_depth=3, constrained=False),
)

PIECES = list(scripted.VOCABULARY.pieces)
PIECES[scripted.A], PIECES[scripted.B], PIECES[15] = b"\xf0\x9f", b"\x8c\x8d \xe6", b"x"
SPLIT = dataclasses.replace(scripted.VOCABULARY, pieces=tuple(PIECES))
"""The same ids and kinds, but one character takes two tokens, and many bytes are no character at all."""

VOCABULARIES = (scripted.VOCABULARY, SPLIT)


def trace_of(answer: reference.Decoded) -> Trace:
    """The trace that the engine would read of what the specification decoded."""
    entries, steps = list(answer.entries), [e.step for e in answer.entries]
    if answer.stop == Stop.EOS:
        last = [t.pending for t in (*answer.threads[1:], answer.threads[0]) if t.pending]
        entries += last
        steps += [UNFED] * len(last)
    n = len(entries)
    fields = {
        name: np.array([getattr(e, name) for e in entries], np.int32)
        for name in ("token", "thread", "order", "position")
    }
    zeros = np.zeros(n, np.int32)
    document = ThreadedTokens(
        **fields, doc=zeros + 1, segment=zeros, sees=zeros[:, None].astype(np.uint32), target=zeros
    )
    fed = [t.pending is None or (answer.stop == Stop.EOS and t.closing) for t in answer.threads]
    return Trace(
        tokens=document,
        step=np.array(steps, np.int32),
        logprob=-np.arange(n, dtype=np.float32),
        stop=answer.stop,
        steps=answer.steps,
        parent=np.array([t.parent.number if t.parent else -1 for t in answer.threads], np.int32),
        fork_order=np.array([t.fork_order for t in answer.threads], np.int32),
        force_closed=np.array([t.force_closed for t in answer.threads]),
        finished=np.array(fed),
    )


@functools.cache
def traces(seed: int, *, constrained: bool = False) -> list[Trace]:
    """Of all settings, or of those with the grammar alone."""
    rng = np.random.default_rng(seed)
    out = []
    for limits in SETTINGS[:2] if constrained else SETTINGS:
        for _ in range(16):
            ask = scripted.request(int(rng.integers(5, 200)), int(rng.integers(3, 40)))
            prompt = [scripted.A] * int(rng.integers(1, 7))
            answer = scripted.run_reference(prompt, random_script(rng), limits, ask, Positions())
            out.append(trace_of(answer))
    return out


def at_step(trace: Trace, step: int, stop: Stop = Stop.RUNNING) -> Trace:
    """What is there of a trace after so many steps."""
    keep = (trace.step >= 0) & (trace.step <= step)
    fed, whole = (
        np.bincount(trace.tokens.thread[k], minlength=len(trace.parent)) for k in (keep, keep | True)
    )
    return dataclasses.replace(
        trace,
        tokens=ThreadedTokens(**{name: array[keep] for name, array in trace.tokens.fields().items()}),
        step=trace.step[keep],
        logprob=trace.logprob[keep],
        stop=stop,
        steps=step,
        force_closed=trace.force_closed & (fed == whole),
        finished=trace.finished & (fed == whole),
    )


def looks(trace: Trace, rng: random.Random, density: float) -> list[Trace]:
    """The trace as it is at some steps, and as it is at last."""
    steps = [step for step in range(trace.steps + 1) if rng.random() < density]
    return [*(at_step(trace, step) for step in steps), trace]


def of_main(tokens: list[int], stop: Stop, *end: int) -> Trace:
    """A trace of one thread and no prompt."""
    n = len(tokens) + len(end)
    column = np.arange(n, dtype=np.int32)
    zeros = np.zeros(n, np.int32)
    document = ThreadedTokens(
        np.array([*tokens, *end], np.int32), column, zeros + 1, zeros, column, zeros[:, None], zeros, zeros
    )
    step = np.array([*range(1, len(tokens) + 1), *(UNFED for _ in end)], np.int32)
    one = np.zeros(1, np.int32)
    return Trace(document, step, zeros.astype(np.float32), stop, len(tokens), one - 1, one, one > 0, one > 0)
