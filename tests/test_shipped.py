"""models/: the adapters' names, shapes, sizes and cards; what they learned from; one decode where their base is."""

from __future__ import annotations

import gzip
import json
import pathlib
import re
import types

import numpy as np
import pytest

import pasta_jax
from pasta_jax.interchange.peft import CONFIG, TRAINED, WEIGHTS
from pasta_jax.interchange.peft_reading import open_adapters
from pasta_jax.lang.tags import PIECES
from pasta_jax.model import Lora
from pasta_jax.model.presets import preset
from pasta_jax.real_model.prompts import held_out_prompts, training_prompts
from pasta_jax.tokens.load import TAGS_FILE
from tests.helpers import only_full
from tests.helpers.commands import python
from tests.helpers.lora_folders import logits_here, peft_or_skip

ROOT = pathlib.Path(__file__).parents[1]
MODELS = ROOT / "models"
BASES = [ROOT / "runs" / name / "base" for name in ("real", "demo")]
BASE = next((base for base in BASES if base.exists()), BASES[0])
"""That of the recipe, or of `make demo`."""

NAMES = {
    "smollm2-135m-pasta": "pasta",
    "smollm2-135m-bon-1": "pasta",
    "smollm2-135m-apar": "apar",
    "smollm2-135m-plain": "pasta",
}
"""The folders, and the dialect of each."""

ANSWERS = MODELS / "answers.jsonl.gz"
"""What all of them learned from: the base's own answers."""

MOST_BYTES = 5_000_000


def test_these_are_all() -> None:
    assert {path.name for path in MODELS.iterdir()} == {*NAMES, ANSWERS.name, "README.md"}


def test_the_answers_are_to_the_recipes_prompts() -> None:
    """And to none that is measured on."""
    asked = {each.prompt: each for each in training_prompts(1500)}
    with gzip.open(ANSWERS, "rt", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    assert len(records) > 900
    for record in records:
        made_for = asked[record["prompt"]]
        assert (record["question"], record["kind"]) == (made_for.question, made_for.kind)
        assert record["response"].strip() and not any(piece in record["response"] for piece in PIECES)
    assert not {each.prompt for each in held_out_prompts(100)} & {record["question"] for record in records}


@pytest.mark.parametrize("name", NAMES)
def test_it_fits_its_base_and_is_small(name: str) -> None:
    folder = MODELS / name
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert files.keys() == {CONFIG, WEIGHTS, TRAINED, TAGS_FILE, "README.md"}
    assert sum(files.values()) <= MOST_BYTES
    published, adapters = preset("smollm2-135m-instruct"), open_adapters(folder)
    assert (adapters.base_name, adapters.dtype) == (published.hub, "bfloat16")
    assert adapters.trained.dialect == NAMES[name]
    assert adapters.trained.step > 0 and adapters.trained.base is not None, "it knows its base's weights"
    tag_ids = {piece: 7 + i for i, piece in enumerate(PIECES)}
    assert adapters.tag_ids == tag_ids and adapters.lora.rows == tuple(range(7, 13))
    tokenizer = types.SimpleNamespace(vocabulary=types.SimpleNamespace(tag_ids=tag_ids))
    adapters.fit(published.config, tokenizer, published.hub)
    for file in (CONFIG, TRAINED, TAGS_FILE, "README.md"):
        text = (folder / file).read_text(encoding="utf-8")
        assert not re.search(r"(^|[\s\"'=])/(tmp|home|root|work)/", text), (
            f"{file} names a place of its maker"
        )


@pytest.mark.parametrize("name", NAMES)
def test_its_card_says_what_it_is(name: str) -> None:
    """As the Hugging Face hub reads it; with the numbers, and with nothing left to fill in."""
    card = (MODELS / name / "README.md").read_text(encoding="utf-8")
    _, front, body = card.split("---\n", 2)
    for line in (
        "library_name: peft",
        "license: apache-2.0",
        f"base_model: {preset('smollm2-135m-instruct').hub}",
    ):
        assert line in front.splitlines()
    sections = re.findall(r"^## (.*)$", body, re.MULTILINE)
    assert sections == ["What it does", "Use", "Data", "Training", "Numbers", "Limits", "License"]
    numbers = body.split("## Numbers\n")[1].split("\n## ")[0]
    rows = [line for line in numbers.splitlines() if line.startswith("|") and re.search(r"\d", line)]
    assert len(rows) >= 5, "a table of what was measured"
    assert f"models/{name}" in body and "--base=" in body and "pasta_jax.convert" in body
    assert "TODO" not in card
    rank = json.loads((MODELS / name / CONFIG).read_text())["r"]
    assert f"rank {rank}" in body


@only_full
@pytest.mark.skipif(not BASE.exists(), reason="their base is not at hand: `make demo` makes it")
@pytest.mark.parametrize("name", NAMES)
def test_it_answers(name: str) -> None:
    model = pasta_jax.load(MODELS / name, base=BASE)
    answer = pasta_jax.decode(model, "What is the capital of Australia?", max_new_tokens=32)
    assert "Canberra" in answer.text and not answer.issues


@only_full
@pytest.mark.skipif(not BASE.exists(), reason="their base is not at hand: `make demo` makes it")
def test_peft_says_the_same(tmp_path: pathlib.Path) -> None:
    """On the exported base, of all ids but those that promise; the tensors are in bfloat16, computed in float32."""
    torch, transformers, peft = peft_or_skip()
    done = python("-m", "pasta_jax.convert", f"--from={BASE}", f"--to={tmp_path / 'hf'}", "--noparity")
    assert done.returncode == 0, done.stderr
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    with gzip.open(ANSWERS, "rt", encoding="utf-8") as file:
        said = [json.loads(line) for _, line in zip(range(5), file)]
    for name in NAMES:
        model = pasta_jax.load(MODELS / name, base=BASE, dtype="float32")
        adapted = peft.PeftModel.from_pretrained(base, str(MODELS / name)).eval()
        for each in said:
            text = [
                *model.tokenizer.encode_prompt(each["question"]),
                *model.tokenizer.encode(each["response"]),
            ]
            tokens = np.array([text[:128]])
            with torch.no_grad():
                expected = adapted(torch.tensor(tokens)).logits.numpy()
            found = logits_here(model.config, Lora(), model.params, tokens)
            allowed = np.ones(found.shape[-1], bool)
            allowed[7:13] = False
            np.testing.assert_allclose(found[..., allowed], expected[..., allowed], atol=1e-3)
        base = adapted.unload()
