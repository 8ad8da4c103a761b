"""Against transformers itself, where it is installed: in, out, after training, with a larger vocabulary."""

import dataclasses
import importlib.machinery
import pathlib
import sys
import types
from typing import Any

import jax
import numpy as np
import pytest

from pasta_jax.checkpoints.load import load_params
from pasta_jax.interchange import parity
from pasta_jax.interchange.parity import parity_line
from pasta_jax.model import init_params
from pasta_jax.model.forms import quantize
from tests.helpers.conversion import bring_in, bring_out, load_tokenizer_rows, trained
from tests.helpers.hf_folders import CONFIGS, small_tokenizer, write_hf_folder

pytestmark = pytest.mark.slow


def difference(line: str) -> float:
    assert line.startswith("Parity with transformers "), line
    assert line.endswith("; 16 of 16 greedy tokens agree."), line
    return float(line.split("difference ")[1].split()[0])


@pytest.mark.parametrize("family", CONFIGS)
def test_in_and_out(family: str, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    write_hf_folder(tmp_path / "hf", CONFIGS[family], dtype=np.float32)
    _, params = bring_in(tmp_path / "hf", tmp_path / "W")
    assert difference(parity_line(params, CONFIGS[family], tmp_path / "hf")) < 1e-4
    trained(tmp_path / "W", tmp_path / "T")
    params, about = load_params(tmp_path / "T")
    bring_out(tmp_path / "T", tmp_path / "out")
    assert difference(parity_line(params, about.config.model, tmp_path / "out")) < 1e-4


def test_a_wrong_model_shows(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    write_hf_folder(tmp_path / "hf", CONFIGS["qwen2"], dtype=np.float32)
    _, params = bring_in(tmp_path / "hf", tmp_path / "W")
    params["layer_1"]["attn"]["q_proj_bias"] += 1.0
    line = parity_line(params, CONFIGS["qwen2"], tmp_path / "hf")
    assert float(line.split("difference ")[1].split()[0]) > 1e-3


def test_with_new_rows_and_without_an_origin(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    tokenizer = small_tokenizer(free_ids=0)
    config = dataclasses.replace(CONFIGS["llama"], vocab_size=load_tokenizer_rows(tokenizer, tmp_path))
    write_hf_folder(tmp_path / "hf", config, tokenizer=tokenizer, dtype=np.float32)
    ready, params = bring_in(tmp_path / "hf", tmp_path / "W", extend_tokenizer=True)
    assert (
        difference(parity_line(params, ready.config, tmp_path / "hf")) < 1e-4
    )  # over the smaller vocabulary
    bring_out(tmp_path / "W", tmp_path / "out", name_tags=True)
    assert difference(parity_line(params, ready.config, tmp_path / "out")) < 1e-4
    (tmp_path / "W" / "origin" / "origin.json").unlink()
    bring_out(tmp_path / "W", tmp_path / "new", shard_bytes=20_000)
    assert difference(parity_line(params, ready.config, tmp_path / "new")) < 1e-4


def params_of(family: str) -> Any:
    return init_params(CONFIGS[family], jax.random.key(0))


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A transformers and a torch that are there, and can do nothing."""
    for name in ("torch", "transformers"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    return sys.modules["transformers"]


def test_what_stands_in_the_way_is_said(
    pretended: types.ModuleType, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, config = params_of("gemma"), CONFIGS["gemma"]
    assert parity_line(params, config, tmp_path).startswith("Parity not measured: AttributeError: ")
    assert (
        parity_line(quantize(params), config, tmp_path)
        == "Parity not measured: int8 weights are not the folder's."
    )
    monkeypatch.setattr(parity, "host_memory", lambda: 100)
    line = parity_line(params, config, tmp_path)
    assert (
        line.startswith("Parity not measured: ")
        and "a second copy of 13,168 parameters, in float32, needs" in line
    )


@pytest.mark.parametrize("name", ["torch", "transformers"])
def test_not_installed(pretended: types.ModuleType, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: None if asked == name else find(asked))
    line = parity_line(params_of("gemma"), CONFIGS["gemma"], "nowhere")
    assert line == f"Parity not measured: {name} is not installed."
