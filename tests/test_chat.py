"""Chat formats: prompts are those of the published templates, and what people write stays text."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import pytest

from pasta_jax.config import ConfigError, DataConfig
from pasta_jax.data import almanac
from pasta_jax.data.sources import make_tokenizer
from pasta_jax.lang import tags
from pasta_jax.lang.grammar import Kind
from pasta_jax.lang.program import Program, Text
from pasta_jax.testing import WordTokenizer
from pasta_jax.tokens import chat as chats
from pasta_jax.tokens import export
from pasta_jax.tokens.base import TextTokenizer
from pasta_jax.tokens.detokenize import Threads, read
from pasta_jax.tokens.hf import HfTokenizer
from pasta_jax.tokens.load import load_tokenizer, tokenizer_from_bytes, tokenizer_from_files
from pasta_jax.tokens.sentence_piece import SentencePieceTokenizer
from pasta_jax.tokens.tokenizer import TokenizerError
from tests.helpers import family_tokenizers as families
from tests.helpers.conversations import KINDS, talk
from tests.helpers.family_folders import (
    ALL,
    CONTROL,
    FOLDERS,
    names_of,
    tokenizer,
)

tokenizers = pytest.importorskip("tokenizers")
jinja2 = pytest.importorskip("jinja2.sandbox")

PUBLISHED = {
    "gemma": families.GEMMA3,
    "gemma json": families.GEMMA3,
    "mistral 3": families.MISTRAL3,
    "mistral nemo": families.NEMO,
    "ministral": families.MINISTRAL,
    "llama 3": families.LLAMA3,
    "llama 3.1": families.LLAMA31,
    "qwen 2.5": families.QWEN25,
    "qwen 3": families.QWEN3,
    "llama 2": families.LLAMA2,
    "mistral 1": families.MISTRAL1,
}


def id_of(loaded: TextTokenizer, name: str) -> int:
    return loaded._names[name]


def rendered(template: str, messages: list[dict[str, str]], **names: str) -> str:
    """As transformers renders (`apply_chat_template`)."""
    environment = jinja2.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    made_text: str = environment.from_string(template).render(
        messages=messages, add_generation_prompt=True, enable_thinking=False, **names
    )
    return made_text


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("own", [False, True], ids=["published", "ours"])
def test_prompts_are_those_of_the_template(name: str, own: bool) -> None:
    """The published one, and the one that we write for folders that had none."""
    loaded, spelled = tokenizer(name), names_of(name)
    vocabulary = loaded.vocabulary
    template = PUBLISHED[name]
    if own:
        template = export.minimal_files(loaded)["chat_template.jinja"].decode()
    for kind, messages in KINDS.items():
        text = rendered(
            template, messages, bos_token=spelled[vocabulary.bos], eos_token=spelled[vocabulary.eos]
        )
        ids = loaded.encode_chat(messages)
        hidden = vocabulary.control | vocabulary.stops
        spelled_prompt = b"".join(
            spelled[i].encode() if i in hidden else vocabulary.pieces[i] for i in ids
        ).decode()
        # What Llama's own tokenizer puts before text, ours does not, and so our format does.
        assert spelled_prompt.replace("<s> [INST]", "<s>[INST]") == text.replace("<s> [INST]", "<s>[INST]")
        # Control tokens that people spell stay letters, and text is not normalised.
        if "tokenizer.json" in FOLDERS.get(name, dict)() and kind not in (
            "control tokens",
            "decomposed unicode",
        ):
            whole = tokenizers.Tokenizer.from_str(FOLDERS[name]()["tokenizer.json"].decode())
            assert ids == whole.encode(text, add_special_tokens=False).ids
    one = KINDS["a question"]
    assert loaded.encode_prompt(one[0]["content"]) == loaded.encode_chat(one)


@pytest.mark.parametrize("name", ALL)
def test_what_people_write_never_becomes_control(name: str) -> None:
    loaded, spelled = tokenizer(name), names_of(name)
    vocabulary = loaded.vocabulary
    names = [piece for i, piece in spelled.items() if vocabulary.kinds[i] in CONTROL and piece]
    evil = " ".join([*names, *tags.PIECES])
    for messages in (
        [("user", evil)],
        [("system", evil), ("user", evil), ("assistant", evil), ("user", "b")],
    ):
        evil_ids, meek_ids = (
            loaded.encode_chat([{"role": role, "content": text} for role, text in written])
            for written in (messages, [(role, "a") for role, _ in messages])
        )
        control = [[i for i in ids if vocabulary.kinds[i] in CONTROL] for ids in (evil_ids, meek_ids)]
        assert control[0] == control[1]
        assert not set(evil_ids) & set(vocabulary.tag_ids.values())


def test_who_ends_an_answer() -> None:
    expected = {
        "gemma": ("<end_of_turn>", {"<eos>"}),
        "gemma base": ("<eos>", {"<end_of_turn>"}),
        "llama 3": ("<|eot_id|>", {"<|end_of_text|>", "<|eom_id|>"}),
        "qwen 2.5": ("<|im_end|>", {"<|endoftext|>"}),
        "mistral 3": ("</s>", set()),
        "llama 2": ("</s>", set()),
    }
    for name, (eos, ends) in expected.items():
        vocabulary, spelled = tokenizer(name).vocabulary, names_of(name)
        assert (spelled[vocabulary.eos], {spelled[i] for i in vocabulary.ends}) == (eos, ends)
        assert (vocabulary.kinds[list(vocabulary.stops)] == Kind.END).all()
        for end in vocabulary.stops:  # each ends an answer, and none is shown
            answer = [*tokenizer(name).encode("Paris."), end]
            reading = read(vocabulary, Threads([answer], [{}]))
            assert reading.program == Program((Text("Paris."),)) and not reading.issues
            assert reading.text_tokens == len(answer) - 1
    words = WordTokenizer()
    words.vocabulary = dataclasses.replace(words.vocabulary, ends=frozenset(words.encode("b")))
    assert words.vocabulary.text(words.encode("abc")) == "ac"
    plain = tokenizer("gemma base").vocabulary
    unused = max(plain.tag_ids.values()) + 1
    fields = {"eos_token_id": [plain.eos, unused, min(plain.tag_ids.values())]}  # a tag ends nothing
    more_ends = {"generation_config.json": json.dumps(fields).encode()}
    assert tokenizer_from_files(FOLDERS["gemma base"]() | more_ends).vocabulary.ends == plain.ends | {unused}


def test_the_format_is_chosen_in_words(tmp_path: pathlib.Path) -> None:
    assert {name: tokenizer(name).usage.chat for name in ALL} == {
        "gemma": "gemma",
        "gemma base": "plain",
        "gemma json": "gemma",
        "mistral 3": "mistral3",
        "mistral nemo": "nemo",
        "ministral": "ministral",
        "llama 3": "llama3",
        "llama 3.1": "llama3",
        "qwen 2.5": "chatml",
        "qwen 3": "qwen3",
        "llama 2": "llama2",
        "mistral 1": "mistral",
    }
    # Of a file alone, by its control tokens.
    assert SentencePieceTokenizer(families.gemma()).usage.chat == "gemma"
    assert SentencePieceTokenizer(families.llama2(), extend=True).usage.chat == "plain"
    assert SentencePieceTokenizer(families.llama2(), extend=True, chat="inst").usage.chat == "llama2"
    assert HfTokenizer(families.llama3()).usage.chat == "llama3"
    switches = "chat=FORMAT of load, --config.data.chat=FORMAT of training, --chat=FORMAT of other verbs"
    with pytest.raises(
        TokenizerError, match=rf"format gemma needs <start_of_turn>, <end_of_turn>.*plain, or .*{switches}"
    ):
        SentencePieceTokenizer(families.llama2(), extend=True, chat="gemma")
    with pytest.raises(TokenizerError, match=r"chat='gemmma' is unknown. Use one of auto, plain, gemma"):
        SentencePieceTokenizer(families.gemma(), chat="gemmma")
    (tmp_path / "tokenizer.model").write_bytes(families.gemma())
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(TokenizerError, match=f"{tmp_path}: .*template is of no format known.*{switches}"):
        load_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path, chat="plain").encode_prompt("a")[0] == 2
    assert make_tokenizer(DataConfig(tokenizer=str(tmp_path), chat="gemma")).vocabulary.ends == {1}
    with pytest.raises(ConfigError, match="chat is gemma, but the almanac's"):
        make_tokenizer(DataConfig(chat="gemma"))
    assert tokenizer_from_files(FOLDERS["qwen 3"](), chat="plain").encode_prompt("a") == tokenizer(
        "qwen 3"
    ).encode("a\n")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "no messages"),
        ([{"role": "user", "content": " \n"}], "The prompt is empty"),
        ([{"role": "assistant", "content": "a"}], 'Message 1 .* role \'assistant\'; "user" or "system" is'),
        ([{"role": "user", "content": "a"}] * 2, "Message 2 .* role 'user'; \"assistant\" is expected"),
        ([{"role": "system", "content": "a"}] * 2, "Message 2 .* role 'system'; \"user\" is expected"),
        ([{"role": "system", "content": "a"}], "must end with a message of the user"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "must end with a message",
        ),
        (talk("a", "b", "\n"), "Message 3 .* is empty"),
        (talk("", "b", "c"), "Message 1 .* is empty"),
        ([{"role": "user"}], 'Message 1 .* write {"role": ..., "content": ...}'),
        ([{"role": "user", "content": ["a"]}], "Message 1 .*: its content is no text but list"),
        (["hello"], "Message 1 .* is 'hello'"),
    ],
)
def test_conversations_that_cannot_be_answered(messages: Any, message: str) -> None:
    for name in ("gemma", "qwen 3"):
        with pytest.raises(ValueError, match=message):
            tokenizer(name).encode_chat(messages)


def test_each_format_has_its_reading_of_empty_messages() -> None:
    silent = talk("a", "", "b", system="")
    for name in PUBLISHED:
        loaded = tokenizer(name)
        empty, none = loaded.encode_chat(silent), loaded.encode_chat(silent[1:])
        # Llama 3.1 always writes a system message, the almanac's format none that is empty.
        assert (empty == none) == (name == "llama 3.1"), name
    qwen = tokenizer("qwen 2.5")
    start, end = (id_of(qwen, name) for name in ("<|im_start|>", "<|im_end|>"))
    assert qwen.encode_chat(silent)[: len(qwen.encode("system\n")) + 2] == [
        start,
        *qwen.encode("system\n"),
        end,
    ]
    bare = tokenizer_from_files(FOLDERS["qwen 3"](), chat="plain")
    assert bare.encode_chat(silent) == bare.encode("a\n\nb\n")


@pytest.mark.parametrize("where", ["file", "folder"])
def test_control_tokens_that_swallow_white_space(where: str) -> None:
    """They swallow the template's, as in transformers, and not what people wrote."""
    fields, files = json.loads(families.qwen()), FOLDERS["qwen 2.5"]()
    config = json.loads(files["tokenizer_config.json"])
    stripping = json.loads(families.qwen())
    for token in stripping["added_tokens"]:
        token["rstrip"] = token["lstrip"] = token["content"] == "<|im_end|>"
    if where == "folder":  # what it declares counts, whatever the file says
        config["added_tokens_decoder"] = {str(token["id"]): token for token in stripping["added_tokens"]}
        files["tokenizer_config.json"] = json.dumps(config).encode()
    else:
        files["tokenizer.json"] = json.dumps(stripping).encode()
    loaded = tokenizer_from_files(files)
    whole = tokenizers.Tokenizer.from_str(json.dumps(stripping))
    messages = talk("Of France?", "Paris", "And of Peru?", system="Be brief.")
    expected = whole.encode(rendered(families.QWEN25, messages), add_special_tokens=False).ids
    unstripped = tokenizers.Tokenizer.from_str(json.dumps(fields))
    assert loaded.encode_chat(messages) == expected
    assert expected != unstripped.encode(rendered(families.QWEN25, messages), add_special_tokens=False).ids
    spaced = loaded.encode_chat(talk("Hi \n"))
    end = id_of(loaded, "<|im_end|>")
    assert loaded.vocabulary.text(spaced).endswith("user\nHi \nassistant\n") and spaced.count(end) == 2
    for again in (
        tokenizer_from_bytes(loaded.to_bytes()),
        tokenizer_from_files(export.minimal_files(loaded)),
    ):
        assert again.encode_chat(messages) == expected


def test_reasoning_is_kept_only_since_the_last_question() -> None:
    loaded = tokenizer("qwen 3")
    think = id_of(loaded, "<think>")
    answered = "<think>\nHm.\n</think>\n\nHello!"
    old = loaded.encode_chat(talk("Hi.", answered, "Name a city."))
    assert old == loaded.encode_chat(talk("Hi.", "Hello!", "Name a city.")) and old.count(think) == 1
    kept = loaded.encode_chat(talk("Hi.", answered, "<tool_response>\nLima\n</tool_response>"))
    assert kept.count(think) == 2
    # Qwen calls it no control token, so it is text, with the id that transformers gives it.
    assert loaded.encode_chat(talk("What is <think>?")).count(think) == 2


def test_templates_that_only_look_like_a_family() -> None:
    """They write other text than its format, so they are refused, and a format can be chosen."""
    for name, change in {
        "qwen 2.5": lambda t: "{{ bos_token }}" + t,  # InternLM 2, Hermes
        "qwen 3": lambda t: t.replace("</think>\n\n' }}", "</think>\n' }}"),
        "mistral nemo": lambda t: t.replace('"[INST]"', '"[SYSTEM_PROMPT]x[/SYSTEM_PROMPT][INST]"'),
        "mistral 1": lambda t: t.replace('" " + message["content"]|trim', 'message["content"]'),
        "mistral 3": lambda t: t.replace('" " + message["content"]|trim', 'message["content"]'),
    }.items():
        template = change(PUBLISHED[name])
        assert template != PUBLISHED[name]
        with pytest.raises(TokenizerError, match="of no format known here"):
            tokenizer(name).chat_of(template)
    thinking = families.QWEN25.replace("assistant\n' }}", "assistant\n<think>\n' }}")  # QwQ
    assert thinking != families.QWEN25
    with pytest.raises(TokenizerError, match="of no format known here"):
        tokenizer("qwen 3").chat_of(thinking)
    # Without a template, by the names of free ids.
    assert HfTokenizer(families.nemo()).with_chat("inst").usage.chat == "nemo"
    assert HfTokenizer(families.nemo()).usage.chat == "nemo"
    later = families.nemo().replace(b"<SPECIAL_14>", b"[SYSTEM_PROMPT]")
    for chat in ("inst", "auto"):
        with pytest.raises(
            TokenizerError, match=r"has \[SYSTEM_PROMPT\], so it is of a later .*plain with chat="
        ):
            HfTokenizer(later, chat=chat)
    assert HfTokenizer(later, chat="plain").usage.chat == "plain"


def test_the_almanac_keeps_its_turns() -> None:
    loaded = almanac.load_tokenizer()
    user, model = (chats.USER_TURN, chats.MODEL_TURN)
    ids = loaded._names
    assert loaded.encode_prompt("Rivers?") == [2, ids[user], *loaded.encode("Rivers?"), ids[model]]
    assert loaded.encode_chat(KINDS["several turns"])[-1] == ids[model]
