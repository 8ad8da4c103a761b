"""Tokenizer files: checkpoints, Hugging Face folders that are read, and those that are written."""

from __future__ import annotations

import json
import pathlib
import sys

import pytest

from pasta_jax.checkpoints.about import CheckpointError, CheckpointMetadata
from pasta_jax.config import CheckpointConfig, Config, DataConfig
from pasta_jax.data import almanac
from pasta_jax.lang import tags
from pasta_jax.tokens import base, export, load
from pasta_jax.tokens.hf import HfTokenizer
from pasta_jax.tokens.load import load_tokenizer, tokenizer_from_bytes, tokenizer_from_files
from pasta_jax.tokens.sentence_piece import SentencePieceTokenizer
from pasta_jax.tokens.tokenizer import TokenizerError
from tests.helpers import family_tokenizers as families
from tests.helpers.conversations import KINDS
from tests.helpers.family_folders import (
    ALL,
    EXTENDED,
    FOLDERS,
    ROOM,
    names_of,
    rows,
    tokenizer,
)

tokenizers = pytest.importorskip("tokenizers")


@pytest.mark.parametrize("name", ALL)
def test_a_checkpoint_has_the_whole_tokenizer(name: str) -> None:
    loaded = tokenizer(name)
    again = tokenizer_from_bytes(loaded.to_bytes())
    assert again.vocabulary == loaded.vocabulary and again.usage == loaded.usage
    assert again.to_bytes() == loaded.to_bytes()
    for messages in KINDS.values():
        assert again.encode_chat(messages) == loaded.encode_chat(messages)
    config = Config(data=DataConfig(dialect="apar"), checkpoint=CheckpointConfig(keep=1))
    about = CheckpointMetadata("there", 1, 0, config, loaded.to_bytes(), dict(loaded.vocabulary.tag_ids), {})
    assert about.matches_tokenizer(
        loaded
    ) and about.load_tokenizer().vocabulary == loaded.vocabulary.with_dialect("apar")


def test_damaged_and_missing(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tokenizer("llama 3")
    with pytest.raises(TokenizerError, match="saved tokenizer is damaged"):
        tokenizer_from_bytes(loaded.to_bytes()[:-100])
    with pytest.raises(TokenizerError, match="kind 'other'"):
        tokenizer_from_bytes(loaded.to_bytes().replace(b'"tokenizers"', b'"other"', 1))
    with pytest.raises(TokenizerError, match=f"Cannot read {tmp_path / 'none.model'}: No such"):
        load_tokenizer(tmp_path / "none.model")
    with pytest.raises(TokenizerError, match=f"{tmp_path}: There is neither a tokenizer.model nor"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")  # what a full disk leaves
    with pytest.raises(TokenizerError, match=f"{tmp_path}: tokenizer.model: Not a .* the file is empty"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=f"{tmp_path}: tokenizer.json: Not a tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(families.llama3()[:-10])
    with pytest.raises(TokenizerError, match=f"{tmp_path / 'tokenizer.json'}: Not a tokenizer.json"):
        load_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_bytes(families.llama3())
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # tiktoken's, under the same name
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(TokenizerError, match="tokenizer_config.json is not JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert isinstance(load_tokenizer(tmp_path), HfTokenizer)
    damaged = json.loads(families.llama3())
    damaged["model"] = {"type": "WordLevel", "vocab": damaged["model"]["vocab"], "unk_token": "none"}
    with pytest.raises(TokenizerError, match="^tokenizer.json: It is damaged: Exception: WordLevel"):
        tokenizer_from_files({"tokenizer.json": json.dumps(damaged).encode()})
    with monkeypatch.context() as patch:
        patch.setattr(base, "settle", None)
        with pytest.raises(TypeError, match="not callable"):  # a fault of ours is no damage
            load_tokenizer(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(TokenizerError, match=r'pip install -e "\.\[hf\]"'):
        load_tokenizer(tmp_path)
    about = CheckpointMetadata(
        "there", 1, 0, Config(), loaded.to_bytes(), dict(loaded.vocabulary.tag_ids), {}
    )
    with pytest.raises(CheckpointError, match=r'^there: Reading tokenizer\.json needs.* -e "\.\[hf\]"'):
        about.load_tokenizer()


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
    (tmp_path / "tokenizer.json").write_bytes(families.qwen())
    size = rows(families.qwen()) - ROOM
    for given, message in ((None, "is not known"), (size + 5, f"has {size + 5} rows for its {size} ids")):
        with pytest.raises(TokenizerError, match=f"{tmp_path}.*no id for 6 of the 6.*{message}") as error:
            load_tokenizer(tmp_path / "tokenizer.json", vocab_size=given)
        assert "extend_tokenizer=true" in str(error.value) and "--extend_tokenizer" in str(error.value)
    for options in ({"vocab_size": size + 6}, {"extend": True}):
        loaded = load_tokenizer(tmp_path / "tokenizer.json", **options)
        assert sorted(loaded.vocabulary.tag_ids.values()) == [*range(size, size + 6)]
    # What the template names is not free.
    files = {
        "tokenizer.model": families.gemma(),
        **families.folder(families.GEMMA3 + "{# <unused0> <unused4> #}"),
    }
    loaded = tokenizer_from_files(files)
    expected = {f"<unused{n}>" for n in (1, 2, 3, 5, 6, 7)}
    assert {names_of("gemma")[i] for i in loaded.vocabulary.tag_ids.values()} == expected
    # Reserved ids come first: nothing is resized that need not be.
    assert SentencePieceTokenizer(families.gemma(), extend=True).vocabulary == (
        SentencePieceTokenizer(families.gemma()).vocabulary
    )


def test_marks_of_source_code_are_free_for_tags() -> None:
    """SmolLM2 has no reserved ids, but marks that no chat needs."""
    marks = [
        "<gh_stars>",
        "<issue_start>",
        "<issue_comment>",
        "<issue_closed>",
        "<jupyter_start>",
        "<jupyter_text>",
    ]
    fields = json.loads(families.qwen())
    size = max(*fields["model"]["vocab"].values(), *(token["id"] for token in fields["added_tokens"])) + 1
    more = [{**fields["added_tokens"][0], "id": size + n, "content": mark} for n, mark in enumerate(marks)]
    fields["added_tokens"] += more
    loaded = tokenizer_from_files({"tokenizer.json": json.dumps(fields).encode()})
    assert loaded.vocabulary.tag_ids == {piece: size + n for n, piece in enumerate(tags.PIECES)}
    assert len(loaded.vocabulary) == size + 6
    more[3]["special"] = False  # text could spell it
    with pytest.raises(TokenizerError, match="no id for 6 of the 6"):
        tokenizer_from_files({"tokenizer.json": json.dumps(fields).encode()})


def test_tokens_declared_beside_the_file() -> None:
    """A Llama 2 that was taught ChatML: its markers are ids after the SentencePiece model's."""
    sp = families.sentencepiece.SentencePieceProcessor(model_proto=families.llama2())
    size = sp.GetPieceSize()
    added = {str(size): {"content": "<|im_start|>"}, str(size + 1): {"content": "<|im_end|>"}}
    files = {
        "tokenizer.model": families.llama2(),
        **families.folder(families.QWEN3, added_tokens_decoder=added),
    }
    with pytest.raises(TokenizerError, match="format qwen3 needs <think>, </think>"):
        tokenizer_from_files(files, extend=True)
    loaded = tokenizer_from_files(files, extend=True, chat="chatml")
    assert loaded.vocabulary.eos == size + 1 and loaded.vocabulary.ends == {2}
    assert min(loaded.vocabulary.tag_ids.values()) == size + 2
    assert loaded.encode_prompt("a")[0] == size
    assert tokenizer_from_bytes(loaded.to_bytes()).vocabulary == loaded.vocabulary


@pytest.mark.parametrize("name", ALL)
def test_exported_files_name_the_tags(name: str) -> None:
    """They load again as the same tokenizer, even without pasta_tags.json."""
    loaded, files = tokenizer(name), (FOLDERS | EXTENDED)[name]()
    template = json.loads(files["tokenizer_config.json"]).get("chat_template")
    for out in (export.with_named_tags(files, loaded.vocabulary), export.minimal_files(loaded)):
        assert json.loads(out[load.TAGS_FILE]) == loaded.vocabulary.tag_ids
        if "tokenizer.json" in out:
            whole = tokenizers.Tokenizer.from_str(out["tokenizer.json"].decode())
            for piece, i in loaded.vocabulary.tag_ids.items():
                assert whole.token_to_id(piece) == i
                assert whole.encode(f"a{piece}b", add_special_tokens=False).ids.count(i) == 1
        for left in (out, {k: v for k, v in out.items() if k != load.TAGS_FILE}):
            again = tokenizer_from_files(left)
            assert again.vocabulary.tag_ids == loaded.vocabulary.tag_ids
            assert again.usage.chat == loaded.usage.chat or not template
            for messages in KINDS.values():
                assert again.encode_chat(messages) == loaded.encode_chat(messages)
            assert again.encode("".join(tags.PIECES)) == loaded.encode("".join(tags.PIECES))
    config = json.loads(export.with_named_tags(files, loaded.vocabulary)["tokenizer_config.json"])
    assert config["additional_special_tokens"] == list(tags.PIECES)
    assert config.get("chat_template") == template


@pytest.mark.parametrize("name", [*ALL, "almanac"])
def test_transformers_reads_what_is_written(name: str, tmp_path: pathlib.Path) -> None:
    transformers = pytest.importorskip("transformers")
    loaded = almanac.load_tokenizer() if name == "almanac" else tokenizer(name)
    for file, data in export.minimal_files(loaded).items():
        (tmp_path / file).write_bytes(data)
    original = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("Paris is the capital.\n\nThe Nile ", "  two  x", "naïve 北京 1803 🌍"):
        assert original.encode(text, add_special_tokens=False) == loaded.encode(text)
        assert original.decode(loaded.encode(text)) == text
    for piece, i in loaded.vocabulary.tag_ids.items():
        assert original.convert_ids_to_tokens(i) == piece and i in original.all_special_ids
        assert original.encode(f"x{piece}y", add_special_tokens=False).count(i) == 1
    assert original.eos_token_id == loaded.vocabulary.eos and original.bos_token_id == loaded.vocabulary.bos
    # By design: control tokens and tags that people spell stay letters here, and text is not normalised.
    for kind in KINDS.keys() - {"control tokens", "tags", "decomposed unicode"}:
        if loaded.usage.chat == "plain":
            break
        messages = KINDS[kind]
        ids = original.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert ids == loaded.encode_chat(messages)


def test_ends_that_only_the_models_configuration_names() -> None:
    """As in transformers: generation_config.json, else config.json, else its text_config."""
    model: dict[str, object] = {"vocab_size": 9, "eos_token_id": [1, 5]}
    for files, ends, size in (
        ({"config.json": model}, (1, 5), 9),
        ({"config.json": {"vocab_size": None, "text_config": {"vocab_size": 7, "eos_token_id": 3}}}, (3,), 7),
        ({"config.json": model, "generation_config.json": {"eos_token_id": 7}}, (7,), 9),
        ({"config.json": model, "generation_config.json": {}}, (1, 5), 9),
        ({"config.json": {"text_config": None}}, (), 0),
        ({"config.json": {"eos_token_id": True, "text_config": {}}}, (), 0),
    ):
        hints = load.read_hints({name: json.dumps(told).encode() for name, told in files.items()})
        assert (hints.ends, hints.vocab_size) == (ends, size)


def test_the_ends_of_a_folder_are_read(tmp_path: pathlib.Path) -> None:
    for name, data in FOLDERS["gemma base"]().items():
        (tmp_path / name).write_bytes(data)
    unused = max(tokenizer("gemma base").vocabulary.tag_ids.values()) + 1
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [1, unused]}))
    assert (
        unused in load_tokenizer(tmp_path, vocab_size=len(tokenizer("gemma base").vocabulary)).vocabulary.ends
    )


def test_guessed_names_are_those_of_control_tokens() -> None:
    """Qwen has an ordinary piece <s>, and its documents begin with its end of text."""
    fields = json.loads(families.qwen())
    vocab = fields["model"]["vocab"]
    freed = next(
        piece for piece in reversed(vocab) if all(piece not in pair for pair in fields["model"]["merges"])
    )
    vocab["<s>"] = vocab.pop(freed)
    fields["model"]["merges"] = [pair for pair in fields["model"]["merges"] if "".join(pair) != freed]
    loaded = HfTokenizer(json.dumps(fields).encode(), extend=True)
    assert loaded.vocabulary.bos == loaded._names["<|endoftext|>"]
    exported = json.loads(export.minimal_files(loaded)["tokenizer_config.json"])
    assert exported["bos_token"] == "<|endoftext|>"


def test_free_ids_that_the_file_does_not_declare() -> None:
    """Gemma 1's tokenizer.json has them and the markers of turns in its vocabulary alone."""
    fields = json.loads(FOLDERS["gemma json"]()["tokenizer.json"])
    fields["added_tokens"] = [
        token for token in fields["added_tokens"] if token["content"] in ("<bos>", "<eos>")
    ]
    loaded = HfTokenizer(json.dumps(fields).encode())
    declared = tokenizer("gemma json")
    assert loaded.vocabulary.tag_ids == declared.vocabulary.tag_ids and loaded.usage.chat == "gemma"
    text = "<unused0> <start_of_turn>"
    assert loaded.vocabulary.text(loaded.encode(text)) == text
    whole = tokenizers.Tokenizer.from_str(export.minimal_files(loaded)["tokenizer.json"].decode())
    mark = loaded._names["<start_of_turn>"]
    assert mark in loaded.encode_prompt("a") and whole.encode("<start_of_turn>").ids == [mark]


def test_declared_ids_without_a_row_are_left_out() -> None:
    """Gemma 3 1B: a text model whose files name an image token that its embedding lacks."""
    plain = tokenizer_from_files({"tokenizer.model": families.gemma()})
    size = len(plain.vocabulary)
    files = {
        "tokenizer.model": families.gemma(),
        "added_tokens.json": json.dumps({"<image_soft_token>": size}).encode(),
    }
    assert len(tokenizer_from_files(files, vocab_size=size).vocabulary) == size
    assert len(tokenizer_from_files(files, vocab_size=size + 64).vocabulary) == size + 1
