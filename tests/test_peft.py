"""Adapters in PEFT's layout: the names, what is refused, and PEFT's own logits where it is installed."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from pasta_jax.config import Config
from pasta_jax.interchange.errors import InterchangeError
from pasta_jax.interchange.origin import read_origin
from pasta_jax.interchange.peft import CONFIG, WEIGHTS, write_adapters
from pasta_jax.model import Lora
from pasta_jax.model.lora import join, merge
from tests.helpers.conversion import run
from tests.helpers.lora_folders import imported, logits_here, peft_or_skip, save, some_tokens


def export(
    folder: pathlib.Path, config: Config, tokenizer: Any, adapters: Any, *, base_step: int = 0
) -> None:
    origin = read_origin(folder / "W")
    write_adapters(folder / "peft", adapters, config, tokenizer, origin, base_step=base_step)


def test_names_and_numbers(tmp_path: pathlib.Path) -> None:
    config, tokenizer, _, adapters = imported("llama", tmp_path)
    export(tmp_path, config, tokenizer, adapters)
    tensors = safetensors.numpy.load_file(tmp_path / "peft" / WEIGHTS)
    q = "base_model.model.model.layers.1.self_attn.q_proj"
    attn = adapters["layer_1"]["attn"]
    np.testing.assert_array_equal(tensors[f"{q}.lora_A.weight"], attn["q_proj_lora_a"].T)
    np.testing.assert_array_equal(tensors[f"{q}.lora_B.weight"], attn["q_proj_lora_b"].reshape(3, -1).T)
    assert len(tensors) == 2 * 7 * config.model.num_layers + 2, "embedding and head have rows of their own"
    about = json.loads((tmp_path / "peft" / CONFIG).read_text())
    assert about["base_model_name_or_path"] == read_origin_source(tmp_path) and about["r"] == 3
    tags = json.loads((tmp_path / "peft" / "pasta_tags.json").read_text())
    assert tags == tokenizer.vocabulary.tag_ids
    assert (tmp_path / "peft" / "tokenizer.model").exists() and not (
        tmp_path / "peft" / "config.json"
    ).exists()


def read_origin_source(folder: pathlib.Path) -> str:
    origin = read_origin(folder / "W")
    assert origin is not None
    return origin.source


def test_the_verb_writes_adapters_or_adds_them(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, tokenizer, base, adapters = imported("gemma", tmp_path)
    save(tmp_path / "L", config, tokenizer, base, adapters)
    assert run(f"--from={tmp_path}/L", f"--to={tmp_path}/peft") == 0
    assert "in PEFT's layout" in capsys.readouterr().out
    export_again = tmp_path / "again"
    write_adapters(export_again, adapters, config, tokenizer, read_origin(tmp_path / "W"), base_step=0)
    for name in (WEIGHTS, CONFIG, "pasta_tags.json"):
        assert (tmp_path / "peft" / name).read_bytes() == (export_again / name).read_bytes()
    assert run(f"--from={tmp_path}/L", f"--to={tmp_path}/whole", "--merge_lora", "--noparity") == 0
    whole = safetensors.numpy.load_file(tmp_path / "whole" / "model-00001-of-00002.safetensors")
    merged = merge(join(base, adapters), config.lora)["embed"]["embedding"]
    np.testing.assert_array_equal(whole["model.embed_tokens.weight"], merged)
    assert run(f"--from={tmp_path}/L", f"--to={tmp_path}/x", "--name_tags") == 2
    assert "--name_tags is for whole models" in capsys.readouterr().err


def test_what_is_no_published_base(tmp_path: pathlib.Path) -> None:
    config, tokenizer, _, adapters = imported("gemma", tmp_path)
    with pytest.raises(InterchangeError, match="was itself trained for 7 steps.*Add --merge_lora"):
        export(tmp_path, config, tokenizer, adapters, base_step=7)
    larger = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=400))
    with pytest.raises(InterchangeError, match="400 embedding rows here and 384 as published.*--merge_lora"):
        export(tmp_path, larger, tokenizer, adapters)
    with pytest.raises(InterchangeError, match="the base of these was not imported"):
        write_adapters(tmp_path / "peft", adapters, config, tokenizer, None, base_step=0)
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize("family", ["gemma", "llama", "qwen2"])
def test_peft_loads_them_and_says_the_same(family: str, tmp_path: pathlib.Path) -> None:
    torch, transformers, peft = peft_or_skip()
    config, tokenizer, base, adapters = imported(family, tmp_path)
    export(tmp_path, config, tokenizer, adapters)
    tokens = some_tokens(config.model, config.lora.rows)
    base_model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base_model, str(tmp_path / "peft")).eval()
    with torch.no_grad():
        expected = adapted(torch.tensor(tokens)).logits.numpy()
        merged = adapted.merge_and_unload()(torch.tensor(tokens)).logits.numpy()
    logits_of_adapters = logits_here(config.model, config.lora, join(base, adapters), tokens)
    plain = logits_here(config.model, Lora(), base, tokens)
    assert np.abs(logits_of_adapters - plain).max() > 0.1, "the adapters do something"
    np.testing.assert_allclose(logits_of_adapters, expected, atol=1e-4)
    np.testing.assert_allclose(logits_of_adapters, merged, atol=1e-4)
