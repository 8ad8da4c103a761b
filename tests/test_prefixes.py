"""Prompts that begin alike: what is kept is what would have been fed, bit for bit, and memory is bounded."""

from __future__ import annotations

import functools
import random
import types
from typing import Any

import jax
import pytest
import requests

from pasta_jax import sharding
from pasta_jax.decoding.compiled import Compiled, ProgramKey
from pasta_jax.decoding.engine import Decoder
from pasta_jax.decoding.model import Model
from pasta_jax.decoding.prefixes import Prefixes
from pasta_jax.decoding.request import SamplingParams
from pasta_jax.decoding.results import result
from pasta_jax.decoding.state import Limits
from pasta_jax.decoding.trace import Trace
from pasta_jax.model import ModelConfig
from pasta_jax.model.pool import pool_bytes
from tests.helpers import compilations, only_full
from tests.helpers.chatty import WORDS, chatty_model
from tests.helpers.chatty import decoder as ordinary
from tests.helpers.faults import runs_out_of_memory_once
from tests.test_batch_invariance import bits, text, wide_model

pytestmark = pytest.mark.slow

C = 16
LIMITS = Limits(lanes=4, threads=8, pool=8 * C)


def a_decoder(model: Model, blocks: int, **sizes: Any) -> Decoder:
    reuse = blocks * pool_bytes(model.config, 1, C)
    sizes |= dict(limits=LIMITS, prompt_block=C, prompt_buckets=(4 * C,), widths=())
    return Decoder(model, rows=4, chunk=16, reuse=reuse, **sizes)


@functools.cache
def wide() -> Decoder:
    return a_decoder(wide_model(), 20, batch_invariant=True)


def prompts(seed: int) -> list[list[int]]:
    """Of all lengths; two of each beginning, one of them short, or ending with a block."""
    rng = random.Random(seed)
    ids = range(300, 500)
    beginning = rng.choices(ids, k=6 * C)
    lengths = (80, 9), (80, 30), (37, 2), (96, 0)
    shared = [beginning[:n] + rng.choices(ids, k=m) for n, m in lengths]
    return [*shared, rng.choices(ids, k=5), beginning[: 2 * C]]


def sampling(number: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=10, temperature=(0.0, 1.2)[number % 2], seed=number, open_bias=3.0)


def decoded(decoder: Decoder, asked: list[list[int]]) -> list[Trace]:
    return decoder.decode(asked, [sampling(i) for i in range(len(asked))])[0]


@only_full
def test_an_answer_is_the_same_whether_its_beginning_was_kept_or_fed(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16, bit for bit: alone with nothing kept, and beside others, each time with more that is kept."""
    decoder, asked = wide(), prompts(seed)
    assert decoder.prefixes is not None
    fed_by: dict[tuple[int, int], set[ProgramKey]] = {}
    run = Compiled._run

    def noted(self: Compiled, program: ProgramKey, *args: Any) -> Any:
        if program.verb == "feed":
            start, end = int(args[-1]), int(args[-3][0])
            fed_by.setdefault((start, end), set()).add(program)
        return run(self, program, *args)

    monkeypatch.setattr(Compiled, "_run", noted)
    expected = list[tuple[bytes, ...]]()
    for i, prompt in enumerate(asked):
        decoder.prefixes.clear()
        expected += map(bits, decoder.decode([prompt], [sampling(i)])[0])
    decoder.prefixes.clear()
    assert [*map(bits, decoded(decoder, asked))] == expected
    again = [decoder.submit(prompt, sampling(i)) for i, prompt in enumerate(asked)]
    assert [bits(answer.wait()) for answer in again] == expected
    assert [answer.reused for answer in again] == [(len(prompt) - 1) // C * C for prompt in asked]
    assert {len(programs) for programs in fed_by.values()} == {1}, "its place decides how a block is fed"
    assert decoder.load.reused >= sum(answer.reused for answer in again)


@functools.cache
def chatty() -> Decoder:
    return a_decoder(chatty_model(), 3)


def test_texts_are_those_of_a_decoder_that_feeds_prompts_at_once() -> None:
    decoder = chatty()
    asked = [
        WORDS.encode_prompt(f"{'rivers and cities of the world ' * n}{n}")[-70:] for n in (0, 3, 3, 9, 2)
    ]
    expected = ordinary().decode(asked, [sampling(i) for i in range(len(asked))])[0]
    for _ in range(2):
        assert [result(WORDS, trace).text for trace in decoded(decoder, asked)] == [
            result(WORDS, trace).text for trace in expected
        ]
    assert decoder.load.reused > 0


def test_a_server_tells_what_it_reused() -> None:
    pytest.importorskip("starlette")
    from tests.helpers.served import asked, events_of, served

    prompt = "rivers and cities of the world " * 3
    tokens = len(WORDS.encode_prompt(prompt))
    kept = tokens // C * C
    body = {"prompt": prompt, **asked(1)}
    own = Decoder(chatty_model(), compiled=chatty().compiled, chunk=16, reuse=chatty().reuse)
    with served(own) as server:
        usages = [server.post("/v1/completions", **body).json()["usage"] for _ in range(2)]
        streamed = events_of(
            server.post("/v1/completions", stream=True, stream_options={"include_usage": True}, **body)
        )
        response = server.post("/v1/responses", input=prompt, **asked(1)).json()
        metrics = requests.get(f"{server.url}/metrics").text
    assert [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages] == [0, kept]
    assert {usage["prompt_tokens"] for usage in usages} == {tokens} and 0 < kept < tokens
    assert streamed[-2]["usage"]["prompt_tokens_details"]["cached_tokens"] == kept
    assert response["usage"]["input_tokens_details"]["cached_tokens"] == kept
    assert f"pasta_reused_tokens_total {3 * kept}\n" in metrics
    assert f"pasta_kept_bytes {own.load.kept_bytes}\n" in metrics and own.load.kept_bytes


def test_nothing_is_compiled_after_the_warm_up(seed: int) -> None:
    decoder = chatty()
    decoder.warm_up(run=True)
    rng = random.Random(seed)
    with compilations() as compiled:
        asked = [rng.choices(range(10), k=rng.randint(1, 8 * C - 1)) for _ in range(12)]
        decoded(decoder, asked + [[*prompt, 1] for prompt in asked if len(prompt) < 100])
    assert compiled == []
    assert decoder.session.idle and decoder.load.kept_bytes == decoder.reuse, "it is full"


def test_an_error_forgets_what_was_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, asked = chatty(), [[n % 9 for n in range(k, k + 40)] for k in range(4)]
    expected = [text(trace) for trace in decoded(decoder, asked)]
    assert decoder.load.kept_bytes > 0
    runs_out_of_memory_once(monkeypatch)
    answers = [decoder.submit(prompt, sampling(i)) for i, prompt in enumerate(asked)]
    with pytest.raises(MemoryError):
        decoder.session.turn()
    assert decoder.load.kept_bytes == 0
    assert [text(answer.wait()) for answer in answers] == expected


class Notes:
    """Stands for `Compiled`: its batch is the tokens in each row, and it notes how many were fed."""

    prompt_block, config = 4, ModelConfig()

    def __init__(self) -> None:
        self.fed = 0

    def feed(self, params: Any, batch: Any, row: int, prompt: Any, request: Any, start: int) -> Any:
        batch[row][start : start + 4] = prompt[start : start + 4]
        self.fed += len(prompt[start : start + 4])
        return batch

    def keep(self, batch: Any, row: int, start: int) -> Any:
        return tuple(batch[row][start : start + 4])

    def reuse(self, batch: Any, row: int, start: int, block: Any) -> Any:
        batch[row][start : start + 4] = block
        return batch


def test_what_is_kept_is_bounded_and_the_oldest_goes_first(seed: int) -> None:
    """Random prompts of few beginnings: a row holds its prompt, and with room for all each block is fed once."""
    rng = random.Random(seed)
    each = pool_bytes(Notes.config, 1, 4)
    for most in (0, 1, 3, 10, 10_000):
        notes: Any = Notes()
        prefixes, rows, once = Prefixes(notes, most * each), {0: list[int](), 1: list[int]()}, set[Any]()
        for _ in range(300):
            prompt, row, before = rng.choices((0, 1), k=rng.randint(1, 20)), rng.randrange(2), notes.fed
            rows[row] = rows[row][: rng.randrange(20)]
            _, reused = prefixes.admit(None, rows, row, prompt, types.SimpleNamespace())  # type: ignore[arg-type]
            assert rows[row][: len(prompt)] == prompt and notes.fed - before == len(prompt) - reused
            assert reused % 4 == 0 and reused < len(prompt) and prefixes.nbytes <= most * each
            beginnings = [tuple(prompt[:end]) for end in range(4, len(prompt) + 1, 4)]
            if most == 10_000:
                assert reused == 4 * min(sum(b in once for b in beginnings), (len(prompt) - 1) // 4)
            once.update(beginnings)
    first, second, third = [1, 1, 1, 1, 9], [2, 2, 2, 2, 9], [3] * 9
    for asked, hits in (
        (
            (first, second, first, third, first, third, second),
            [0, 0, 4, 0, 4, 8, 0],
        ),  # the second was used least
        ((third, first, second, third), [0, 0, 0, 4]),  # of the third, its end went
    ):
        prefixes = Prefixes(notes, 3 * each)
        found = [prefixes.admit(None, rows, 0, prompt, None)[1] for prompt in asked]  # type: ignore[arg-type]
        assert found == hits


def test_mistakes_in_words() -> None:
    model = chatty_model()
    with pytest.raises(ValueError, match=r"pool=120 is no multiple of prompt_block=128, .* Give 128\.$"):
        Decoder(model, limits=Limits(pool=120), reuse=2**20)
    with pytest.raises(ValueError, match=r"^reuse=9 bytes hold no block of 16 tokens\. Give \d+ or more\.$"):
        Decoder(model, limits=LIMITS, reuse=9, prompt_block=C)
    mesh = sharding.make_mesh(2, 1, 1, devices=jax.devices()[:2])
    params = jax.device_put(model.params, sharding.param_shardings(model.params, mesh))
    with pytest.raises(ValueError, match="reused on one device only"):
        Decoder(Model(params, model.config, WORDS), limits=LIMITS, reuse=2**20, prompt_block=C)
