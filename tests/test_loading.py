"""pasta_jax.load: published weights from wherever they are, onto a mesh, in a dtype, in int8."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import numpy as np
import pytest

import pasta_jax
from pasta_jax.checkpoints.about import CheckpointError
from pasta_jax.interchange import hub
from pasta_jax.interchange.errors import InterchangeError
from pasta_jax.model.presets import presets
from pasta_jax.sharding import make_mesh
from pasta_jax.tokens.tokenizer import TokenizerError
from tests.helpers.hf_folders import CONFIGS, write_hf_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("hf") / "gemma2"
    write_hf_folder(path, CONFIGS["gemma2"])
    return path


def same(one: Any, other: Any) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_folder_is_known_with_and_without_its_scheme(folder: pathlib.Path) -> None:
    model = pasta_jax.load(folder)
    assert model.config.num_layers == 3 and model.config.dtype == "bfloat16"
    same(pasta_jax.load(f"hf:{folder}").params, model.params)
    wide = pasta_jax.load(folder, dtype="float32")
    assert wide.config.dtype == "float32"
    same(jax.tree.map(lambda x: x.astype("bfloat16"), wide.params), model.params)


def test_names_of_the_hub_and_of_published_models(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def download(name: str, **_: Any) -> str:
        asked.append(name)
        return str(folder)

    monkeypatch.setattr(hub, "download", download)
    for source in ("hf:somebody/something", "gemma-2-2b-it", "Gemma-2-2B-it"):
        same(pasta_jax.load(source).params, pasta_jax.load(folder).params)
    assert asked == ["somebody/something", "google/gemma-2-2b-it", "google/gemma-2-2b-it"]
    assert all(hub.NAME.fullmatch(preset.hub) for preset in presets().values())


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_onto_a_mesh(folder: pathlib.Path, quantize: str | None) -> None:
    """What decodes there without a word more is in test_quantize."""
    here = pasta_jax.load(folder, dtype="float32", quantize=quantize)
    spread = pasta_jax.load(folder, dtype="float32", quantize=quantize, mesh=make_mesh(2, 2, 2))
    same(spread.params, here.params)
    embedding = spread.params["embed"]["embedding"]
    held = embedding.values if quantize else embedding
    assert len(held.sharding.device_set) == 8 and held.dtype == ("int8" if quantize else "float32")
    assert spread.mesh == make_mesh(2, 2, 2) and here.mesh is None


def test_refusals(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    for source, message in (
        ("gemma-2b-pasta", "No checkpoint at .*gemma-2b-pasta: no such directory.*hf:org/name"),
        ("runs/gemma-2b", "No checkpoint at .*runs/gemma-2b: no such directory.*hf:org/name"),
        (
            "runs/demo/nothing",
            "No checkpoint at .*runs/demo/nothing: no such directory. Run `make demo` first",
        ),
        ("google/gemma-2b", "import published weights: python -m .* --from=hf:google/gemma-2b --to=WORKDIR"),
    ):
        with pytest.raises(CheckpointError, match=message):
            pasta_jax.load(source)
    with pytest.raises(
        InterchangeError, match="hf:nowhere: there is no folder nowhere, and names on the hub are"
    ):
        pasta_jax.load("hf:nowhere")
    with pytest.raises(ValueError, match="source=7 is neither a path nor"):
        pasta_jax.load(7)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="quantize='int4' is unknown. Use int8"):
        pasta_jax.load(folder, quantize="int4")
    with pytest.raises(ValueError, match="dtype='float64' is unknown. Use float32 or bfloat16"):
        pasta_jax.load(folder, dtype="float64")
    with pytest.raises(ValueError, match="is for adapters"):
        pasta_jax.load(folder, base="elsewhere")
    with pytest.raises(TokenizerError, match="Cannot read .*none.model: No such file"):
        pasta_jax.load(folder, tokenizer=tmp_path / "none.model")
