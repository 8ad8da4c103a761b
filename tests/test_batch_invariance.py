"""With `batch_invariant`, an answer in bfloat16 is the same bit for bit, whatever is decoded beside it.

Log-probabilities are compared too: they show every difference of rounding, and texts only some.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import pasta_jax
from pasta_jax.decoding import api
from pasta_jax.decoding.engine import Decoder
from pasta_jax.decoding.model import Model
from pasta_jax.decoding.request import SamplingParams
from pasta_jax.decoding.state import Limits
from pasta_jax.decoding.trace import Trace
from pasta_jax.model import ModelConfig
from pasta_jax.testing import WordTokenizer
from tests.helpers.faults import runs_out_of_memory_once
from tests.helpers.models import random_params

pytestmark = pytest.mark.slow


@functools.cache
def wide_model() -> Model:
    """Random, with matrices so large that XLA adds up the products of other shapes in another order.

    Its logits are close to each other: the rounding of bfloat16 changes its texts too.
    """
    config = ModelConfig(
        vocab_size=512, num_layers=2, model_dim=576, num_heads=9, num_kv_heads=3, head_dim=64, mlp_dim=768,
        dtype="bfloat16",
    )  # fmt: skip
    words = WordTokenizer("rivers and cities of the world", vocab_size=512)
    return Model(random_params(config, np.random.default_rng(0)), config, words)


@functools.cache
def real_model() -> Model:
    if not (folder := os.environ.get("PASTA_REAL_MODEL")):
        pytest.skip("PASTA_REAL_MODEL names no folder or workdir of a published model")
    return pasta_jax.load(folder, dtype="bfloat16")


MODELS = pytest.mark.parametrize("model", [wide_model, real_model], ids=["wide", "real"])

MakeModel = Callable[[], Model]


@functools.cache
def decoder(model: MakeModel, batch_invariant: bool) -> Decoder:
    limits = Limits(lanes=2, threads=4, pool=126)
    sizes: Any = dict(prompt_buckets=(16,), widths=(1,), batch_invariant=batch_invariant)
    return Decoder(model(), limits=limits, rows=4, chunk=16, **sizes)


Ask = tuple[list[int], SamplingParams]


def asks(model: MakeModel) -> list[Ask]:
    """Prompts of two buckets, greedy and sampled, with promises and without."""
    rng, tokenizer = np.random.default_rng(0), model().tokenizer
    return [
        (
            [tokenizer.vocabulary.bos, *rng.integers(300, 500, length).tolist()],
            SamplingParams(
                max_new_tokens=30,
                temperature=(0.0, 0.8, 1.2)[i % 3],
                top_p=(1.0, 0.95)[i % 2],
                seed=i,
                open_bias=(3.0, -np.inf)[i % 2],
            ),
        )
        for i, length in enumerate((5, 40, 90, 11, 30, 7))
    ]


def text(trace: Trace) -> tuple[bytes, ...]:
    return tuple(x.tobytes() for x in (trace.tokens.token, trace.tokens.thread, trace.step))


def bits(trace: Trace) -> tuple[bytes, ...]:
    return (*text(trace), trace.logprob.tobytes())


@functools.cache
def alone(model: MakeModel, batch_invariant: bool) -> list[Trace]:
    return [decoder(model, batch_invariant).decode([ids], [how])[0][0] for ids, how in asks(model)]


def together(model: MakeModel, batch_invariant: bool, order: list[int]) -> list[Trace]:
    """More requests than rows: some come to a row that another has left. In the order of `asks`."""
    ids, sampling = zip(*(asks(model)[i] for i in order))
    traces, _ = decoder(model, batch_invariant).decode(ids, sampling)
    return [traces[order.index(i)] for i in range(len(order))]


ORDERS = [0, 1, 2, 3, 4, 5], [5, 3, 1, 4, 2, 0], [2, 0, 5, 1, 3, 4]


@MODELS
def test_an_answer_is_the_same_alone_and_beside_others(model: MakeModel) -> None:
    """In any row, early or late."""
    expected = [bits(trace) for trace in alone(model, True)]
    for order in ORDERS:
        assert [bits(trace) for trace in together(model, True, order)] == expected
    differ = {
        sum(of(a) != of(b) for a, b in zip(alone(model, False), together(model, False, ORDERS[0])))
        for of in (bits, text)
    }
    if model is real_model and 0 in differ:
        pytest.skip("here nothing differs without batch_invariant, so the test shows nothing")
    assert 0 not in differ, "nothing differs without batch_invariant, so the test shows nothing"


def test_an_answer_is_the_same_streamed_and_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside what is cancelled, with chunks of other lengths."""
    shared = decoder(wide_model, True)
    queue = shared.for_model(shared.model)
    queue.session.chunk = 5
    answers = [queue.submit(*ask) for ask in asks(wide_model)]
    leaving = [queue.submit(*ask) for ask in asks(wide_model)[:3]]
    answers[1].watched = True
    for other in leaving:
        queue.session.turn()
        other.cancel()
    runs_out_of_memory_once(monkeypatch)
    with pytest.raises(MemoryError):
        queue.session.turn()
    assert [bits(a.wait()) for a in answers] == [bits(trace) for trace in alone(wide_model, True)]


def test_decode_answers_a_prompt_as_it_answers_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "MAX_ROWS", 4)  # programs that are compiled
    model, prompts = wide_model(), ["rivers", "rivers and cities of the world " * 4, "cities"]
    options: Any = dict(
        max_new_tokens=20, temperature=0.8, cache_len=126, lanes=2, max_branches=3, batch_invariant=True
    )
    results = pasta_jax.decode(model, prompts, **options)
    for prompt, result in zip(prompts, results, strict=True):
        single = pasta_jax.decode(model, prompt, **options)
        assert single.text == result.text and single.logprobs.tobytes() == result.logprobs.tobytes()
    options["cache_len"] = None
    with pytest.raises(ValueError, match="batch_invariant=True needs cache_len"):
        pasta_jax.decode(model, prompts, **options)
