"""Training of SentencePiece models whose vocabularies this package can use."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Iterable
from typing import Any

import sentencepiece

from pasta_jax.lang import tags
from pasta_jax.messages import message_of
from pasta_jax.tokens.chat import MODEL_TURN, USER_TURN
from pasta_jax.tokens.tokenizer import TokenizerError

NEEDED: dict[str, Any] = {
    # Decoding restores the text exactly: no normalisation, no added space, bytes for rare characters.
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "byte_fallback": True,
    # A newline is a piece of its own. Tags and marks of turns are control symbols, which no text can produce.
    "user_defined_symbols": ["\n"],
    "control_symbols": [*tags.PIECES, USER_TURN, MODEL_TURN],
    "pad_id": 0,
    "eos_id": 1,
    "bos_id": 2,
    "unk_id": 3,
    # The same text gives the same model.
    "num_threads": 1,
    "shuffle_input_sentence": False,
    "minloglevel": 2,
}
"""The flags that every vocabulary needs."""

OWN: dict[str, Any] = {
    "model_type": "bpe",  # on little or repetitive text unigram finds few pieces: half as many bytes a token
    "split_digits": True,
    "required_chars": "0123456789",  # of the numbers in promises
    "allow_whitespace_only_pieces": True,  # indentation
}
"""The flags for a user's text; the almanac has others."""

LONGEST = 4000
"""Bytes of a sentence at most; SentencePiece drops sentences of more than 4192."""


def train_pieces(sentences: Iterable[str], vocab_size: int, **flags: Any) -> bytes:
    """A SentencePiece model.

    Args:
      sentences: the text, of at most LONGEST bytes each.
      vocab_size: the number of pieces, with those for tags, bytes and control.
      **flags: of the SentencePiece trainer, besides those in NEEDED.

    Raises:
      TokenizerError: the text is too little for so many pieces, or has more characters than fit; says which
        numbers are possible.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            vocab_size=vocab_size,
            **NEEDED,
            **flags,
        )
    except RuntimeError as error:
        raise TokenizerError(_reason(str(error), vocab_size)) from error
    return model.getvalue()


def _reason(message: str, vocab_size: int) -> str:
    """What SentencePiece says, for people."""
    if "sentences_.empty()" in message:
        return "There is no text to train on."
    if most := re.search(r"Vocabulary size too high \(\d+\).*<= (\d+)", message):
        return (
            f"This text gives at most {int(most[1]):,} pieces, not {vocab_size:,}. Take a vocabulary of at most "
            f"{most[1]}, or more text."
        )
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"This text needs at least {int(least[1]):,} pieces, for its characters, for single bytes and for the "
            f"tags, not {vocab_size:,}. Take a vocabulary of at least {least[1]}, or a lower coverage."
        )
    return f"The tokenizer cannot be trained: {message_of(RuntimeError(message))}"


@dataclasses.dataclass(frozen=True)
class Measured:
    """How a vocabulary spells some texts: the tokens that it takes, and how many characters it has pieces for."""

    bytes: int
    tokens: int
    characters: int
    covered: int


def measure(model: bytes, texts: Iterable[str]) -> Measured:
    """How a SentencePiece model spells some texts."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    # The first byte of a character, not one that continues it.
    begins = {i for i in range(processor.GetPieceSize()) if processor.IsByte(i)}
    begins = {i for i in begins if int(processor.IdToPiece(i)[3:5], 16) & 0xC0 != 0x80}
    size = tokens = characters = spelled = 0
    for text in texts:
        ids = processor.EncodeAsIds(text)
        size, tokens, characters = size + len(text.encode()), tokens + len(ids), characters + len(text)
        spelled += sum(i in begins for i in ids)
    return Measured(size, tokens, characters, characters - spelled)


def sentences_of(text: str) -> list[str]:
    r"""A text as sentences to train on: its lines, since no piece spans two; long ones cut, at a space if possible.

    >>> sentences_of("One line.\n\n  And another.\n")
    ['One line.', '  And another.']
    """
    found: list[str] = []
    for line in text.split("\n"):
        while len(line.encode()) > LONGEST:
            fits = line.encode()[:LONGEST].decode(errors="ignore")
            cut = fits.rfind(" ", 1)
            cut = cut if cut > 0 else len(fits)
            found.append(line[:cut])
            line = line[cut:]
        if line:
            found.append(line)
    return found
