"""Continuous batching: every request is accounted for, and its text is the one that it has alone."""

from __future__ import annotations

import dataclasses
import functools
import gc
import random
import re
import threading
from typing import Any

import jax
import numpy as np
import pytest

from pasta_jax.decoding import session
from pasta_jax.decoding.compiled import Compiled
from pasta_jax.decoding.pending import PendingAnswer
from pasta_jax.decoding.request import SamplingParams
from pasta_jax.decoding.results import result
from pasta_jax.decoding.script import FREE, Script
from pasta_jax.decoding.state import Stop
from pasta_jax.decoding.trace import Trace
from pasta_jax.memory import Shortage
from tests.helpers import FULL
from tests.helpers.chatty import PROMPTS, WORDS, decoder, ids

pytestmark = pytest.mark.slow


@dataclasses.dataclass(frozen=True)
class Ask:
    prompt: tuple[int, ...]
    sampling: SamplingParams


def some_asks(rng: random.Random, count: int) -> list[Ask]:
    """Requests with limits, temperatures, biases and stop strings of their own."""
    asks = []
    for _ in range(count):
        sampling = SamplingParams(
            max_new_tokens=rng.choice((1, 2, 7, 20, 60, 90)),
            max_branch_tokens=rng.choice((1, 8, 30)),
            temperature=rng.choice((0.0, 0.7, 1.0)),
            top_k=rng.choice((0, 0, 5)),
            top_p=rng.choice((1.0, 0.9)),
            min_p=rng.choice((0.0, 0.05)),
            seed=rng.randrange(1000),
            open_bias=rng.choice((0.0, 3.5, float("-inf"))),
            stop=rng.choice(((), (), (" the", "a"), ("e", "rivers and"))),
        )
        asks.append(Ask(tuple(ids(f"{rng.choice(PROMPTS)} {rng.randrange(97)}")), sampling))
    return asks


def read(ask: Ask, trace: Trace) -> tuple[str, str]:
    """What the reader gets, and why it ended."""
    answer = result(WORDS, trace, stop=ask.sampling.stop)
    return answer.text, answer.stop_reason


@functools.cache
def alone(ask: Ask) -> Trace:
    return decoder(rows=1).decode([ask.prompt], [ask.sampling])[0][0]


def is_beginning(part: Trace, whole: Trace) -> bool:
    """Every thread of the one begins as that of the other."""
    pairs = zip(part.threads.tokens, whole.threads.tokens)
    return len(part.parent) <= len(whole.parent) and all(a == b[: len(a)] for a, b in pairs)


def alive(kind: type) -> int:
    """How many there are in this process, apart from what `alone` remembers."""
    gc.collect()
    remembered = alone.cache_info().currsize if kind is Trace else 0
    return sum(isinstance(each, kind) for each in gc.get_objects()) - remembered


def test_many_requests(seed: int) -> None:
    """Mixed limits, stop strings and cancellations, in any order: each has the text it has alone."""
    rng = random.Random(seed)
    before = {
        kind: alive(kind) for kind in (PendingAnswer, Trace)
    }  # what other tests of this process remember
    kinds = some_asks(rng, 40)
    requests = decoder().session
    count = 1000 if FULL else 160
    waiting = [rng.choice(kinds) for _ in range(count)]
    running: list[tuple[Ask, PendingAnswer]] = []
    ended: dict[str, int] = {}
    held: list[int] = []
    while waiting or running:
        for _ in range(min(len(waiting), rng.randrange(12))):
            ask = waiting.pop()
            running.append((ask, decoder().submit(ask.prompt, ask.sampling)))
        if running and rng.random() < 0.5:
            rng.choice(running)[1].cancel()
        requests.turn()
        for ask, answer in [pair for pair in running if pair[1].done]:
            trace = answer.wait()
            if trace.stop == Stop.CANCELLED:
                reason = "cancelled"
                assert answer.cancelled and is_beginning(trace, alone(ask))
            else:
                text, reason = read(ask, trace)
                assert (text, reason) == read(ask, alone(ask))
            ended[reason] = ended.get(reason, 0) + 1
        running = [pair for pair in running if not pair[1].done]
        if len(waiting) < count * (0.8 - 0.6 * len(held)):  # early, and late
            kept = {kind: alive(kind) - count for kind, count in before.items()}
            assert max(kept.values()) <= len(running) + 1, "what is done is kept"
            held.append(sum(x.nbytes for x in jax.live_arrays()))
    assert sum(ended.values()) == count, "every request is accounted for"
    assert {"eos", "length", "stop", "cancelled"} <= ended.keys(), ended
    assert requests.idle
    assert held[0] == held[1]


def a_long_one() -> tuple[Ask, Trace]:
    sampling = SamplingParams(max_new_tokens=90, temperature=1.0, open_bias=-np.inf)
    asks = (Ask(tuple(ids("rivers 3")), dataclasses.replace(sampling, seed=seed)) for seed in range(1000))
    return next((ask, alone(ask)) for ask in asks if alone(ask).steps > 60)


def long_one_with_a_late_stop() -> Ask:
    """A stop string that first comes after several looks."""
    ask, whole = a_long_one()
    text = result(WORDS, whole).text
    stop = next(text[i : i + 6] for i in range(len(text)) if text.index(text[i : i + 6]) > 3 * len(text) // 5)
    return dataclasses.replace(ask, sampling=dataclasses.replace(ask.sampling, stop=(stop,)))


def test_a_stop_string_frees_the_row_before_the_answer_would_end() -> None:
    ask, whole = a_long_one()
    text = result(WORDS, whole).text
    stop = text[4:6]
    (trace,), _ = decoder().decode([ask.prompt], [dataclasses.replace(ask.sampling, stop=(stop,))])
    assert trace.steps < 40
    cut = decoder().submit(ask.prompt, dataclasses.replace(ask.sampling, stop=(stop,))).result()
    assert cut.stats.wall_s > 0 and cut.trace.steps == trace.steps
    assert (cut.text, cut.stop_reason) == (text[: text.index(stop)], "stop")


@pytest.mark.parametrize(
    ("verb", "call"),
    [("admit", 0), ("decode_chunk", 0), ("read", 0), ("release", 0), ("read", 5)],
)
def test_nothing_is_lost_wherever_it_breaks_off(
    verb: str, call: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asks = some_asks(random.Random(seed), 9)
    asks += [long_one_with_a_late_stop()] * 3
    answers = [decoder().submit(ask.prompt, ask.sampling) for ask in asks]
    done, calls = getattr(Compiled, verb), list[Any]()

    def breaks_once(self: Compiled, *args: Any) -> Any:
        calls.append(done(self, *args))  # the batch that went in is gone
        if len(calls) == call + 1:
            raise MemoryError
        return calls[-1]

    monkeypatch.setattr(Compiled, verb, breaks_once)
    with pytest.raises(MemoryError):
        [answer.wait() for answer in answers]
    for ask, answer in zip(asks, answers, strict=True):
        assert read(ask, answer.wait()) == read(ask, alone(ask))


def test_cancelled_while_others_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """From another thread, or by the collector of a stream that nobody reads: it leaves with the same turn."""
    ask, _ = a_long_one()
    first = decoder().submit(ids("rivers"), SamplingParams(max_new_tokens=1))
    other = decoder().submit(ask.prompt, ask.sampling)
    decode_chunk = Compiled.decode_chunk

    def while_somebody_cancels(self: Compiled, *args: Any) -> Any:
        other.cancel()
        return decode_chunk(self, *args)

    monkeypatch.setattr(Compiled, "decode_chunk", while_somebody_cancels)
    first.wait()
    assert first.done and other.done and decoder().session.idle
    assert other.wait().stop == Stop.CANCELLED


def test_long_prompts_are_fed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all of them together would take much memory for their scores, or more than is free; else together."""
    asks = some_asks(random.Random(0), 6)
    fed: list[int] = []
    admit, compiled = Compiled._admit, decoder().compiled

    def counted(self: Compiled, *args: Any) -> Any:
        fed.append(args[3])
        return admit(self, *args)

    monkeypatch.setattr(Compiled, "_admit", counted)
    monkeypatch.setattr("pasta_jax.decoding.compiled.SMALL_PREFILL", 0)
    for limit, lack, rows in ((0, None, 1), (10**9, None, 6), (10**9, Shortage(2, 1, "here"), 1)):
        monkeypatch.setattr("pasta_jax.decoding.compiled.LARGE_PREFILL", limit)
        monkeypatch.setattr("pasta_jax.decoding.compiled.shortage", lambda leaves, lack=lack: lack)
        fed.clear()
        traces, _ = decoder().decode([ask.prompt for ask in asks], [ask.sampling for ask in asks])
        assert fed == [rows] * (6 // rows)
        assert [read(*pair) for pair in zip(asks, traces)] == [read(ask, alone(ask)) for ask in asks]
        assert {program.rows for program in compiled.programs if program.verb == "admit"} == {
            1,
            6 if limit else 1,
        }


def test_no_short_answer_shows_a_piece_of_a_tag(seed: int) -> None:
    """Of 300, cut off by a limit, a stop string or the caller; many within a tag."""
    rng = random.Random(seed)
    answers = []
    for number in range(300):
        stop = rng.choice(((), (), (" ",), ("e",), ('"',), ("=",)))
        sampling = SamplingParams(rng.randint(1, 16), 30, 1.0, seed=number, open_bias=3.5, stop=stop)
        answers.append(decoder().submit(ids(rng.choice(PROMPTS)), sampling))
    for answer in rng.sample(answers, 40):
        decoder().session.turn()
        answer.cancel()
    cut = 0
    for each in (answer.result() for answer in answers):
        cut += any("incomplete tag" in issue for issue in each.issues)
        for text in (each.text, *(branch.text for branch in each.branches)):
            assert not re.search("promise|topic|tokens|sync", text), each.annotated
    assert cut > 30


def test_only_work_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what a consumer does between two turns, nor what others compile meanwhile."""
    clock = [0.0]

    def tick() -> float:
        clock[0] += 1
        return clock[0]

    ask, whole = a_long_one()
    decoder().submit(ask.prompt, ask.sampling).wait()  # nothing is left to compile
    monkeypatch.setattr(session.time, "perf_counter", tick)
    answer = decoder().submit(ask.prompt, ask.sampling)
    answer.step()
    assert not answer.done
    clock[0] += 1000
    monkeypatch.setattr(decoder().compiled, "compile_s", decoder().compiled.compile_s + 1000)
    turns = 1 + whole.steps // 16
    assert 0 < answer.result().stats.wall_s < 5 * turns and answer.result().stats.compile_s == 0


def test_several_threads_may_wait(seed: int) -> None:
    asks = some_asks(random.Random(seed), 12)
    traces: dict[int, Trace] = {}

    def work(numbers: range) -> None:
        answers = {i: decoder().submit(asks[i].prompt, asks[i].sampling) for i in numbers}
        traces.update({i: answer.wait() for i, answer in answers.items()})

    threads = [threading.Thread(target=work, args=(range(k, 12, 3),)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, ask in enumerate(asks):
        assert read(ask, traces[i]) == read(ask, alone(ask))


def test_a_failed_call_leaves_no_request_behind() -> None:
    good, bad = ids("rivers"), [5] * 500
    with pytest.raises(ValueError, match=r"pool holds 120 .* set Limits.pool to more than 500\.$"):
        decoder().decode([good, bad], [SamplingParams()] * 2)
    for wrong in (
        b"rivers",
        bytearray(b"rivers"),
        ["rivers"],
        5,
        None,
        set(good),
        dict.fromkeys(good),
    ):
        with pytest.raises(ValueError, match="neither a text nor a conversation nor ids"):
            decoder().submit(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="none of the model's"):
        decoder().submit([2**40])
    with pytest.raises(ValueError, match="max_new_tokens"):
        SamplingParams(max_new_tokens=2**31)
    script = Script(np.full((1, 4), 300, np.int32), np.full((1, 4), FREE, np.int32))
    with pytest.raises(ValueError, match="does not fit"):
        decoder().submit(good, SamplingParams(script=script))
    assert decoder().session.idle


def test_a_prompt_may_be_any_ids_in_order() -> None:
    """Read once, when it is submitted; what happens to them later changes nothing."""
    good, one = ids("rivers"), SamplingParams(max_new_tokens=1)
    changed = [*good]
    answers = [decoder().submit(each, one) for each in (good, iter(good), np.array(good), changed)]  # type: ignore[arg-type]
    changed.clear()
    assert len({answer.result().text for answer in answers}) == 1 and decoder().session.idle
