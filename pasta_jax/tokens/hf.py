"""Hugging Face `tokenizer.json` files, by the `tokenizers` package (the extra `[hf]`): Llama 3, Qwen, and others.

A file is used as it is but for what would lose text: Unicode normalisation (Qwen's NFC), a space put before text,
white space swallowed by added tokens. Text that such a step leaves alone, nearly all, gets the ids that it has
elsewhere.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from pasta_jax.tokens.base import SPACE, TextTokenizer
from pasta_jax.tokens.tokenizer import MissingPackage, TokenizerError
from pasta_jax.tokens.usage import MARKER, Symbols


class HfTokenizer(TextTokenizer):
    """A `tokenizer.json`, loaded from bytes; see `TextTokenizer`.

    Byte-level BPE (Llama 3, Qwen) and what is made from SentencePiece models (Gemma, Llama 2, Mistral).
    """

    kind = "tokenizers"

    def _open(self, added: Mapping[int, str]) -> Symbols:
        try:
            tokenizers: Any = importlib.import_module("tokenizers")
        except ImportError as error:
            raise MissingPackage(
                'Reading tokenizer.json needs the tokenizers package: pip install -e ".[hf]".'
            ) from error
        try:
            told = json.loads(self.model)
            vocab, extra = told["model"]["vocab"], told.get("added_tokens") or []
            if isinstance(vocab, list):  # Unigram: pieces with their scores
                vocab = {piece: i for i, (piece, _) in enumerate(vocab)}
            special = {int(t["id"]) for t in extra if t["special"] or MARKER.fullmatch(t["content"])}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TokenizerError(
                f"Not a tokenizer.json of Hugging Face: {type(error).__name__}: {error}"
            ) from error
        names = {**{name: int(i) for name, i in vocab.items()}, **{t["content"]: int(t["id"]) for t in extra}}
        own = set(names.values())
        added = {i: name for i, name in added.items() if i not in own and name not in names}
        names |= {name: i for i, name in added.items()}
        byte_level = any(step.get("type") == "ByteLevel" for step in _steps(told, "pre_tokenizer", "decoder"))
        unknown = told["model"].get("unk_token")
        special |= {names[unknown]} if unknown in names else set()

        size = max(names.values()) + 1
        pieces: list[bytes | None] = [None] * size
        for name, i in vocab.items():
            pieces[i] = _bytes_of(name, byte_level)
        for token in extra:
            written = token["content"] if byte_level else token["content"].replace(SPACE, " ")
            pieces[token["id"]] = written.encode()
        special |= {i for i, piece in enumerate(pieces) if piece is None}  # ids that the file does not have
        spelled = tuple(b"" if i in special else piece or b"" for i, piece in enumerate(pieces))

        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(_faithful(told)))
        except Exception as error:  # the package raises plain Exception
            raise TokenizerError(f"Not a tokenizer.json of Hugging Face: {error}") from error
        begins = self._tokenizer.encode("", add_special_tokens=True).ids
        return Symbols(
            pieces=spelled,
            names=names,
            special=frozenset(special),
            bos=begins[0] if begins else None,
            begins=bool(begins),
            marks_spaces=not byte_level,
            added=added,
        )

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def _steps(told: Mapping[str, Any], *parts: str) -> Iterator[dict[str, Any]]:
    """The steps of normaliser, pre-tokenizer or decoder, those of sequences one by one."""
    waiting = [told.get(part) for part in parts]
    while waiting:
        if step := waiting.pop():
            yield step
            for inner in ("normalizers", "pretokenizers", "decoders"):
                waiting += step.get(inner, [])


def _faithful(told: dict[str, Any]) -> dict[str, Any]:
    """The file without what would lose text."""
    told = json.loads(json.dumps({**told, "model": {}})) | {"model": told["model"]}
    told |= {"truncation": None, "padding": None}
    told["normalizer"] = _kept(told.get("normalizer"))
    for step in _steps(told, "pre_tokenizer"):
        if step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
            step.pop("add_prefix_space", None)
        elif step["type"] == "ByteLevel":
            step["add_prefix_space"] = False
    for token in told.get("added_tokens") or []:
        token |= {"lstrip": False, "rstrip": False}
    return told


def _kept(step: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normaliser without Unicode normalisation and without a prefix; what is left is tried out on texts."""
    if step is None or step["type"] in ("NFC", "Prepend"):
        return None
    if step["type"] == "Sequence":
        inner = [kept for each in step["normalizers"] if (kept := _kept(each)) is not None]
        return {"type": "Sequence", "normalizers": inner} if inner else None
    return step


def _bytes_of(piece: str, byte_level: bool) -> bytes:
    if byte_level:
        return b"".join(_BYTES[c] if c in _BYTES else c.encode() for c in piece)
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(SPACE, " ").encode()


def _byte_alphabet() -> dict[str, bytes]:
    """The characters that stand for bytes in byte-level vocabularies (GPT-2, `bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): bytes([byte]) for byte in printable}
    return letters | {chr(256 + n): bytes([byte]) for n, byte in enumerate(others)}


_BYTES = _byte_alphabet()
