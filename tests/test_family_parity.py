"""Law 8: every family computes what transformers computes, whole and token by token (`tests/tiny_families.py`)."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from pasta_jax.decoding.engine import Decoder
from pasta_jax.decoding.model import Model
from pasta_jax.decoding.request import SamplingParams
from pasta_jax.decoding.state import Limits, Stop
from pasta_jax.model import ModelConfig, Transformer
from pasta_jax.model.families import FAMILIES, config_from_hf
from pasta_jax.model.weights import hf_tensors
from tests.helpers import FULL, full, optimized
from tests.helpers import tiny_families as tiny

pytestmark = pytest.mark.slow

NAMES = sorted(tiny.CONFIGS)
DECODED = ("gemma", "gemma2", "gemma3", "llama3", "mistral", "qwen2", "qwen3")
"""One of each family: compiling the decode loop is what takes time here."""

LIMITS = Limits(lanes=2, threads=2, pool=96)
OFF = -np.inf
"""The bias with which no promise is opened."""

IN_A_HURRY: dict[str, Any] = {"xla_backend_optimization_level": 0}
"""Compiling is what takes time here: this halves it, and changes no arithmetic."""


def params_of(config: ModelConfig, tensors: dict[str, np.ndarray]) -> Any:
    table = hf_tensors(config)
    assert {tensor.name for tensor in table} == set(tensors)
    return unflatten_dict(
        {tensor.path: jnp.asarray(tensor.to_ours(tensors[tensor.name])) for tensor in table}
    )


@functools.cache
def model_of(name: str) -> tuple[tiny.TinyModel, Model]:
    theirs = tiny.read(name)
    config = config_from_hf(theirs.config, f"{name}/config.json")
    return theirs, Model(params_of(config, theirs.tensors), config, tiny.TinyTokenizer())


@functools.cache
def decoder_of(name: str, rows: int = len(tiny.LENGTHS)) -> Decoder:
    """Decodes as on a CPU whose cache does not hold the weights. In full, one family has steps of one lane, too."""
    model, widths = model_of(name)[1], (1,) if FULL and name == "mistral" else ()
    return Decoder(model, limits=LIMITS, rows=rows, prompt_buckets=(32,), widths=widths, cached_bytes=0)


def whole_pass(model: Model, tokens: np.ndarray) -> np.ndarray:
    """Logits of padded rows in one batch, [B, L, V]."""
    transformer = Transformer(model.config)

    @functools.partial(jax.jit, compiler_options=IN_A_HURRY)
    def run(params: Any, tokens: Any) -> Any:
        B, L = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(L), (B, L))
        causal = jnp.broadcast_to(jnp.tril(jnp.ones((L, L), bool)), (B, L, L))
        hidden, _ = transformer.apply({"params": params}, tokens, positions, causal)
        return transformer.apply({"params": params}, hidden, method="logits")

    return np.asarray(run(model.params, tokens))


def decode(decoder: Decoder, prompts: list[list[int]], open_bias: float) -> np.ndarray:
    """The greedy continuations, int [B, NEW]."""
    wish = SamplingParams(max_new_tokens=tiny.NEW, open_bias=open_bias)
    traces, _ = decoder.decode(prompts, [wish] * len(prompts))
    assert all(len(trace.parent) == 1 and trace.stop == Stop.LENGTH for trace in traces)
    return np.array([trace.threads.tokens[0] for trace in traces])


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_those_of_transformers_at_every_position(name: str) -> None:
    """And after each token of its greedy continuations the most likely token is the next one."""
    theirs, ours = model_of(name)
    texts = [prompt + row.tolist() for prompt, row in zip(theirs.prompts, theirs.continuations)]
    tokens = np.array([text + [0] * (max(map(len, texts)) - len(text)) for text in texts])
    logits = whole_pass(ours, tokens)
    for row, length in enumerate(tiny.LENGTHS):
        np.testing.assert_allclose(logits[row, :length], theirs.logits[row, :length], atol=1e-4, rtol=0)
        greedy = logits[row, length - 1 : length - 1 + tiny.NEW].argmax(-1)
        np.testing.assert_array_equal(greedy, theirs.continuations[row])


@pytest.mark.parametrize("name", [name if name in ("gemma2", "gemma3") else full(name) for name in DECODED])
def test_decoded_greedily_it_continues_like_transformers(name: str) -> None:
    """In a batch with other lengths, without promises and with them allowed; and alone, the other rows idle.

    All have the logits above, of the pass in which they differ. These two have windows, caps and norms.
    """
    theirs, _ = model_of(name)
    for open_bias in (OFF, 0.0):
        np.testing.assert_array_equal(
            decode(decoder_of(name), theirs.prompts, open_bias), theirs.continuations
        )
    for row in (1, 2):  # more and less than the others
        alone = decode(decoder_of(name), [theirs.prompts[row]], 0.0)
        np.testing.assert_array_equal(alone[0], theirs.continuations[row])


def test_with_one_row_it_continues_like_transformers() -> None:
    """Compiled as for users."""
    theirs, _ = model_of("mistral")
    with optimized():
        for prompt, expected in zip(theirs.prompts, theirs.continuations):
            np.testing.assert_array_equal(decode(decoder_of("mistral", rows=1), [prompt], 0.0)[0], expected)


def test_the_fixtures_cover_what_families_differ_in() -> None:
    configs = [model_of(name)[1].config for name in NAMES]
    for names in (NAMES, DECODED):
        assert {model_of(name)[0].config["model_type"] for name in names} == set(FAMILIES)
    for field in (
        "activation",
        "norm_offset",
        "post_norms",
        "qk_norm",
        "qkv_bias",
        "embed_scale",
        "tie_embeddings",
    ):
        assert len({getattr(config, field) for config in configs}) == 2, field
    assert {config.rope_scaling.kind for config in configs} == {"none", "linear", "llama3", "yarn"}
    assert any(config.attn_softcap and config.final_softcap for config in configs)
    assert any(config.query_scale and config.query_scale != config.head_dim for config in configs)
    assert any(config.num_kv_heads == 1 for config in configs)
    assert any(config.num_layers % 2 for config in configs)
    assert any(config.head_dim * config.num_heads != config.model_dim for config in configs)
    windows = [config.sliding_window for config in configs if config.sliding_window]
    assert windows and max(windows) < max(tiny.LENGTHS)
    assert {kind for config in configs for kind in [tuple(set(config.kinds))] if len(kind) == 2}
    assert sum(file.stat().st_size for file in tiny.FOLDER.iterdir()) < 2e6


# ------------------------------------------------------------------------------- where transformers is installed


@pytest.fixture
def transformers() -> Iterator[Any]:
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more only wait for each other in models so small
    yield pytest.importorskip("transformers")
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["gemma", "llama3"])
def test_the_fixtures_are_what_transformers_makes(name: str, transformers: Any) -> None:
    fixture = tiny.read(name)
    fresh, margin = tiny.make(name, fixture.seed)
    assert tiny.good(fresh, margin)
    assert fresh.config == fixture.config
    assert set(fresh.tensors) == set(fixture.tensors)
    for key, array in fresh.tensors.items():
        np.testing.assert_array_equal(array, fixture.tensors[key])
    np.testing.assert_array_equal(fresh.continuations, fixture.continuations)
    np.testing.assert_allclose(fresh.logits, fixture.logits, atol=1e-4)


@pytest.mark.parametrize("name", ["gemma3", "mistral", "qwen2"])
def test_transformers_with_its_cache_continues_alike(name: str, transformers: Any) -> None:
    """The fixtures' continuations were made without a cache, which has windows of its own."""
    fixture = tiny.read(name)
    model = tiny.transformers_model(fixture.config, fixture.tensors)
    torch = pytest.importorskip("torch")
    for prompt, expected in zip(fixture.prompts, fixture.continuations):
        tokens = torch.tensor([prompt])  # with a mask: by itself it hides ids that are the pad's
        out = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=tiny.NEW, do_sample=False
        )
        np.testing.assert_array_equal(out[0, len(prompt) :].numpy(), expected)


PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}

OTHERWISE: dict[str, Any] = {
    "rms_norm_eps": 1e-6,
    "hidden_act": "relu",
    "hidden_activation": "relu",
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "query_pre_attn_scalar": 100,
    "sliding_window": 64,
    "sliding_window_pattern": 3,
    "max_window_layers": 0,
    "rope_theta": 10_000.0,
    "rope_scaling": None,
    "rope_local_base_freq": 10_000.0,
    "rope_parameters": PLAIN,
}


def changes(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Fields of a `config.json` with other values, one at a time; those that say nothing there are left out."""
    silent = {"sliding_window", "max_window_layers"} if config.get("use_sliding_window") is False else set()
    if "hidden_activation" in config:
        silent.add("hidden_act")
    for field, value in OTHERWISE.items():
        if config.get(field) is None or field in silent:
            continue
        if field == "rope_parameters" and "full_attention" in config[field]:
            for kind in config[field]:
                yield {field: config[field] | {kind: PLAIN}}
        else:
            yield {field: value}
    if "layer_types" in config:
        yield {"layer_types": config["layer_types"][::-1]}


@pytest.mark.parametrize("name", NAMES)
def test_every_choice_shows_in_the_fixtures(name: str, transformers: Any) -> None:
    """Another value of any field moves some logit by far more than the tolerance, so a wrong one cannot hide."""
    fixture = tiny.read(name)
    row = int(np.argmax(tiny.LENGTHS))
    for change in changes(fixture.config):
        model = tiny.transformers_model(fixture.config | change, fixture.tensors)
        moved = np.abs(tiny.logits_of(model, fixture.prompts[row]) - fixture.logits[row]).max()
        assert moved > 0.01, f"{change}: {moved}"
