"""Laws 1 and 3: the golden trace, and the compiled interpreter against its specification."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasta_jax.decoding import interpreter, reference
from pasta_jax.decoding.state import Limits, Stop
from pasta_jax.lang import grammar
from pasta_jax.lang.grammar import Effect, Kind
from pasta_jax.tokens.positions import Positions
from tests.helpers import FULL, full, scripted, slow
from tests.helpers.scripted import compare, compare_views, random_script

PROGRAMS = 10_240 if FULL else 1_280


SETTINGS = [
    (Limits(lanes=8, threads=16, pool=160), Positions()),
    (Limits(lanes=1, threads=16, pool=160), Positions("shared")),
    (Limits(lanes=2, threads=6, pool=120, max_depth=3), Positions()),
    (Limits(lanes=4, threads=12, pool=160, max_depth=2), Positions("const", 40)),
    (Limits(lanes=8, threads=16, pool=160, constrained=False), Positions("pred", 1)),
    (Limits(lanes=3, threads=9, pool=160, max_depth=3, constrained=False), Positions()),
    (Limits(lanes=2, threads=2, pool=60, constrained=False), Positions()),
    (Limits(lanes=8, threads=24, pool=240, max_depth=3), Positions()),
]


@pytest.mark.parametrize("setting", [0, slow(1), 2, slow(3), full(4), 5, full(6), full(7)])
def test_compiled_interpreter_is_its_specification(setting, seed):
    """Law 3: same tokens, threads, places, steps, views and stop, on random programs, malformed ones included."""
    limits, positions = SETTINGS[setting]
    rng = np.random.default_rng([seed, setting])
    n = PROGRAMS // len(SETTINGS)
    scripts = [random_script(rng) for _ in range(n)]
    lengths = rng.integers(1, 7, n)
    asks = [scripted.request(int(m), int(b)) for m, b in zip(rng.integers(5, 200, n), rng.integers(3, 40, n))]
    prompts = np.full((n, 6), scripted.A, np.int32)
    rows = scripted.decoded(limits, positions, prompts, lengths, scripts, asks)
    stops, deep = set(), 0
    for i in range(n):
        views: scripted.Views = {}
        answer = scripted.run_reference(
            list(prompts[i, : lengths[i]]), scripts[i], limits, asks[i], positions, views
        )
        row = jax.tree.map(lambda x, i=i: x[i], rows)
        compare(row, answer)
        if i < 40:
            compare_views(row, answer, views)
        stops.add(answer.stop)
        deep += any(t.depth == limits.max_depth and t.closing and t.pending is None for t in answer.threads)
    assert deep > n // 40, "hardly any branch as deep as may be came to its end"
    assert Stop.EOS in stops and len(stops) > 1, f"the programs are too tame: {stops}"


@pytest.mark.parametrize("max_depth", [1, 3])
def test_lanes_change_neither_the_text_nor_who_sees_whom(max_depth, seed):
    """Law 5, of the specification: where nothing is cut, an entry and its view are the same for any S."""
    rng = np.random.default_rng([seed, max_depth])
    compared = 0
    while compared < 8:
        script, ask = random_script(rng), scripted.request(300, int(rng.integers(3, 40)))
        found = []
        for lanes in (2, 1, 5, 40):
            views: scripted.Views = {}
            limits = Limits(lanes=lanes, threads=40, pool=400, max_depth=max_depth)
            answer = scripted.run_reference([scripted.A], script, limits, ask, Positions(), views)
            shallow = max(thread.depth for thread in answer.threads) < max_depth
            if answer.stop != Stop.EOS or shallow or len(answer.threads) > 25:  # a thread for all that ask
                break
            found.append(views_by_name(answer, views))
        else:
            assert all(other == found[0] for other in found[1:])
            compared += 1


def views_by_name(answer: reference.Decoded, views: scripted.Views) -> dict[tuple, tuple]:
    """Token, position and what it sees, of each entry that led to another; named by its promises and its order."""

    def name_of(thread: reference.Thread) -> tuple[int, ...]:
        return (*name_of(thread.parent), thread.fork_order) if thread.parent else ()

    def name(entry: reference.Entry) -> tuple:
        return name_of(answer.threads[entry.thread]), entry.order

    return {
        name(entry): (entry.token, entry.position, {name(seen) for seen in views[id(entry)]})
        for entry in answer.entries
        if id(entry) in views
    }


def test_golden_trace():
    """Law 1: the paper's Figure 2, step for step and index for index; a fork and a join cost no extra step.

    The figure draws a promise as one token, so here the grammar's table is told that one token completes one.
    """
    limits = Limits(lanes=3, threads=4, pool=96)
    rules = interpreter.rules_for(scripted.VOCABULARY, limits)
    promise, sync, end = scripted.CLOSE, scripted.SYNC, scripted.EOS
    rules = dataclasses.replace(rules, event=rules.event.at[grammar.TEXT, Kind.CLOSE].set(Effect.FORK))
    word = scripted.A
    says = {
        0: [promise, promise, sync, word, end],  # Let's
        1: [word] * 32 + [scripted.ASYNC_CLOSE],  # To find the ... a plane
        2: [word] * 19 + [scripted.ASYNC_CLOSE],  # The length ...
    }
    ask, prompt = scripted.request(max_branch_tokens=64), jnp.full(21, word)
    feed = jax.jit(lambda state: interpreter.feed(state, ask, limits))
    advance = jax.jit(functools.partial(interpreter.advance, rules=rules))
    record = jax.jit(interpreter.record)
    state = interpreter.begin(limits, limits.pool + limits.lanes, prompt, jnp.int32(21))
    lanes = feed(state)
    said = {thread: iter(tokens) for thread, tokens in says.items()}
    while True:
        sampled = [0] * limits.lanes
        for lane in range(limits.lanes):
            thread = int(lanes.thread[lane])
            if lanes.is_real[lane] and not state.threads.closing[thread]:
                sampled[lane] = next(said[thread])
        state = advance(state, ask, lanes, jnp.array(sampled), jnp.zeros(limits.lanes))
        if state.stop != Stop.RUNNING:
            break
        lanes = feed(state)
        state = record(state, lanes)

    e = state.entries
    trace = {i: (int(e.step[i]), int(e.thread[i]), int(e.token[i])) for i in range(int(state.cursor))}
    async_open, async_close = scripted.ASYNC_OPEN, scripted.ASYNC_CLOSE
    expected = {
        21: (1, 0, promise), 22: (1, 1, async_open),
        23: (2, 0, promise), 24: (2, 1, word), 25: (2, 2, async_open),
        **{2 * step + 20: (step, 1, word) for step in range(3, 23)},
        **{2 * step + 21: (step, 2, word) for step in range(3, 22)},
        65: (22, 2, async_close),
        **{step + 43: (step, 1, word) for step in range(23, 34)},
        77: (34, 1, async_close), 78: (34, 0, sync),
        79: (35, 0, word),
    }  # fmt: skip
    assert {i: trace[i] for i in range(21, len(trace))} == expected
    assert int(state.cursor) == 80 and int(state.step) == 35
