"""GGUF files: whatever one holds, it is a model or one error of ours, in little time and memory."""

from __future__ import annotations

import functools
import pathlib
import random
import tempfile
from typing import Any

import numpy as np

from pasta_jax.interchange.errors import InterchangeError
from pasta_jax.loading import load
from pasta_jax.tokens.tokenizer import TokenizerError
from tests.fuzz import hostile
from tests.fuzz.runner import Target, outcome
from tests.helpers import gguf_files, hf_folders

ERRORS = (InterchangeError, TokenizerError)

FAMILIES = ("gemma3", "llama", "qwen3")

KEYS = (
    *("block_count", "embedding_length", "attention.head_count", "attention.head_count_kv", "context_length"),
    *(
        "attention.key_length",
        "attention.sliding_window",
        "attention.sliding_window_pattern",
        "rope.freq_base",
    ),
    *("rope.scaling.type", "rope.scaling.factor", "rope.dimension_count", "expert_count"),
)
TOKENIZER = (
    *("model", "pre", "tokens", "scores", "token_type", "merges", "bos_token_id", "eos_token_id"),
    *("add_bos_token", "add_space_prefix", "padding_token_id"),
)
VALUES = (
    0,
    1,
    3,
    2**32 - 1,
    0.0,
    1e30,
    True,
    "",
    "linear",
    "gpt2",
    "odd",
    ["a"],
    ["a", "a"],
    [0],
    [7] * 319,
    [5] * 319,
    [2.0] * 319,
    [True] * 319,
    ["x"] * 319,
    [[1]] * 319,
    [True],
)
"""Values of keys, of all kinds that a file has."""


@functools.cache
def base(family: str) -> dict[str, Any]:
    """What makes a good file."""
    config = hf_folders.CONFIGS[family]
    return {"config": config, "tensors": hf_folders.random_tensors(config)}


def draw(rng: random.Random) -> Any:
    family = rng.choice(FAMILIES)
    keys, kind = {}, rng.random()
    for _ in range(rng.choice((0, 1, 1, 2)) if kind < 0.7 else 0):
        name = rng.choice(
            [f"{family}.{key}" for key in KEYS] + [f"tokenizer.ggml.{key}" for key in TOKENIZER]
        )
        keys[name] = rng.choice((None, *VALUES))
    stored = rng.choice(("blk.0.attn_q.weight", "token_embd.weight", "more", None, None))
    damage = hostile.damage(rng) if kind >= 0.7 else None
    # The first thousands of bytes say how the others are read.
    return {
        "family": family,
        "keys": keys,
        "stored": stored,
        "damage": damage,
        "early": rng.randint(0, 20_000),
    }


def check(case: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "m.gguf")
        stored = {case["stored"]: (np.ones((3, 4), np.float32), "F32")} if case["stored"] else {}
        made = base(case["family"])
        gguf_files.write_gguf(
            path, made["config"], case["family"], made["tensors"], keys=case["keys"], stored=stored
        )
        if case["damage"]:
            data, cut = path.read_bytes(), case["early"]
            damaged = hostile.damaged(data[:cut], case["damage"])
            path.write_bytes((damaged or b"") + data[cut:])
        model, error = outcome(ERRORS, load, f"gguf:{path}")
    if error is None:
        ids = model.tokenizer.encode_prompt("the Nile is long <sync/>")
        assert all(0 <= i < model.config.vocab_size for i in ids)


TARGET = Target(draw, check, share=2.0, cases=10)
