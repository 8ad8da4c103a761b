"""Hugging Face `tokenizer.json` files, by the `tokenizers` package (the extra `[hf]`): Llama 3, Qwen, and others.

Steps of a file that would lose text are left out: Unicode normalisation (Qwen's NFC), a space put before text,
white space removed around added tokens. They change little text, and all other text gets its usual ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pasta_jax.extras import optional
from pasta_jax.foreign import parse_object
from pasta_jax.messages import message_of, shown
from pasta_jax.tokens.base import SPACE, TextTokenizer
from pasta_jax.tokens.tokenizer import MissingPackage, TokenizerError, is_id, of_library
from pasta_jax.tokens.usage import MARKER, Symbols


class HfTokenizer(TextTokenizer):
    """A `tokenizer.json`, loaded from bytes; see `TextTokenizer`.

    Byte-level BPE (Llama 3, Qwen) and files converted from SentencePiece models (Gemma, Llama 2, Mistral).
    """

    kind = "tokenizers"

    def _open(self, added: Mapping[int, str]) -> Symbols:
        tokenizers = optional("tokenizers", "hf", "Reading tokenizer.json", MissingPackage)
        try:
            fields = parse_object(self.model, "it")
            vocab, extra = fields["model"]["vocab"], fields.get("added_tokens") or []
            if isinstance(vocab, list):  # Unigram: pieces with their scores
                vocab = {piece: i for i, (piece, _) in enumerate(vocab)}
            names = {**vocab, **{t["content"]: t["id"] for t in extra}}
            if wrong := [i for i in (*vocab.values(), *names.values()) if not is_id(i)]:
                raise ValueError(f"the id {shown(wrong[0])}")
            special = {t["id"] for t in extra if t["special"]}
            special |= {i for name, i in names.items() if MARKER.fullmatch(name)}
            lstrip, rstrip = ({t["id"] for t in extra if t.get(side)} for side in ("lstrip", "rstrip"))
            own = set(names.values())
            added = {i: name for i, name in added.items() if i not in own and name not in names}
            names |= {name: i for i, name in added.items()}
            byte_level = any(
                step.get("type") == "ByteLevel" for step in _steps(fields, "pre_tokenizer", "decoder")
            )
            unknown = fields["model"].get("unk_token")
            special |= {names[unknown]} if unknown in names else set()

            size = max(names.values()) + 1
            pieces: list[bytes | None] = [None] * size
            for name, i in vocab.items():
                pieces[i] = _bytes_of(name, byte_level)
            for token in extra:
                written = token["content"] if byte_level else token["content"].replace(SPACE, " ")
                pieces[token["id"]] = written.encode()
            special |= {i for i, piece in enumerate(pieces) if piece is None}  # ids that the file lacks
            spelled = tuple(b"" if i in special else piece or b"" for i, piece in enumerate(pieces))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise TokenizerError(f"Not a tokenizer.json of Hugging Face: {message_of(error)}") from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(_lossless(fields)))
        except Exception as error:  # the package raises plain Exception
            raise TokenizerError(f"Not a tokenizer.json of Hugging Face: {message_of(error)}") from error
        begins = of_library(self._tokenizer.encode, "", add_special_tokens=True).ids
        return Symbols(
            pieces=spelled,
            names=names,
            special=frozenset(special),
            bos=begins[0] if begins else None,
            begins=bool(begins),
            marks_spaces=not byte_level,
            added=added,
            lstrip=frozenset(lstrip),
            rstrip=frozenset(rstrip),
        )

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = of_library(self._tokenizer.encode, text, add_special_tokens=False).ids
        return ids


def _steps(fields: Mapping[str, Any], *parts: str) -> Iterator[dict[str, Any]]:
    """The steps of normaliser, pre-tokenizer or decoder; sequences are flattened."""
    waiting = [fields.get(part) for part in parts]
    while waiting:
        if step := waiting.pop():
            yield step
            for inner in ("normalizers", "pretokenizers", "decoders"):
                waiting += step.get(inner, [])


def _lossless(fields: dict[str, Any]) -> dict[str, Any]:
    """The file without the steps that would lose text."""
    fields = json.loads(json.dumps({**fields, "model": {}})) | {"model": fields["model"]}
    fields |= {"truncation": None, "padding": None}
    fields["normalizer"] = _lossless_normalizer(fields.get("normalizer"))
    for step in _steps(fields, "pre_tokenizer"):
        if step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
            step.pop("add_prefix_space", None)
        elif step["type"] == "ByteLevel":
            step["add_prefix_space"] = False
    for token in fields.get("added_tokens") or []:
        token |= {"lstrip": False, "rstrip": False}
    return fields


def _lossless_normalizer(step: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normaliser without Unicode normalisation and prefix; `TextTokenizer` tests what is left on texts."""
    if step is None or step["type"] in ("NFC", "Prepend"):
        return None
    if step["type"] == "Sequence":
        inner = [kept for part in step["normalizers"] if (kept := _lossless_normalizer(part)) is not None]
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
