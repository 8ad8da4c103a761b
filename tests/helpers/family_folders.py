"""A folder for each published family's kind of tokenizer (`family_tokenizers`), loaded; and conversations."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable

from pasta_jax.lang.grammar import Kind
from pasta_jax.tokens import export
from pasta_jax.tokens.base import TextTokenizer
from pasta_jax.tokens.load import tokenizer_from_files
from pasta_jax.tokens.sentence_piece_json import sentencepiece_as_json
from tests.helpers import family_tokenizers as made

ROOM = 8
CONTROL = frozenset(Kind) - {Kind.TEXT, Kind.TOPIC, Kind.ZERO, Kind.DIGIT}
"""The kinds of ids that text never has."""


def rows(tokenizer_json: bytes) -> int:
    """Rows of an embedding with room for the tags."""
    told = json.loads(tokenizer_json)
    return max(token["id"] for token in told["added_tokens"]) + 1 + ROOM


@functools.cache
def gemma_json() -> bytes:
    """Gemma's tokenizer.json, as made from its SentencePiece model; it does not call the markers special."""
    told = sentencepiece_as_json(made.gemma(), {})
    for token in told["added_tokens"]:
        token["special"] &= not token["content"].startswith("<unused")
    return json.dumps(told).encode()


FOLDERS: dict[str, Callable[[], dict[str, bytes]]] = {
    "gemma": lambda: {"tokenizer.model": made.gemma(), **made.folder(made.GEMMA3, eos_token="<eos>")},
    "gemma base": lambda: {"tokenizer.model": made.gemma(), **made.folder()},
    "gemma json": lambda: {
        "tokenizer.json": gemma_json(),
        **made.folder(made.GEMMA3, bos_token="<bos>", eos_token="<eos>"),
    },
    "mistral 3": lambda: {"tokenizer.model": made.mistral3(), **made.folder(made.MISTRAL3)},
    "mistral nemo": lambda: {
        "tokenizer.json": made.nemo(),
        **made.folder(made.NEMO, bos_token="<s>", eos_token="</s>"),
    },
    "ministral": lambda: {
        "tokenizer.json": made.nemo(),
        **made.folder(made.MINISTRAL, bos_token="<s>", eos_token="</s>"),
    },
    "llama 3": lambda: {"tokenizer.json": made.llama3(), **made.folder(made.LLAMA3, eos_token="<|eot_id|>")},
    "llama 3.1": lambda: {
        "tokenizer.json": made.llama3(),
        **made.folder(made.LLAMA31, eos_token="<|eot_id|>"),
    },
    "qwen 2.5": lambda: {
        "tokenizer.json": made.qwen(),
        **made.folder(made.QWEN25, rows=rows(made.qwen()), eos_token="<|im_end|>", bos_token=None),
    },
    "qwen 3": lambda: {
        "tokenizer.json": made.qwen(),
        **made.folder(made.QWEN3, rows=rows(made.qwen()), eos_token="<|im_end|>", bos_token=None),
    },
}
EXTENDED: dict[str, Callable[[], dict[str, bytes]]] = {
    "llama 2": lambda: {"tokenizer.model": made.llama2(), **made.folder(made.LLAMA2)},
    "mistral 1": lambda: {"tokenizer.model": made.llama2(), **made.folder(made.MISTRAL1)},
}
ALL = (*FOLDERS, *EXTENDED)


@functools.cache
def tokenizer(name: str) -> TextTokenizer:
    if name in EXTENDED:
        return tokenizer_from_files(EXTENDED[name](), extend=True)
    return tokenizer_from_files(FOLDERS[name]())


def names_of(name: str) -> dict[int, str]:
    """How each control id is spelled."""
    files = (FOLDERS | EXTENDED)[name]()
    if "tokenizer.json" in files:
        return {i: piece for piece, i in export._names(json.loads(files["tokenizer.json"])).items()}
    sp = made.sentencepiece.SentencePieceProcessor(model_proto=files["tokenizer.model"])
    return {i: sp.IdToPiece(i) for i in range(sp.GetPieceSize())}
