"""Tokenizers: text to ids and back without loss, and one id for each fixed piece of a tag.

Text is encoded run by run, between tags, and must come back exactly: no prefix space, no normalisation that
drops anything. Ordinary text never encodes to a tag's id, whatever it spells, since tags are control symbols.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import re
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import sentencepiece

from pasta_jax.lang import tags
from pasta_jax.lang.grammar import Kind

USER_TURN, MODEL_TURN = "<user>", "<model>"

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


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What layout and interpreter need to know of a vocabulary; all ids.

    Attributes:
      pieces: bytes of each id, tag pieces and control symbols included, V of them.
      tag_ids: id of each piece in `tags.PIECES`.
      pad, eos, bos: control ids.
      control: all ids that are never part of an answer's text (pad, bos, turn markers, ...), eos excepted.
      dialect: which tags there are; `with_dialect` changes it.
    """

    pieces: tuple[bytes, ...]
    tag_ids: dict[str, int]
    pad: int
    eos: int
    bos: int
    control: frozenset[int]
    dialect: tags.Dialect = "pasta"

    def with_dialect(self, dialect: tags.Dialect) -> Vocabulary:
        """The same ids, read as the tags of a dialect. `apar` takes the id of ` />` for its `<promise/>`."""
        pieces = list(self.pieces)
        shared = tags.FORK if dialect == "apar" else tags.PROMISE_CLOSE
        pieces[self.tag_ids[tags.PROMISE_CLOSE]] = shared.encode()
        return dataclasses.replace(self, pieces=tuple(pieces), dialect=dialect)

    def __len__(self) -> int:
        return len(self.pieces)

    @functools.cached_property
    def kinds(self) -> np.ndarray:
        """int32 [V]: the class of each id for the tag grammar, a `Kind`."""
        kinds = np.array([_kind_of_text(piece) for piece in self.pieces], np.int32)
        for i in self.control:
            kinds[i] = Kind.CONTROL
        for piece, i in self.tag_ids.items():
            kinds[i] = _TAG_KINDS[self.dialect].get(piece, Kind.CONTROL)
        kinds[self.eos] = Kind.END
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
        hidden = self.control | {self.eos}
        return b"".join(self.pieces[i] for i in ids if i not in hidden).decode("utf-8", errors="replace")


class Tokenizer(Protocol):
    """What the rest of the system asks of a tokenizer."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text; never a tag's id; `vocabulary.text` gives the text back."""

    def encode_prompt(self, prompt: str) -> list[int]:
        """Ids of a prompt, with whatever tells the model that it is its turn. Errors: ValueError if empty."""

    def to_bytes(self) -> bytes:
        """All that is needed to build the same tokenizer again, for the checkpoint."""


def _kind_of_text(piece: bytes) -> Kind:
    if re.fullmatch(rb"[0-9]", piece):
        return Kind.ZERO if piece == b"0" else Kind.DIGIT
    forbidden = tags.TOPIC_FORBIDS.encode()
    return Kind.TEXT if not piece or any(byte in forbidden for byte in piece) else Kind.TOPIC


_FENCE = "\x02"
"""A character that no vocabulary merges with its neighbours: what stands before it (SentencePiece's dummy
prefix) is cut off with it."""


class SentencePieceTokenizer:
    """A SentencePiece model, loaded from bytes.

    Args:
      model: the serialised model.
      extend: give tags that the vocabulary lacks, or has as ordinary text, new ids after its end (the embedding
        must then be that much larger). Otherwise such a vocabulary is an error.

    Raises:
      TokenizerError: not a SentencePiece model, no ids for the tags, or text would not come back.
    """

    def __init__(self, model: bytes, *, extend: bool = False):
        self._bytes = model
        try:
            self._sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        except Exception as error:
            raise TokenizerError(f"Not a SentencePiece model: {error}") from error
        self._ids = {self._sp.IdToPiece(i): i for i in range(self._sp.GetPieceSize())}
        self._fence = self._sp.EncodeAsIds(_FENCE)
        if not any(self._sp.IdToPiece(i).strip("\u2581") for i in self._fence):  # at most the dummy prefix
            raise TokenizerError(
                "This tokenizer drops control characters, so text would not come back as it was. "
                "Train one with normalization_rule_name=identity."
            )
        self.vocabulary = self._read_vocabulary(extend)

    def _read_vocabulary(self, extend: bool) -> Vocabulary:
        sp, size = self._sp, self._sp.GetPieceSize()
        pieces = [self._piece_bytes(i) for i in range(size)]
        tag_ids = {
            piece: self._ids[piece]
            for piece in tags.PIECES
            if piece in self._ids and sp.IsControl(self._ids[piece])
        }
        missing = [piece for piece in tags.PIECES if piece not in tag_ids]
        if missing and not extend:
            if missing[0] in self._ids:
                fault = f"{missing[0]!r} is no control symbol, so text that spells it would become the tag"
            else:
                fault = f"it splits {missing[0]!r} into {len(sp.EncodeAsPieces(missing[0]))} pieces"
            raise TokenizerError(
                f"This tokenizer has no id for {len(missing)} of the {len(tags.PIECES)} tag pieces; {fault}. "
                "Train one with the tags as control symbols, or load this one with extend=True "
                "(--config.data.extend_tokenizer=true), which adds ids after its end."
            )
        for piece in missing:
            tag_ids[piece] = len(pieces)
            pieces.append(piece.encode())
        for piece, i in tag_ids.items():
            pieces[i] = piece.encode()
        eos, bos, pad = sp.eos_id(), sp.bos_id(), max(sp.pad_id(), 0)
        if min(eos, bos) < 0:
            raise TokenizerError(
                "This tokenizer lacks an end-of-text or a begin-of-text id; answers could not end."
            )
        control = (
            {i for i in range(size) if sp.IsControl(i) or sp.IsUnknown(i)} - set(tag_ids.values()) - {eos}
        )
        return Vocabulary(tuple(pieces), tag_ids, pad, eos, bos, frozenset(control | {pad, bos}))

    def _piece_bytes(self, i: int) -> bytes:
        piece = self._sp.IdToPiece(i)
        if self._sp.IsByte(i):
            return bytes([int(piece[3:5], 16)])
        if self._sp.IsControl(i) or self._sp.IsUnknown(i):
            return b""
        return piece.replace("\u2581", " ").encode()

    def encode(self, text: str) -> list[int]:
        if not text:
            return []
        return self._sp.EncodeAsIds(_FENCE + text)[len(self._fence) :]

    def encode_prompt(self, prompt: str) -> list[int]:
        if not prompt.strip():
            raise ValueError("The prompt is empty. Give the model something to answer.")
        bos = self.vocabulary.bos
        if USER_TURN in self._ids and MODEL_TURN in self._ids:
            return [bos, self._ids[USER_TURN], *self.encode(prompt), self._ids[MODEL_TURN]]
        return [bos, *self.encode(prompt + "\n")]

    def to_bytes(self) -> bytes:
        return self._bytes

    def with_dialect(self, dialect: tags.Dialect) -> SentencePieceTokenizer:
        """The same tokenizer for a model that speaks `dialect`; a new one speaks `pasta`."""
        other = copy.copy(self)
        other.vocabulary = self.vocabulary.with_dialect(dialect)
        return other


def load_tokenizer(path: str | os.PathLike[str], *, extend: bool = False) -> SentencePieceTokenizer:
    """A SentencePiece model file; errors name the file."""
    try:
        with open(path, "rb") as file:
            return SentencePieceTokenizer(file.read(), extend=extend)
    except OSError as error:
        raise TokenizerError(f"Cannot read the tokenizer {os.fspath(path)}: {error.strerror}.") from error
    except TokenizerError as error:
        raise TokenizerError(f"{os.fspath(path)}: {error}") from error
