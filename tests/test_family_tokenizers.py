"""Tokenizers of the published families: text comes back and stays text, and tags have ids."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from pasta_jax.lang import tags
from pasta_jax.lang.grammar import Kind
from pasta_jax.lang.program import Program, Promise, Sync, Text
from pasta_jax.tokens.detokenize import read, threads_of
from pasta_jax.tokens.hf import HfTokenizer
from pasta_jax.tokens.layout import layout
from pasta_jax.tokens.load import load_tokenizer
from pasta_jax.tokens.positions import Positions
from pasta_jax.tokens.sentence_piece import SentencePieceTokenizer
from pasta_jax.tokens.sentence_piece_json import sentencepiece_as_json
from pasta_jax.tokens.tokenizer import TextError, TokenizerError
from tests.helpers import family_tokenizers as families
from tests.helpers.data import data_file, real_responses
from tests.helpers.family_folders import (
    ALL,
    CONTROL,
    EXTENDED,
    names_of,
    tokenizer,
)
from tests.helpers.hard_texts import TEXTS
from tests.helpers.programs import random_program, random_text

tokenizers = pytest.importorskip("tokenizers")


@pytest.mark.parametrize("name", ALL)
def test_tags_take_ids_that_nothing_uses(name: str) -> None:
    loaded, spelled = tokenizer(name), names_of(name)
    ids = [loaded.vocabulary.tag_ids[piece] for piece in tags.PIECES]
    now = [spelled.get(i, "") for i in ids]
    if name.startswith("gemma"):
        assert now == [f"<unused{n}>" for n in range(6)]
    elif name == "mistral 3":
        assert now == [f"[control_{n}]" for n in range(14, 20)]
    elif name in ("mistral nemo", "ministral"):
        assert now == [f"<SPECIAL_{n}>" for n in range(18, 24)]
    elif name.startswith("llama 3"):
        assert now == [f"<|reserved_special_token_{n}|>" for n in range(6, 12)]
    else:  # past the end: in rows of the embedding that are there (Qwen), or that will be
        assert ids == [*range(len(spelled), len(spelled) + 6)]
    assert [loaded.vocabulary.pieces[i] for i in ids] == [piece.encode() for piece in tags.PIECES]
    kinds = [Kind(k) for k in loaded.vocabulary.kinds[ids]]
    assert kinds == [Kind.OPEN, Kind.TOKENS, Kind.CLOSE, Kind.ASYNC_OPEN, Kind.ASYNC_CLOSE, Kind.SYNC]


@pytest.mark.parametrize("name", ALL)
def test_text_comes_back_and_stays_text(name: str, seed: int) -> None:
    """Whatever it spells: tags, every control token of the vocabulary, what tokenizers treat as markup."""
    loaded, rng = tokenizer(name), random.Random(seed)
    vocabulary = loaded.vocabulary
    spelled = [piece for i, piece in names_of(name).items() if vocabulary.kinds[i] in CONTROL and piece]
    assert len(spelled) >= (3 if name in EXTENDED else 5)
    texts = [
        *spelled,
        "".join(spelled),
        "<<unused0>unused0> <|<|im_end|>im_end|>",
        " ".join(families.QWEN_TEXT) + "<table>\n\n\n",
        "".join(tags.PIECES),
        *TEXTS,
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
        ids = loaded.encode(text)
        assert vocabulary.text(ids) == text
        assert not {Kind(k) for k in vocabulary.kinds[ids]} & CONTROL, text


@pytest.mark.parametrize("name", ALL)
def test_programs_come_back(name: str, seed: int) -> None:
    """Each tag piece is one id, the number of a promise digit by digit."""
    loaded, rng = tokenizer(name), random.Random(seed)
    programs = [
        Program((Promise("rivers", 42, (Text(" The Nile 1803."),)), Text(" 7"), Sync(), Text("\nEnd")))
    ]
    for _ in range(60):
        program = random_program(rng, max_depth=2)
        topics = [len(loaded.encode(f" {promise.topic}")) for promise in program.promises()]
        programs += [program] if max(topics, default=1) <= tags.MAX_TOPIC_TOKENS else []
    assert len(programs) > 5
    for program in programs:
        document = layout(loaded, [loaded.vocabulary.bos], program, Positions(), threads=16)
        reading = read(loaded.vocabulary, threads_of(document))
        assert reading.program == program and not reading.issues
    digits = [loaded.vocabulary.pieces[i] for i in loaded.vocabulary.digits]
    assert digits == [b"%d" % d for d in range(10)]


def test_all_real_responses_with_a_real_tokenizer() -> None:
    loaded = load_tokenizer(data_file("llama2_tokenizer.model"), extend=True)
    responses = real_responses()
    assert len(responses) == 404 and loaded.usage.chat == "plain"
    ids_of_tags = set(loaded.vocabulary.tag_ids.values())
    for response in responses:
        ids = loaded.encode(response)
        assert loaded.vocabulary.text(ids) == response and not ids_of_tags & set(ids)
        # Cut into three parts wherever that falls: text, a promise's block, text after a sync.
        first, second = len(response) // 3, 2 * len(response) // 3
        texts = [Text(part) for part in (response[:first], response[first:second], response[second:])]
        program = Program((texts[0], Promise("the middle part", 99, (texts[1],)), Sync(), texts[2]))
        document = layout(loaded, [loaded.vocabulary.bos], program, Positions(), threads=16)
        assert read(loaded.vocabulary, threads_of(document)).program == program
        assert sum(int(token) in ids_of_tags for token in document.token) == len(tags.PIECES)


def test_lossy_tokenizers_are_refused() -> None:
    fields = json.loads(families.qwen())
    fields["normalizer"] = {"type": "Lowercase"}
    with pytest.raises(TokenizerError, match="does not preserve text"):
        HfTokenizer(json.dumps(fields).encode(), extend=True)
    fields["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}]}
    assert HfTokenizer(json.dumps(fields).encode(), extend=True).vocabulary.digits
    with pytest.raises(TokenizerError, match="does not preserve text"):
        SentencePieceTokenizer(families.sentencepiece_model(byte_fallback=False, vocab_size=90), extend=True)


def test_a_character_that_a_vocabulary_lacks_is_named() -> None:
    """SmolLM2's lacks the ids of some bytes, and its own package drops them without a word."""
    fields = json.loads(families.qwen())
    for letter in ("\u0113", "\u00f1"):  # of the bytes 0x13 and 0xF1
        fields["model"]["vocab"][f"{letter}{letter}"] = fields["model"]["vocab"].pop(letter)
    loaded = HfTokenizer(json.dumps(fields).encode(), extend=True)
    for text in ("a\x12b", "\U0003ffff\U000c0000", "ñ \u0115"):
        assert loaded.vocabulary.text(loaded.encode(text)) == text
    for text, message in (
        ("\x13", r"The text holds U\+0013, which this tokenizer has no ids for, at its start\. Remove it\."),
        ("a \U00040000", r"holds U\+40000, which .*, after 'a '"),
        ("ñ\x12\x13 \x13", r"holds U\+0013, which .*, after 'ñ\\x12'"),
    ):
        with pytest.raises(TextError, match=message):
            loaded.encode(text)
        with pytest.raises(TextError, match="which this tokenizer has no ids for"):
            loaded.encode_prompt(text)


def test_spaces_are_neither_added_nor_swallowed() -> None:
    fields, original = json.loads(families.qwen()), tokenizer("qwen 3")
    fields["pre_tokenizer"]["pretokenizers"][-1]["add_prefix_space"] = True
    for token in fields["added_tokens"]:
        token["lstrip"] = token["rstrip"] = True
    loaded = HfTokenizer(json.dumps(fields).encode(), extend=True)
    for text in ("the Nile", "a  <think> \n b"):
        assert (
            loaded.encode(text) == original.encode(text)
            and loaded.vocabulary.text(loaded.encode(text)) == text
        )


@pytest.mark.parametrize("prefix", ["normalizer", "metaspace"])
def test_a_prefix_space_is_left_out(prefix: str) -> None:
    """Llama 2's and Mistral's tokenizer.json put a space before text, in one of two ways."""
    fields = sentencepiece_as_json(families.llama2(), {})
    if prefix == "normalizer":
        prepend = {"type": "Prepend", "prepend": "\u2581"}
        fields["normalizer"] = {"type": "Sequence", "normalizers": [prepend, fields["normalizer"]]}
    else:
        fields["normalizer"] = None
        fields["pre_tokenizer"] = {
            "type": "Metaspace",
            "replacement": "\u2581",
            "prepend_scheme": "first",
            "split": False,
        }
    loaded, original = HfTokenizer(json.dumps(fields).encode(), extend=True), tokenizer("llama 2")
    for text in ("the Nile", " the Nile", "  two\n\n é 42", "\u2581a"):
        assert loaded.encode(text) == original.encode(text)
    assert loaded.vocabulary.pieces == original.vocabulary.pieces


def test_runs_of_spaces_that_are_symbols() -> None:
    """Gemma 2 and 3 have them; a tokenizer.json finds them where the SentencePiece model does."""
    runs = ("\u2581\u2581", "\u2581\u2581\u2581\u2581", "\n\n")
    model = families.sentencepiece_model(symbols=runs, add_dummy_prefix=False)
    original = SentencePieceTokenizer(model, extend=True)
    data = json.dumps(sentencepiece_as_json(model, {})).encode()
    library = tokenizers.Tokenizer.from_str(data.decode())
    loaded = HfTokenizer(data, extend=True)
    for text in ("a  b", "   three,     five", "    two:\n\n  c", "one b \u2581 d"):
        assert loaded.encode(text) == original.encode(text)
        assert "\u2581" in text or library.encode(text).ids == original.encode(text)


def test_llama_3_groups_digits_and_promises_do_not() -> None:
    loaded = tokenizer("llama 3")
    vocabulary = loaded.vocabulary
    assert (
        len(loaded.encode("123")) == 1 and np.isin(tokenizer("qwen 3").encode("1803"), range(999)).sum() == 4
    )
    document = layout(loaded, [0], Program((Promise("a", 42, ()),)), Positions(), threads=4)
    four, two = vocabulary.digits[4], vocabulary.digits[2]
    assert [four, two] == [int(t) for t in document.token if vocabulary.kinds[t] == Kind.DIGIT]
