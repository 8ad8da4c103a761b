"""Published models by name: their sizes and choices, and the repositories of their weights.

Source: the `config.json` of each repository, which takes precedence when weights are loaded. The presets are for
planning, compiling ahead of time and training from new parameters.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from typing import Any

from pasta_jax.model.config import ModelConfig, RopeScaling


@dataclasses.dataclass(frozen=True)
class Preset:
    """A published model.

    Attributes:
      config: its sizes and choices.
      hub: its repository on Hugging Face's hub, "organisation/name".
      max_positions: the longest text it was trained for, in tokens.
    """

    config: ModelConfig
    hub: str
    max_positions: int


_GEMMA = ModelConfig(vocab_size=256_000, head_dim=256, dtype="bfloat16")

_GEMMA_2 = dataclasses.replace(
    _GEMMA, post_norms=True, attn_softcap=50.0, final_softcap=30.0, sliding_window=4096,
    layer_kinds=("local", "global"),
)  # fmt: skip

_GEMMA_3 = dataclasses.replace(
    _GEMMA, vocab_size=262_208, post_norms=True, qk_norm=True, rope_base=1_000_000.0, local_rope_base=10_000.0,
    rope_scaling=RopeScaling("linear", factor=8.0), sliding_window=1024, layer_kinds=("local",) * 5 + ("global",),
)  # fmt: skip

_LLAMA_3 = ModelConfig(
    vocab_size=128_256, num_kv_heads=8, num_heads=32, head_dim=128, rope_base=500_000.0, norm_eps=1e-5,
    activation="silu", norm_offset=0.0, embed_scale=False, tie_embeddings=False, dtype="bfloat16",
)  # fmt: skip

_LLAMA_3_1 = dataclasses.replace(_LLAMA_3, rope_scaling=RopeScaling("llama3", factor=8.0))

_LLAMA_3_2 = dataclasses.replace(
    _LLAMA_3, rope_scaling=RopeScaling("llama3", factor=32.0), tie_embeddings=True
)

_MISTRAL = dataclasses.replace(_LLAMA_3, vocab_size=32_000, rope_base=10_000.0)

_SMOLLM_2 = dataclasses.replace(
    _LLAMA_3, vocab_size=49_152, head_dim=64, rope_base=100_000.0, tie_embeddings=True
)

_QWEN_2 = dataclasses.replace(
    _LLAMA_3, vocab_size=151_936, rope_base=1_000_000.0, norm_eps=1e-6, qkv_bias=True
)

_QWEN_3 = dataclasses.replace(_QWEN_2, qkv_bias=False, qk_norm=True)

_Sizes = tuple[int, int, int, int, int]
"""Z, D, N, K, F."""


def _sized(config: ModelConfig, sizes: _Sizes, **changes: Any) -> ModelConfig:
    Z, D, N, K, F = sizes
    numbers: dict[str, Any] = dict(num_layers=Z, model_dim=D, num_heads=N, num_kv_heads=K, mlp_dim=F)
    return dataclasses.replace(config, **numbers, **changes)


@functools.cache
def presets() -> dict[str, Preset]:
    """All presets by name, in lower case."""
    by_name: dict[str, Preset] = {}

    def add(hubs: tuple[str, ...], length: int, config: ModelConfig) -> None:
        for hub in hubs:
            name = hub.split("/")[1].lower().removeprefix("meta-")
            by_name[name] = Preset(config, hub, length)

    def both(hub: str, suffix: str) -> tuple[str, str]:
        """The base model and the one finetuned to follow instructions."""
        return hub, f"{hub}-{suffix}"

    add(both("google/gemma-2b", "it"), 8192, _sized(_GEMMA, (18, 2048, 8, 1, 16_384)))
    add(both("google/gemma-7b", "it"), 8192, _sized(_GEMMA, (28, 3072, 16, 16, 24_576)))

    add(both("google/gemma-2-2b", "it"), 8192, _sized(_GEMMA_2, (26, 2304, 8, 4, 9216)))
    add(both("google/gemma-2-9b", "it"), 8192, _sized(_GEMMA_2, (42, 3584, 16, 8, 14_336)))
    large = _sized(_GEMMA_2, (46, 4608, 32, 16, 36_864), head_dim=128, query_scale=144.0)
    add(both("google/gemma-2-27b", "it"), 8192, large)

    one: dict[str, Any] = dict(vocab_size=262_144, rope_scaling=RopeScaling(), sliding_window=512)
    small = _sized(_GEMMA_3, (26, 1152, 4, 1, 6912), **one)
    large = _sized(_GEMMA_3, (62, 5376, 32, 16, 21_504), head_dim=128, query_scale=168.0)
    for size, length, config in (
        ("1b", 32_768, small),
        ("4b", 131_072, _sized(_GEMMA_3, (34, 2560, 8, 4, 10_240))),
        ("12b", 131_072, _sized(_GEMMA_3, (48, 3840, 16, 8, 15_360))),
        ("27b", 131_072, large),
    ):
        add((f"google/gemma-3-{size}-pt", f"google/gemma-3-{size}-it"), length, config)

    eight, seventy = (32, 4096, 32, 8, 14_336), (80, 8192, 64, 8, 28_672)
    add(both("meta-llama/Meta-Llama-3-8B", "Instruct"), 8192, _sized(_LLAMA_3, eight))
    add(both("meta-llama/Meta-Llama-3-70B", "Instruct"), 8192, _sized(_LLAMA_3, seventy))
    add(both("meta-llama/Llama-3.1-8B", "Instruct"), 131_072, _sized(_LLAMA_3_1, eight))
    add(both("meta-llama/Llama-3.1-70B", "Instruct"), 131_072, _sized(_LLAMA_3_1, seventy))
    small = _sized(_LLAMA_3_2, (16, 2048, 32, 8, 8192), head_dim=64)
    add(both("meta-llama/Llama-3.2-1B", "Instruct"), 131_072, small)
    add(both("meta-llama/Llama-3.2-3B", "Instruct"), 131_072, _sized(_LLAMA_3_2, (28, 3072, 24, 8, 8192)))
    largest = _sized(_LLAMA_3_1, (126, 16_384, 128, 8, 53_248))
    add(both("meta-llama/Llama-3.1-405B", "Instruct"), 131_072, largest)
    add(("meta-llama/Llama-3.3-70B-Instruct",), 131_072, _sized(_LLAMA_3_1, seventy))

    for size, sizes, rope_base in (
        ("135M", (30, 576, 9, 3, 1536), 100_000.0),
        ("360M", (32, 960, 15, 5, 2560), 100_000.0),
        ("1.7B", (24, 2048, 32, 32, 8192), 130_000.0),
    ):
        smol = both(f"HuggingFaceTB/SmolLM2-{size}", "Instruct")
        add(smol, 8192, _sized(_SMOLLM_2, sizes, rope_base=rope_base))

    narrow, wide = dict(tie_embeddings=True), dict(vocab_size=152_064)
    for size, length, eps, sizes, changes in (
        ("0.5B", 32_768, 1e-6, (24, 896, 14, 2, 4864), dict(tie_embeddings=True, head_dim=64)),
        ("1.5B", 131_072, 1e-6, (28, 1536, 12, 2, 8960), narrow),
        ("3B", 32_768, 1e-6, (36, 2048, 16, 2, 11_008), narrow),
        ("7B", 131_072, 1e-6, (28, 3584, 28, 4, 18_944), wide),
        ("14B", 131_072, 1e-5, (48, 5120, 40, 8, 13_824), wide),
        ("32B", 131_072, 1e-5, (64, 5120, 40, 8, 27_648), wide),
        ("72B", 131_072, 1e-5, (80, 8192, 64, 8, 29_568), wide),
    ):
        config = _sized(_QWEN_2, sizes, **changes)
        base, instruct = both(f"Qwen/Qwen2.5-{size}", "Instruct")
        add((base,), length, dataclasses.replace(config, norm_eps=eps))
        add((instruct,), 32_768, config)

    for size, sizes, tied in (
        ("0.6B", (28, 1024, 16, 8, 3072), True),
        ("1.7B", (28, 2048, 16, 8, 6144), True),
        ("4B", (36, 2560, 32, 8, 9728), True),
        ("8B", (36, 4096, 32, 8, 12_288), False),
        ("14B", (40, 5120, 40, 8, 17_408), False),
        ("32B", (64, 5120, 64, 8, 25_600), False),
    ):
        config = _sized(_QWEN_3, sizes, tie_embeddings=tied)
        add((f"Qwen/Qwen3-{size}",), 40_960, config)
        if size != "32B":  # of which no base model was published
            add((f"Qwen/Qwen3-{size}-Base",), 32_768, config)

    first = dict(sliding_window=4096, layer_kinds=("local",))
    third = dict(vocab_size=32_768, rope_base=1_000_000.0)
    mistral = "mistralai/Mistral-7B"
    add((f"{mistral}-v0.1", f"{mistral}-Instruct-v0.1"), 32_768, _sized(_MISTRAL, eight, **first))
    add((f"{mistral}-Instruct-v0.2",), 32_768, _sized(_MISTRAL, eight, rope_base=1_000_000.0))
    add((f"{mistral}-v0.3", f"{mistral}-Instruct-v0.3"), 32_768, _sized(_MISTRAL, eight, **third))
    return by_name


def published_length(config: ModelConfig) -> int | None:
    """`max_positions` of the published model with this configuration, whatever its dtype and vocabulary.

    If there are several, the smallest; None if there is none.
    """

    def comparable(config: ModelConfig) -> ModelConfig:
        return dataclasses.replace(config, vocab_size=1, dtype="float32")

    same = [p.max_positions for p in presets().values() if comparable(p.config) == comparable(config)]
    return min(same, default=None)


def preset(name: str) -> Preset:
    """The published model of that name, the last part of its repository: "gemma-2b-it", "qwen3-0.6b".

    Raises:
      ValueError: unknown name; the message suggests similar ones.

    >>> preset("llama-3.2-1b").config.num_layers
    16
    """
    by_name = presets()
    if name.lower() in by_name:
        return by_name[name.lower()]
    close = difflib.get_close_matches(name.lower(), by_name, 3)
    hint = f"Did you mean {' or '.join(close)}?" if close else f"There are {', '.join(by_name)}."
    raise ValueError(f"No published model is called {name!r}. {hint}")
