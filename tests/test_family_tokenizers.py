"""Tokenizers of the published families: text comes back and stays text, tags have ids, prompts their format."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import random
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pasta_jax.checkpoints.about import About, CheckpointError
from pasta_jax.config import CheckpointConfig, Config, ConfigError, DataConfig
from pasta_jax.data import almanac
from pasta_jax.data.sources import make_tokenizer
from pasta_jax.lang import tags
from pasta_jax.lang.grammar import Kind
from pasta_jax.lang.program import Program, Promise, Sync, Text
from pasta_jax.testing import WordTokenizer, random_program, random_text
from pasta_jax.tokens import chat as chats
from pasta_jax.tokens import export, load
from pasta_jax.tokens.base import TextTokenizer
from pasta_jax.tokens.detokenize import Threads, read, threads_of
from pasta_jax.tokens.hf import HfTokenizer
from pasta_jax.tokens.layout import layout
from pasta_jax.tokens.load import load_tokenizer, tokenizer_from_bytes, tokenizer_from_files
from pasta_jax.tokens.positions import Positions
from pasta_jax.tokens.sentence_piece import SentencePieceTokenizer
from pasta_jax.tokens.tokenizer import TokenizerError
from tests.helpers import family_tokenizers as made

tokenizers = pytest.importorskip("tokenizers")
jinja2 = pytest.importorskip("jinja2.sandbox")

DATA = pathlib.Path(__file__).parent.parent.parent / "shared" / "data"
ROOM = 8
CONTROL = frozenset({Kind.CONTROL, Kind.END, Kind.OPEN, Kind.TOKENS, Kind.CLOSE, Kind.ASYNC_OPEN, Kind.SYNC})


def rows(tokenizer_json: bytes) -> int:
    """Rows of an embedding with room for the tags."""
    told = json.loads(tokenizer_json)
    return max(token["id"] for token in told["added_tokens"]) + 1 + ROOM


@functools.cache
def gemma_json() -> bytes:
    """Gemma's tokenizer.json, as made from its SentencePiece model; it does not call the markers special."""
    told = export._from_sentencepiece(made.gemma(), {})
    for token in told["added_tokens"]:
        token["special"] &= not token["content"].startswith("<unused")
    return json.dumps(told).encode()


FOLDERS: dict[str, Callable[[], dict[str, bytes]]] = {
    "gemma": lambda: {"tokenizer.model": made.gemma(), **made.folder(made.GEMMA3, eos_token="<eos>")},
    "gemma base": lambda: {"tokenizer.model": made.gemma(), **made.folder()},
    "gemma json": lambda: {
        "tokenizer.json": gemma_json(),
        **made.folder(made.GEMMA3, bos_token="<bos>", eos_token="<eos>"),
    },
    "mistral 3": lambda: {"tokenizer.model": made.mistral3(), **made.folder(made.MISTRAL3)},
    "llama 3": lambda: {"tokenizer.json": made.llama3(), **made.folder(made.LLAMA3, eos_token="<|eot_id|>")},
    "llama 3.1": lambda: {
        "tokenizer.json": made.llama3(),
        **made.folder(made.LLAMA31, eos_token="<|eot_id|>"),
    },
    "qwen 2.5": lambda: {
        "tokenizer.json": made.qwen(),
        **made.folder(made.QWEN25, rows=rows(made.qwen()), eos_token="<|im_end|>", bos_token=None),
    },
    "qwen 3": lambda: {
        "tokenizer.json": made.qwen(),
        **made.folder(made.QWEN3, rows=rows(made.qwen()), eos_token="<|im_end|>", bos_token=None),
    },
}
EXTENDED: dict[str, Callable[[], dict[str, bytes]]] = {
    "llama 2": lambda: {"tokenizer.model": made.llama2(), **made.folder(made.LLAMA2)},
    "mistral 1": lambda: {"tokenizer.model": made.llama2(), **made.folder(made.MISTRAL1)},
}
ALL = (*FOLDERS, *EXTENDED)


@functools.cache
def tokenizer(name: str) -> TextTokenizer:
    if name in EXTENDED:
        return tokenizer_from_files(EXTENDED[name](), extend=True)
    return tokenizer_from_files(FOLDERS[name]())


def names_of(name: str) -> dict[int, str]:
    """How each control id is spelled."""
    files = (FOLDERS | EXTENDED)[name]()
    if "tokenizer.json" in files:
        return {i: piece for piece, i in export._names(json.loads(files["tokenizer.json"])).items()}
    sp = made.sentencepiece.SentencePieceProcessor(model_proto=files["tokenizer.model"])
    return {i: sp.IdToPiece(i) for i in range(sp.GetPieceSize())}


# ------------------------------------------------------------------------------------------------ text and tags


@pytest.mark.parametrize("name", ALL)
def test_tags_take_ids_that_nothing_uses(name: str) -> None:
    found, spelled = tokenizer(name), names_of(name)
    ids = [found.vocabulary.tag_ids[piece] for piece in tags.PIECES]
    now = [spelled.get(i, "") for i in ids]
    if name.startswith("gemma"):
        assert now == [f"<unused{n}>" for n in range(6)]
    elif name == "mistral 3":
        assert now == [f"[control_{n}]" for n in range(14, 20)]
    elif name.startswith("llama 3"):
        assert now == [f"<|reserved_special_token_{n}|>" for n in range(6, 12)]
    else:  # past the end: in rows of the embedding that are there (Qwen), or that will be
        assert ids == [*range(len(spelled), len(spelled) + 6)]
    assert [found.vocabulary.pieces[i] for i in ids] == [piece.encode() for piece in tags.PIECES]
    kinds = [Kind(k) for k in found.vocabulary.kinds[ids]]
    assert kinds == [Kind.OPEN, Kind.TOKENS, Kind.CLOSE, Kind.ASYNC_OPEN, Kind.ASYNC_CLOSE, Kind.SYNC]


@pytest.mark.parametrize("name", ALL)
def test_text_comes_back_and_stays_text(name: str, seed: int) -> None:
    """Whatever it spells: tags, every control token of the vocabulary, what tokenizers treat as markup."""
    found, rng = tokenizer(name), random.Random(seed)
    vocabulary = found.vocabulary
    spelled = [piece for i, piece in names_of(name).items() if vocabulary.kinds[i] in CONTROL and piece]
    assert len(spelled) >= (3 if name in EXTENDED else 5)
    texts = [
        *spelled,
        "".join(spelled),
        "<<unused0>unused0> <|<|im_end|>im_end|>",
        " ".join(made.QWEN_TEXT) + "<table>\n\n\n",
        "".join(tags.PIECES),
        *(
            " ",
            "",
            "  two",
            "\n",
            "\r\n\n",
            "é e\u0301 Å \u212b ﬁ",
            "\u2581a \u2581\u2581",
            "\x00\x02",
            "🌍\u200d東京",
        ),
        *("0123456789", " 42", "1803 and 100000000"),
        *(random_text(rng) for _ in range(100)),
        *("".join(rng.choices([*spelled, "a", " ", "<", "|>", "\u2581"], k=6)) for _ in range(100)),
    ]
    for text in texts:
        ids = found.encode(text)
        assert vocabulary.text(ids) == text
        assert not {Kind(k) for k in vocabulary.kinds[ids]} & CONTROL, text


@pytest.mark.parametrize("name", ALL)
def test_programs_come_back(name: str, seed: int) -> None:
    """Each tag piece is one id, the number of a promise digit by digit."""
    found, rng = tokenizer(name), random.Random(seed)
    programs = [
        Program((Promise("rivers", 42, (Text(" The Nile 1803."),)), Text(" 7"), Sync(), Text("\nEnd")))
    ]
    for _ in range(60):
        program = random_program(rng, max_depth=2)
        topics = [len(found.encode(f" {promise.topic}")) for promise in program.promises()]
        programs += [program] if max(topics, default=1) <= tags.MAX_TOPIC_TOKENS else []
    assert len(programs) > 5
    for program in programs:
        document = layout(found, [found.vocabulary.bos], program, Positions(), threads=16)
        reading = read(found.vocabulary, threads_of(document, 1))
        assert reading.program == program and not reading.issues
    digits = [found.vocabulary.pieces[i] for i in found.vocabulary.digits]
    assert digits == [b"%d" % d for d in range(10)]


@pytest.mark.skipif(not DATA.exists(), reason="needs the real responses and tokenizer in ../shared/data")
def test_all_real_responses_with_a_real_tokenizer() -> None:
    found = load_tokenizer(DATA / "llama2_tokenizer.model", extend=True)
    lines = (DATA / "alpaca_eval_responses.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 404 and found.usage.chat == "plain"
    ids_of_tags = set(found.vocabulary.tag_ids.values())
    for line in lines:
        response = json.loads(line)["response"]
        ids = found.encode(response)
        assert found.vocabulary.text(ids) == response and not ids_of_tags & set(ids)
        # Cut into three parts wherever that falls: text, a promise's block, text after a sync.
        first, second = len(response) // 3, 2 * len(response) // 3
        texts = [Text(part) for part in (response[:first], response[first:second], response[second:])]
        program = Program((texts[0], Promise("the middle part", 99, (texts[1],)), Sync(), texts[2]))
        document = layout(found, [found.vocabulary.bos], program, Positions(), threads=16)
        assert read(found.vocabulary, threads_of(document, 1)).program == program
        assert sum(int(token) in ids_of_tags for token in document.token) == len(tags.PIECES)


# ------------------------------------------------------------------------------------------------ prompts

CONVERSATIONS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "user", "content": "  It's\n\n 1803 \n"}],
    [
        {"role": "system", "content": "You are brief."},
        {"role": "user", "content": "Of France?"},
        {"role": "assistant", "content": "Paris"},
        {"role": "user", "content": "And of Peru?"},
    ],
    [
        {"role": "user", "content": "Of France?"},
        {"role": "assistant", "content": "Paris "},
        {"role": "user", "content": "And of Peru?"},
    ],
]
PUBLISHED = {
    "gemma": made.GEMMA3,
    "gemma json": made.GEMMA3,
    "mistral 3": made.MISTRAL3,
    "llama 3": made.LLAMA3,
    "llama 3.1": made.LLAMA31,
    "qwen 2.5": made.QWEN25,
    "qwen 3": made.QWEN3,
    "llama 2": made.LLAMA2,
    "mistral 1": made.MISTRAL1,
}


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
    found, spelled = tokenizer(name), names_of(name)
    vocabulary = found.vocabulary
    template = PUBLISHED[name]
    if own:
        template = export.minimal_files(found)["chat_template.jinja"].decode()
    for messages in CONVERSATIONS:
        text = rendered(
            template, messages, bos_token=spelled[vocabulary.bos], eos_token=spelled[vocabulary.eos]
        )
        ids = found.encode_chat(messages)
        hidden = vocabulary.control | vocabulary.stops
        said = b"".join(spelled[i].encode() if i in hidden else vocabulary.pieces[i] for i in ids).decode()
        # What Llama's own tokenizer puts before text, ours does not, and so our format does.
        assert said.replace("<s> [INST]", "<s>[INST]") == text.replace("<s> [INST]", "<s>[INST]")
        if name.startswith(("llama 3", "qwen")):
            whole = tokenizers.Tokenizer.from_str(FOLDERS[name]()["tokenizer.json"].decode())
            assert ids == whole.encode(text, add_special_tokens=False).ids
    one = CONVERSATIONS[0]
    assert found.encode_prompt(one[0]["content"]) == found.encode_chat(one)


@pytest.mark.parametrize("name", ALL)
def test_what_people_write_never_becomes_control(name: str) -> None:
    found, spelled = tokenizer(name), names_of(name)
    vocabulary = found.vocabulary
    names = [piece for i, piece in spelled.items() if vocabulary.kinds[i] in CONTROL and piece]
    evil = " ".join([*names, *tags.PIECES])
    for messages in (
        [("user", evil)],
        [("system", evil), ("user", evil), ("assistant", evil), ("user", "b")],
    ):
        said, meek = (
            found.encode_chat([{"role": role, "content": text} for role, text in written])
            for written in (messages, [(role, "a") for role, _ in messages])
        )
        control = [[i for i in ids if vocabulary.kinds[i] in CONTROL] for ids in (said, meek)]
        assert control[0] == control[1]
        assert not set(said) & set(vocabulary.tag_ids.values())


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
    told = {"eos_token_id": [plain.eos, unused, min(plain.tag_ids.values())]}  # a tag ends nothing
    told_of = {"generation_config.json": json.dumps(told).encode()}
    assert tokenizer_from_files(FOLDERS["gemma base"]() | told_of).vocabulary.ends == plain.ends | {unused}


def test_the_format_is_chosen_in_words(tmp_path: pathlib.Path) -> None:
    assert {name: tokenizer(name).usage.chat for name in ALL} == {
        "gemma": "gemma",
        "gemma base": "plain",
        "gemma json": "gemma",
        "mistral 3": "mistral3",
        "llama 3": "llama3",
        "llama 3.1": "llama3",
        "qwen 2.5": "chatml",
        "qwen 3": "qwen3",
        "llama 2": "llama2",
        "mistral 1": "mistral",
    }
    # Of a file alone, by its control tokens.
    assert SentencePieceTokenizer(made.gemma()).usage.chat == "gemma"
    assert SentencePieceTokenizer(made.llama2(), extend=True).usage.chat == "plain"
    assert SentencePieceTokenizer(made.llama2(), extend=True, chat="inst").usage.chat == "llama2"
    assert HfTokenizer(made.llama3()).usage.chat == "llama3"
    switches = "chat=FORMAT of load, --config.data.chat=FORMAT of training, --chat=FORMAT of other verbs"
    with pytest.raises(
        TokenizerError, match=rf"format gemma needs <start_of_turn>, <end_of_turn>.*plain, or .*{switches}"
    ):
        SentencePieceTokenizer(made.llama2(), extend=True, chat="gemma")
    with pytest.raises(TokenizerError, match=r"chat='gemmma' is unknown. Use one of auto, plain, gemma"):
        SentencePieceTokenizer(made.gemma(), chat="gemmma")
    (tmp_path / "tokenizer.model").write_bytes(made.gemma())
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
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}], "Message 2 .* is empty"),
        ([{"role": "user"}], 'Message 1 .* write {"role": ..., "content": ...}'),
        ([{"role": "user", "content": ["a"]}], "Message 1 .*: its content is no text but list"),
        (["hello"], "Message 1 .* is 'hello'"),
    ],
)
def test_conversations_that_cannot_be_answered(messages: Any, message: str) -> None:
    for name in ("gemma", "qwen 3"):
        with pytest.raises(ValueError, match=message):
            tokenizer(name).encode_chat(messages)


def test_the_almanac_keeps_its_turns() -> None:
    found = almanac.load_tokenizer()
    user, model = (chats.USER_TURN, chats.MODEL_TURN)
    ids = found._marks
    assert found.encode_prompt("Rivers?") == [2, ids[user], *found.encode("Rivers?"), ids[model]]
    assert found.encode_chat(CONVERSATIONS[3])[-1] == ids[model]


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("name", ALL)
def test_a_checkpoint_has_the_whole_tokenizer(name: str) -> None:
    found = tokenizer(name)
    again = tokenizer_from_bytes(found.to_bytes())
    assert again.vocabulary == found.vocabulary and again.usage == found.usage
    assert again.to_bytes() == found.to_bytes()
    for messages in CONVERSATIONS:
        assert again.encode_chat(messages) == found.encode_chat(messages)
    config = Config(data=DataConfig(dialect="apar"), checkpoint=CheckpointConfig(keep=1))
    about = About("there", 1, 0, config, found.to_bytes(), dict(found.vocabulary.tag_ids), {})
    assert about.is_of(found) and about.tokenizer().vocabulary == found.vocabulary.with_dialect("apar")


def test_checkpoints_of_before() -> None:
    """They hold the SentencePiece model alone; tags that it lacks lie after its end, and there is no format."""
    for model, extend in (
        (almanac.load_tokenizer().model, False),
        (made.gemma(), True),
        (made.llama2(), True),
    ):
        found = tokenizer_from_bytes(model, extend=extend)
        size = found._sp.GetPieceSize() if isinstance(found, SentencePieceTokenizer) else 0
        if extend:
            assert list(found.vocabulary.tag_ids.values()) == list(range(size, size + 6))
            assert found.encode_prompt("a") == [found.vocabulary.bos, *found.encode("a\n")]
    with pytest.raises(TokenizerError, match="no id for 6"):
        tokenizer_from_bytes(made.llama2())


def test_damaged_and_missing(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = tokenizer("llama 3")
    with pytest.raises(TokenizerError, match="saved tokenizer is damaged"):
        tokenizer_from_bytes(found.to_bytes()[:-100])
    with pytest.raises(TokenizerError, match="kind 'other'"):
        tokenizer_from_bytes(found.to_bytes().replace(b'"tokenizers"', b'"other"', 1))
    with pytest.raises(TokenizerError, match=f"Cannot read the tokenizer {tmp_path / 'none.model'}: No such"):
        load_tokenizer(tmp_path / "none.model")
    with pytest.raises(TokenizerError, match=f"{tmp_path}: There is neither a tokenizer.model nor"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=f"{tmp_path}: tokenizer.json: Not a tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(made.llama3()[:-10])
    with pytest.raises(TokenizerError, match=f"{tmp_path / 'tokenizer.json'}: Not a tokenizer.json"):
        load_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_bytes(made.llama3())
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # tiktoken's, under the same name
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(TokenizerError, match="tokenizer_config.json is no JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert isinstance(load_tokenizer(tmp_path), HfTokenizer)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(TokenizerError, match=r"pip install 'pasta_jax\[hf\]'"):
        load_tokenizer(tmp_path)
    about = About("there", 1, 0, Config(), found.to_bytes(), dict(found.vocabulary.tag_ids), {})
    with pytest.raises(CheckpointError, match=r"^there: Reading tokenizer.json needs.*'pasta_jax\[hf\]'"):
        about.tokenizer()


def test_tag_ids_that_a_folder_names() -> None:
    by_name = {piece: i for i, piece in names_of("gemma").items()}
    named = {piece: by_name[f"<unused{n}>"] for n, piece in enumerate(tags.PIECES, 3)}
    files = FOLDERS["gemma"]()
    assert (
        tokenizer_from_files(files | {load.TAGS_FILE: json.dumps(named).encode()}).vocabulary.tag_ids == named
    )
    for bad in (
        named | {tags.SYNC: named[tags.ASYNC_OPEN]},
        named | {tags.SYNC: "25"},
        named | {"x": 1},
        {tags.SYNC: 1},
    ):
        with pytest.raises(TokenizerError, match=r"pasta_tags\.json must have an id for each of '<promise"):
            tokenizer_from_files(files | {load.TAGS_FILE: json.dumps(bad).encode()})
    bad = named | {tags.SYNC: by_name["e"]}
    with pytest.raises(TokenizerError, match=rf"tags the ids \[{by_name['e']}\], which are ordinary text"):
        tokenizer_from_files(files | {load.TAGS_FILE: json.dumps(bad).encode()})


def test_no_room_for_tags(tmp_path: pathlib.Path) -> None:
    """An error that names the file and both ways out; with `extend`, ids after the end."""
    (tmp_path / "tokenizer.json").write_bytes(made.qwen())
    size = rows(made.qwen()) - ROOM
    for given, said in ((None, "is not known"), (size + 5, f"has {size + 5} rows for its {size} ids")):
        with pytest.raises(TokenizerError, match=f"{tmp_path}.*no id for 6 of the 6.*{said}") as error:
            load_tokenizer(tmp_path / "tokenizer.json", vocab_size=given)
        assert "extend_tokenizer=true" in str(error.value) and "--extend_tokenizer" in str(error.value)
    for options in ({"vocab_size": size + 6}, {"extend": True}):
        found = load_tokenizer(tmp_path / "tokenizer.json", **options)
        assert sorted(found.vocabulary.tag_ids.values()) == [*range(size, size + 6)]
    # What the template names is not free.
    files = {"tokenizer.model": made.gemma(), **made.folder(made.GEMMA3 + "{# <unused0> <unused4> #}")}
    found = tokenizer_from_files(files)
    expected = {f"<unused{n}>" for n in (1, 2, 3, 5, 6, 7)}
    assert {names_of("gemma")[i] for i in found.vocabulary.tag_ids.values()} == expected
    # Reserved ids come first: nothing is resized that need not be.
    assert SentencePieceTokenizer(made.gemma(), extend=True).vocabulary == (
        SentencePieceTokenizer(made.gemma()).vocabulary
    )


def test_lossy_tokenizers_are_refused() -> None:
    told = json.loads(made.qwen())
    told["normalizer"] = {"type": "Lowercase"}
    with pytest.raises(TokenizerError, match="Text would not come back as it was"):
        HfTokenizer(json.dumps(told).encode(), extend=True)
    told["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}]}
    assert HfTokenizer(json.dumps(told).encode(), extend=True).vocabulary.digits
    with pytest.raises(TokenizerError, match="Text would not come back as it was"):
        SentencePieceTokenizer(made.sentencepiece_model(byte_fallback=False, vocab_size=90), extend=True)


def test_spaces_are_neither_added_nor_swallowed() -> None:
    told, theirs = json.loads(made.qwen()), tokenizer("qwen 3")
    told["pre_tokenizer"]["pretokenizers"][-1]["add_prefix_space"] = True
    for token in told["added_tokens"]:
        token["lstrip"] = token["rstrip"] = True
    found = HfTokenizer(json.dumps(told).encode(), extend=True)
    for text in ("the Nile", "a  <think> \n b"):
        assert found.encode(text) == theirs.encode(text) and found.vocabulary.text(found.encode(text)) == text


@pytest.mark.parametrize("prefix", ["normalizer", "metaspace"])
def test_a_prefix_space_is_left_out(prefix: str) -> None:
    """Llama 2's and Mistral's tokenizer.json put a space before text, in one of two ways."""
    told = export._from_sentencepiece(made.llama2(), {})
    if prefix == "normalizer":
        prepend = {"type": "Prepend", "prepend": "\u2581"}
        told["normalizer"] = {"type": "Sequence", "normalizers": [prepend, told["normalizer"]]}
    else:
        told["normalizer"] = None
        told["pre_tokenizer"] = {
            "type": "Metaspace",
            "replacement": "\u2581",
            "prepend_scheme": "first",
            "split": False,
        }
    found, theirs = HfTokenizer(json.dumps(told).encode(), extend=True), tokenizer("llama 2")
    for text in ("the Nile", " the Nile", "  two\n\n é 42", "\u2581a"):
        assert found.encode(text) == theirs.encode(text)
    assert found.vocabulary.pieces == theirs.vocabulary.pieces


def test_tokens_declared_beside_the_file() -> None:
    """A Llama 2 that was taught ChatML: its markers are ids after the SentencePiece model's."""
    sp = made.sentencepiece.SentencePieceProcessor(model_proto=made.llama2())
    size = sp.GetPieceSize()
    added = {str(size): {"content": "<|im_start|>"}, str(size + 1): {"content": "<|im_end|>"}}
    files = {"tokenizer.model": made.llama2(), **made.folder(made.QWEN3, added_tokens_decoder=added)}
    with pytest.raises(TokenizerError, match="format qwen3 needs <think>, </think>"):
        tokenizer_from_files(files, extend=True)
    found = tokenizer_from_files(files, extend=True, chat="chatml")
    assert found.vocabulary.eos == size + 1 and found.vocabulary.ends == {2}
    assert min(found.vocabulary.tag_ids.values()) == size + 2
    assert found.encode_prompt("a")[0] == size
    assert tokenizer_from_bytes(found.to_bytes()).vocabulary == found.vocabulary


@pytest.mark.parametrize("name", ALL)
def test_exported_files_name_the_tags(name: str) -> None:
    """They load again as the same tokenizer, even without pasta_tags.json."""
    found, files = tokenizer(name), (FOLDERS | EXTENDED)[name]()
    template = json.loads(files["tokenizer_config.json"]).get("chat_template")
    for out in (export.with_named_tags(files, found.vocabulary), export.minimal_files(found)):
        assert json.loads(out[load.TAGS_FILE]) == found.vocabulary.tag_ids
        if "tokenizer.json" in out:
            whole = tokenizers.Tokenizer.from_str(out["tokenizer.json"].decode())
            for piece, i in found.vocabulary.tag_ids.items():
                assert whole.token_to_id(piece) == i
                assert whole.encode(f"a{piece}b", add_special_tokens=False).ids.count(i) == 1
        for left in (out, {k: v for k, v in out.items() if k != load.TAGS_FILE}):
            again = tokenizer_from_files(left)
            assert again.vocabulary.tag_ids == found.vocabulary.tag_ids
            assert again.usage.chat == found.usage.chat or not template
            for messages in CONVERSATIONS:
                assert again.encode_chat(messages) == found.encode_chat(messages)
            assert again.encode("".join(tags.PIECES)) == found.encode("".join(tags.PIECES))
    config = json.loads(export.with_named_tags(files, found.vocabulary)["tokenizer_config.json"])
    assert config["additional_special_tokens"] == list(tags.PIECES)
    assert config.get("chat_template") == template


@pytest.mark.parametrize("name", [*ALL, "almanac"])
def test_transformers_reads_what_is_written(name: str, tmp_path: pathlib.Path) -> None:
    transformers = pytest.importorskip("transformers")
    found = almanac.load_tokenizer() if name == "almanac" else tokenizer(name)
    for file, data in export.minimal_files(found).items():
        (tmp_path / file).write_bytes(data)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("Paris is the capital.\n\nThe Nile ", "  two  x", "naïve 北京 1803 🌍"):
        assert theirs.encode(text, add_special_tokens=False) == found.encode(text)
        assert theirs.decode(found.encode(text)) == text
    for piece, i in found.vocabulary.tag_ids.items():
        assert theirs.convert_ids_to_tokens(i) == piece and i in theirs.all_special_ids
        assert theirs.encode(f"x{piece}y", add_special_tokens=False).count(i) == 1
    assert theirs.eos_token_id == found.vocabulary.eos and theirs.bos_token_id == found.vocabulary.bos
    for messages in CONVERSATIONS if found.usage.chat != "plain" else ():
        ids = theirs.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert ids == found.encode_chat(messages)


def test_llama_3_groups_digits_and_promises_do_not() -> None:
    found = tokenizer("llama 3")
    vocabulary = found.vocabulary
    assert (
        len(found.encode("123")) == 1 and np.isin(tokenizer("qwen 3").encode("1803"), range(999)).sum() == 4
    )
    document = layout(found, [0], Program((Promise("a", 42, ()),)), Positions(), threads=4)
    four, two = vocabulary.digits[4], vocabulary.digits[2]
    assert [four, two] == [int(t) for t in document.token if vocabulary.kinds[t] == Kind.DIGIT]


def test_declared_ids_without_a_row_are_left_out() -> None:
    """Gemma 3 1B: a text model whose files name an image token that its embedding lacks."""
    plain = tokenizer_from_files({"tokenizer.model": made.gemma()})
    size = len(plain.vocabulary)
    files = {
        "tokenizer.model": made.gemma(),
        "added_tokens.json": json.dumps({"<image_soft_token>": size}).encode(),
    }
    assert len(tokenizer_from_files(files, vocab_size=size).vocabulary) == size
    assert len(tokenizer_from_files(files, vocab_size=size + 64).vocabulary) == size + 1
