"""Tokenizer files for a Hugging Face folder, in which the tags have names.

In the files of a model that was trained with the tags on reserved ids (`tokens.usage`), these ids get the tags as
their names, so transformers prints and reads them as special tokens. Ids never change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from pasta_jax.files import json_bytes
from pasta_jax.foreign import parse_object
from pasta_jax.lang import tags
from pasta_jax.messages import message_of
from pasta_jax.tokens.base import TextTokenizer
from pasta_jax.tokens.load import TAGS_FILE
from pasta_jax.tokens.sentence_piece import SentencePieceTokenizer
from pasta_jax.tokens.sentence_piece_json import added_token, sentencepiece_as_json
from pasta_jax.tokens.templates import template_of
from pasta_jax.tokens.tokenizer import TokenizerError, Vocabulary

Fields: TypeAlias = dict[str, Any]
"""A JSON file."""

Names: TypeAlias = Mapping[int, str]
"""The tags by their ids."""

FormerNames: TypeAlias = Mapping[str, str]
"""The tags by the names that their ids had."""

_Piece = sentencepiece_model_pb2.ModelProto.SentencePiece


def tags_json(vocabulary: Vocabulary) -> bytes:
    """`pasta_tags.json`: the id of each tag piece, for `load_tokenizer`."""
    return json_bytes({piece: vocabulary.tag_ids[piece] for piece in tags.PIECES})


def with_named_tags(files: Mapping[str, bytes], vocabulary: Vocabulary) -> dict[str, bytes]:
    """A folder's tokenizer files with the tags as the names of their ids, as special tokens.

    Args:
      files: by name; those that name no tokens are returned unchanged.
      vocabulary: has the ids of the tags.

    Returns:
      The files, and `pasta_tags.json`.

    Raises:
      TokenizerError: one of them is damaged.
    """
    names = {i: piece for piece, i in vocabulary.tag_ids.items()}
    change = {
        "tokenizer.json": _tokenizer_json,
        "tokenizer_config.json": _tokenizer_config,
        "special_tokens_map.json": _special_tokens_map,
        "added_tokens.json": _added_tokens,
    }
    out = dict(files)
    name = ""
    try:
        former = dict[str, str]()
        for name, data in files.items():
            former |= _former_names(name, data, names)
        for name, data in files.items():
            if name in change:
                out[name] = json_bytes(change[name](parse_object(data, name, TokenizerError), names, former))
            elif name == "tokenizer.model":
                out[name] = _sentencepiece_model(data, names)
    except TokenizerError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, DecodeError) as error:
        raise TokenizerError(f"{name} is damaged: {message_of(error)}") from error
    return out | {TAGS_FILE: tags_json(vocabulary)}


def minimal_files(tokenizer: TextTokenizer) -> dict[str, bytes]:
    """The tokenizer files of a new folder, as transformers' AutoTokenizer needs them.

    `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`; for a SentencePiece model `tokenizer.model`
    too. In transformers the ids are those of `tokenizer.encode`, without a prefix space.
    """
    usage, vocabulary = tokenizer.usage, tokenizer.vocabulary
    files: dict[str, bytes] = {}
    if isinstance(tokenizer, SentencePieceTokenizer):
        files["tokenizer.model"] = tokenizer.model
        fields = sentencepiece_as_json(tokenizer.model, usage.added)
    else:
        fields = parse_object(tokenizer.model, "tokenizer.json", TokenizerError)
    _declare_marks(fields, tokenizer)
    by_id = {i: name for name, i in _names(fields).items()} | dict(usage.added)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": by_id[usage.bos],
        "eos_token": by_id[usage.eos],
        "pad_token": by_id[usage.pad],
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    files["tokenizer.json"] = json_bytes(fields)
    files["tokenizer_config.json"] = json_bytes(config)
    if template := template_of(usage.chat, usage.opening):
        files["chat_template.jinja"] = template.encode()
    return with_named_tags(files, vocabulary)


def _declare_marks(fields: Fields, tokenizer: TextTokenizer) -> None:
    """Makes the chat format's control tokens added tokens, as the prompts of training had them."""
    usage = tokenizer.usage
    declared = {token["id"]: token for token in fields.get("added_tokens") or []}
    names = {i: name for name, i in _names(fields).items()}
    for mark in tokenizer.marks:
        if mark in names:
            strips = {"lstrip": mark in usage.lstrip, "rstrip": mark in usage.rstrip}
            declared[mark] = {"id": mark, **added_token(names[mark]), **declared.get(mark, {}), **strips}
    fields["added_tokens"] = sorted(declared.values(), key=lambda token: token["id"])


def _names(fields: Mapping[str, Any]) -> dict[str, int]:
    """The names in a tokenizer.json."""
    vocab = fields["model"]["vocab"]
    if isinstance(vocab, list):
        vocab = {piece: i for i, (piece, _) in enumerate(vocab)}
    return {**vocab, **{token["content"]: token["id"] for token in fields.get("added_tokens") or []}}


def _former_names(file: str, data: bytes, names: Names) -> dict[str, str]:
    """The former names of the tags' ids in a file: {former name: tag}."""
    if file == "tokenizer.json":
        known = _names(parse_object(data, file, TokenizerError))
        return {name: names[i] for name, i in known.items() if i in names}
    if file == "tokenizer.model":
        model = sentencepiece_model_pb2.ModelProto.FromString(data)
        return {model.pieces[i].piece: tag for i, tag in names.items() if i < len(model.pieces)}
    return {}


def _tokenizer_json(fields: Fields, names: Names, former: FormerNames) -> Fields:
    vocab = fields["model"]["vocab"]
    if isinstance(vocab, list):
        fields["model"]["vocab"] = [[names.get(i, piece), score] for i, (piece, score) in enumerate(vocab)]
    else:
        fields["model"]["vocab"] = {names.get(i, piece): i for piece, i in vocab.items()}
    others = [token for token in fields.get("added_tokens") or [] if token["id"] not in names]
    ours = [{"id": i, **added_token(name)} for i, name in names.items()]
    fields["added_tokens"] = sorted([*others, *ours], key=lambda token: token["id"])
    return fields


def _tokenizer_config(fields: Fields, names: Names, former: FormerNames) -> Fields:
    if declared := fields.get("added_tokens_decoder"):
        declared |= {str(i): added_token(name) for i, name in names.items()}
        fields["added_tokens_decoder"] = dict(sorted(declared.items(), key=lambda item: int(item[0])))
    return _special_tokens_map(fields, names, former)


def _special_tokens_map(fields: Fields, names: Names, former: FormerNames) -> Fields:
    key = "extra_special_tokens" if "extra_special_tokens" in fields else "additional_special_tokens"
    listed = fields.get(key) or []
    if not isinstance(listed, list):  # a dict by role, transformers' newer form, takes no list
        key, listed = "additional_special_tokens", fields.get("additional_special_tokens") or []

    def is_tag(token: Any) -> bool:
        content = token["content"] if isinstance(token, dict) else token
        return former.get(content, content) in names.values()

    fields[key] = [*(token for token in listed if not is_tag(token)), *names.values()]
    return fields


def _added_tokens(fields: Fields, names: Names, former: FormerNames) -> Fields:
    return {name: i for name, i in fields.items() if i not in names} | {name: i for i, name in names.items()}


def _sentencepiece_model(data: bytes, names: Mapping[int, str]) -> bytes:
    model = sentencepiece_model_pb2.ModelProto.FromString(data)
    for i in range(len(model.pieces), max(names) + 1):
        model.pieces.append(_Piece(piece=f"[unassigned_{i}]", score=0.0, type=_Piece.CONTROL))
    for i, name in names.items():
        model.pieces[i].piece, model.pieces[i].type = name, _Piece.CONTROL
    model.trainer_spec.vocab_size = len(model.pieces)
    written: bytes = model.SerializeToString(deterministic=True)
    return written
