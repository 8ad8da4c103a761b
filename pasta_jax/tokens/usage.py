"""How each family's vocabulary is used: the ids of the tags, of the start of a text, of the end of an answer.

A published vocabulary has no tags, and its embedding should not be resized for them. Almost all have unused ids
(docs/design.md, decision 1):

  Gemma          <unused0> to <unused98>: the first six
  Llama 3        <|reserved_special_token_0|> to _247|> (at most): the last six
  Mistral 0.3    [control_8] to [control_768]: the last six; later versions name the first ones
  Mistral Nemo   <SPECIAL_14> to <SPECIAL_999>: the last six
  SmolLM2        marks of source code, which no chat has: <gh_stars> and the five after it
  Qwen 2.5, 3    rows of the embedding past the tokenizer's last id (151,936 rows, 151,669 ids at most)
  Llama 2, Mistral 0.1   none: the vocabulary must be extended, and the embedding with it

Only the vocabulary is looked at, never a family's name. Ids that the chat template names are not free.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping

from pasta_jax.lang import tags
from pasta_jax.tokens import chat as chats
from pasta_jax.tokens.tokenizer import TokenizerError, Vocabulary, is_id

MARKER = re.compile(
    r"<\|[^|<>\s]+\|>|<unused\d+>|<(?:start|end)_of_(?:turn|image|audio)>|<(?:image|audio)_soft_token>"
    r"|<SPECIAL_\d+>|<mask>|<2mass>|\[@BOS@\]|\[multimodal\]"
)
"""Names of control tokens that some files declare as ordinary symbols, so text could spell them."""

_RESERVED = (
    (re.compile(r"<unused(\d{1,9})>"), "first"),
    (re.compile(r"<\|reserved_special_token_(\d{1,9})\|>"), "last"),
    (re.compile(r"\[control_(\d{1,9})\]"), "last"),
    (re.compile(r"<SPECIAL_(\d{1,9})>"), "last"),
)
_OF_CODE = (
    *("<gh_stars>", "<issue_start>", "<issue_comment>", "<issue_closed>"),
    *("<jupyter_start>", "<jupyter_text>"),
)
"""Marks of repositories and notebooks in the pretraining of SmolLM2 (and StarCoder), which a chat never needs."""

_ENDS = (
    *("<end_of_turn>", "<eos>"),  # Gemma
    *("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),  # Llama 3
    *("<|im_end|>", "<|endoftext|>"),  # Qwen
)
_EOS = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "<|eot_id|>", "<|im_end|>")
_BOS = ("<|begin_of_text|>", "<s>", "<bos>", "<|endoftext|>")
"""Qwen has no bos: its end of text starts the next document."""

_PAD = ("<|finetune_right_pad_id|>", "<pad>")


@dataclasses.dataclass(frozen=True)
class Symbols:
    """A vocabulary as it is in its file.

    Attributes:
      pieces: the bytes that each id spells; b"" if it is no text.
      names: the id of each piece, spelled as in the file.
      special: ids that are no text: control, unknown, unassigned, and symbols that are a MARKER.
      bos, eos, pad: ids, if the file names them.
      begins: whether a prompt starts with bos.
      marks_spaces: whether the file writes a space as SentencePiece does.
      added: names of the ids that come from `Hints.added`.
      lstrip, rstrip: ids that swallow white space to their left, to their right.
    """

    pieces: tuple[bytes, ...]
    names: Mapping[str, int]
    special: frozenset[int]
    bos: int | None = None
    eos: int | None = None
    pad: int | None = None
    begins: bool = True
    marks_spaces: bool = True
    added: Mapping[int, str] = dataclasses.field(default_factory=dict)
    lstrip: frozenset[int] = frozenset()
    rstrip: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True)
class Hints:
    """What the other files of a Hugging Face folder say of its tokenizer.

    Attributes:
      template: the chat template; "" if there is none, None without a folder.
      bos, eos, pad: names of the tokens.
      begins: whether a prompt starts with bos; None if unknown.
      ends: ids that end a generated text.
      vocab_size: rows of the model's embedding; 0 if unknown.
      tag_ids: id of each tag piece, for a model that was trained with them.
      added: names by id, some of which the file lacks.
      strips: for ids, whether they swallow white space to their left and to their right; it overrides the file.
    """

    template: str | None = None
    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    begins: bool | None = None
    ends: tuple[int, ...] = ()
    vocab_size: int = 0
    tag_ids: Mapping[str, int] | None = None
    added: Mapping[int, str] = dataclasses.field(default_factory=dict)
    strips: Mapping[int, tuple[bool, bool]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Usage:
    """How a vocabulary is used. It and the file make a tokenizer.

    Attributes:
      tag_ids: id of each piece in `tags.PIECES`.
      bos, eos, pad, ends: as in `Vocabulary`.
      begins: whether a prompt starts with bos, if its chat format does not say.
      chat: a name in `chat.FORMATS`.
      opening: text that the chat template adds by itself (`chat.choose`).
      added: names of ids after the file's own.
      lstrip, rstrip: ids that swallow the chat format's white space to their left, to their right.
    """

    tag_ids: Mapping[str, int]
    bos: int
    eos: int
    pad: int
    ends: frozenset[int] = frozenset()
    begins: bool = True
    chat: str = "plain"
    opening: str = ""
    added: Mapping[int, str] = dataclasses.field(default_factory=dict)
    lstrip: frozenset[int] = frozenset()
    rstrip: frozenset[int] = frozenset()


def settle(symbols: Symbols, hints: Hints, *, extend: bool, chat: str, splits: Callable[[str], int]) -> Usage:
    """Decides how a vocabulary is used.

    Args:
      symbols: the vocabulary.
      hints: of its folder.
      extend: whether tags without a free id get new ones after the end.
      chat: the requested format, one of `chat.CHATS`.
      splits: number of ids of a text, for the error message.

    Raises:
      TokenizerError: there are no ids for the tags, for the start or end of a text, or for the chat format.
    """
    names = symbols.names

    def named(name: str | None) -> int | None:
        return None if name is None else names.get(name)

    def first(candidates: tuple[str, ...]) -> int | None:
        # Qwen's vocabulary has <s> as an ordinary piece.
        return next((i for name in candidates if (i := names.get(name)) in symbols.special), None)

    def either(*ids: int | None) -> int | None:
        return next((i for i in ids if i is not None), None)

    end_of_text = either(named(hints.eos), symbols.eos, first(_EOS))
    bos = either(named(hints.bos), symbols.bos, first(_BOS))
    if end_of_text is None or bos is None:
        raise TokenizerError(
            "This tokenizer lacks an end-of-text or a begin-of-text id; answers could not end."
        )
    pad = either(named(hints.pad), symbols.pad, first(_PAD), end_of_text)
    style, opening = chats.choose(chat, names.keys(), hints.template)
    eos = either(named(chats.FORMATS[style].end), end_of_text)
    assert eos is not None and pad is not None
    known = {names[name] for name in _ENDS if names.get(name) in symbols.special}
    tag_ids = _tag_ids(symbols, hints, extend, splits)
    ends = ({end_of_text, *known} | {i for i in hints.ends if 0 <= i < len(symbols.pieces)}) - {eos}
    return Usage(
        tag_ids=tag_ids,
        bos=bos,
        eos=eos,
        pad=pad,
        ends=frozenset(ends - set(tag_ids.values())),
        begins=symbols.begins if hints.begins is None else hints.begins,
        chat=style,
        opening=opening,
        added=symbols.added,
        lstrip=(symbols.lstrip - set(hints.strips)) | {i for i, (left, _) in hints.strips.items() if left},
        rstrip=(symbols.rstrip - set(hints.strips)) | {i for i, (_, right) in hints.strips.items() if right},
    )


def _tag_ids(symbols: Symbols, hints: Hints, extend: bool, splits: Callable[[str], int]) -> dict[str, int]:
    if hints.tag_ids is not None:
        return _checked(hints.tag_ids, symbols)
    ids = own_tag_ids(symbols)
    missing = [piece for piece in tags.PIECES if piece not in ids]
    free = [i for i in _reserved(symbols, hints.template or "") if i not in ids.values()]
    size = len(symbols.pieces)
    if len(free) < len(missing):
        if not extend and hints.vocab_size - size < len(missing):
            raise TokenizerError(_no_room(symbols, hints, missing, splits))
        free = [*range(size, size + len(missing))]
    ids |= zip(missing, free, strict=False)
    return {piece: ids[piece] for piece in tags.PIECES}


def own_tag_ids(symbols: Symbols) -> dict[str, int]:
    """The ids of the tags that the vocabulary already has as control symbols."""
    names = symbols.names
    return {piece: names[piece] for piece in tags.PIECES if names.get(piece) in symbols.special}


def _reserved(symbols: Symbols, template: str) -> list[int]:
    """Ids whose names say that they are free, in the order of their numbers: one for each tag, or too few."""
    for pattern, which in _RESERVED:
        numbered = sorted(
            (int(match.group(1)), i)
            for name, i in symbols.names.items()
            if (match := pattern.fullmatch(name)) and i in symbols.special and name not in template
        )
        if len(numbered) >= len(tags.PIECES):
            ids = [i for _, i in numbered]
            return ids[: len(tags.PIECES)] if which == "first" else ids[-len(tags.PIECES) :]
    of_code = [symbols.names[name] for name in _OF_CODE if name in symbols.names and name not in template]
    return [i for i in of_code if i in symbols.special]


def _checked(tag_ids: Mapping[str, int], symbols: Symbols) -> dict[str, int]:
    ids = [i for i in tag_ids.values() if is_id(i)]
    if set(tag_ids) != set(tags.PIECES) or len(set(ids)) != len(tags.PIECES):
        raise TokenizerError(
            f"pasta_tags.json must have an id for each of {', '.join(map(repr, tags.PIECES))}."
        )
    if text := [i for i in ids if i < len(symbols.pieces) and i not in symbols.special]:
        raise TokenizerError(f"pasta_tags.json gives tags the ids {text}, which are ordinary text here.")
    return {piece: tag_ids[piece] for piece in tags.PIECES}


def _no_room(symbols: Symbols, hints: Hints, missing: list[str], splits: Callable[[str], int]) -> str:
    if missing[0] in symbols.names:
        fault = f"{missing[0]!r} is no control symbol, so text that spells it would become the tag"
    else:
        fault = f"it splits {missing[0]!r} into {splits(missing[0])} pieces"
    rows = (
        f"the model's embedding has {hints.vocab_size} rows for its {len(symbols.pieces)} ids"
        if hints.vocab_size
        else "how many rows the model's embedding has is not known"
    )
    return (
        f"This tokenizer has no id for {len(missing)} of the {len(tags.PIECES)} tag pieces; {fault}. It has no "
        f"reserved ids that they could take, and {rows}. Train one with the tags as control symbols, or load "
        "this one with extend=True (--config.data.extend_tokenizer=true, --extend_tokenizer of other verbs), which "
        "adds ids after its end; the embedding grows with them."
    )


def vocabulary_of(symbols: Symbols, usage: Usage) -> Vocabulary:
    """The vocabulary, used in this way."""
    used = set(usage.tag_ids.values())
    size = max(len(symbols.pieces), *(i + 1 for i in used))
    pieces = [*symbols.pieces, *[b""] * (size - len(symbols.pieces))]
    unassigned = set(range(len(symbols.pieces), size))
    for piece, i in usage.tag_ids.items():
        pieces[i] = piece.encode()
    control = (symbols.special | unassigned | {usage.pad, usage.bos}) - used - usage.ends - {usage.eos}
    return Vocabulary(
        pieces=tuple(pieces),
        tag_ids=dict(usage.tag_ids),
        pad=usage.pad,
        eos=usage.eos,
        bos=usage.bos,
        control=frozenset(control),
        ends=usage.ends,
    )
