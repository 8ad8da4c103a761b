"""What is compiled ahead of time is what a decoder runs: the same programs, letter for letter."""

from __future__ import annotations

import gc
import logging
import os
import random
import time
import weakref
from typing import Any

import jax
import pytest

import pasta_jax
from pasta_jax import sharding
from pasta_jax.compile.programs import decoder_programs
from pasta_jax.config import Config
from pasta_jax.decoding import cpu
from pasta_jax.decoding.api import decoder_for
from pasta_jax.decoding.compiled import Compiled, ProgramKey
from pasta_jax.decoding.engine import Decoder
from pasta_jax.decoding.model import Model
from pasta_jax.decoding.request import SamplingParams
from pasta_jax.decoding.state import Limits
from pasta_jax.model import ModelConfig, init_params
from pasta_jax.model.forms import quantize
from pasta_jax.testing import WordTokenizer
from tests.helpers import compilations, full

pytestmark = pytest.mark.slow

WORDS = WordTokenizer("the river", vocab_size=320)
CONFIG = Config(
    model=ModelConfig(
        vocab_size=320, num_layers=1, model_dim=8, num_heads=2, num_kv_heads=2, head_dim=4, mlp_dim=8
    )
)
LIMITS = Limits(lanes=2, threads=4, pool=62)


def model_of(config: Config, *, int8: bool, mesh: Any) -> Model:
    """A new model of an experiment's sizes."""
    params = init_params(config.model, jax.random.key(0))
    if int8:
        params = quantize(params)
    if mesh is not None:
        params = jax.device_put(params, sharding.param_shardings(params, mesh))
    return Model(params, config.model, WORDS, config.data.positions)


@pytest.mark.parametrize(
    ("rows", "form", "int8", "spread", "settings"),
    [
        full(3, "outputs_first", False, False, {"cached_bytes": 0, "pool_buckets": (20,)}),
        full(1, "fused", True, False, {"platform": "gpu", "pool_buckets": ()}),
        (3, "plain", True, True, {"widths": (), "pool_buckets": ()}),
    ],
)
def test_a_decoder_runs_what_is_compiled_ahead_of_time(
    rows: int, form: str, int8: bool, spread: bool, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh = sharding.make_mesh(2, 2, 2) if spread else None
    model = model_of(CONFIG, int8=int8, mesh=mesh)
    one_device = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    sizes: dict[str, Any] = dict(limits=LIMITS, rows=rows, prompt_buckets=(), **settings)
    ahead = decoder_programs(CONFIG, mesh or one_device, WORDS, int8=int8, **sizes)
    lowered = {program: ahead.lower(program).as_text() for program in ahead.programs}
    assert ahead.form == form and len({*lowered.values()}) == len(lowered)

    ran: list[str] = []
    compile_lowered = jax.stages.Lowered.compile

    def record(self: Any, *args: Any, **kwargs: Any) -> Any:
        ran.append(self.as_text())
        return compile_lowered(self, *args, **kwargs)

    monkeypatch.setattr(jax.stages.Lowered, "compile", record)
    decoder = Decoder(model, chunk=8, **sizes)
    prompts = [WORDS.encode_prompt(text) for text in ("Iron", "Peru", "Ohio")]
    cancelled = decoder.submit(prompts[0], SamplingParams(max_new_tokens=20))
    cancelled.step()
    cancelled.cancel()
    enough = SamplingParams(max_new_tokens=40 if settings["pool_buckets"] else 4, temperature=1.0)
    decoder.decode(prompts, [enough] * 3)

    names = {text: program for program, text in lowered.items()}
    assert {names.get(text, "something else") for text in ran} == {*lowered}, "all of them, and no other"
    assert len(ran) == len(lowered), "each once"


@pytest.mark.parametrize(
    ("rows", "settings", "buckets"),
    [
        (8, {"cached_bytes": 0}, (128, 512, 1540)),
        (8, {"cached_bytes": 0, "batch_invariant": True}, (1540,)),
        (8, {"cached_bytes": 0, "platform": "gpu"}, (512, 1540)),
        (8, {}, (512, 1540)),
        (1, {"cached_bytes": 0}, (512, 1540)),
    ],
)
def test_steps_of_several_rows_read_a_small_part_of_the_pool_at_first(
    rows: int, settings: Any, buckets: tuple[int, ...]
) -> None:
    """On a CPU whose cache does not hold the weights."""
    model = model_of(CONFIG, int8=False, mesh=None)
    decoder = Decoder(model, limits=Limits(lanes=4, threads=4, pool=1536), rows=rows, **settings)
    assert decoder.compiled.pool_buckets == buckets


@pytest.mark.parametrize(
    ("rows", "settings", "widths"),
    [
        (1, {}, (2, 3, 4)),
        (1, {"cached_bytes": 0}, (2, 4)),
        (8, {}, (2, 4)),
        (8, {"widths": (1, 9)}, (1, 4)),
        (1, {"batch_invariant": True}, (4,)),
        (1, {"platform": "gpu"}, (4,)),
    ],
)
def test_steps_have_several_widths_on_a_cpu(
    rows: int, settings: Any, widths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them for one row whose weights are cached."""
    monkeypatch.setattr(cpu, "widths_for", lambda lanes, cached: (2, 3) if cached else (2,))
    model = model_of(CONFIG, int8=False, mesh=None)
    decoder = Decoder(model, limits=Limits(lanes=4, threads=4, pool=62), rows=rows, **settings)
    assert decoder.compiled.widths == widths


def test_long_prompts_are_padded_to_powers_of_two() -> None:
    one_device = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    compiled = decoder_programs(CONFIG, one_device, WORDS, limits=Limits(lanes=4, threads=4, pool=10_000))
    assert [compiled.bucket(n) for n in (3, 17, 2049, 8192, 8193)] == [16, 32, 4096, 8192, 10_000]


def test_nothing_is_compiled_after_the_warm_up(
    seed: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 200 requests of all kinds, whose weights had to be laid out anew; and what is done is there meanwhile."""
    jax.clear_caches()  # of other tests: what is found there would not be counted
    rng = random.Random(seed)
    sizes: dict[str, Any] = dict(prompt_buckets=(), pool_buckets=(20,), cached_bytes=0)
    decoder = Decoder(model_of(CONFIG, int8=False, mesh=None), limits=LIMITS, rows=3, chunk=8, **sizes)
    lower = Compiled.lower

    def others_are_there(self: Compiled, program: ProgramKey, **options: Any) -> Any:
        deadline = time.monotonic() + 60
        while program == self.programs[-1] and not self._executables and time.monotonic() < deadline:
            time.sleep(0.01)
        assert program != self.programs[-1] or self._executables
        return lower(self, program, **options)

    monkeypatch.setattr(Compiled, "lower", others_are_there)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    with compilations() as compiled, caplog.at_level(logging.INFO, "pasta_jax"):
        assert decoder.warm_up() > 0
    programs = len(decoder.compiled.programs)
    assert len(compiled) > programs, "nothing would be counted"
    assert f"compiled {programs} of {programs} after" in caplog.messages[-1]
    assert len({record.thread for record in caplog.records if record.name == "pasta_jax"}) == 1, "one core"
    assert decoder.compiled.compile_s == 0, "no request waited"

    with compilations() as compiled:
        decoder.warm_up()
        answers = [
            decoder.submit(WORDS.encode_prompt("ab" * rng.randint(1, 26)), any_sampling(rng))
            for _ in range(200)
        ]
        while not all(answer.done for answer in answers):
            for answer in rng.sample(answers, 4):
                answer.watched = not answer.watched  # streams that come and go
            if rng.random() < 0.5:
                rng.choice(answers).cancel()
            decoder.session.turn()
        results = [answer.result() for answer in answers]
    assert {result.stop_reason for result in results} >= {"length", "stop", "cancelled", "cache_full"}
    assert compiled == [] and all(result.stats.compile_s == 0 for result in results)


def test_the_warm_up_may_run_each_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a request that is alone may need has run before it comes."""
    sizes: dict[str, Any] = dict(
        limits=LIMITS, rows=2, prompt_buckets=(16,), pool_buckets=(20,), widths=(1, 2)
    )
    decoder = Decoder(model_of(CONFIG, int8=False, mesh=None), **sizes)
    ran, run = [], Compiled._run

    def noted(self: Compiled, program: ProgramKey, *args: Any) -> Any:
        ran.append(program)
        return run(self, program, *args)

    monkeypatch.setattr(Compiled, "_run", noted)
    decoder.warm_up(run=True)
    needed = {key for key in decoder.compiled.programs if key.verb in ("admit", "decode") and key.rows <= 1}
    assert len(needed) == 2 + 2 and needed <= set(ran)
    assert ran.count(ProgramKey("decode", length=20)) == len(decoder.compiled.widths) > 1
    ran.clear()
    decoder.decode([WORDS.encode_prompt("ab")], [SamplingParams(40, temperature=1.0, seed=1)])
    assert needed >= {key for key in ran if key.verb in ("admit", "decode")} > set()


def any_sampling(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        max_new_tokens=rng.randint(1, 80),
        max_branch_tokens=rng.choice((3, 256)),
        temperature=rng.choice((0.0, 0.7, 1.3)),
        top_k=rng.choice((0, 5)),
        top_p=rng.choice((1.0, 0.9)),
        min_p=rng.choice((0.0, 0.1)),
        seed=rng.randrange(99),
        open_bias=rng.choice((0.0, 4.0, float("-inf"))),
        stop=rng.choice(((), (), ("a",), ("e", "th"))),
    )


def test_a_model_that_nobody_uses_is_freed_with_its_decoders() -> None:
    """And as long as somebody uses it, its programs stay compiled."""
    model = model_of(CONFIG, int8=False, mesh=None)
    options: dict[str, Any] = dict(max_new_tokens=3, cache_len=62, lanes=2, max_branches=3)
    first = pasta_jax.decode(model, "Iron", **options)
    assert first.stats.compile_s > 0
    assert pasta_jax.decode(model, "Peru", **options).stats.compile_s == 0
    decoder = decoder_for(model, LIMITS, 1)
    assert decoder is decoder_for(model, LIMITS, 1)
    gone = weakref.ref(model), weakref.ref(decoder), weakref.ref(decoder.compiled)
    del model, decoder
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3
