"""What a vocabulary and a tokenizer are to the rest of the system.

Text is encoded run by run, between tags, and must come back exactly: no prefix space, no normalisation that
drops anything. Each fixed piece of a tag is one id. Ordinary text never encodes to a tag's id nor to any other
control id, whatever it spells.
"""

from __future__ import annotations

import codecs
import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from pasta_jax.lang import tags
from pasta_jax.lang.grammar import Kind

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
"""What the tag pieces are in each dialect; those that it lacks are control symbols there."""


class TokenizerError(ValueError):
    """A tokenizer that cannot serve, and what to do about it."""


class MissingPackage(TokenizerError):
    """A tokenizer that may be good, but whose format needs a package that is not installed."""


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What layout and interpreter need to know of a vocabulary; all ids.

    Attributes:
      pieces: bytes of each id, tag pieces and control symbols included, V of them.
      tag_ids: id of each piece in `tags.PIECES`.
      pad, eos, bos: control ids. `eos` is what training writes at the end of an answer: the end of a turn where
        the family has one. `bos` begins a document; where a family has none, it is what ends its texts.
      control: all ids that are never part of an answer's text (pad, bos, turn markers, ...), but `stops`.
      dialect: which tags there are; `with_dialect` changes it.
      ends: ids that end an answer too, though training does not write them.
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
        """The same ids, read as the tags of a dialect. `apar` takes the id of ` />` for its `<promise/>`."""
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
        """int32 [V]: the class of each id for the tag grammar, a `Kind`."""
        kinds = np.array([_kind_of_text(piece) for piece in self.pieces], np.int32)
        for i in self.control:
            kinds[i] = Kind.CONTROL
        for piece, i in self.tag_ids.items():
            kinds[i] = _TAG_KINDS[self.dialect].get(piece, Kind.CONTROL)
        kinds[list(self.stops)] = Kind.END
        return kinds

    @functools.cached_property
    def digit_values(self) -> np.ndarray:
        """int32 [V]: the value of the ids that are one digit, 0 elsewhere."""
        return np.array([int(p) if re.fullmatch(rb"[0-9]", p) else 0 for p in self.pieces], np.int32)

    @functools.cached_property
    def digits(self) -> tuple[int, ...]:
        """The ids of "0" to "9"."""
        found = {piece: i for i, piece in enumerate(self.pieces)}  # the last: byte-fallback ids come first
        missing = [d for d in range(10) if b"%d" % d not in found]
        if missing:
            raise TokenizerError(
                f"This tokenizer has no id for the digits {missing}; promises cannot be written."
            )
        return tuple(found[b"%d" % d] for d in range(10))

    def text(self, ids: Sequence[int]) -> str:
        """The text that ids spell, tag pieces literally; broken UTF-8 becomes U+FFFD.

        Control symbols spell nothing.
        """
        return self.spelled(ids).decode("utf-8", errors="replace")

    def spelled(self, ids: Sequence[int]) -> bytes:
        """The bytes of `text`; those of a few ids may be part of a character."""
        return b"".join(self.pieces[i] for i in ids if i not in self._hidden)


def whole_characters(spelled: bytes, *, ended: bool) -> tuple[str, bytes]:
    """The text of some bytes, as `Vocabulary.text` has it, and the bytes at the end that begin a character.

    `ended`: nothing follows, so those are broken UTF-8 too, and none are left.
    """
    text, used = codecs.utf_8_decode(spelled, "replace", ended)
    return text, spelled[used:]


class Tokenizer(Protocol):
    """What the rest of the system asks of a tokenizer."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text; never a tag's id; `vocabulary.text` gives the text back."""

    def encode_prompt(self, prompt: str) -> list[int]:
        """Ids of a prompt, with whatever tells the model that it is its turn. Errors: ValueError if empty."""

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """As `encode_prompt`, of a conversation: `{"role": ..., "content": ...}` each (see `tokens.chat`).

        Errors: ValueError if it is none, or one that does not end with the user.
        """

    def to_bytes(self) -> bytes:
        """All that is needed to build the same tokenizer again, for the checkpoint (`tokenizer_from_bytes`)."""

    def with_dialect(self, dialect: tags.Dialect) -> Tokenizer:
        """The same tokenizer for a model that speaks `dialect`; a new one speaks `pasta`."""


def _kind_of_text(piece: bytes) -> Kind:
    if re.fullmatch(rb"[0-9]", piece):
        return Kind.ZERO if piece == b"0" else Kind.DIGIT
    forbidden = tags.TOPIC_FORBIDS.encode()
    return Kind.TEXT if not piece or any(byte in forbidden for byte in piece) else Kind.TOPIC
