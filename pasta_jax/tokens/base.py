"""What tokenizers of all file formats share: text decodes to itself, and never becomes a control token."""

from __future__ import annotations

import abc
import copy
import dataclasses
import functools
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

from pasta_jax.foreign import parse_object
from pasta_jax.lang import tags
from pasta_jax.messages import message_of
from pasta_jax.tokens import chat as chats
from pasta_jax.tokens.tokenizer import TextError, TokenizerError, check_text, place_in
from pasta_jax.tokens.usage import Hints, Symbols, Usage, settle, vocabulary_of

MAGIC = b"pasta_jax tokenizer 1\n"
"""`to_bytes` starts with this; a line of JSON and the compressed file follow."""

SPACE = "\u2581"
"""SentencePiece writes it for a space; the same character in text must not become a space."""

_SETS = ("ends", "lstrip", "rstrip")
"""The fields of `Usage` that JSON holds as lists; checkpoints of earlier code lack the last two."""

_OF_UTF8 = frozenset(range(256)) - {0xC0, 0xC1, *range(0xF5, 0x100)}
"""The bytes that text has."""

_PROBES = (
    "  two  spaces,\ttabs\r\n\r\nand lines \n",
    "e\u0301 \u00e9 \ufb01 \u212b \uff21 \u1e9b\u0323",  # what NFC, NFKC or case folding would change
    "\u6771\u4eac \U0001f30d\u200d \u00a0\u2028\x00\x02\x7f",
    f"{SPACE}a {SPACE}{SPACE} 0123456789 1,234.5",
    "<s> </s> <unk> <0x41> [INST] <|im_end|>",
)
"""Texts that a lossy tokenizer changes."""


class TextTokenizer(abc.ABC):
    """A tokenizer made from a file's bytes (`tokenizer.Tokenizer`).

    Args:
      model: the file.
      extend: tags for which the vocabulary has no free ids get new ones after its end; the embedding must grow by
        as many rows. Without it such a vocabulary is an error.
      chat: the format of prompts, one of `chat.CHATS`; `auto` decides by template and vocabulary.
      hints: what the files beside it say.
      usage: of a tokenizer that was saved; then the other options are not used.

    Raises:
      TokenizerError: the file is of another format, has no ids for the tags or the chat format, or loses text.
    """

    kind: ClassVar[str]

    def __init__(
        self,
        model: bytes,
        *,
        extend: bool = False,
        chat: str = "auto",
        hints: Hints = Hints(),
        usage: Usage | None = None,
    ):
        self.model = model
        symbols = self._open(hints.added if usage is None else usage.added)
        self.usage = usage or settle(
            symbols, hints, extend=extend, chat=chat, splits=lambda text: len(self._encode(text))
        )
        self.vocabulary = vocabulary_of(symbols, self.usage)
        self._names = names = symbols.names
        self._marks = {chats.Mark(name): names[name] for name in chats.FORMATS[self.usage.chat].needs}
        self._marks |= {chats.BOS: self.vocabulary.bos, chats.EOS: self.vocabulary.eos}
        never = symbols.special | set(self.usage.tag_ids.values()) | self.vocabulary.stops
        self._never = {i: name.replace(SPACE, " ") for name, i in names.items() if i in never}
        spelled = [symbols.pieces.index(bytes([b])) for b in SPACE.encode() if bytes([b]) in symbols.pieces]
        self._space = spelled if symbols.marks_spaces and len(spelled) == len(SPACE.encode()) else None
        # SmolLM2's lacks rare ones: some control characters, and the first bytes of U+40000 to U+BFFFF.
        self._lacking = _OF_UTF8 - {piece[0] for piece in symbols.pieces if len(piece) == 1}
        for text in _PROBES:
            if (back := self.vocabulary.text(self._encode_whole(text))) != text:
                raise TokenizerError(
                    f"This tokenizer does not preserve text: {text!r} becomes {back!r}. Use one that keeps every "
                    "character (byte-level, or with byte fallback and no normalisation)."
                )

    @abc.abstractmethod
    def _open(self, added: Mapping[int, str]) -> Symbols:
        """Reads `self.model`; `added` names more of its ids."""

    @abc.abstractmethod
    def _encode(self, text: str) -> list[int]:
        """The ids of a text that is not empty, by the file's own rules: no bos, no eos, no prefix space."""

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text, never those of tags or control tokens, whatever the text spells.

        Raises TextError for half a character, and for one that the vocabulary cannot spell: no text is lost.
        """
        check_text(text)
        ids = self._encode_whole(text)
        doubtful = self._lacking and not self._lacking.isdisjoint(text.encode())
        if doubtful and self.vocabulary.text(ids) != text:
            at = next(i for i, c in enumerate(text) if self.vocabulary.text(self._encode_whole(c)) != c)
            fault = f"The text holds U+{ord(text[at]):04X}, which this tokenizer has no ids for"
            raise TextError(f"{fault}, {place_in(text, at)}. Remove it.")
        return ids

    def _encode_whole(self, text: str) -> list[int]:
        if self._space is None or SPACE not in text:
            return self._encode_as_text(text)
        first, *others = text.split(SPACE)
        ids = self._encode_as_text(first)
        for part in others:
            ids += [*self._space, *self._encode_as_text(part)]
        return ids

    def _encode_as_text(self, text: str) -> list[int]:
        if not text:
            return []
        ids = self._encode(text)
        spelled = {self._never[i] for i in set(ids) if i in self._never}
        if not spelled or len(text) == 1:
            return ids
        # The file reads some control tokens in text: their names are cut in two, after the first letter.
        pattern = "|".join(re.escape(name) for name in sorted(spelled, key=len, reverse=True) if name)
        cuts = [match.start() + 1 for match in re.finditer(pattern, text)] if pattern else []
        cuts = [cut for cut in cuts if cut < len(text)] or [*range(1, len(text))]
        pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)])]
        return [i for piece in pieces for i in self._encode_as_text(piece)]

    def encode_prompt(self, prompt: str) -> list[int]:
        """Ids of one message of the user in the chat format, up to where the answer starts.

        Raises ValueError if it is empty.
        """
        return self.encode_chat([{"role": "user", "content": prompt}])

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of a conversation (`chat.dialogue`) in the chat format, up to where the answer starts."""
        usage, ids, text = self.usage, list[int](), ""
        parts = chats.FORMATS[usage.chat].render(chats.dialogue(messages), usage.opening)
        lstrip, rstrip = ([m for m, i in self._marks.items() if i in s] for s in (usage.lstrip, usage.rstrip))
        for part in chats.stripped(parts, lstrip, rstrip):
            if isinstance(part, str):
                text += part  # a run between control tokens is encoded as a whole, like the template's text
                continue
            ids += self.encode(text)
            text = ""
            if part == chats.BOS and usage.chat == "plain" and not usage.begins:
                continue
            ids.append(self._marks[part])
        return ids + self.encode(text)

    @property
    def marks(self) -> frozenset[int]:
        """The ids of control tokens that the chat format may write."""
        return frozenset(self._marks.values())

    @functools.cached_property
    def _bytes(self) -> bytes:
        usage = dataclasses.asdict(self.usage)
        usage |= {name: sorted(usage[name]) for name in _SETS}
        head = json.dumps({"kind": self.kind, "usage": usage}, sort_keys=True)
        return MAGIC + head.encode() + b"\n" + zlib.compress(self.model)

    def to_bytes(self) -> bytes:
        """The tokenizer as bytes; `load.tokenizer_from_bytes` reads them."""
        return self._bytes

    def with_dialect(self, dialect: tags.Dialect) -> Self:
        """The same tokenizer with the tags of `dialect`; the default is `pasta`."""
        other = copy.copy(self)
        other.vocabulary = self.vocabulary.with_dialect(dialect)
        return other

    def chat_of(self, template: str) -> tuple[str, str]:
        """The format that `auto` chooses for a chat template (`chat.choose`). Raises TokenizerError."""
        return chats.choose("auto", self._names.keys(), template)

    def with_chat(self, chat: str) -> Self:
        """The same tokenizer with prompts in another format. Raises TokenizerError like the constructor."""
        usage = self.usage
        hints = Hints(
            bos=next(name for name, i in self._names.items() if i == usage.bos),
            begins=usage.begins,
            ends=(usage.eos, *sorted(usage.ends)),
            tag_ids=usage.tag_ids,
            added=usage.added,
            strips={i: (i in usage.lstrip, i in usage.rstrip) for i in usage.lstrip | usage.rstrip},
        )
        return type(self)(self.model, chat=chat, hints=hints).with_dialect(self.vocabulary.dialect)


def unpack(data: bytes) -> tuple[str, bytes, Usage]:
    """(kind, file, usage) of bytes that `to_bytes` wrote. Raises TokenizerError."""
    try:
        head, _, packed = data.removeprefix(MAGIC).partition(b"\n")
        fields = parse_object(head, "its head")
        usage = fields["usage"]
        usage |= {name: frozenset(usage.get(name, ())) for name in _SETS}
        usage["added"] = {int(i): name for i, name in usage["added"].items()}
        return fields["kind"], zlib.decompress(packed), Usage(**usage)
    except (ValueError, KeyError, TypeError, AttributeError, zlib.error) as error:
        raise TokenizerError(f"The saved tokenizer is damaged: {message_of(error)}") from error
