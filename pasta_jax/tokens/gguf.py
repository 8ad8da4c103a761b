"""The tokenizer in a GGUF file's metadata, as the files of a Hugging Face folder.

Byte-level BPE ("gpt2") becomes a `tokenizer.json`; a SentencePiece vocabulary ("llama") a `tokenizer.model`, and a
`tokenizer.json` for transformers. Beside them are the special tokens, the chat template and the ids that end
an answer. How a byte-level vocabulary splits text into words is a name in the file, `tokenizer.ggml.pre`, whose
rules are those of llama.cpp (src/llama-vocab.cpp).
"""

from __future__ import annotations

from typing import Any

from sentencepiece import sentencepiece_model_pb2

from pasta_jax.files import json_bytes
from pasta_jax.foreign import Fields
from pasta_jax.messages import shown
from pasta_jax.tokens.base import SPACE
from pasta_jax.tokens.sentence_piece_json import sentencepiece_as_json
from pasta_jax.tokens.tokenizer import MOST_IDS, TokenizerError

_PREFIX = "tokenizer.ggml."

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of tokens; SentencePiece has the same numbers."""

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN_2 = _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(words: str) -> list[dict[str, Any]]:
    return [
        {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ]


_GPT_2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}

_STEPS: dict[tuple[str, ...], list[dict[str, Any]]] = {
    ("llama-bpe", "llama3", "llama-v3", "smaug-bpe"): _split(_LLAMA_3),
    ("qwen2", "deepseek-r1-qwen"): _split(_QWEN_2),
    ("tekken",): _split(_TEKKEN),  # Mistral Nemo
    ("smollm", "starcoder", "refact"): [{"type": "Digits", "individual_digits": True}, _GPT_2],
    ("gpt-2",): [_GPT_2],
}
_WORDS = {name: steps for names, steps in _STEPS.items() for name in names}
"""The steps that split text into words, by `tokenizer.ggml.pre`."""

_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "smaug-bpe", "tekken")
"""In these a word that is in the vocabulary is one token, whatever the merges say; and a text starts with bos."""


def tokenizer_files(keys: Fields) -> dict[str, bytes]:
    """The files of a folder, by name, for `tokens.load.tokenizer_from_files`.

    Args:
      keys: the metadata of a GGUF file.

    Raises:
      TokenizerError: it has no tokenizer, or one of a kind that we do not make; says which key.
    """
    keys = Fields(keys.tree, keys.path, error=TokenizerError)
    kind = keys.choice(
        f"{_PREFIX}model", ("gpt2", "llama"), "a kind of tokenizer that is not read from GGUF files"
    )
    tokens, kinds = _tokens(keys)
    special = {
        role: _special(keys, role, tokens) for role in ("bos", "eos", "eot", "eom", "unknown", "padding")
    }
    template = keys["tokenizer.chat_template"]
    begins = keys[f"{_PREFIX}add_bos_token"]
    if begins is None:
        begins = kind == "llama" or keys[f"{_PREFIX}pre"] in _WHOLE_WORDS
    elif not isinstance(begins, bool):
        raise keys.fault(f"{_PREFIX}add_bos_token", "must be true or false")
    files: dict[str, bytes] = {}
    if kind == "llama":
        files["tokenizer.model"] = model = _sentencepiece(keys, tokens, kinds, special)
        fields = sentencepiece_as_json(model, {})
    else:
        fields = _byte_level(keys, tokens, kinds)
    bos = special["bos"]
    if begins and bos is not None:
        fields["post_processor"] = _begin(tokens[bos], bos)
    files["tokenizer.json"] = json_bytes(fields)
    named = {"bos_token": bos, "eos_token": special["eos"], "pad_token": special["padding"]}
    files["tokenizer_config.json"] = json_bytes(
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{role: tokens[i] for role, i in named.items() if i is not None},
            "add_bos_token": begins,
            "model_input_names": ["input_ids", "attention_mask"],
            "clean_up_tokenization_spaces": False,
        }
    )
    files["generation_config.json"] = json_bytes(special_ids(special))
    if isinstance(template, str) and template:
        files["chat_template.jinja"] = template.encode()
    return files


def special_ids(special: dict[str, int | None]) -> dict[str, Any]:
    """The ids of special tokens as a config.json spells them."""
    ends = list(dict.fromkeys(i for role in ("eos", "eot", "eom") if (i := special[role]) is not None))
    found = {"bos_token_id": special["bos"], "pad_token_id": special["padding"]}
    return {role: i for role, i in found.items() if i is not None} | (
        {"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {}
    )


def _tokens(keys: Fields) -> tuple[list[str], list[int]]:
    """Tokens and their kinds, without the unused ones that fill a vocabulary up to the embedding's rows."""
    tokens, kinds = keys[f"{_PREFIX}tokens"], keys[f"{_PREFIX}token_type"]
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise keys.fault(f"{_PREFIX}tokens", "must be a list of tokens")
    if len(tokens) > MOST_IDS:
        raise keys.fault(f"{_PREFIX}tokens", f"has {len(tokens)} tokens, at most {MOST_IDS} are read")
    kinds = [NORMAL] * len(tokens) if kinds is None else kinds
    if (
        not isinstance(kinds, list)
        or len(kinds) != len(tokens)
        or not all(type(kind) is int and NORMAL <= kind <= BYTE for kind in kinds)
    ):
        raise keys.fault(f"{_PREFIX}token_type", f"must be a kind, 1 to 6, for each of {len(tokens)} tokens")
    size = max((i + 1 for i, kind in enumerate(kinds) if kind != UNUSED), default=0)
    if not size:
        raise keys.fault(f"{_PREFIX}token_type", "says that no token is used")
    return tokens[:size], kinds[:size]


def _special(keys: Fields, role: str, tokens: list[str]) -> int | None:
    key = f"{_PREFIX}{role}_token_id"
    value = keys[key]
    if value is None or value == 2**32 - 1:  # llama.cpp's -1
        return None
    if type(value) is not int or not 0 <= value < len(tokens):
        raise keys.fault(key, f"must be the id of one of {len(tokens)} tokens")
    return value


def _byte_level(keys: Fields, tokens: list[str], kinds: list[int]) -> dict[str, Any]:
    """A tokenizer.json of byte-level BPE."""
    rule, merges = keys[f"{_PREFIX}pre"], keys[f"{_PREFIX}merges"]
    if not isinstance(rule, str) or rule not in _WORDS:
        raise TokenizerError(
            f"{keys.path}: {_PREFIX}pre={shown(rule)}: an unknown way to split words. We have {', '.join(_WORDS)}. "
            "Name the published model's own tokenizer: --tokenizer=FOLDER."
        )
    if not isinstance(merges, list) or not all(isinstance(merge, str) for merge in merges):
        raise keys.fault(f"{_PREFIX}merges", "must be a list of pairs")
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        raise keys.fault(f"{_PREFIX}tokens", "has the same token twice")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, **flags, "special": kind != USER_DEFINED}
            for i, (token, kind) in enumerate(zip(tokens, kinds))
            if kind != NORMAL and token
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _WORDS[rule]},
        "post_processor": None,
        "decoder": _GPT_2 | {"add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": rule in _WHOLE_WORDS,
            "vocab": vocab,
            "merges": merges,
        },
    }


def _sentencepiece(
    keys: Fields, tokens: list[str], kinds: list[int], special: dict[str, int | None]
) -> bytes:
    """A SentencePiece model of the kind BPE, which llama.cpp's vocabularies are."""
    scores = keys[f"{_PREFIX}scores"]
    scores = [-float(i) for i in range(len(tokens))] if scores is None else scores
    if (
        not isinstance(scores, list)
        or len(scores) < len(tokens)
        or not all(type(score) in (int, float) for score in scores)
    ):
        raise keys.fault(f"{_PREFIX}scores", f"must be a number for each of {len(tokens)} tokens")
    model = sentencepiece_model_pb2.ModelProto()
    for token, kind, score in zip(tokens, kinds, scores):
        # llama.cpp stores the symbols that text is searched for with their spaces.
        piece = token.replace(" ", SPACE) if kind == USER_DEFINED else token
        model.pieces.add(piece=piece, score=float(score), type=kind)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = trainer.BPE
    trainer.vocab_size = len(tokens)
    trainer.byte_fallback = BYTE in kinds
    for role, name in (("unknown", "unk"), ("bos", "bos"), ("eos", "eos"), ("padding", "pad")):
        if (i := special[role]) is None and role == "unknown":
            i = next((i for i, kind in enumerate(kinds) if kind == UNKNOWN), None)
        setattr(trainer, f"{name}_id", -1 if i is None else i)
        if i is not None:
            setattr(trainer, f"{name}_piece", model.pieces[i].piece)
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = keys[f"{_PREFIX}add_space_prefix"] is not False
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    written: bytes = model.SerializeToString(deterministic=True)
    return written


def _begin(token: str, i: int) -> dict[str, Any]:
    """The step of a tokenizer.json that puts a token before each text."""
    one = {"SpecialToken": {"id": token, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [one, first],
        "pair": [one, first, {"SpecialToken": {"id": token, "type_id": 1}}, second],
        "special_tokens": {token: {"id": token, "ids": [i], "tokens": [token]}},
    }
