"""The interface of vocabularies and tokenizers.

Text is encoded run by run, between tags, and decodes to exactly the same text: no prefix space, no normalisation
that loses anything. Each fixed piece of a tag is one id. Ordinary text never encodes to a tag's id or another
control id, whatever it spells.
"""

from __future__ import annotations

import codecs
import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from pasta_jax.lang import tags
from pasta_jax.lang.grammar import Kind
from pasta_jax.messages import message_of

_BLOCK_KINDS = {tags.ASYNC_OPEN: Kind.ASYNC_OPEN, tags.ASYNC_CLOSE: Kind.ASYNC_CLOSE}
_TAG_KINDS: dict[tags.Dialect, dict[str, Kind]] = {
    "pasta": _BLOCK_KINDS
    | {
        tags.PROMISE_OPEN: Kind.OPEN,
        tags.PROMISE_TOKENS: Kind.TOKENS,
        tags.PROMISE_CLOSE: Kind.CLOSE,
        tags.SYNC: Kind.SYNC,
    },
    "apar": _BLOCK_KINDS | {tags.PROMISE_CLOSE: Kind.FORK},
}
"""The kinds of the tag pieces in each dialect; a piece that the dialect lacks is a control symbol."""


MOST_IDS = 2**22
"""16 times the largest published vocabulary, Gemma 3's of 262,144; tables have an entry for each id."""


def is_id(value: object) -> bool:
    """Whether a value of a file is an id, from 0 to MOST_IDS - 1."""
    return type(value) is int and 0 <= value < MOST_IDS


class TokenizerError(ValueError):
    """The tokenizer cannot be used; the message says what to do."""


class MissingPackage(TokenizerError):
    """The tokenizer's format needs a package that is not installed."""


class TextError(ValueError):
    """A text without ids: it holds half a character, or one that the tokenizer lacks; the message says which."""


LACKING = "characters that the tokenizer lacks"
"""The reason for which records with such a text are not used."""


def check_text(text: str) -> None:
    r"""Raises TextError if a text cannot be written in UTF-8.

    Half a character is what JSON that was cut within an emoji leaves, and what Python makes of a byte of a command
    line that is not UTF-8.

    >>> check_text("cut \ud83d")
    Traceback (most recent call last):
        ...
    pasta_jax.tokens.tokenizer.TextError: The text holds half a character, U+D83D, after 'cut '. Remove it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        byte = f" (the byte 0x{code - 0xDC00:02X}, which is not UTF-8)" if 0xDC80 <= code <= 0xDCFF else ""
        raise TextError(
            f"The text holds half a character, U+{code:04X}{byte}, {place_in(text, error.start)}. Remove it."
        ) from None


def place_in(text: str, index: int) -> str:
    """Where a character stands, for messages."""
    return f"after {text[max(0, index - 20) : index]!r}" if index else "at its start"


def of_library(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What a tokenizer's library returns. Raises TokenizerError for what a damaged file makes it raise."""
    try:
        return call(*args, **options)
    except Exception as error:
        raise TokenizerError(f"It is damaged: {message_of(error)}") from error


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The ids of a vocabulary, as layout and interpreter use them.

    Attributes:
      pieces: the bytes of each of the V ids, tag pieces and control symbols included.
      tag_ids: id of each piece in `tags.PIECES`.
      pad, eos, bos: control ids. Training writes `eos` at the end of an answer: the end of a turn if the family
        has one. `bos` starts a document; a family without one uses its end-of-text id.
      control: all ids that are never part of an answer's text (pad, bos, turn markers, ...), except `stops`.
      dialect: the dialect of the tags; `with_dialect` changes it.
      ends: other ids that end an answer, though training does not write them.
    """

    pieces: tuple[bytes, ...]
    tag_ids: dict[str, int]
    pad: int
    eos: int
    bos: int
    control: frozenset[int]
    dialect: tags.Dialect = "pasta"
    ends: frozenset[int] = frozenset()

    def with_dialect(self, dialect: tags.Dialect) -> Vocabulary:
        """The same ids with the tags of another dialect. In `apar`, `<promise/>` has the id of ` />`."""
        pieces = list(self.pieces)
        shared = tags.FORK if dialect == "apar" else tags.PROMISE_CLOSE
        pieces[self.tag_ids[tags.PROMISE_CLOSE]] = shared.encode()
        return dataclasses.replace(self, pieces=tuple(pieces), dialect=dialect)

    def __len__(self) -> int:
        return len(self.pieces)

    @functools.cached_property
    def stops(self) -> frozenset[int]:
        """All ids that end an answer."""
        return self.ends | {self.eos}

    @functools.cached_property
    def _hidden(self) -> frozenset[int]:
        return self.control | self.stops

    @functools.cached_property
    def kinds(self) -> np.ndarray:
        """int32 [V]: the `Kind` of each id in the tag grammar."""
        kinds = np.array([_kind_of_text(piece) for piece in self.pieces], np.int32)
        for i in self.control:
            kinds[i] = Kind.CONTROL
        for piece, i in self.tag_ids.items():
            kinds[i] = _TAG_KINDS[self.dialect].get(piece, Kind.CONTROL)
        kinds[list(self.stops)] = Kind.END
        return kinds

    @functools.cached_property
    def digit_values(self) -> np.ndarray:
        """int32 [V]: the value of each id that is one digit, 0 for the others."""
        return np.array([int(p) if re.fullmatch(rb"[0-9]", p) else 0 for p in self.pieces], np.int32)

    @functools.cached_property
    def digits(self) -> tuple[int, ...]:
        """The ids of "0" to "9"."""
        ids = {piece: i for i, piece in enumerate(self.pieces)}  # the last: byte-fallback ids come first
        missing = [d for d in range(10) if b"%d" % d not in ids]
        if missing:
            raise TokenizerError(
                f"This tokenizer has no id for the digits {missing}; promises cannot be written."
            )
        return tuple(ids[b"%d" % d] for d in range(10))

    def text(self, ids: Sequence[int]) -> str:
        """The text that ids spell, tag pieces literally; broken UTF-8 becomes U+FFFD.

        Control symbols spell nothing.
        """
        return self.spelled(ids).decode("utf-8", errors="replace")

    def spelled(self, ids: Sequence[int]) -> bytes:
        """The bytes of `text`; those of a single id may be part of a character."""
        return b"".join(self.pieces[i] for i in ids if i not in self._hidden)


def whole_characters(spelled: bytes, *, ended: bool) -> tuple[str, bytes]:
    """The text of some bytes, as in `Vocabulary.text`, and the bytes at the end that start a character.

    `ended`: nothing follows, so these bytes are broken UTF-8 as well, and none are left.
    """
    text, used = codecs.utf_8_decode(spelled, "replace", ended)
    return text, spelled[used:]


class TextEncoder(Protocol):
    """What an answer needs of a tokenizer."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text, never a tag's id; `vocabulary.text` returns the same text.

        Raises TextError for half a character, and for one that the vocabulary cannot spell.
        """


class Tokenizer(TextEncoder, Protocol):
    """What the rest of the package needs of a tokenizer."""

    def encode_prompt(self, prompt: str) -> list[int]:
        """Ids of a prompt, up to where the model's answer starts. Raises ValueError if it is empty."""

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """As `encode_prompt`, for a conversation: a list of {"role": ..., "content": ...} (see `tokens.chat`).

        Raises ValueError if it is no such list, or does not end with a message of the user.
        """

    def to_bytes(self) -> bytes:
        """The tokenizer as bytes, for the checkpoint; `tokenizer_from_bytes` reads them."""

    def with_dialect(self, dialect: tags.Dialect) -> Tokenizer:
        """The same tokenizer with the tags of `dialect`; the default is `pasta`."""


def _kind_of_text(piece: bytes) -> Kind:
    if re.fullmatch(rb"[0-9]", piece):
        return Kind.ZERO if piece == b"0" else Kind.DIGIT
    forbidden = tags.TOPIC_FORBIDS.encode()
    return Kind.TEXT if not piece or any(byte in forbidden for byte in piece) else Kind.TOPIC
