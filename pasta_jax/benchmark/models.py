"""Models to measure: random weights of named sizes, whose numbers cost as much as trained ones."""

from __future__ import annotations

import collections
import functools
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pasta_jax.decoding.model import Model
from pasta_jax.lang import tags
from pasta_jax.loading import as_asked, load
from pasta_jax.model import ModelConfig, init_params
from pasta_jax.model.presets import preset
from pasta_jax.tokens.chat import EMPTY
from pasta_jax.tokens.tokenizer import Tokenizer, Vocabulary

NAMED = {
    "tiny": ModelConfig(),
    "300m": ModelConfig(
        vocab_size=32_000, num_layers=24, model_dim=1024, num_heads=16, num_kv_heads=8, head_dim=64, mlp_dim=2816,
        norm_eps=1e-5, activation="silu", norm_offset=0.0, embed_scale=False,
    ),
    "gemma7b": preset("gemma-7b").config,
}  # fmt: skip
"""Sizes by the names that they have here: the tiny model, one of Llama's shape, and a published one."""

MAX_DEPTH = 3


def model_of(name: str, dtype: str | None = None, texts: Sequence[str] = ()) -> Model:
    """The model that `name` names: a size of NAMED, with random weights, or what `load` takes.

    Args:
      name: of a size, or a path.
      dtype: as `load` takes it.
      texts: what a tokenizer for random weights must know the words of.
    """
    if name not in NAMED or os.path.exists(name):
        return load(name, dtype=dtype)
    config = as_asked(NAMED[name], dtype, None)
    tokenizer = PieceTokenizer(config.vocab_size, texts)
    params = jax.jit(functools.partial(init_params, config))(jax.random.key(0))
    return Model(silent(params, config, tokenizer.vocabulary), config, tokenizer, max_depth=MAX_DEPTH)


def silent(params: dict[str, Any], config: ModelConfig, vocabulary: Vocabulary) -> dict[str, Any]:
    """The same weights, which now write no tag and end no answer unless they are made to.

    Logits of those ids are zero: among so many others one is always larger.
    """
    special = jnp.array([*vocabulary.tag_ids.values(), *vocabulary.stops, *vocabulary.control])
    if config.tie_embeddings:
        embedding = jnp.asarray(params["embed"]["embedding"]).at[special].set(0)
        return {**params, "embed": {**params["embed"], "embedding": embedding}}
    return {**params, "head": jnp.asarray(params["head"]).at[:, special].set(0)}


class PieceTokenizer:
    """A tokenizer with exactly V ids for weights that never saw a text, in order of how often texts have them.

    A word of up to six letters is one token, with the space before it, and so is a single other character; what is
    not among the V ids is bytes. Words that nobody writes fill the rest.
    """

    _PIECES = re.compile(r" ?[^\W\d_]{1,6}|.", re.DOTALL)

    def __init__(self, vocab_size: int, texts: Sequence[str] = ()):
        control = [b"", b"", b""]
        tag_pieces = [piece.encode() for piece in tags.PIECES]
        single = [bytes([byte]) for byte in range(256)]
        first = len(control) + len(tag_pieces) + len(single)
        counts = collections.Counter(piece for text in texts for piece in self._PIECES.findall(text))
        seen = [piece.encode() for piece, _ in counts.most_common() if len(piece.encode()) > 1]
        filling = (f" {_letters(n)}".encode() for n in range(vocab_size))
        words = [*dict.fromkeys([*seen[: max(0, vocab_size - first - 64)], *filling])][: vocab_size - first]
        self.vocabulary = Vocabulary(
            pieces=(*control, *tag_pieces, *single, *words),
            tag_ids={piece: len(control) + i for i, piece in enumerate(tags.PIECES)},
            pad=0,
            eos=1,
            bos=2,
            control=frozenset({0, 2}),
        )
        self._bytes = len(control) + len(tag_pieces)
        self._ids = {word: first + i for i, word in enumerate(words)}

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in (found.encode() for found in self._PIECES.findall(text)):
            ids += [self._ids[piece]] if piece in self._ids else [self._bytes + byte for byte in piece]
        return ids

    def encode_prompt(self, prompt: str) -> list[int]:
        if not prompt.strip():
            raise ValueError(EMPTY)
        return [self.vocabulary.bos, *self.encode(prompt)]

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        raise NotImplementedError("Random weights hold no conversations.")

    def with_dialect(self, dialect: tags.Dialect) -> Tokenizer:
        raise NotImplementedError("Random weights speak the pasta dialect only.")

    def to_bytes(self) -> bytes:
        raise NotImplementedError("Random weights are not saved.")


def _letters(n: int) -> str:
    """0 -> "aa", 1 -> "ab", ..., so that each number has its own two to six letters."""
    spelled = ""
    while n or len(spelled) < 2:
        n, letter = divmod(n, 26)
        spelled = chr(ord("a") + letter) + spelled
    return spelled
