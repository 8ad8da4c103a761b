"""What tests and benchmarks run on: random texts and programs, and a tokenizer without a model."""

from __future__ import annotations

import collections
import copy
import random
import re
from collections.abc import Mapping, Sequence

from pasta_jax.lang import tags
from pasta_jax.lang.program import MAX_TOKENS, MIN_TOKENS, Node, Program, Promise, Sync, Text
from pasta_jax.lang.render import joined
from pasta_jax.tokens.chat import EMPTY, dialogue
from pasta_jax.tokens.tokenizer import Vocabulary

_PLAIN = ("the ", "Nile", " is long", ". ", "42", " 7", "\n", "\n\n- ", "\r\n")
_SIGNS = ("'", '"', "<", ">", "\\", "\\\\", "/>")
_FOREIGN = ("Zürich", "e\u0301", "東京", "🌍", "\u00a0", "\u2028", "\t", "\x00")
_TAG_LIKE = ("<b>", "<sync />", "< async >", "</ async>", "<promise tokens=2 />", "<\\sync/>", "<\\\\async>")
_FRAGMENTS = (*_PLAIN, *_PLAIN, *_SIGNS, *_FOREIGN, *_TAG_LIKE, *tags.PIECES)
_MADE_UP = 64
"""Ids kept for made-up words in a vocabulary of a given size: words that any text may be built of."""

_TOPICS = ("rivers", "two words", "The 3 moons", "東京", "it's", "a/b", "tokens=2 /", " ", "é🌍", "7")


def random_text(rng: random.Random, *, max_fragments: int = 8) -> str:
    """Text of at least one fragment: words, digits, quotes, backslashes, and what looks like tags."""
    return "".join(rng.choices(_FRAGMENTS, k=rng.randint(1, max_fragments)))


def random_program(rng: random.Random, *, max_depth: int = 1, max_nodes: int = 12) -> Program:
    """A valid program of at most `max_nodes` nodes, the ones in blocks counted too.

    It has everything that may occur: promises next to each other, empty blocks, syncs with no branch open and
    several in a row, and literal text that spells tags. No two Text nodes are neighbours, none is empty.
    """
    left = rng.randint(0, max_nodes)

    def nodes(depth: int) -> tuple[Node, ...]:
        nonlocal left
        out: list[Node] = []
        # A main thread takes what is left; a block ends at some point, and may be empty.
        while left > 0 and (depth == 0 or rng.random() < 0.6):
            left -= 1
            kind = rng.choice("tps") if depth < max_depth else rng.choice("tts")
            if kind == "t":
                out.append(Text(random_text(rng)))
            elif kind == "s":
                out.append(Sync())
            else:
                tokens = rng.choice((MIN_TOKENS, 2, 10, MAX_TOKENS, rng.randint(MIN_TOKENS, MAX_TOKENS)))
                out.append(Promise(rng.choice(_TOPICS), tokens, nodes(depth + 1)))
        return joined(out)

    return Program(nodes(0))


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
