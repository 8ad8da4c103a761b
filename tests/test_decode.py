"""Laws 2 and 5: a decoded trace fed once gives the same logits, and nothing but the request changes the text."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasta_jax import sharding
from pasta_jax.arrays import NO_TARGET, ThreadedTokens
from pasta_jax.decoding import loop
from pasta_jax.decoding.engine import Decoder
from pasta_jax.decoding.request import SamplingParams
from pasta_jax.decoding.state import Limits, Stop
from pasta_jax.decoding.trace import Trace, as_document
from pasta_jax.lang import tags
from pasta_jax.tokens import cost
from pasta_jax.tokens.detokenize import read, threads_of
from pasta_jax.tokens.positions import Positions
from tests.helpers import AS_FOR_USERS, FULL, SEEDS_ARE_FIXED, chatty, full, only_full, optimized
from tests.helpers.chatty import PROMPTS, WORDS, chatty_model, ids, log_softmax, once_through

LIMITS = Limits(lanes=8, threads=16, pool=300)


def ask(seed: int, **changes: Any) -> SamplingParams:
    sampling = SamplingParams(
        max_new_tokens=200, max_branch_tokens=30, temperature=1.0, seed=seed, open_bias=3.5
    )
    return dataclasses.replace(sampling, **changes)


@functools.cache
def decoder(
    limits: Limits = LIMITS,
    rows: int = 4,
    chunk: int = 512,
    widths: tuple[int, ...] = (),
    careful: bool = False,
) -> Decoder:
    sizes: dict[str, Any] = dict(limits=limits, rows=rows, prompt_buckets=(16,), widths=widths)
    return Decoder(chatty_model(), chunk=chunk, xla_options=AS_FOR_USERS if careful else None, **sizes)


def prompt_of(seed: int) -> str:
    return f"{PROMPTS[seed % len(PROMPTS)]} {seed % 97}"


def requests(seeds: Sequence[int], *, greedy: bool) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts and settings of each."""
    sampling = [ask(seed, temperature=0.0 if greedy else 1.0) for seed in seeds]
    return [ids(prompt_of(seed)) for seed in seeds], sampling


def decode(seeds: Sequence[int], *, greedy: bool = False, **options: Any) -> list[Trace]:
    traces, _ = decoder(**options).decode(*requests(seeds, greedy=greedy))
    return traces


def text(trace: Trace) -> tuple:
    """All that the text is: tokens by thread, whatever the schedule, and how it ended."""
    return [list(t) for t in trace.threads.tokens], [dict(b) for b in trace.threads.branches], trace.stop


def schedule(trace: Trace) -> tuple:
    """The text, and which step fed each token."""
    return *text(trace), trace.tokens.thread.tolist(), trace.step.tolist(), trace.steps


def agree(one: Trace, other: Trace) -> bool:
    """The same text; where a limit cut one, the schedule decides which thread it cut: as far as both go."""
    if one.stop == other.stop == Stop.EOS:
        return text(one) == text(other)
    pairs = list(zip(one.threads.tokens, other.threads.tokens))
    return Stop.EOS not in (one.stop, other.stop) and all(
        list(a[: len(b)]) == list(b[: len(a)]) for a, b in pairs
    )


def depth(trace: Trace) -> int:
    """How deep the promises of a trace nest."""
    depths = [0]
    for parent in trace.parent[1:]:
        depths.append(depths[parent] + 1)
    return max(depths)


SEEDS = range(36, 48)


def test_the_model_is_worth_testing_with():
    traces = decode(SEEDS)
    branches = [len(t.parent) - 1 for t in traces]
    assert max(branches) >= 5 and np.mean(branches) > 1.5
    assert any(t.stop == Stop.EOS for t in traces)
    assert sum(int(np.sum(t.tokens.token == WORDS.vocabulary.tag_ids[tags.SYNC])) for t in traces) > 3
    assert max(t.widths.max() for t in traces) >= 4


FORMS: dict[int, tuple[str, dict[str, Any]]] = {
    1: ("fused", {"platform": "gpu"}),
    3: ("outputs_first", {"cached_bytes": 0}),
    8: ("fused", {}),
}
"""By lanes: the form of the weights, and when they have it. On accelerators; on CPUs without and with a cache."""


@pytest.mark.parametrize(
    ("max_depth", "lanes"), [full(1, 1), full(1, 3), full(1, 8), full(3, 1), full(3, 3), (3, 8)]
)
def test_parity(max_depth, lanes, seed, monkeypatch):
    """Law 2: every token fed has all the logits, fed at once, that it had when it was decoded."""
    limits = Limits(lanes, 16, 300, max_depth)
    seeds = [seed + i for i in range(6)]
    decoded = listen(monkeypatch)
    form, settings = FORMS[lanes]
    sizes: dict[str, Any] = dict(rows=len(seeds), prompt_buckets=(16,), widths=(1, 2) if lanes == 3 else ())
    made = Decoder(chatty_model(), limits=limits, **sizes, **settings)
    assert made.compiled.form == form
    sampling = [ask(seed, open_bias=3.5 if i < 3 else 6.0) for i, seed in enumerate(seeds)]
    traces, _ = made.decode([ids(prompt_of(seed)) for seed in seeds], sampling)
    jax.effects_barrier()
    assert not SEEDS_ARE_FIXED or max(depth(trace) for trace in traces) == max_depth
    checked = 0
    for row, trace in enumerate(traces):
        logits, targets = once_through(chatty_model(), trace)
        document = as_document(trace)
        place = {(int(t), int(o)): i for i, (t, o) in enumerate(zip(document.thread, document.order))}
        heard = {key[1:]: value for key, value in decoded.items() if key[0] == row}
        for i in (trace.prompt_length - 1, *np.flatnonzero(trace.step > 0)):
            key = int(trace.tokens.thread[i]), int(trace.tokens.order[i])
            np.testing.assert_allclose(
                heard.pop(key), logits[place[key]], rtol=0, atol=1e-4, err_msg=f"thread, order {key}"
            )
        assert not heard
        # What was recorded for a token is its log-probability where its thread's token before it stands.
        logprobs = log_softmax(logits)
        recorded = trace.logprob[[_in_trace(trace, document, i) for i in range(len(document))]]
        for i, target in enumerate(targets):
            after = place.get((int(document.thread[i]), int(document.order[i]) + 1))
            forced = (
                trace.force_closed[document.thread[i]]
                and target == WORDS.vocabulary.tag_ids[tags.ASYNC_CLOSE]
            )
            if target == NO_TARGET or after is None or forced:
                continue
            assert document.token[after] == target
            assert abs(float(logprobs[i, target]) - float(recorded[after])) < 1e-4
            checked += 1
    assert checked > (100 if SEEDS_ARE_FIXED else 0)


def listen(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, int, int], np.ndarray]:
    """The logits that decoders compiled from now on choose from, by row, thread and order of the token fed."""
    heard: dict[tuple[int, int, int], np.ndarray] = {}
    next_tokens = loop.next_tokens

    def hear(active: np.ndarray, thread: np.ndarray, order: np.ndarray, logits: np.ndarray) -> None:
        for row, lane in zip(*np.nonzero(active)):
            heard[int(row), int(thread[row, lane]), int(order[row, lane])] = np.array(logits[row, lane])

    def choose_aloud(rules: Any, rows: Any, requests: Any, lanes: Any, logits: Any) -> Any:
        jax.debug.callback(hear, lanes.is_real, lanes.thread, lanes.order, logits)
        return next_tokens(rules, rows, requests, lanes, logits)

    monkeypatch.setattr(loop, "next_tokens", choose_aloud)
    return heard


def _in_trace(trace: Trace, document: ThreadedTokens, i: int) -> int:
    same = (trace.tokens.thread == document.thread[i]) & (trace.tokens.order == document.order[i])
    return int(np.flatnonzero(same)[0])


@pytest.mark.parametrize("greedy", [False, True])
class TestInvariance:
    """Law 5. The pool is large enough and no row is cut, so only the request may matter."""

    @pytest.mark.slow
    def test_lanes(self, greedy):
        expected = decode(SEEDS, greedy=greedy)
        for lanes in (1, 2, 4, 16) if FULL else (1,):
            found = decode(SEEDS, greedy=greedy, limits=dataclasses.replace(LIMITS, lanes=lanes))
            for seed, one, other in zip(SEEDS, expected, found):
                assert agree(one, other), (lanes, seed)
            compared = [min(map(len, pair)) for e, f in zip(expected, found) for pair in _branches(e, f)]
            assert sum(compared) > 100, "hardly any branch was compared"

    @pytest.mark.slow
    @only_full
    def test_width(self, greedy):
        """Compiled with little care, and as for users, with all of it."""
        expected = [schedule(t) for t in decode(SEEDS, greedy=greedy)]
        for widths, careful in (((1, 2, 3, 4, 6), False), ((1, 4), True)):
            with optimized() if careful else contextlib.nullcontext():
                found = decode(SEEDS, greedy=greedy, widths=widths, careful=careful)
            assert [schedule(t) for t in found] == expected

    def test_chunk(self, greedy):
        expected = [schedule(t) for t in decode(SEEDS, greedy=greedy)]
        queue = decoder().for_model(chatty_model())
        queue.session.chunk = 7
        traces, _ = queue.decode(*requests(SEEDS, greedy=greedy))
        assert [schedule(t) for t in traces] == expected

    @pytest.mark.slow
    def test_batch_mates_order_and_idle_rows(self, greedy):
        expected = [schedule(t) for t in decode(SEEDS, greedy=greedy)]
        backwards = decode(list(SEEDS)[::-1], greedy=greedy)
        assert [schedule(t) for t in backwards][::-1] == expected
        few = SEEDS if FULL else SEEDS[:4]
        assert [schedule(decode([seed], greedy=greedy)[0]) for seed in few] == expected[: len(few)]

    @pytest.mark.slow
    def test_fewer_rows_a_longer_pool_and_widths(self, greedy):
        """All at once; with the full counts, one row and the pool each alone too."""
        expected = [schedule(t) for t in decode(SEEDS, greedy=greedy)]
        longer: dict[str, Any] = {"limits": dataclasses.replace(LIMITS, pool=611)}
        changes: list[dict[str, Any]] = [{"rows": 3, "widths": (4,), **longer}]
        if FULL:
            changes += [{"rows": 1}, longer]
        for changed in changes:
            assert [schedule(t) for t in decode(SEEDS, greedy=greedy, **changed)] == expected


@only_full
def test_nested_branches_are_drawn_the_same_whatever_the_room_for_threads():
    """With at most 4 threads, and a tag begun in each, a table of 8 limits nothing."""
    narrow, wide = (
        decode(range(60), limits=Limits(lanes=8, threads=threads, pool=300, max_depth=3))
        for threads in (8, 16)
    )
    compared = 0
    for one, other in zip(narrow, wide):
        if len(other.parent) <= 4 and depth(other) > 1:
            assert text(one) == text(other)
            compared += 1
    assert compared >= 3


def test_a_draw_does_not_depend_on_the_length_of_the_prompt():
    """Of a model for which all tokens are the same, so that only the draws make the text."""
    model = chatty_model()
    params = {**model.params, "embed": jax.tree.map(jnp.zeros_like, model.params["embed"])}
    deaf = decoder().for_model(dataclasses.replace(model, params=params))
    prompts = [[5], [5] * 2, [5] * 9, [5] * 16]
    traces, _ = deaf.decode(prompts, [ask(11, max_new_tokens=100)] * 4)
    assert len({str(text(trace)) for trace in traces}) == 1
    assert len({*traces[0].threads.tokens[0]}) > 5


def _branches(one: Trace, other: Trace) -> list[tuple]:
    return list(zip(one.threads.tokens[1:], other.threads.tokens[1:]))


@functools.cache
def spread_decoder() -> Decoder:
    """Parameters and pool over 8 devices."""
    model, mesh = chatty_model(), sharding.make_mesh(data=2, fsdp=2, tensor=2)
    params = jax.device_put(model.params, sharding.param_shardings(model.params, mesh))
    spread = dataclasses.replace(model, params=params)
    return Decoder(spread, limits=LIMITS, rows=4, prompt_buckets=(16,), widths=())


@pytest.mark.slow
@pytest.mark.parametrize("greedy", [False, True])
def test_mesh(greedy):
    """Law 5, the mesh: parameters and pool over 8 devices give the same text."""
    expected = [text(t) for t in decode(SEEDS, greedy=greedy)]
    spread = spread_decoder()
    assert spread.compiled.mesh is not None and not decoder().fits(spread.model)
    traces, _ = spread.decode(*requests(SEEDS, greedy=greedy))
    pool = spread.compiled.empty_batch().pool
    assert len(pool.k[0].sharding.device_set) == 8 and not pool.k[0].sharding.is_fully_replicated
    assert [text(t) for t in traces] == expected


@pytest.mark.slow
def test_critical_path_is_the_steps_taken_with_lanes_to_spare():
    compared = 0
    for trace in decode(SEEDS):
        if trace.stop == Stop.EOS and max(trace.widths) < LIMITS.lanes:
            assert cost.critical_path(trace.threads, WORDS.vocabulary) == trace.steps
            assert cost.widths(trace.threads, WORDS.vocabulary) == [*trace.widths]
            compared += len(trace.parent) > 2
    assert compared >= 2, "hardly any had several branches"


@pytest.mark.slow
@pytest.mark.parametrize(("max_depth", "threads", "bias"), [full(1, 16, 3.5), (3, 3, 10.0), full(3, 16, 3.5)])
def test_with_the_grammar_nothing_is_malformed(max_depth, threads, bias):
    """Not even where several threads want the last free one in the same step, as nearly always with 3 threads."""
    limits = Limits(min(4, threads), threads, 300, max_depth)
    prompts, sampling = zip(*((ids(prompt_of(seed)), ask(seed, open_bias=bias)) for seed in range(24)))
    traces, _ = decoder(limits).decode(prompts, sampling)
    ended = 0
    for trace in traces:
        reading = read(WORDS.vocabulary, trace.threads)
        faults = [
            issue for issue in reading.issues if "no thread was free" in issue or "out of place" in issue
        ]
        assert not faults
        if trace.stop == Stop.EOS:
            ended += 1
            assert not [issue for issue in reading.issues if "incomplete" not in issue]
            assert trace.force_closed.any() or not reading.issues
            assert read(WORDS.vocabulary, threads_of(as_document(trace))) == reading
    assert ended > 3


@pytest.mark.slow
def test_without_the_grammar_nothing_crashes():
    limits = dataclasses.replace(LIMITS, constrained=False)
    issues = [
        issue for t in decode(SEEDS, limits=limits) for issue in read(WORDS.vocabulary, t.threads).issues
    ]
    assert any("out of place" in issue for issue in issues), "nothing that the grammar would have forbidden"


def test_open_bias_and_limits_of_one_request_leave_the_others_alone():
    expected = [text(t) for t in (*decode([0, 1, 2]), *decode([3], greedy=True))]
    sampling = [ask(0), ask(1, open_bias=-np.inf), ask(2, max_new_tokens=9), ask(3, temperature=0)]
    traces, _ = decoder().decode([ids(prompt_of(s)) for s in range(4)], sampling)
    assert [text(traces[i]) for i in (0, 3)] == [expected[i] for i in (0, 3)]
    assert len(traces[1].parent) == 1
    assert traces[2].stop == Stop.LENGTH and np.sum(traces[2].step > 0) == 9


def test_open_bias_is_a_knob():
    """None at -inf, and the more the higher it is, by one program."""
    promises = []
    for bias in (-np.inf, 2.0, 3.5, 5.0):
        sampling = [ask(seed, open_bias=bias) for seed in SEEDS]
        traces, timing = decoder().decode([ids(prompt_of(seed)) for seed in SEEDS], sampling)
        promises.append(sum(len(trace.parent) - 1 for trace in traces))
        assert timing.compile_s == 0 or len(promises) == 1
    assert promises[0] == 0 and promises == sorted(set(promises)), promises


def test_a_mixed_batch_draws_as_each_row_does_alone():
    """One program for all; and what is narrowed differs from what is not, or there is nothing to see."""
    narrowed: list[dict[str, Any]] = [
        {"temperature": 0},
        {"top_k": 3},
        {"min_p": 0.3},
        {"top_p": 0.4, "top_k": 9, "temperature": 1.5},
    ]
    prompts, sampling = (
        [ids(prompt_of(i)) for i in range(4)],
        [ask(i, **wish) for i, wish in enumerate(narrowed)],
    )
    plain = [text(t) for t in decode(range(4))]
    together, _ = decoder().decode(prompts, sampling)
    decoder().decode(prompts[:1], sampling[:1])  # compiles what admits one prompt
    for i, trace in enumerate(together):
        (alone,), timing = decoder().decode([prompts[i]], [sampling[i]])
        assert schedule(alone) == schedule(trace) and timing.compile_s == 0
        assert text(trace) != plain[i]


@pytest.mark.slow
def test_pool_full_stops_one_row_with_its_text():
    """The decoder of other tests, whose pool is smaller than some answers."""
    small = chatty.decoder()
    traces, _ = small.decode(*requests(SEEDS, greedy=False))
    full = [t for t in traces if t.stop == Stop.CACHE_FULL]
    assert full and all(len(t.tokens) == small.limits.pool for t in full)
    assert len(full) < len(traces)


def test_prompts_that_cannot_be_answered():
    with pytest.raises(ValueError, match="prompt has 301 tokens, and the pool holds 300.*set Limits.pool"):
        decoder().decode([[5] * 301], [ask(0)])
    with pytest.raises(ValueError, match="prompt has 300 tokens"):  # not one token of an answer would fit
        decoder().decode([[5] * 300], [ask(0)])
    with pytest.raises(ValueError, match="empty"):
        decoder().decode([[]], [ask(0)])
    with pytest.raises(ValueError, match="temperature=-1"):
        ask(0, temperature=-1)


@pytest.mark.slow
def test_models_alike_in_all_but_their_parameters_share_what_is_compiled():
    mine = chatty_model()
    prompt, sampling = [ids("rivers")], [ask(3, temperature=0)]
    (expected,), _ = decoder().decode(prompt, sampling)
    head = jnp.roll(mine.params["head"], 1, axis=1)
    other = dataclasses.replace(mine, params={**mine.params, "head": head})
    twin = decoder().for_model(other)
    (trace,), timing = twin.decode(prompt, sampling)
    assert timing.compile_s == 0
    alone = Decoder(other, limits=LIMITS, rows=4, prompt_buckets=(16,), widths=()).decode(prompt, sampling)[
        0
    ][0]
    assert text(trace) == text(alone) != text(expected)
    assert text(decoder().decode(prompt, sampling)[0][0]) == text(expected)
    shared = dataclasses.replace(mine, positions=Positions("shared"))
    elsewhere = dataclasses.replace(mine, params=jax.device_put(mine.params, jax.devices()[1]))
    assert not decoder().fits(shared) and not decoder().fits(elsewhere)
    with pytest.raises(ValueError, match="alike in all but their parameters"):
        decoder().for_model(shared)
