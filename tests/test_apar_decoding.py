"""APAR decoding: the compiled interpreter, parity with one forward pass, results."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasta_jax.arrays import NO_TARGET
from pasta_jax.decoding.engine import Decoder
from pasta_jax.decoding.interpreter import rules_for
from pasta_jax.decoding.model import Model
from pasta_jax.decoding.request import SamplingParams
from pasta_jax.decoding.results import result
from pasta_jax.decoding.state import Limits, Stop
from pasta_jax.decoding.trace import Trace, as_document, document_order
from pasta_jax.lang import tags
from pasta_jax.model import ModelConfig, init_params
from pasta_jax.testing import WordTokenizer
from pasta_jax.tokens.detokenize import read
from pasta_jax.tokens.positions import Positions
from tests.helpers import FULL, full, scripted
from tests.helpers.chatty import log_softmax, once_through
from tests.helpers.scripted import compare, compare_views

SHARED = Positions("shared")


def words(*texts: str) -> WordTokenizer:
    tokenizer = WordTokenizer(*texts)
    tokenizer.vocabulary = tokenizer.vocabulary.with_dialect("apar")
    return tokenizer


WORDS = words(" The rivers two words moons tokens and it's é 東京 the Nile is long a b c d e f")


def random_script(rng: np.random.Generator) -> scripted.Script:
    """Words and digits with forks between, noise, and ends."""
    sloppiness, forks, ends = rng.choice([0.0, 0.1, 0.5]), rng.choice([0.05, 0.3]), rng.choice([0.02, 0.1])
    draw, shape = rng.random((8, 80)), (8, 80)
    line = rng.choice([scripted.A, scripted.B, scripted.digit(3)], shape)
    line = np.where(draw < sloppiness + ends + forks, scripted.FORK, line)
    line = np.where(draw < sloppiness + ends, rng.choice([scripted.EOS, scripted.ASYNC_CLOSE], shape), line)
    line = np.where(draw < sloppiness, rng.integers(len(scripted.VOCABULARY), size=shape), line)
    return scripted.Script(line.astype(np.int32))


SETTINGS = [
    (Limits(lanes=4, threads=8, pool=160), SHARED),
    (Limits(lanes=2, threads=12, pool=160, max_depth=3), Positions()),
    (Limits(lanes=3, threads=6, pool=120, constrained=False), SHARED),
]


@pytest.mark.slow
@pytest.mark.parametrize("setting", [0, full(1), 2])
def test_compiled_interpreter_is_its_specification(setting, seed):
    """Law 3 in this dialect; and under the grammar every fork is kept, there being a thread for it."""
    limits, positions = SETTINGS[setting]
    rng = np.random.default_rng([seed, setting])
    n = 3_400 if FULL else 120
    scripts = [random_script(rng) for _ in range(n)]
    lengths = rng.integers(1, 7, n)
    asks = [scripted.request(int(m), int(b)) for m, b in zip(rng.integers(5, 200, n), rng.integers(3, 40, n))]
    prompts = np.full((n, 6), scripted.A, np.int32)
    rows = scripted.decoded(limits, positions, prompts, lengths, scripts, asks, "apar")
    vocabulary = scripted.VOCABULARY.with_dialect("apar")
    stops, branches, issues = set(), 0, 0
    for i in range(n):
        prompt = prompts[i, : lengths[i]].tolist()
        views: scripted.Views = {}
        answer = scripted.run_reference(prompt, scripts[i], limits, asks[i], positions, views, dialect="apar")
        row = jax.tree.map(lambda x, i=i: x[i], rows)
        compare(row, answer)
        if i < 40:
            compare_views(row, answer, views)
        stops.add(answer.stop)
        branches += len(answer.threads) - 1
        notes = read(vocabulary, answer.by_thread).issues
        issues += sum("stopped before" not in note for note in notes)
    assert Stop.EOS in stops and len(stops) > 1 and branches > n, "the programs are too tame"
    assert (issues == 0) == limits.constrained


@functools.cache
def chatty_model() -> Model:
    """A random model that loves to fork."""
    config = ModelConfig(
        vocab_size=len(WORDS.vocabulary) + 1, num_layers=1, model_dim=32, num_heads=4, num_kv_heads=2, head_dim=8,
        mlp_dim=64, tie_embeddings=False,
    )  # fmt: skip
    params = init_params(config, jax.random.key(1))
    head = np.array(params["head"]) * 0.35
    head[:, [WORDS.vocabulary.tag_ids[tags.PROMISE_CLOSE], WORDS.vocabulary.tag_ids[tags.ASYNC_CLOSE]]] *= 9.0
    head[:, WORDS.vocabulary.eos] *= 5.0
    return Model({**params, "head": jnp.asarray(head)}, config, WORDS, SHARED)


@functools.cache
def decoder() -> Decoder:
    limits = Limits(lanes=4, threads=8, pool=200)
    return Decoder(chatty_model(), limits=limits, rows=3, prompt_buckets=(16,), widths=())


def decode(seed: int, **fields: Any) -> list[Trace]:
    prompts = [WORDS.encode_prompt(f"the rivers {i}") for i in range(6)]
    sampling = [SamplingParams(150, 30, temperature=1.0, seed=seed + i, **fields) for i in range(6)]
    return decoder().decode(prompts, sampling)[0]


@pytest.mark.slow
def test_parity(seed):
    """Law 2: every sampled token has the log-probability, fed at once, that it had when it was decoded."""
    checked = branches = 0
    for trace in decode(seed, open_bias=2.0):
        logits, targets = once_through(chatty_model(), trace)
        logprobs, document = log_softmax(logits), as_document(trace)
        recorded = trace.logprob[document_order(trace)]
        place = {(int(t), int(o)): i for i, (t, o) in enumerate(zip(document.thread, document.order))}
        branches += len(trace.parent) - 1
        for i in np.flatnonzero(targets != NO_TARGET):
            after = place[int(document.thread[i]), int(document.order[i]) + 1]
            if recorded[after] == 0:  # a forced end
                continue
            assert document.token[after] == targets[i]
            assert abs(float(logprobs[i, targets[i]]) - float(recorded[after])) < 1e-4
            checked += 1
    assert checked > 100 and branches > 3


@pytest.mark.slow
def test_results_and_sequential_decoding(seed):
    trace = max(decode(seed, open_bias=2.0), key=lambda trace: len(trace.parent))
    answer = result(WORDS, trace)
    assert answer.branches and all((b.topic, b.promised_tokens) == ("", 0) for b in answer.branches)
    assert answer.annotated.count("<promise/><async>") == len(answer.branches)
    assert all(len(trace.parent) == 1 for trace in decode(seed, open_bias=float("-inf")))


@pytest.mark.slow
def test_the_other_dialect_compiles_to_the_same_shapes():
    """One base model serves both: nothing but the kinds of four ids differs."""
    limits = Limits(lanes=2, threads=4, pool=64)
    one = rules_for(WORDS.vocabulary.with_dialect("pasta"), limits)
    other = rules_for(WORDS.vocabulary, limits)
    assert dataclasses.replace(one, kinds=0, digit_values=0, next_state=0, event=0, legal=0) == (
        dataclasses.replace(other, kinds=0, digit_values=0, next_state=0, event=0, legal=0)
    )
    assert int((one.kinds != other.kinds).sum()) == 4
