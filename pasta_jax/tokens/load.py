"""Tokenizers from files, Hugging Face folders and checkpoints."""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from pasta_jax import gguf
from pasta_jax.foreign import Fields, parse_object, read_bytes
from pasta_jax.messages import message_of, shown
from pasta_jax.tokens.base import TextTokenizer, unpack
from pasta_jax.tokens.gguf import tokenizer_files
from pasta_jax.tokens.hf import HfTokenizer
from pasta_jax.tokens.sentence_piece import SentencePieceTokenizer
from pasta_jax.tokens.tokenizer import TokenizerError, is_id
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
"""The files of a folder that are read, besides vocabulary size and ends in config.json."""


def load_tokenizer(
    path: str | os.PathLike[str], *, extend: bool = False, chat: str = "auto", vocab_size: int | None = None
) -> TextTokenizer:
    """A tokenizer from a SentencePiece model, a `tokenizer.json`, a GGUF file, or a Hugging Face folder.

    In a folder, `tokenizer.model` is preferred if it is a SentencePiece model, since that needs no extra package.

    Args:
      path: file or folder.
      extend: tags for which the vocabulary has no free id get new ones after its end.
      chat: the format of prompts, one of `chat.CHATS`. `auto` decides by a folder's or a GGUF file's chat template
        (`plain` if it has none), and by the control tokens of another single file.
      vocab_size: rows of the model's embedding; those past the tokenizer's end are free for tags. By default
        taken from the folder's config.json, or the GGUF file's embedding.

    Raises:
      TokenizerError: the message names the file and says what to do.
    """
    path, single = pathlib.Path(path), False
    if path.is_dir():
        wanted = (*FILES, "config.json")
        files = {name: read_bytes(path / name, TokenizerError) for name in wanted if (path / name).is_file()}
    elif path.suffix == ".gguf":
        keys, tensors = gguf.read_file(os.fspath(path), TokenizerError)
        files = tokenizer_files(Fields(keys, os.fspath(path)))
        if vocab_size is None and (embedding := tensors.get("token_embd.weight")) is not None:
            vocab_size = embedding.shape[0]
    else:
        files, single = {path.name: read_bytes(path, TokenizerError)}, True
    try:
        if not single:
            return tokenizer_from_files(files, extend=extend, chat=chat, vocab_size=vocab_size)
        kind = HfTokenizer if path.suffix == ".json" else SentencePieceTokenizer
        hints = Hints(vocab_size=vocab_size or 0)
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
            try:
                return known(model, usage=usage)
            except TokenizerError:
                raise
            except (ValueError, LookupError, TypeError, AttributeError) as error:  # of what the usage says
                raise TokenizerError(f"The saved tokenizer is damaged: {message_of(error)}") from error
    raise TokenizerError(
        f"The saved tokenizer is of the kind {shown(kind)}, which this pasta_jax does not know."
    )


def read_hints(files: Mapping[str, bytes], vocab_size: int | None = None) -> Hints:
    """The hints in the files beside a tokenizer. Raises TokenizerError, which names the file."""
    parsed = {  # tokenizer.json is large, and read elsewhere
        name: parse_object(data, name, TokenizerError)
        for name, data in files.items()
        if name.endswith(".json") and name != "tokenizer.json"
    }
    config, names = parsed.get("tokenizer_config.json", {}), parsed.get("special_tokens_map.json", {})

    def name_of(role: str) -> str | None:
        entry = config.get(role) or names.get(role)
        entry = entry.get("content") if isinstance(entry, dict) else entry
        return entry if isinstance(entry, str) else None

    whole = Fields(parsed.get("config.json", {}), "config.json", error=TokenizerError)
    text = whole.inner("text_config")
    places = (parsed.get("generation_config.json", {}), whole.tree, text.tree)
    ends = next((ids for place in places if (ids := end_ids(place))), [])
    model = whole if whole["vocab_size"] else text
    begins = config.get("add_bos_token")
    size = model.size("vocab_size", default=0) if vocab_size is None else vocab_size
    declared = _added(config, parsed.get("added_tokens.json", {}))
    return Hints(
        template=_template(files, parsed),
        bos=name_of("bos_token"),
        eos=name_of("eos_token"),
        pad=name_of("pad_token"),
        begins=begins if isinstance(begins, bool) else None,
        ends=tuple(ends),
        vocab_size=size,
        tag_ids=parsed.get(TAGS_FILE),
        # Gemma 3's text model has no row for the image token that its files declare.
        added={i: name for i, name in declared.items() if not size or i < size},
        strips={
            int(i): (bool(token.get("lstrip")), bool(token.get("rstrip")))
            for i, token in (config.get("added_tokens_decoder") or {}).items()
        },
    )


def end_ids(fields: Mapping[str, Any]) -> list[int]:
    """The ids that a config.json or generation_config.json calls the end of a text."""
    ids: Any = fields.get("eos_token_id")
    return [i for i in (ids if isinstance(ids, list) else [ids]) if is_id(i)]


def _template(files: Mapping[str, bytes], parsed: Mapping[str, dict[str, Any]]) -> str:
    """The folder's chat template; "" if it has none."""
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode("utf-8", errors="replace")
    for name in ("tokenizer_config.json", "chat_template.json"):
        template = parsed.get(name, {}).get("chat_template")
        if isinstance(template, list):  # several with names
            template = _default_template(name, template)
        if isinstance(template, str):
            return template
    return ""


def _default_template(file: str, named: list[Any]) -> str:
    by_name: dict[str, str] = {}
    for entry in named:
        match entry:
            case {"name": str(name), "template": str(template)}:
                by_name[name] = template
            case _:
                raise TokenizerError(f"{file}: chat_template has {shown(entry)}, no template with a name.")
    return by_name.get("default") or next(iter(by_name.values()), "")


def _added(config: Mapping[str, Any], added: Mapping[str, Any]) -> dict[int, str]:
    """Names by id of the tokens that are declared beside the tokenizer's file."""
    declared = {i: name for name, i in added.items() if is_id(i)}
    if wrong := [name for name, i in added.items() if not is_id(i)]:
        raise TokenizerError(f"added_tokens.json: {shown(wrong[0])} has the id {shown(added[wrong[0]])}.")
    fields = Fields(config, "tokenizer_config.json", error=TokenizerError).inner("added_tokens_decoder")
    for number, token in fields.tree.items():
        match token:
            case {"content": str(name)} if re.fullmatch("[0-9]{1,9}", number) and is_id(int(number)):
                declared[int(number)] = name
            case _:
                raise fields.fault(number, "must be an id with the content of its token")
    return declared
