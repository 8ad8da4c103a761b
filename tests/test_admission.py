"""Branches that wait while others are fed: the schedule changes, and no text."""

from __future__ import annotations

import functools
import json
import logging
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasta_jax import kept
from pasta_jax.decoding.admission import Admission
from pasta_jax.decoding.compiled import Compiled
from pasta_jax.decoding.engine import Decoder
from pasta_jax.decoding.loop import Until
from pasta_jax.decoding.request import SamplingParams
from pasta_jax.decoding.state import Limits, Phase, RowState, Stop, empty_row
from pasta_jax.decoding.trace import Trace
from tests.helpers import compilations
from tests.helpers.chatty import PROMPTS, chatty_model, ids

pytestmark = pytest.mark.slow

LIMITS = Limits(lanes=4, threads=8, pool=120)


@functools.cache
def programs() -> Compiled:
    """Steps of one, two or four lanes, for three requests."""
    sizes: Any = dict(limits=LIMITS, prompt_buckets=(), widths=(1, 2), pool_buckets=())
    return Decoder(chatty_model(), rows=3, **sizes).compiled


def a_decoder(policy: str) -> Decoder:
    return Decoder(chatty_model(), compiled=programs(), chunk=8, admission=policy)


def decoded(decoder: Decoder) -> list[Trace]:
    sampling = [SamplingParams(60, temperature=1.0, seed=seed, open_bias=3.5) for seed in range(9)]
    return decoder.decode([ids(PROMPTS[i % len(PROMPTS)]) for i in range(9)], sampling)[0]


def same_threads(some: list[Trace], others: list[Trace]) -> bool:
    """Where a limit cuts an answer off depends on the schedule; then each thread begins as the other."""
    for a, b in zip(some, others, strict=True):
        pairs = [*zip(a.threads.tokens, b.threads.tokens)]
        if {a.stop, b.stop} == {Stop.EOS} and a.threads.tokens != b.threads.tokens:
            return False
        if not all(p[: len(q)] == q[: len(p)] for p, q in pairs):
            return False
    return True


def most(traces: list[Trace]) -> int:
    return max(int(trace.widths.max()) for trace in traces)


def test_threads_wait_and_say_the_same() -> None:
    """With a cap, with costs, and with too little time, when none waits in vain; the same programs serve all."""
    everything = decoded(a_decoder("all"))
    assert most(everything) > 2
    with compilations() as compiled:
        capped = decoded(a_decoder("cap:2"))
        dear = a_decoder("cost")
        dear.admission.times = dict.fromkeys(programs().pool_buckets, (1.0, 5.0, 9.0))
        hurried = a_decoder("cost:0.000001")
        hurried.admission.times = dict.fromkeys(programs().pool_buckets, (1.0, 1.0, 1.0))
        cheap = a_decoder("cost")
        cheap.admission.times = dict.fromkeys(programs().pool_buckets, (1.0, 1.1, 1.2))
        others = [capped, decoded(dear), decoded(hurried), decoded(cheap)]
    assert compiled == []
    assert [most(traces) for traces in others] == [2, 1, most(everything), most(everything)]
    assert all(same_threads(traces, everything) for traces in others)
    assert sum(trace.steps for trace in capped) > sum(trace.steps for trace in everything)


def test_a_step_has_the_width_that_feeds_most_for_its_cost(seed: int) -> None:
    """Compared with a search in plain Python; rows that have stopped do not count."""
    rng = np.random.default_rng(seed)
    limits, widths = Limits(lanes=8, threads=12, pool=32), (1, 3, 8)
    row = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (5, *jnp.shape(leaf))), empty_row(limits, 40))

    @jax.jit
    def choice(rows: RowState, costs: Any) -> Any:
        zero = jnp.int32(0)
        return Until(zero, zero > 0, zero, 32, widths, costs).choice(rows)

    for _ in range(200):
        phase, stop = rng.choice([*Phase], (5, 12)), rng.choice([Stop.RUNNING, Stop.EOS], 5)
        stop[0] = Stop.RUNNING
        rows = row.replace(threads=row.threads.replace(phase=jnp.array(phase)), stop=jnp.array(stop))
        costs = [1.0, 1.0, 1.0] if rng.random() < 0.3 else rng.choice([1.0, 2.0, 3.5, 6.0, np.inf], 3)
        costs[0] = min(costs[0], 6.0)
        ready = [sum(p == Phase.READY) for p, s in zip(phase, stop) if s == Stop.RUNNING]
        worth = [np.float32(sum(min(r, w) for r in ready)) / np.float32(c) for w, c in zip(widths, costs)]
        found = int(choice(rows, np.array(costs, np.float32)))
        assert worth[found] == max(worth)
        if len({*costs}) == 1 and max(ready):
            assert widths[found] == min(w for w in widths if w >= min(8, *(max(ready), 8)))


def test_requests_have_their_tokens_in_time() -> None:
    """No request is late if a width can help it; it is a matter of who is ahead, and of threads that are ready."""
    bound = Admission(programs(), "cost:0.5")
    assert bound.costs(124, 8, []).tolist() == [1, 1, 1], "nothing is measured yet"
    bound.times = {124: (0.4, 0.5, 0.8), 248: (0.6, 0.7, 0.9)}
    no = math.inf
    for used, pace, expected in (
        (124, [], [0.4, 0.5, 0.8]),
        (124, [(0, 0.0, 1), (20, 7.0, 1)], [0.4, 0.5, no]),
        (124, [(10, 4.0, 1), (20, 7.0, 1)], [0.4, 0.5, no]),  # 1 s ahead: 0.125 s a step
        (124, [(20, 7.0, 1), (20, 7.0, 1)], [0.4, 0.5, 0.8]),  # 3 s
        (124, [(20, 7.0, 1), (10, 6.0, 1)], [0.4, no, no]),  # the other is behind
        (124, [(0, 0.0, 4), (0, 0.0, 2)], [0.4, 0.5, 0.8]),  # 0.4 s a token at most
        (124, [(0, 0.0, 4), (0, 0.0, 1)], [0.4, 0.5, no]),
        (124, [(10, 6.0, 4), (10, 5.0, 1)], [no, 0.5, no]),  # one is behind and has four threads
        # No width gives each thread a token in 0.5 s:
        (248, [(0, 0.0, 1)], [0.6, 0.7, 0.9]),  # alone
        (248, [(0, 0.0, 1), (0, 0.0, 4)], [0.6, no, no]),
        (248, [(0, 0.0, 2), (0, 0.0, 4)], [no, 0.7, 0.9]),  # two have theirs, every 0.7 s
        (248, [(0, 9.0, 4), (0, 0.0, 4)], [no, no, 0.9]),  # it catches up as well as it can
    ):
        assert np.allclose(bound.costs(used, 8, pace), expected), (used, pace)
    assert Admission(programs(), "cap:2").costs(124, 8, []).tolist() == [1, 1, no]
    assert Admission(programs(), "cap:3").costs(124, 8, []).tolist() == [1, 1, 1]
    assert Admission(programs(), "cap:9").costs(124, 8, []).tolist() == [1, 1, 1]


def test_times_are_measured_once(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By the warm up, for each width and part of the pool, without compiling more; the next start reads them.

    Each start logs them.
    """
    caplog.set_level(logging.INFO, "pasta_jax")
    monkeypatch.setattr(kept, "programs", str(tmp_path))
    programs().compile_all()
    first = a_decoder("cost")
    with compilations() as compiled:
        first.warm_up()
    assert compiled == [] and first.admission.times is not None
    assert first.admission.times.keys() == {124}
    assert all(len(times) == 3 and min(times) > 0 for times in first.admission.times.values())
    (file,) = tmp_path.glob("*-times")
    (table,) = [message for message in caplog.messages if message.startswith("steps over 124 entries, of ")]
    caplog.clear()

    def not_again(*_: Any) -> Any:
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr(Compiled, "decode_chunk", not_again)
        second = a_decoder("cost:1")
        second.warm_up()
        assert second.admission.times == first.admission.times
        assert caplog.messages[-2].endswith(f"delete {file}") and caplog.messages[-1] == table
        a_decoder("all").warm_up()
    for damaged in ("", "[]", json.dumps({"20": [1, 2, 3]})):
        file.write_text(damaged)
        again = a_decoder("cost")
        again.warm_up()
        assert again.admission.times is not None and again.admission.times.keys() == {124}


def test_mistakes_in_words() -> None:
    for wrong in ("some", "cap", "cap:0", "cap:-1", "cost:", "cost:x", "", None, 4):
        with pytest.raises(ValueError, match=r'is unknown\. Use "all", "cap:4", "cost" or "cost:0\.05"\.$'):
            Admission(programs(), wrong)  # type: ignore[arg-type]
    alone = Decoder(chatty_model(), limits=LIMITS, widths=()).compiled
    with pytest.raises(ValueError, match="admission=cost has no choice: every step has 4 lanes"):
        Admission(alone, "cost")
