"""Answers to replay: random trees of given properties, annotated real answers, and their text without tags."""

from __future__ import annotations

import dataclasses
import math
import random
import re
from collections.abc import Iterator, Sequence

from pasta_jax.lang.assemble import assemble
from pasta_jax.lang.program import MAX_TOKENS, MIN_TOKENS, Node, Program, Promise, Sync, Text
from pasta_jax.lang.render import joined
from pasta_jax.lang.topics import fits
from pasta_jax.tokens.tokenizer import Tokenizer

BETWEEN = 4
"""Tokens of main's text before each promise of a random tree, such as the mark of a list item."""


def random_tree(
    rng: random.Random,
    tokenizer: Tokenizer,
    *,
    branches: int = 8,
    tokens: int = 32,
    balanced: bool = True,
    syncs: bool = False,
    depth: int = 1,
) -> Program:
    """An answer of a given shape, made of random words.

    Args:
      rng: samples words and lengths.
      tokenizer: of the model; counts tokens.
      branches: number of promises, including nested ones.
      tokens: mean length of a branch's own text.
      balanced: all branches have the same length; otherwise lengths with a heavy tail and the same sum.
      syncs: main waits after every two to four promises, and then writes half a branch's length of text.
      depth: how deep promises nest if there are enough: a third, rounded up, in main, the others in those.
    """
    if branches < 1 or tokens < 1 or depth < 1:
        raise ValueError(f"branches={branches}, tokens={tokens} and depth={depth} must be at least 1.")
    words = one_token_words(tokenizer)

    def text(count: int) -> Text:
        return Text(random_text(rng, tokenizer, words, count))

    def nodes(lengths: Sequence[int], depth: int) -> Iterator[Node]:
        own = len(lengths) if depth == 1 else math.ceil(len(lengths) / 3)
        until_sync = rng.randint(2, 4)
        for i, length in enumerate(lengths[:own]):
            yield text(BETWEEN)
            yield promise(length, lengths[own + i :: own], depth)
            until_sync -= 1
            if syncs and (until_sync == 0 or i == own - 1):
                yield Sync()
                yield text(max(1, tokens // 2))
                until_sync = rng.randint(2, 4)

    def promise(length: int, nested: Sequence[int], depth: int) -> Promise:
        block: list[Node] = [text(length)]
        if nested:
            block = [text(math.ceil(length / 2)), *nodes(nested, depth - 1), text(max(1, length // 2))]
        topic = rng.choice(words).strip()
        return Promise(topic, promised_tens(length + sum(nested)), joined(block))

    return Program(joined(nodes(_lengths(rng, branches, tokens, balanced), depth)))


def _lengths(rng: random.Random, branches: int, tokens: int, balanced: bool) -> list[int]:
    if balanced:
        return [tokens] * branches
    weights = [rng.paretovariate(1.2) for _ in range(branches)]
    return [max(1, round(branches * tokens * weight / sum(weights))) for weight in weights]


def promised_tens(tokens: int) -> int:
    """The number of tens in the promise of a block: rounded up, and within what a tag can say (1 to 99)."""
    return min(max(math.ceil(tokens / 10), MIN_TOKENS), MAX_TOKENS)


def one_token_words(tokenizer: Tokenizer, count: int = 200) -> list[str]:
    """Words that are one token each with the space before them; a letter if the vocabulary has none."""
    words: list[str] = []
    for i, piece in enumerate(tokenizer.vocabulary.pieces):
        if re.fullmatch(rb" [a-z]{2,}", piece) and tokenizer.encode(piece.decode()) == [i]:
            words.append(piece.decode())
            if len(words) == count:
                break
    return words or ["a"]


def random_text(rng: random.Random, tokenizer: Tokenizer, words: Sequence[str], tokens: int) -> str:
    """A random text of words with this number of tokens. Raises ValueError if it finds none."""
    chosen: list[str] = []
    for _ in range(100 + 10 * tokens):
        have = len(tokenizer.encode("".join(chosen)))
        if have == tokens:
            return "".join(chosen)
        if have < tokens:
            chosen += rng.choices(words, k=tokens - have)
        else:
            chosen.pop(rng.randrange(len(chosen)))
    raise ValueError(f"Found no text of {tokens} tokens in words such as {words[0]!r}.")


def without_tags(program: Program) -> Program:
    """The same tokens of text in document order, without tags. The texts stay separate, so no tokens merge."""

    def texts(nodes: tuple[Node, ...]) -> Iterator[Node]:
        for node in nodes:
            if isinstance(node, Text):
                yield node
            elif isinstance(node, Promise):
                yield from texts(node.block)

    return Program(tuple(texts(program.nodes)))


def complete_promises(program: Program, tokenizer: Tokenizer) -> Program:
    """Gives topic and length to the bare promises that a rule finds (`baselines.apar`).

    The topic is the block's first word or two, or "part" if those cannot be a topic.
    """

    def complete(node: Node) -> Node:
        if not isinstance(node, Promise):
            return node
        block = tuple(map(complete, node.block))
        if not node.is_bare:
            return dataclasses.replace(node, block=block)
        text = assemble(Program(block))
        topic = " ".join(re.findall(r"[^\W\d_]+", text)[:2])
        if not topic or not fits(tokenizer, topic):
            topic = "part"
        return Promise(topic, promised_tens(len(tokenizer.encode(text))), block)

    return Program(tuple(map(complete, program.nodes)))
