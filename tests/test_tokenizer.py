"""Tokenizers that cannot serve are refused in words: no tags, tags that text can spell, text that is lost."""

import functools
import io
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import sentencepiece

from pasta_jax.checkpoints.about import CheckpointMetadata
from pasta_jax.config import CheckpointConfig, Config, DataConfig
from pasta_jax.data import almanac
from pasta_jax.data.sources import make_tokenizer
from pasta_jax.lang import tags
from pasta_jax.lang.program import Program, Promise
from pasta_jax.testing import WordTokenizer
from pasta_jax.tokens.layout import LayoutError, layout_example, promise_tokens
from pasta_jax.tokens.sentence_piece import SentencePieceTokenizer
from pasta_jax.tokens.tokenizer import TextError, TokenizerError
from tests.helpers.family_folders import tokenizer

SPELLED = f"a {tags.ASYNC_OPEN} b {tags.SYNC} c"


@functools.cache
def trained(**options: Any) -> bytes:
    """A small SentencePiece model that knows nothing of tags unless `options` say so."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(["the Nile is long, the Amazon is wide 0 1 2 3 4 5 6 7 8 9"] * 50),
        model_writer=model,
        vocab_size=400,
        hard_vocab_limit=False,
        byte_fallback=True,
        remove_extra_whitespaces=options.get("strip", False),
        normalization_rule_name=options.get("rule", "identity"),
        user_defined_symbols=options.get("symbols", ""),
        minloglevel=2,
    )
    return model.getvalue()


def test_without_tags() -> None:
    with pytest.raises(
        TokenizerError, match=r"no id for 6 of the 6 tag pieces; it splits '<promise topic=\"'.*extend=True"
    ):
        SentencePieceTokenizer(trained())
    tokenizer = SentencePieceTokenizer(trained(), extend=True)
    size = len(tokenizer.vocabulary)
    assert list(tokenizer.vocabulary.tag_ids.values()) == list(range(size - 6, size))
    assert tokenizer.vocabulary.text(tokenizer.encode(SPELLED)) == SPELLED


@pytest.mark.parametrize("kind", ["sentencepiece", "tokenizers"])
def test_half_a_character_is_named(kind: str) -> None:
    """In a text, a prompt, a message and the topic of a promise, whatever reads the file."""
    made = almanac.load_tokenizer() if kind == "sentencepiece" else tokenizer("qwen 3")
    ways: tuple[Callable[[str], object], ...] = (
        made.encode,
        made.encode_prompt,
        lambda text: made.encode_chat([{"role": "user", "content": text}]),
        lambda text: promise_tokens(made, Promise(text, 1, ())),
    )
    for encode in ways:
        with pytest.raises(
            TextError, match=r"The text holds half a character, U\+D83D, after '.*a '. Remove it."
        ):
            encode("a \ud83d b")
        with pytest.raises(TextError, match=r"U\+DCE9 \(the byte 0xE9, which is not UTF-8\), "):
            encode("\udce9")
    assert made.vocabulary.text(made.encode("a \U0001f600")) == "a \U0001f600"


def test_tags_that_text_can_spell() -> None:
    """Symbols that are not control symbols: `<async>` in a text would start a branch."""
    model = trained(symbols=",".join((tags.ASYNC_OPEN, tags.ASYNC_CLOSE, tags.SYNC, tags.PROMISE_OPEN)))
    with pytest.raises(TokenizerError, match=r"'<promise topic=\"' is no control symbol"):
        SentencePieceTokenizer(model)
    tokenizer = SentencePieceTokenizer(model, extend=True)
    ids = tokenizer.encode(SPELLED)
    assert tokenizer.vocabulary.text(ids) == SPELLED
    assert not set(ids) & set(tokenizer.vocabulary.tag_ids.values())


def test_control_characters_that_are_dropped() -> None:
    for strip in (False, True):  # with or without the dummy prefix that then stands alone
        with pytest.raises(TokenizerError, match="drops control characters.*rule_name=identity"):
            SentencePieceTokenizer(trained(rule="nmt_nfkc", strip=strip), extend=True)


def test_a_configuration_says_whether_ids_are_added(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "foreign.model"
    file.write_bytes(trained())
    with pytest.raises(TokenizerError, match=r"foreign\.model: .*--config\.data\.extend_tokenizer=true"):
        make_tokenizer(DataConfig(tokenizer=str(file)))
    config = Config(
        data=DataConfig(tokenizer=str(file), extend_tokenizer=True), checkpoint=CheckpointConfig(keep=1)
    )
    tokenizer = make_tokenizer(config.data)
    about = CheckpointMetadata("there", 1, 0, config, tokenizer.to_bytes(), tokenizer.vocabulary.tag_ids, {})
    assert about.load_tokenizer().vocabulary == tokenizer.vocabulary  # the checkpoint remembers


def test_the_almanacs_own_needs_no_new_ids() -> None:
    tokenizer = almanac.load_tokenizer()
    assert max(tokenizer.vocabulary.tag_ids.values()) < 20
    assert not set(tokenizer.encode(SPELLED)) & set(tokenizer.vocabulary.tag_ids.values())


@pytest.mark.parametrize(
    ("topic", "tokens", "message"),
    [
        ("rivers", 0, "tokens=0 is not between 1 and 99"),
        ("rivers", 100, "tokens=100 is not between 1 and 99"),
        ('a "b"', 1, "the topic holds '\"'"),
        ("a\nb", 1, "the topic holds '\\\\n'"),
        ("", 1, "the topic is empty"),
    ],
)
def test_promises_that_could_not_be_read_back(topic: str, tokens: int, message: str) -> None:
    tokenizer = WordTokenizer("rivers")
    promise = Promise(topic, tokens, ())
    with pytest.raises(LayoutError, match=message):
        promise_tokens(tokenizer, promise)
    with pytest.raises(LayoutError, match=message):
        layout_example(tokenizer, "Rivers?", Program((promise,)))
