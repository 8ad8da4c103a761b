"""A tokenizer without a model, for tests and benchmarks."""

from __future__ import annotations

import collections
import copy
import re
from collections.abc import Mapping, Sequence

from pasta_jax.lang import tags
from pasta_jax.tokens.chat import EMPTY, dialogue
from pasta_jax.tokens.tokenizer import Vocabulary, check_text

_MADE_UP = 64
"""Ids kept for made-up words in a vocabulary of a given size: words that any text may be built of."""


class WordTokenizer:
    """A tokenizer for models that never saw a text: words are ids, a space before them included; else bytes.

    The words are those of `texts`, in order of appearance. With `vocab_size`, the vocabulary has exactly that many
    ids: the most frequent words of `texts`, and made-up words to fill the rest.
    """

    _WORDS = re.compile(r" ?[^\W\d]+|.", re.DOTALL)

    def __init__(self, *texts: str, vocab_size: int | None = None):
        control = (b"", b"", b"")
        tag_pieces = [piece.encode() for piece in tags.PIECES]
        single = [bytes([byte]) for byte in range(256)]
        first = len(control) + len(tag_pieces) + len(single)
        counts = collections.Counter(word.encode() for text in texts for word in self._WORDS.findall(text))
        words = [word for word in counts if len(word) > 1]
        if vocab_size is not None:
            room = vocab_size - first
            frequent = sorted(words, key=lambda word: -counts[word])[: max(0, room - _MADE_UP)]
            words = [*dict.fromkeys([*frequent, *(f" {_letters(n)}".encode() for n in range(room))])][:room]
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
        check_text(text)
        ids: list[int] = []
        for word in (match.encode() for match in self._WORDS.findall(text)):
            ids += [self._ids[word]] if word in self._ids else [self._bytes + byte for byte in word]
        return ids

    def encode_prompt(self, prompt: str) -> list[int]:
        if not prompt.strip():
            raise ValueError(EMPTY)
        return [self.vocabulary.bos, *self.encode(prompt + "\n")]

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        chat = dialogue(messages)
        return [self.vocabulary.bos, *self.encode("".join(f"{t}\n" for t in (chat.system, *chat.turns) if t))]

    def with_dialect(self, dialect: tags.Dialect) -> WordTokenizer:
        other = copy.copy(self)
        other.vocabulary = self.vocabulary.with_dialect(dialect)
        return other

    def to_bytes(self) -> bytes:
        return b"\0".join(self.vocabulary.pieces)


def _letters(n: int) -> str:
    """A made-up word of at least two letters for each number: 0 is "aa", 1 is "ab"."""
    spelled = ""
    while n or len(spelled) < 2:
        n, letter = divmod(n, 26)
        spelled = chr(ord("a") + letter) + spelled
    return spelled
