"""Tiny random models of each family, with what transformers makes of them; and the fixtures that hold that.

    python -m tests.helpers.tiny_families  # writes tests/fixtures/families again; needs torch and transformers

A fixture has the text of a `config.json`, all tensors under their names in a Hugging Face folder, prompts of
different lengths, transformers' logits at each of their positions (each prompt alone, eager attention, float32)
and its greedy continuations. Weights come from NumPy's generator, so that they do not depend on torch's version.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import tempfile
from typing import Any

import numpy as np

from pasta_jax.lang import tags
from pasta_jax.testing import WordTokenizer
from pasta_jax.tokens.tokenizer import Vocabulary

FOLDER = pathlib.Path(__file__).parents[1] / "fixtures" / "families"

V = 64

_SPECIAL = ("", "", "", *tags.PIECES)

VOCABULARY = Vocabulary(
    pieces=tuple(
        piece.encode()
        for piece in (
            *_SPECIAL,
            *map(str, range(10)),
            *(chr(ord("A") + i) for i in range(V - len(_SPECIAL) - 10)),
        )
    ),
    tag_ids={piece: 3 + i for i, piece in enumerate(tags.PIECES)},
    pad=0,
    eos=1,
    bos=2,
    control=frozenset({0, 2}),
)
"""The models' logits of its first ids, control symbols and tags, are close to 0, so that none is ever sampled."""

LENGTHS = (9, 30, 17)
NEW = 64


class TinyTokenizer(WordTokenizer):
    """The vocabulary alone: prompts are ids here."""

    def __init__(self) -> None:
        self.vocabulary = VOCABULARY

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError


_SIZES = {
    "vocab_size": V, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "rms_norm_eps": 0.01,
    "torch_dtype": "float32", "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
"""Head dim is twice D / N; the norms' epsilon is large enough to be seen."""


def _tree(architecture: str, model_type: str, **fields: Any) -> dict[str, Any]:
    """A `config.json`; a field that is ... is left out."""
    tree = {"architectures": [architecture], "model_type": model_type} | _SIZES | fields
    return {name: value for name, value in tree.items() if value is not ...}


def _rope5(**fields: Any) -> dict[str, Any]:
    return {"rope_type": "default"} | fields


CONFIGS: dict[str, dict[str, Any]] = {
    "gemma": _tree("GemmaForCausalLM", "gemma", hidden_act="gelu", num_key_value_heads=1, rope_theta=100.0),
    "gemma_untied": _tree(
        "GemmaForCausalLM", "gemma", hidden_act="gelu_pytorch_tanh", hidden_activation=None, num_key_value_heads=4,
        tie_word_embeddings=False, num_hidden_layers=2, rope_parameters=_rope5(rope_theta=200.0),
    ),
    "gemma2": _tree(
        "Gemma2ForCausalLM", "gemma2", hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh",
        sliding_window=5, query_pre_attn_scalar=3, attn_logit_softcapping=2.0, final_logit_softcapping=4.0,
    ),
    "gemma2_listed": _tree(
        "Gemma2ForCausalLM", "gemma2", hidden_activation="gelu_pytorch_tanh", num_key_value_heads=1,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"], sliding_window=11,
        query_pre_attn_scalar=8, attn_logit_softcapping=None, final_logit_softcapping=6.0,
        tie_word_embeddings=False, rope_parameters=_rope5(rope_type="linear", factor=3.0, rope_theta=100.0),
    ),
    "gemma3": _tree(
        "Gemma3ForCausalLM", "gemma3_text", hidden_activation="gelu_pytorch_tanh", num_hidden_layers=7,
        num_key_value_heads=1, intermediate_size=12, sliding_window=6, sliding_window_pattern=6,
        query_pre_attn_scalar=5, rope_theta=500.0, rope_local_base_freq=20.0,
        rope_scaling={"rope_type": "linear", "factor": 2.0},
    ),
    "gemma3_listed": _tree(
        "Gemma3ForCausalLM", "gemma3_text", hidden_activation="gelu_pytorch_tanh", torch_dtype=...,
        dtype="float32", tie_word_embeddings=False, sliding_window=4, query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention", "full_attention"], final_logit_softcapping=8.0,
        rope_parameters={
            "full_attention": _rope5(rope_theta=900.0),
            "sliding_attention": _rope5(rope_theta=30.0),
        },
    ),
    "llama2": _tree(
        "LlamaForCausalLM", "llama", hidden_act="silu", num_key_value_heads=..., head_dim=..., rope_scaling=None,
        num_hidden_layers=2, tie_word_embeddings=False, pretraining_tp=1,
    ),
    "llama3": _tree(
        "LlamaForCausalLM", "llama", hidden_act="silu", attention_bias=False, mlp_bias=False, rope_theta=100.0,
        num_key_value_heads=1, tie_word_embeddings=True,
        rope_scaling={
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "llama_yarn": _tree(
        "LlamaForCausalLM", "llama", hidden_act="gelu_pytorch_tanh", num_hidden_layers=1, head_dim=16,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 64,
            "beta_fast": 8.0, "beta_slow": 0.5, "attention_factor": 1.3,
        },
    ),
    "qwen2": _tree(
        "Qwen2ForCausalLM", "qwen2", hidden_act="silu", head_dim=..., use_sliding_window=True, sliding_window=7,
        max_window_layers=1, rope_theta=300.0, use_mrope=False, tie_word_embeddings=False,
        rope_scaling={
            "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 8.0,
        },
    ),
    "qwen2_tied": _tree(
        "Qwen2ForCausalLM", "qwen2", hidden_act="silu", num_key_value_heads=1, use_sliding_window=False,
        sliding_window=4, max_window_layers=1, rope_theta=300.0, tie_word_embeddings=True, num_hidden_layers=2,
    ),
    "qwen3": _tree(
        "Qwen3ForCausalLM", "qwen3", hidden_act="silu", attention_bias=False, use_sliding_window=False,
        sliding_window=None, max_window_layers=3, rope_theta=300.0, tie_word_embeddings=True, rope_scaling=None,
        hidden_size=20, num_attention_heads=5, num_key_value_heads=1,
    ),
    "mistral": _tree(
        "MistralForCausalLM", "mistral", hidden_act="silu", sliding_window=5, rope_theta=300.0,
        tie_word_embeddings=False,
    ),
    "mistral_global": _tree(
        "MistralForCausalLM", "mistral", hidden_act="silu", sliding_window=None, rope_theta=300.0,
        tie_word_embeddings=False, num_hidden_layers=1, num_key_value_heads=4,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TinyModel:
    """What a fixture holds.

    Attributes:
      config: parsed `config.json`.
      tensors: float32, by name in a Hugging Face folder.
      tokens: int32 [B, L], prompts padded with 0.
      logits: float32 [B, L, V], 0 where padded.
      continuations: int32 [B, NEW].
      seed: of `make`.
    """

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    tokens: np.ndarray
    logits: np.ndarray
    continuations: np.ndarray
    seed: int

    @property
    def prompts(self) -> list[list[int]]:
        return [row[:length].tolist() for row, length in zip(self.tokens, LENGTHS)]


def read(name: str) -> TinyModel:
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    prefix = "tensor/"
    return TinyModel(
        config=json.loads(arrays.pop("config").item()),
        tensors={key.removeprefix(prefix): arrays[key] for key in arrays if key.startswith(prefix)},
        **{key: arrays[key].astype(np.int32) for key in ("tokens", "continuations")},
        logits=arrays["logits"],
        seed=int(arrays["seed"]),
    )


def write(name: str, model: TinyModel) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Any] = {f"tensor/{key}": array for key, array in model.tensors.items()}
    np.savez_compressed(
        FOLDER / f"{name}.npz",
        config=np.array(json.dumps(model.config)),
        tokens=model.tokens.astype(np.int8),
        continuations=model.continuations.astype(np.int8),
        logits=model.logits,
        seed=np.array(model.seed),
        **tensors,
    )


def transformers_model(tree: dict[str, Any], tensors: dict[str, np.ndarray] | None = None) -> Any:
    """The model that transformers makes of a `config.json`, with its tensors if they are given; float32, eager."""
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "config.json").write_text(json.dumps(tree))
        config = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    if tensors is not None:
        state = {name: torch.from_numpy(array.copy()) for name, array in tensors.items()}
        missing, unexpected = model.load_state_dict(state, strict=False)
        tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
        assert set(missing) <= tied and not unexpected, (missing, unexpected)
        model.tie_weights()
    return model


def random_tensors(model: Any, seed: int) -> dict[str, np.ndarray]:
    """Every parameter of a transformers model at random: no norm is neutral, no bias 0."""
    rng = np.random.default_rng(seed)
    gemma = model.config.model_type.startswith("gemma")
    tied = model.config.tie_word_embeddings
    out = {}
    for name, parameter in model.named_parameters():  # each once, the tied head not
        noise = rng.normal(size=tuple(parameter.shape))
        if name == "model.norm.weight":  # of both signs, or tied embeddings say the same token for ever
            value = 1.2 * noise
        elif name.endswith("norm.weight"):
            value = 0.6 * noise if gemma else 1 + 0.6 * noise
        elif name.endswith("bias"):
            value = 0.7 * noise
        elif "embed_tokens" in name:
            value = noise * (parameter.shape[1] ** -0.5 if gemma else 0.5)
            if tied:
                value[: len(_SPECIAL)] *= 0.02
        elif name == "lm_head.weight":
            value = noise * 2 * parameter.shape[1] ** -0.5
            value[: len(_SPECIAL)] *= 0.02
        else:
            value = (
                noise * (2.0 if "q_proj" in name or "v_proj" in name else 1.5) * parameter.shape[1] ** -0.5
            )
        out[name] = value.astype(np.float32)
    return out


def logits_of(model: Any, tokens: list[int]) -> np.ndarray:
    """Float32 [L, V], without a cache."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=False).logits[0].float().numpy()


def make(name: str, seed: int) -> tuple[TinyModel, float]:
    """The model with this seed, and the least distance between the best two logits of its continuations."""
    tree = CONFIGS[name]
    tensors = random_tensors(transformers_model(tree), seed)
    model = transformers_model(tree, tensors)
    rng = np.random.default_rng([seed, 1])
    tokens = np.zeros((len(LENGTHS), max(LENGTHS)), np.int32)
    logits = np.zeros((*tokens.shape, V), np.float32)
    continuations = np.zeros((len(LENGTHS), NEW), np.int32)
    margin = np.inf
    for row, length in enumerate(LENGTHS):
        tokens[row, :length] = rng.integers(0, V, length)
        text = tokens[row, :length].tolist()
        logits[row, :length] = logits_of(model, text)
        for _ in range(NEW):
            last = logits_of(model, text)[-1]
            second, first = np.sort(last)[-2:]
            margin = min(margin, float(first - second))
            text.append(int(np.argmax(last)))
        continuations[row] = text[length:]
    return TinyModel(tree, tensors, tokens, logits, continuations, seed), margin


def good(model: TinyModel, margin: float) -> bool:
    """Rounding cannot change the continuations; they are varied and have no control symbol or tag."""
    varied = min(len(set(row.tolist())) for row in model.continuations)
    return margin > 3e-3 and varied >= 8 and model.continuations.min() >= len(_SPECIAL)


def seed_of(name: str) -> int:
    """The first with which the model is good."""
    return next(seed for seed in range(100) if good(*make(name, seed)))


def main() -> None:
    for name in CONFIGS:
        seed = seed_of(name)
        model, margin = make(name, seed)
        write(name, model)
        varied = [len(set(row.tolist())) for row in model.continuations]
        spread = float(np.std(model.logits[model.logits != 0]))
        size = (FOLDER / f"{name}.npz").stat().st_size
        print(
            f"{name}: seed {seed}, margin {margin:.4f}, {varied} ids, logits +-{spread:.2f}, {size / 1e3:.0f} kB"
        )


if __name__ == "__main__":
    main()
