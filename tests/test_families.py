"""Published configurations read and written, in the spellings of transformers 4 and 5; and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import pytest

from pasta_jax.model import ModelConfig, init_params, param_count
from pasta_jax.model.config import RopeScaling
from pasta_jax.model.families import FAMILIES, FamilyError, config_from_hf, config_to_hf, family_of
from pasta_jax.model.presets import preset, presets

# ------------------------------------------------------------------------- as published: what each file says

GEMMA_2B = {
    "architectures": ["GemmaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 2,
    "eos_token_id": 1, "head_dim": 256, "hidden_act": "gelu", "hidden_activation": None, "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 16384, "max_position_embeddings": 8192, "model_type": "gemma",
    "num_attention_heads": 8, "num_hidden_layers": 18, "num_key_value_heads": 1, "pad_token_id": 0,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000.0, "torch_dtype": "bfloat16",
    "transformers_version": "4.38.0.dev0", "use_cache": True, "vocab_size": 256000,
}  # fmt: skip

GEMMA_2_27B = {
    "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1,
    "final_logit_softcapping": 30.0, "head_dim": 128, "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 4608, "initializer_range": 0.02,
    "intermediate_size": 36864, "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 32,
    "num_hidden_layers": 46, "num_key_value_heads": 16, "pad_token_id": 0, "query_pre_attn_scalar": 144,
    "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096, "sliding_window_size": 4096,
    "torch_dtype": "bfloat16", "transformers_version": "4.42.0.dev0", "use_cache": True, "vocab_size": 256000,
}  # fmt: skip

GEMMA_3_1B = {
    "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 106],
    "final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152,
    "initializer_range": 0.02, "intermediate_size": 6912, "max_position_embeddings": 32768,
    "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
    "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0", "use_cache": True, "vocab_size": 262144,
}  # fmt: skip

GEMMA_3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000,
    "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
    "vision_config": {
        "hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "model_type": "siglip_vision_model",
        "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False,
    },
}  # fmt: skip

GEMMA_3_27B = GEMMA_3_4B | {
    "text_config": {
        "head_dim": 128, "hidden_size": 5376, "intermediate_size": 21504, "model_type": "gemma3_text",
        "num_attention_heads": 32, "num_hidden_layers": 62, "num_key_value_heads": 16, "query_pre_attn_scalar": 168,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    },
}  # fmt: skip

LLAMA_3_2_1B = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": 128001, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0", "use_cache": True, "vocab_size": 128256,
}  # fmt: skip

LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": 128001, "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 8192, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 500000.0, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.40.0.dev0", "use_cache": True, "vocab_size": 128256,
}  # fmt: skip

LLAMA_2_7B = {
    "_name_or_path": "meta-llama/Llama-2-7b-hf", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip

QWEN_2_5_7B_INSTRUCT = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02,
    "intermediate_size": 18944, "max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "qwen2",
    "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1", "use_cache": True, "use_sliding_window": False, "vocab_size": 152064,
}  # fmt: skip

QWEN_2_5_0_5B = QWEN_2_5_7B_INSTRUCT | {
    "eos_token_id": 151643, "hidden_size": 896, "intermediate_size": 4864, "max_window_layers": 24,
    "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "sliding_window": 32768,
    "tie_word_embeddings": True, "use_mrope": False, "vocab_size": 151936,
}  # fmt: skip

QWEN_3_0_6B = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
    "initializer_range": 0.02, "intermediate_size": 3072, "max_position_embeddings": 40960,
    "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
    "sliding_window": None, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip

SMOLLM_2_135M = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
    "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None,
    "rope_theta": 100000, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True,
    "vocab_size": 49152,
}  # fmt: skip

MISTRAL_0_1 = {
    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
    "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip

MISTRAL_0_3 = MISTRAL_0_1 | {
    "attention_dropout": 0.0, "rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32768,
}  # fmt: skip

PUBLISHED: dict[str, dict[str, Any]] = {
    "gemma-2b": GEMMA_2B, "gemma-2-27b": GEMMA_2_27B, "gemma-3-1b-it": GEMMA_3_1B, "gemma-3-4b-it": GEMMA_3_4B,
    "gemma-3-27b-it": GEMMA_3_27B, "llama-3-8b": LLAMA_3_8B, "llama-3.2-1b": LLAMA_3_2_1B,
    "qwen2.5-0.5b": QWEN_2_5_0_5B, "qwen2.5-7b-instruct": QWEN_2_5_7B_INSTRUCT, "qwen3-0.6b": QWEN_3_0_6B,
    "mistral-7b-v0.1": MISTRAL_0_1, "mistral-7b-v0.3": MISTRAL_0_3, "smollm2-135m-instruct": SMOLLM_2_135M,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_file_gives_the_preset(name: str) -> None:
    assert config_from_hf(PUBLISHED[name]) == preset(name).config


def test_llama_2() -> None:
    assert config_from_hf(LLAMA_2_7B) == ModelConfig(
        vocab_size=32_000, num_layers=32, model_dim=4096, num_heads=32, num_kv_heads=32, head_dim=128,
        mlp_dim=11_008, norm_eps=1e-5, activation="silu", norm_offset=0.0, embed_scale=False, tie_embeddings=False,
        dtype="float16",
    )  # fmt: skip


def as_written_by_5(tree: dict[str, Any]) -> dict[str, Any]:
    """The same in the spelling of transformers 5."""
    tree = dict(tree)
    if "text_config" in tree:
        return tree | {"text_config": as_written_by_5(tree["text_config"])}
    kind = tree["model_type"]
    theta = tree.pop("rope_theta", FAMILIES[kind].defaults["rope_theta"])
    rope = {"rope_type": "default", "rope_theta": theta} | (tree.pop("rope_scaling", None) or {})
    if kind == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": tree.pop("rope_local_base_freq", 10_000.0)}
        rope = {"full_attention": rope, "sliding_attention": local}
    tree["rope_parameters"] = rope
    if "torch_dtype" in tree:
        tree["dtype"] = tree.pop("torch_dtype")
    every = {"gemma2": 2, "gemma3_text": tree.pop("sliding_window_pattern", 6)}.get(kind)
    if every:
        tree["layer_types"] = [
            "sliding_attention" if (z + 1) % every else "full_attention"
            for z in range(tree["num_hidden_layers"])
        ]
    elif kind.startswith("qwen"):
        tree["layer_types"] = ["full_attention"] * tree["num_hidden_layers"]
        tree["sliding_window"] = None
    return tree


@pytest.mark.parametrize("name", PUBLISHED)
def test_both_spellings_say_the_same(name: str) -> None:
    tree = as_written_by_5(PUBLISHED[name])
    assert tree != PUBLISHED[name]
    assert config_from_hf(tree) == preset(name).config


def test_what_a_file_leaves_out_is_as_in_transformers() -> None:
    for kind, family in FAMILIES.items():
        config = config_from_hf({"model_type": kind})
        assert config.tie_embeddings == kind.startswith("gemma")
        assert config.vocab_size == family.defaults["vocab_size"]
        assert config.dtype == "float32"
        assert config.sliding_window == (4096 if kind in ("gemma2", "gemma3_text", "mistral") else 0)
    gemma_3 = config_from_hf({"model_type": "gemma3_text"})
    assert gemma_3.layer_kinds == (*["local"] * 5, "global")
    assert (gemma_3.rope_base, gemma_3.local_rope_base) == (1e6, 1e4)
    gemma_2 = config_from_hf({"model_type": "gemma2"})
    assert (gemma_2.attn_softcap, gemma_2.final_softcap, gemma_2.layer_kinds) == (50, 30, ("local", "global"))
    assert config_from_hf({"model_type": "llama"}).num_kv_heads == 32
    assert config_from_hf({"model_type": "qwen3"}).head_dim == 128


def test_qwens_last_layers_are_the_local_ones() -> None:
    tree = QWEN_3_0_6B | {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 3}
    config = config_from_hf(tree)
    assert config.kinds == ("global",) * 3 + ("local",) * 25
    assert config.sliding_window == 100
    assert config_from_hf(tree | {"max_window_layers": 28}).sliding_window == 0


def test_yarn() -> None:
    def scaling(**fields: Any) -> RopeScaling:
        rope = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768} | fields
        return config_from_hf(QWEN_2_5_7B_INSTRUCT | {"rope_scaling": rope}).rope_scaling

    assert scaling() == RopeScaling("yarn", factor=4.0, original_length=32_768)
    assert scaling(beta_fast=16, attention_factor=1.5) == RopeScaling(
        "yarn", factor=4.0, original_length=32_768, beta_fast=16.0, attention_factor=1.5
    )
    assert scaling(mscale=1.0, mscale_all_dim=1.0).attention_factor == 1.0
    assert scaling(original_max_position_embeddings=8192, factor=None).factor == 4.0


# ----------------------------------------------------------------------------------------------- and back


@pytest.mark.parametrize("name", sorted(presets()))
def test_round_trip(name: str) -> None:
    known = preset(name)
    tree = config_to_hf(known.config) | {"max_position_embeddings": known.max_positions}
    assert json.loads(json.dumps(tree)) == tree
    assert config_from_hf(tree) == known.config
    assert tree["max_position_embeddings"] == known.max_positions


def test_an_export_has_the_published_length() -> None:
    def length(config: ModelConfig) -> int:
        written: int = config_to_hf(config)["max_position_embeddings"]
        return written

    for known in presets().values():
        same = [other.max_positions for other in presets().values() if other.config == known.config]
        assert length(known.config) == min(same)
    small = preset("gemma-3-1b-it").config
    assert length(small) == 32_768 and length(preset("gemma-3-4b-it").config) == 131_072
    assert length(dataclasses.replace(small, vocab_size=262_150, dtype="float32")) == 32_768
    assert length(dataclasses.replace(small, num_layers=3)) == 131_072  # no published one: transformers' own
    scaled = preset("llama-3.2-1b").config
    assert (
        length(dataclasses.replace(scaled, num_layers=3)) == 32 * 8192
    )  # as far as its positions are scaled


def test_the_family_can_be_chosen_where_two_fit() -> None:
    config = preset("mistral-7b-v0.3").config
    assert family_of(config) == "llama"
    tree = config_to_hf(config, family="mistral")
    assert (tree["architectures"], tree["sliding_window"]) == (["MistralForCausalLM"], None)
    assert config_from_hf(tree) == config
    with pytest.raises(
        FamilyError, match=r"GemmaForCausalLM cannot express norm_offset=0.0, embed_scale=False"
    ):
        config_to_hf(config, family="gemma")
    with pytest.raises(FamilyError, match="family='gpt2' is unknown. Use one of gemma, "):
        config_to_hf(config, family="gpt2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(norm_offset=0.0), "nearest, GemmaForCausalLM, has no norm_offset=0.0"),
        (dict(qk_norm=True), "qk_norm=True"),
        (dict(attn_softcap=5.0), "attn_softcap=5.0"),
        (dict(query_scale=7.0), "query_scale=7.0"),
        (dict(layer_kinds=("local",), sliding_window=9), "layer_kinds="),
        (dict(post_norms=True, query_scale=7.5), "query_scale=7.5"),
        (
            dict(post_norms=True, layer_kinds=("local",), sliding_window=9, local_rope_base=5.0),
            "local_rope_base=5",
        ),
    ],
)
def test_what_no_architecture_has_is_not_written(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FamilyError, match=message):
        config_to_hf(dataclasses.replace(ModelConfig(), **changes))


def test_our_own_default_is_a_gemma() -> None:
    assert config_to_hf(ModelConfig())["architectures"] == ["GemmaForCausalLM"]
    assert config_from_hf(config_to_hf(ModelConfig())) == ModelConfig()


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"model_type": "qwen3_moe"}, "model_type='qwen3_moe': unknown architecture.*Mixtures of experts"),
        ({"model_type": "gemma3n"}, "model_type='gemma3n': unknown architecture.*nearest is gemma"),
        ({}, "model_type=None"),
        ([], "holds list"),
        (LLAMA_3_8B | {"architectures": ["LlamaForSequenceClassification"]}, "architectures="),
        (LLAMA_3_8B | {"mlp_bias": True}, "mlp_bias=True"),
        (LLAMA_3_8B | {"attention_bias": True}, "attention_bias=True"),
        (QWEN_2_5_0_5B | {"attention_bias": False}, "attention_bias=False"),
        (QWEN_2_5_0_5B | {"use_mrope": True}, "use_mrope=True"),
        (LLAMA_3_8B | {"quantization_config": {"bits": 4}}, "quantization_config="),
        (LLAMA_3_8B | {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        (GEMMA_3_1B | {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        (GEMMA_3_1B | {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        (GEMMA_2B | {"hidden_act": "relu"}, "hidden_act='relu': unknown activation"),
        (GEMMA_2B | {"hidden_activation": "gelu"}, "hidden_activation='gelu': unknown activation"),
        (GEMMA_2_27B | {"hidden_activation": "gelu"}, "hidden_activation='gelu': unknown activation"),
        (LLAMA_3_8B | {"rope_scaling": {"type": "dynamic"}}, "rope_scaling: type='dynamic': unknown"),
        (LLAMA_3_8B | {"rope_scaling": {"type": "linear"}}, "rope_scaling: factor=None"),
        (LLAMA_3_8B | {"rope_scaling": {"type": "linear", "mscale": 1}}, "rope_scaling: mscale=1: not supported"),
        (LLAMA_3_8B | {"rope_scaling": "linear"}, "rope_scaling='linear': must be an object"),
        (
            LLAMA_3_8B | {"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}},
            "rope_scaling: truncate=False",
        ),
        (LLAMA_3_8B | {"rope_parameters": {"full_attention": {}}}, "rope_parameters=.*the same for all layers"),
        (GEMMA_3_1B | {"rope_parameters": {"rope_theta": 1e4}}, "must have full_attention"),
        (
            GEMMA_3_1B | {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "local layers have no scaling",
        ),
        (GEMMA_2_27B | {"layer_types": ["full_attention"] * 3}, "layer_types=.*name each of 46 layers"),
        (GEMMA_2_27B | {"sliding_window": None}, "sliding_window=None"),
        (MISTRAL_0_3 | {"layer_types": ["sliding_attention"] * 32}, "MistralForCausalLM does not read it"),
        (LLAMA_3_8B | {"layer_types": ["sliding_attention"] * 32}, "LlamaForCausalLM does not read it"),
        (LLAMA_3_8B | {"hidden_size": "4096"}, "hidden_size='4096': must be a number above 0"),
        (LLAMA_3_8B | {"num_hidden_layers": 1.5}, "num_hidden_layers=1.5: must be a whole number"),
        (LLAMA_3_8B | {"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000: .* at most 1,024"),
        (LLAMA_3_8B | {"vocab_size": 2**31}, "vocab_size=2147483648: must be a whole number, at most 2,147"),
        (LLAMA_3_8B | {"rope_theta": 10**400}, r"rope_theta=1000*\.\.\.0*: is too large"),
        (LLAMA_3_8B | {"model_type": ["llama"]}, r"model_type=\['llama'\]: unknown architecture"),
        (LLAMA_3_8B | {"architectures": {"a": 1}}, r"architectures=\{'a': 1\}"),
        (LLAMA_3_8B | {"hidden_act": ["silu"]}, r"hidden_act=\['silu'\]: unknown activation"),
        (LLAMA_3_8B | {"torch_dtype": {}}, r"torch_dtype=\{\}: unknown"),
        (LLAMA_3_8B | {"rope_scaling": {"rope_type": []}}, r"rope_scaling: rope_type=\[\]: unknown"),
        (GEMMA_3_1B | {"rope_parameters": {"full_attention": "x"}}, "full_attention='x': must be an object"),
        (GEMMA_2_27B | {"layer_types": [["full_attention"]] * 46}, "layer_types=.*name each of 46 layers"),
        (LLAMA_3_8B | {"model_type": "x" * 10**6}, "model_type='x*[.]{3}x*': unknown architecture"),
        (LLAMA_3_8B | {"hidden_size": 4095}, "hidden_size=4095: is no multiple of num_attention_heads=32"),
        (LLAMA_3_8B | {"head_dim": 7}, "head_dim=7"),
        (LLAMA_3_8B | {"num_key_value_heads": 5}, "num_heads=32 is not a multiple of num_kv_heads=5"),
        (LLAMA_3_8B | {"tie_word_embeddings": "no"}, "tie_word_embeddings='no': must be true or false"),
        (LLAMA_3_8B | {"torch_dtype": "int8"}, "torch_dtype='int8': unknown"),
        (LLAMA_3_8B | {"rms_norm_eps": None}, "rms_norm_eps=None"),
        ({"model_type": "gemma3"}, "text_config: a multi-modal"),
    ],
)  # fmt: skip
def test_refusals_name_file_and_field(tree: Any, message: str) -> None:
    with pytest.raises(FamilyError, match=f"^models/x/config.json: .*{message}"):
        config_from_hf(tree, "models/x/config.json")


def test_fields_that_change_nothing_are_let_pass() -> None:
    tree = LLAMA_3_8B | {
        "partial_rotary_factor": 1.0, "attention_bias": None, "quantization_config": None, "pretraining_tp": 4,
        "unsloth_fixed": True, "rope_scaling": {"rope_type": "default"}, "layer_types": ["full_attention"] * 32,
    }  # fmt: skip
    assert config_from_hf(tree) == config_from_hf(LLAMA_3_8B)


# ------------------------------------------------------------------------------------------------- presets

COUNTS = {
    "gemma-2b": 2_506_172_416, "gemma-7b": 8_537_680_896, "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984, "gemma-2-27b": 27_227_128_320, "gemma-3-1b-it": 999_885_952,
    "llama-3-8b": 8_030_261_248, "llama-3.1-70b": 70_553_706_496, "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824, "qwen2.5-0.5b": 494_032_768, "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688, "qwen2.5-7b": 7_615_616_512, "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352, "qwen2.5-72b": 72_706_203_648, "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976, "qwen3-4b": 4_022_468_096, "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200, "qwen3-32b": 32_762_123_264, "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552, "llama-3.1-405b-instruct": 405_853_388_800,
    "qwen3-0.6b-base": 596_049_920, "qwen3-14b-base": 14_768_307_200,
    "smollm2-135m": 134_515_008, "smollm2-360m": 361_821_120, "smollm2-1.7b": 1_711_376_384,
}  # fmt: skip
"""As published with the weights; tied embeddings once."""

MULTI_MODAL = {
    "gemma-3-4b-it": 4_300_079_472,
    "gemma-3-12b-it": 12_187_325_040,
    "gemma-3-27b-it": 27_432_406_640,
}
VISION = 416_866_032
"""Of the vision model that the three share, beside which stands a projection [1152, D] and a norm [1152]."""


def count(config: ModelConfig) -> int:
    """From the shapes of one layer and of two: all are alike."""
    one, two = (
        param_count(jax.eval_shape(functools.partial(init_params, some), jax.random.key(0)))
        for some in (dataclasses.replace(config, num_layers=n) for n in (1, 2))
    )
    return one + (config.num_layers - 1) * (two - one)


@pytest.mark.parametrize("name", [*COUNTS, *MULTI_MODAL])
def test_presets_have_the_published_number_of_parameters(name: str) -> None:
    config = preset(name).config
    if name in COUNTS:
        assert count(config) == COUNTS[name]
    else:
        assert count(config) == MULTI_MODAL[name] - VISION - 1152 * (config.model_dim + 1)


def test_presets_by_name() -> None:
    assert preset("Gemma-2B-it").hub == "google/gemma-2b-it"
    assert preset("llama-3-8b-instruct").hub == "meta-llama/Meta-Llama-3-8B-Instruct"
    for name, known in presets().items():
        assert known.hub.lower().endswith(name)
        assert known.config.dtype == "bfloat16"
    with pytest.raises(ValueError, match="'gemma-2b-instruct'. Did you mean gemma-2b-it"):
        preset("gemma-2b-instruct")
    assert preset("qwen3-8b-base").config == preset("qwen3-8b").config
    assert preset("qwen3-8b-base").max_positions == 32_768
    assert "qwen3-32b-base" not in presets()
    with pytest.raises(ValueError, match="'gpt-2-xl'"):
        preset("gpt-2-xl")


# ------------------------------------------------------------------------------- where transformers is installed


@pytest.mark.parametrize(
    "name", [*PUBLISHED, "gemma-7b", "gemma-2-9b", "gemma-3-12b-it", "mistral-7b-instruct-v0.1"]
)
def test_transformers_reads_what_we_write(name: str, tmp_path: pathlib.Path) -> None:
    """And what it writes again, in its own spelling, we read as the same model."""
    transformers = pytest.importorskip("transformers")
    known = preset(name)
    (tmp_path / "config.json").write_text(
        json.dumps(config_to_hf(known.config) | {"max_position_embeddings": known.max_positions})
    )
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert theirs.architectures == [FAMILIES[theirs.model_type].architecture]
    assert hasattr(transformers, theirs.architectures[0])
    assert theirs.hidden_size == known.config.model_dim
    assert theirs.head_dim == known.config.head_dim
    again = theirs.to_dict()
    assert again["rope_parameters"]
    assert config_from_hf(again) == known.config


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_go_through_transformers_unchanged(name: str, tmp_path: pathlib.Path) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    again = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    assert config_from_hf(again) == preset(name).config


@pytest.mark.parametrize("kind", FAMILIES)
def test_our_defaults_are_those_of_transformers(kind: str, tmp_path: pathlib.Path) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    assert config_from_hf(theirs) == config_from_hf({"model_type": kind})
