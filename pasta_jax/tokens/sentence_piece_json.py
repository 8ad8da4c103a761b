"""A SentencePiece model as a `tokenizer.json`, for tools that read nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from pasta_jax.tokens.base import SPACE
from pasta_jax.tokens.usage import MARKER

_Piece = sentencepiece_model_pb2.ModelProto.SentencePiece


def added_token(content: str, **others: Any) -> dict[str, Any]:
    """An entry of `added_tokens` but for its id: a special token, unless `others` say otherwise."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"content": content, **flags, **others}


def sentencepiece_as_json(data: bytes, added: Mapping[int, str]) -> dict[str, Any]:
    """A tokenizer.json equal to a SentencePiece model, except for its prefix space; `added` names more ids."""
    model = sentencepiece_model_pb2.ModelProto.FromString(data)
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    unknown = model.trainer_spec.unk_id
    if model.trainer_spec.model_type == 1:  # unigram
        core: dict[str, Any] = {"type": "Unigram", "unk_id": unknown, "vocab": pieces}
    else:
        core = {
            "type": "BPE",
            "unk_token": pieces[unknown][0],
            "fuse_unk": True,
            "vocab": {piece: i for i, (piece, _) in enumerate(pieces)},
            "merges": _merges(pieces),
        }
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            *_added(model.pieces),
            *({"id": i, **added_token(name)} for i, name in added.items()),
        ],
        "normalizer": spaces,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": core | {"byte_fallback": True},
    }


def _added(pieces: Iterable[Any]) -> list[dict[str, Any]]:
    """The `added_tokens` of a tokenizer.json: control symbols, and symbols that are matched in text first."""
    added = []
    for i, piece in enumerate(pieces):
        if piece.type in (_Piece.CONTROL, _Piece.UNKNOWN):
            added.append({"id": i, **added_token(piece.piece)})
        elif piece.type == _Piece.USER_DEFINED:
            # Text is searched for it as the model spells it: with a space it is no name of a piece.
            is_special, spaced = bool(MARKER.fullmatch(piece.piece)), SPACE in piece.piece
            added.append({"id": i, **added_token(piece.piece, special=is_special, normalized=spaced)})
    return added


def _merges(pieces: list[tuple[str, float]]) -> list[tuple[str, str]]:
    """The merges of a BPE model, best first: for each piece, every split into two other pieces."""
    ids = {piece: i for i, (piece, _) in enumerate(pieces)}
    merges: list[tuple[float, tuple[str, str]]] = []
    for piece, score in pieces:
        ways = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [(left, right) for left, right in ways if left in ids and right in ids]
        known.sort(key=lambda way: (ids[way[0]], ids[way[1]]))
        merges += [(score, way) for way in known]
    merges.sort(key=lambda merge: merge[0], reverse=True)
    return [way for _, way in merges]
