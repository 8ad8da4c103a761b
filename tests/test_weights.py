"""The table between our parameters and a Hugging Face folder: complete, exact, and in the same numbers."""

import dataclasses
import functools

import jax
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from pasta_jax.model import ModelConfig, init_params
from pasta_jax.model import weights as table
from pasta_jax.model.weights import hf_tensors

SMALL = ModelConfig(
    vocab_size=11, num_layers=3, model_dim=6, num_heads=4, num_kv_heads=2, head_dim=10, mlp_dim=7
)
ALL = dataclasses.replace(SMALL, tie_embeddings=False, qkv_bias=True, qk_norm=True, post_norms=True)
LLAMA = dataclasses.replace(SMALL, tie_embeddings=False)


@pytest.mark.parametrize("config", [SMALL, LLAMA, ALL, dataclasses.replace(ALL, post_norms=False)])
@pytest.mark.parametrize("prefix", ["model.", *table.MULTIMODAL_PREFIXES])
def test_every_parameter_is_one_tensor_and_has_the_models_shape(config: ModelConfig, prefix: str) -> None:
    shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    tensors = hf_tensors(config, prefix)
    assert unflatten_dict({t.path: t.ours for t in tensors}) == jax.tree.map(lambda x: x.shape, shapes)
    assert len({t.name for t in tensors}) == len(tensors)
    assert table.find_prefix(t.name for t in tensors) == prefix
    assert not any(table.is_ignored(t.name) for t in tensors)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_both_ways_are_exact_and_copy_nothing(dtype: type, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for tensor in hf_tensors(ALL):
        theirs: np.ndarray = rng.normal(size=tensor.shape).astype(dtype)
        ours = tensor.to_ours(theirs)
        assert ours.shape == tensor.ours and ours.dtype == dtype and np.shares_memory(ours, theirs)
        np.testing.assert_array_equal(tensor.to_hf(ours), theirs)
        with pytest.raises(ValueError, match=f"{tensor.name} .* must be"):
            tensor.to_ours(theirs[:-1])


def test_a_projection_is_the_same_map() -> None:
    """x W^T in their layout, heads in rows one after the other, is our einsum."""
    rng = np.random.default_rng(0)
    by_name = {t.name: t for t in hf_tensors(SMALL)}
    x, heads = rng.normal(size=6), rng.normal(size=(4, 10))
    for name, letter_dims in (("q_proj", (4, 10)), ("v_proj", (2, 10))):
        tensor = by_name[f"model.layers.2.self_attn.{name}.weight"]
        theirs = rng.normal(size=tensor.shape)
        expected = (theirs @ x).reshape(letter_dims)
        np.testing.assert_allclose(np.einsum("D,DNH->NH", x, tensor.to_ours(theirs)), expected)
    out = by_name["model.layers.0.self_attn.o_proj.weight"]
    theirs = rng.normal(size=out.shape)
    np.testing.assert_allclose(np.einsum("NH,NHD->D", heads, out.to_ours(theirs)), theirs @ heads.reshape(-1))


def test_names_that_mean_two_things() -> None:
    """`post_attention_layernorm` is another norm in Gemma 2 and 3 than elsewhere."""
    elsewhere = {t.name: t.parameter for t in hf_tensors(SMALL)}
    gemma2 = {t.name: t.parameter for t in hf_tensors(dataclasses.replace(SMALL, post_norms=True))}
    name = "model.layers.1.post_attention_layernorm.weight"
    assert elsewhere[name] == "layer_1/mlp_norm/scale"
    assert gemma2[name] == "layer_1/attn_post_norm/scale"
    assert gemma2["model.layers.1.pre_feedforward_layernorm.weight"] == "layer_1/mlp_norm/scale"
    assert gemma2["model.layers.1.post_feedforward_layernorm.weight"] == "layer_1/mlp_post_norm/scale"
    assert hf_tensors(LLAMA, "language_model.model.")[-1].name == "language_model.lm_head.weight"
    assert hf_tensors(LLAMA)[-1].name == table.tied_head(SMALL).name == "lm_head.weight"


def test_what_is_not_of_the_text_model() -> None:
    assert table.is_ignored("vision_tower.vision_model.embeddings.patch_embedding.weight")
    assert table.is_ignored("model.multi_modal_projector.mm_input_projection_weight")
    assert table.is_ignored("model.layers.0.self_attn.rotary_emb.inv_freq")
    assert not table.is_ignored("model.layers.0.mlp.experts.0.up_proj.weight")
    assert not table.is_ignored("lm_head.weight")
