"""Tokenizers from files, Hugging Face folders and checkpoints."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from pasta_jax.tokens.base import TextTokenizer, unpack
from pasta_jax.tokens.hf import HfTokenizer
from pasta_jax.tokens.sentence_piece import SentencePieceTokenizer
from pasta_jax.tokens.tokenizer import TokenizerError
from pasta_jax.tokens.usage import Hints

TAGS_FILE = "pasta_tags.json"
"""The file of an exported folder with the id of each tag piece."""

FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    TAGS_FILE,
)
"""The files of a folder that are read, besides the size of the vocabulary in config.json."""


def load_tokenizer(
    path: str | os.PathLike[str], *, extend: bool = False, chat: str = "auto", vocab_size: int | None = None
) -> TextTokenizer:
    """A tokenizer from a SentencePiece model, a `tokenizer.json`, or a Hugging Face folder with either.

    In a folder, `tokenizer.model` is preferred if it is a SentencePiece model, since that needs no extra package.

    Args:
      path: file or folder.
      extend: tags for which the vocabulary has no free id get new ones after its end.
      chat: the format of prompts, one of `chat.CHATS`. `auto` decides by a folder's chat template (`plain` if it
        has none), and by the control tokens of a single file.
      vocab_size: rows of the model's embedding; those past the tokenizer's end are free for tags. By default
        taken from the folder's config.json.

    Raises:
      TokenizerError: the message names the file and says what to do.
    """
    path = pathlib.Path(path)
    try:
        if path.is_dir():
            files = {name: (path / name).read_bytes() for name in FILES if (path / name).is_file()}
            if vocab_size is None and (path / "config.json").is_file():
                files["config.json"] = (path / "config.json").read_bytes()
        else:
            files = {path.name: path.read_bytes()}
    except OSError as error:
        raise TokenizerError(f"Cannot read the tokenizer {path}: {error.strerror}.") from error
    try:
        if path.is_dir():
            return tokenizer_from_files(files, extend=extend, chat=chat, vocab_size=vocab_size)
        hints = Hints(vocab_size=vocab_size or 0)
        kind = HfTokenizer if path.suffix == ".json" else SentencePieceTokenizer
        return kind(files[path.name], extend=extend, chat=chat, hints=hints)
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error}") from error


def tokenizer_from_files(
    files: Mapping[str, bytes], *, extend: bool = False, chat: str = "auto", vocab_size: int | None = None
) -> TextTokenizer:
    """As `load_tokenizer`, for a folder's files by name (FILES, config.json); errors name the file."""
    model, hf = files.get("tokenizer.model"), files.get("tokenizer.json")
    if model is None and hf is None:
        raise TokenizerError("There is neither a tokenizer.model nor a tokenizer.json in it.")
    hints = read_hints(files, vocab_size)
    if model is not None:
        try:
            return SentencePieceTokenizer(model, extend=extend, chat=chat, hints=hints)
        except TokenizerError as error:
            # Other formats have the same file name, tiktoken's for one.
            if hf is None or not str(error).startswith("Not a SentencePiece model"):
                raise TokenizerError(f"tokenizer.model: {error}") from error
    assert hf is not None
    try:
        return HfTokenizer(hf, extend=extend, chat=chat, hints=hints)
    except TokenizerError as error:
        raise TokenizerError(f"tokenizer.json: {error}") from error


def tokenizer_from_bytes(data: bytes) -> TextTokenizer:
    """The tokenizer that `to_bytes` wrote.

    Raises:
      TokenizerError: the data is damaged, or needs a package that is not installed.
    """
    kind, model, usage = unpack(data)
    for known in (SentencePieceTokenizer, HfTokenizer):
        if kind == known.kind:
            return known(model, usage=usage)
    raise TokenizerError(f"The saved tokenizer is of the kind {kind!r}, which this pasta_jax does not know.")


def read_hints(files: Mapping[str, bytes], vocab_size: int | None = None) -> Hints:
    """The hints in the files beside a tokenizer."""
    parsed = {name: _json(name, data) for name, data in files.items() if name.endswith(".json")}
    config, names = parsed.get("tokenizer_config.json", {}), parsed.get("special_tokens_map.json", {})

    def name_of(role: str) -> str | None:
        entry = config.get(role) or names.get(role)
        entry = entry.get("content") if isinstance(entry, dict) else entry
        return entry if isinstance(entry, str) else None

    ends = parsed.get("generation_config.json", {}).get("eos_token_id")
    model = parsed.get("config.json", {})
    rows = model.get("vocab_size") or model.get("text_config", {}).get("vocab_size") or 0
    begins = config.get("add_bos_token")
    size = vocab_size if vocab_size is not None else int(rows)
    declared = _added(config, parsed.get("added_tokens.json", {}))
    return Hints(
        template=_template(files, parsed),
        bos=name_of("bos_token"),
        eos=name_of("eos_token"),
        pad=name_of("pad_token"),
        begins=begins if isinstance(begins, bool) else None,
        ends=tuple(i for i in (ends if isinstance(ends, list) else [ends]) if isinstance(i, int)),
        vocab_size=size,
        tag_ids=parsed.get(TAGS_FILE),
        # Gemma 3's text model has no row for the image token that its files declare.
        added={i: name for i, name in declared.items() if not size or i < size},
    )


def _json(name: str, data: bytes) -> dict[str, Any]:
    if name == "tokenizer.json":  # large, and read elsewhere
        return {}
    try:
        parsed = json.loads(data)
    except ValueError as error:
        raise TokenizerError(f"{name} is no JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise TokenizerError(f"{name} holds no JSON object.")
    return parsed


def _template(files: Mapping[str, bytes], parsed: Mapping[str, dict[str, Any]]) -> str:
    """The folder's chat template; "" if it has none."""
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode("utf-8", errors="replace")
    for name in ("tokenizer_config.json", "chat_template.json"):
        template = parsed.get(name, {}).get("chat_template")
        if isinstance(template, list):  # several with names
            by_name = {entry["name"]: entry["template"] for entry in template}
            template = by_name.get("default") or next(iter(by_name.values()), "")
        if isinstance(template, str):
            return template
    return ""


def _added(config: Mapping[str, Any], added: Mapping[str, Any]) -> dict[int, str]:
    """Names by id of the tokens that are declared beside the tokenizer's file."""
    declared = config.get("added_tokens_decoder") or {}
    return {int(i): name for name, i in added.items()} | {int(i): t["content"] for i, t in declared.items()}
