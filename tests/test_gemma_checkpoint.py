"""Gemma's own checkpoints: made up in its layout, read, and the parameters that they were made of."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from pasta_jax.interchange import gemma
from pasta_jax.interchange.errors import InterchangeError
from pasta_jax.interchange.importing import ImportOptions, open_published
from pasta_jax.model import ModelConfig
from pasta_jax.model.layers import project
from pasta_jax.model.presets import Preset
from pasta_jax.sharding import make_mesh
from tests.helpers.hf_folders import CONFIGS, small_tokenizer
from tests.helpers.models import random_params

ONE = dataclasses.replace(CONFIGS["gemma"], num_layers=2)
SEVEN = dataclasses.replace(ONE, num_kv_heads=4)  # keys for each head: one einsum for all three
THREE = dataclasses.replace(CONFIGS["gemma3"], num_layers=2)


def published(
    params: Any, config: ModelConfig, *, transposed: bool = False, w: bool = False
) -> dict[str, Any]:
    """In the layout of google-deepmind/gemma's modules, as a flat dict."""
    tree = {
        "transformer/embedder": {"input_embedding": params["embed"]["embedding"]},
        "transformer/final_norm": {"scale": params["final_norm"]["scale"]},
    }
    for z in range(config.num_layers):
        ours, at = params[f"layer_{z}"], f"transformer/layer_{z}"
        q, k, v = (np.moveaxis(ours["attn"][f"{x}_proj"], 0, 1) for x in "qkv")
        if config.num_heads == config.num_kv_heads:
            tree[f"{at}/attn/qkv_einsum"] = {"w": np.stack([q, k, v])}
        else:
            tree[f"{at}/attn/q_einsum"] = {"w": np.asarray(q)}
            tree[f"{at}/attn/kv_einsum"] = {"w": np.stack([k, v])}
        tree[f"{at}/attn/attn_vec_einsum"] = {"w": ours["attn"]["o_proj"]}
        gating = np.stack([ours["mlp"]["gate_proj"], ours["mlp"]["up_proj"]])
        gating = np.ascontiguousarray(gating.transpose(0, 2, 1)) if transposed else gating
        if w:
            tree[f"{at}/mlp/gating_einsum"] = {"w": gating}
            tree[f"{at}/mlp/linear"] = {"w": ours["mlp"]["down_proj"]}
        else:
            tree[f"{at}/mlp"] = {"gating_einsum": gating, "linear": ours["mlp"]["down_proj"]}
        norms = {"pre_attention_norm": "attn_norm", "pre_ffw_norm": "mlp_norm"}
        if config.post_norms:
            norms |= {"post_attention_norm": "attn_post_norm", "post_ffw_norm": "mlp_post_norm"}
        for theirs, name in norms.items():
            tree[f"{at}/{theirs}"] = {"scale": ours[name]["scale"]}
        for letter, name in (("q", "query"), ("k", "key")) if config.qk_norm else ():
            tree[f"{at}/attn/_{name}_norm"] = {"scale": ours["attn"][f"{letter}_norm"]}
    return tree


def nested(flat: dict[str, Any], below: int) -> dict[str, Any]:
    """With dicts for slashes, and without the first `below` levels."""
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *path, last = name.split("/")[below:]
        at = tree
        for key in path:
            at = at.setdefault(key, {})
        at[last] = leaf
    return tree


def write(path: pathlib.Path, tree: Any) -> pathlib.Path:
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
    return path


@pytest.mark.parametrize(
    ("config", "how"),
    [(ONE, "flat"), (SEVEN, "flat"), (THREE, "nested"), (THREE, "bare")],
    ids=["Gemma 1, 2B's kind", "7B's kind", "Gemma 3", "Gemma 3, no first level"],
)
def test_parameters_are_the_same(config: ModelConfig, how: str, tmp_path: pathlib.Path, seed: int) -> None:
    params = jax.tree.map(np.asarray, random_params(config, np.random.default_rng(seed)))
    flat = published(params, config, transposed=how != "flat", w=how == "bare")
    tree: Any = flat if how == "flat" else nested(flat, 0 if how == "nested" else 1)
    if how != "flat":
        tree |= {"vision_encoder": {"siglip": {"kernel": np.ones((3, 3), np.float32)}}}
    checkpoint = gemma.open_gemma(write(tmp_path / "ckpt", tree), config)
    read = gemma.read_gemma(checkpoint, checkpoint.config)
    jax.tree.map(np.testing.assert_array_equal, read, params)


def test_the_layout_means_what_its_modules_compute() -> None:
    """The einsums of google-deepmind/gemma, gm/nn/_modules.py, on what `published` makes, and our product."""
    params = jax.tree.map(np.asarray, random_params(SEVEN, np.random.default_rng(0)))
    flat, layer = published(params, SEVEN), params["layer_1"]
    x_BxTxD = np.random.default_rng(1).normal(size=(2, 3, 16)).astype(np.float32)

    def ours(name: str, inner: int = 1, x: np.ndarray = x_BxTxD) -> np.ndarray:
        part = layer["mlp" if name in layer["mlp"] else "attn"][name]
        return np.asarray(project(jax.numpy.asarray(x), part, inner))

    at = "transformer/layer_1"
    qkv = np.einsum("BTD,SNDH->SBTNH", x_BxTxD, flat[f"{at}/attn/qkv_einsum"]["w"])
    for got, name in zip(qkv, ("q_proj", "k_proj", "v_proj"), strict=True):
        np.testing.assert_allclose(got, ours(name), atol=1e-5)
    out = np.einsum("BTNH,NHD->BTD", qkv[0], flat[f"{at}/attn/attn_vec_einsum"]["w"])
    np.testing.assert_allclose(out, ours("o_proj", 2, qkv[0]), atol=1e-4)
    gating = flat[f"{at}/mlp"]["gating_einsum"]
    np.testing.assert_allclose(x_BxTxD @ gating[0], ours("gate_proj"), atol=1e-5)
    np.testing.assert_allclose(x_BxTxD @ gating[1], ours("up_proj"), atol=1e-5)
    turned = published(params, SEVEN, transposed=True)[f"{at}/mlp"]["gating_einsum"]
    both = np.einsum("BTD,CFD->CBTF", x_BxTxD, turned)
    np.testing.assert_allclose(both[1], ours("up_proj"), atol=1e-5)


def test_as_a_source(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes by the shapes, a tokenizer beside it, onto a mesh."""
    params = jax.tree.map(np.asarray, random_params(ONE, np.random.default_rng(0)))
    where = str(write(tmp_path / "ckpt", published(params, ONE)))
    known = {"gemma-tiny": Preset(ONE, "google/gemma-tiny", 64), "qwen-tiny": Preset(ONE, "q/q", 64)}
    monkeypatch.setattr(gemma, "presets", lambda: known)
    with pytest.raises(InterchangeError, match="holds no tokenizer. Add --tokenizer=FILE"):
        open_published("orbax", where)
    (tmp_path / "tokenizer.model").write_bytes(small_tokenizer())
    with pytest.raises(InterchangeError, match="extend_tokenizer is for Hugging Face folders"):
        open_published(
            "orbax", where, ImportOptions(tokenizer=tmp_path / "tokenizer.model", extend_tokenizer=True)
        )
    opened = open_published(
        "orbax", where, ImportOptions(tokenizer=tmp_path / "tokenizer.model", dtype="bfloat16")
    )
    assert opened.config == dataclasses.replace(ONE, dtype="bfloat16") and opened.origin is None
    placed = opened.read(make_mesh(1, 4, 2))
    expected = jax.tree.map(lambda x: x.astype("bfloat16"), params)
    jax.tree.map(np.testing.assert_array_equal, placed, expected)
    known |= {"gemma-other": Preset(dataclasses.replace(ONE, rope_base=1.0), "google/other", 64)}
    with pytest.raises(
        InterchangeError, match="may be gemma-tiny or gemma-other. Choose one with --preset of convert"
    ):
        gemma.open_gemma(where)
    known.clear()
    with pytest.raises(
        InterchangeError, match=r"2 layers of D=16, N=4, K=2, H=6, F=24, which no published Gemma"
    ):
        gemma.open_gemma(where)
    with pytest.raises(InterchangeError, match="No published model is called 'gemma-2c'"):
        gemma.open_gemma(where, "gemma-2c")


def test_what_is_wrong_with_one(tmp_path: pathlib.Path) -> None:
    params = jax.tree.map(np.asarray, random_params(ONE, np.random.default_rng(0)))
    tree = published(params, ONE)
    path = write(tmp_path / "ckpt", tree)
    three = dataclasses.replace(ONE, num_layers=3, mlp_dim=25)
    with pytest.raises(InterchangeError) as error:
        gemma.open_gemma(path, three)
    assert "layer_0/mlp/linear is [24, 16], [25, 16] by the model" in str(error.value)
    with pytest.raises(
        InterchangeError, match=r"layer_1/attn/q_einsum/w \[4, 16, 6\]: there is no such array"
    ):
        gemma.open_gemma(path, dataclasses.replace(ONE, num_layers=1))
    with pytest.raises(InterchangeError, match=r"layer_2/pre_attention_norm/scale \[16\] is missing"):
        gemma.open_gemma(path, dataclasses.replace(ONE, num_layers=3))
    with pytest.raises(InterchangeError, match="no such directory"):
        gemma.open_gemma(tmp_path / "nowhere")
    other = write(tmp_path / "other", {"a": {"b": np.ones(2)}})
    with pytest.raises(
        InterchangeError, match=r"has no transformer/embedder/input_embedding \[V, D\] \(found: a/b\)"
    ):
        gemma.open_gemma(other, ONE)
    embedding = {"input_embedding": np.ones((4, 2))}
    odd = {
        "embedder": embedding,
        "layer_0": {"attn": {"kv_einsum": {"w": np.ones(2)}}, "mlp": {"linear": np.ones(1)}},
    }
    with pytest.raises(
        InterchangeError, match="has 1 layers of D=2, N=0, K=0, H=0, F=0, which no published Gemma"
    ):
        gemma.open_gemma(write(tmp_path / "odd", {"transformer": odd}))
    for shape in ((4,), (4, 2, 2)):
        path = write(tmp_path / f"embedding {len(shape)}", {"embedder": {"input_embedding": np.ones(shape)}})
        with pytest.raises(InterchangeError, match=r"has no transformer/embedder/input_embedding \[V, D\]"):
            gemma.open_gemma(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InterchangeError, match="empty is not a checkpoint that Orbax can read"):
        gemma.open_gemma(tmp_path / "empty")
