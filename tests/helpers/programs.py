"""Random texts and programs."""

from __future__ import annotations

import random

from pasta_jax.lang import tags
from pasta_jax.lang.program import MAX_TOKENS, MIN_TOKENS, Node, Program, Promise, Sync, Text
from pasta_jax.lang.render import joined

_PLAIN = ("the ", "Nile", " is long", ". ", "42", " 7", "\n", "\n\n- ", "\r\n")
_SIGNS = ("'", '"', "<", ">", "\\", "\\\\", "/>")
_FOREIGN = ("Zürich", "e\u0301", "東京", "🌍", "\u00a0", "\u2028", "\t", "\x00")
_TAG_LIKE = ("<b>", "<sync />", "< async >", "</ async>", "<promise tokens=2 />", "<\\sync/>", "<\\\\async>")
_FRAGMENTS = (*_PLAIN, *_PLAIN, *_SIGNS, *_FOREIGN, *_TAG_LIKE, *tags.PIECES)
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
