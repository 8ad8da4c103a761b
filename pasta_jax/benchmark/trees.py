"""Answers to replay: random trees of a given shape, the same text without tags, what a rule finds in real ones."""

from __future__ import annotations

import dataclasses
import math
import random
import re
from collections.abc import Iterator, Sequence

from pasta_jax.lang.program import MAX_TOKENS, MIN_TOKENS, Node, Program, Promise, Sync, Text
from pasta_jax.lang.render import joined
from pasta_jax.lang.tags import MAX_TOPIC_TOKENS
from pasta_jax.tokens.detokenize import TOPIC_PREFIX
from pasta_jax.tokens.tokenizer import Tokenizer

BETWEEN = 4
"""Tokens of main's text before each promise of a random tree: the mark of an item, a word or two."""


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
    """An answer of the shape asked for, its text random words.

    Args:
      rng: draws words and lengths.
      tokenizer: of the model; counts tokens.
      branches: promises, the nested ones included.
      tokens: mean length of a branch's own text.
      balanced: all branches are as long; else their lengths have a heavy tail, the sum being the same.
      syncs: main waits after two to four promises each, and says something of half a branch's length.
      depth: how deep promises nest, where there are enough of them: a third, rounded up, stand in main, the
        others within those.
    """
    if branches < 1 or tokens < 1 or depth < 1:
        raise ValueError(f"branches={branches}, tokens={tokens} and depth={depth} must be at least 1.")
    words = some_words(tokenizer)

    def say(count: int) -> Text:
        return Text(text_of(rng, tokenizer, words, count))

    def nodes(lengths: Sequence[int], depth: int) -> Iterator[Node]:
        here = len(lengths) if depth == 1 else math.ceil(len(lengths) / 3)
        until_sync = rng.randint(2, 4)
        for i, length in enumerate(lengths[:here]):
            yield say(BETWEEN)
            yield promise(length, lengths[here + i :: here], depth)
            until_sync -= 1
            if syncs and (until_sync == 0 or i == here - 1):
                yield Sync()
                yield say(max(1, tokens // 2))
                until_sync = rng.randint(2, 4)

    def promise(length: int, nested: Sequence[int], depth: int) -> Promise:
        block: list[Node] = [say(length)]
        if nested:
            block = [say(math.ceil(length / 2)), *nodes(nested, depth - 1), say(max(1, length // 2))]
        said = min(max(math.ceil((length + sum(nested)) / 10), MIN_TOKENS), MAX_TOKENS)
        return Promise(rng.choice(words).strip(), said, joined(block))

    return Program(joined(nodes(_lengths(rng, branches, tokens, balanced), depth)))


def _lengths(rng: random.Random, branches: int, tokens: int, balanced: bool) -> list[int]:
    if balanced:
        return [tokens] * branches
    weights = [rng.paretovariate(1.2) for _ in range(branches)]
    return [max(1, round(branches * tokens * weight / sum(weights))) for weight in weights]


def some_words(tokenizer: Tokenizer, most: int = 200) -> list[str]:
    """Words with a space before them that are one token each; a letter if the vocabulary has none."""
    found: list[str] = []
    for i, piece in enumerate(tokenizer.vocabulary.pieces):
        if re.fullmatch(rb" [a-z]{2,}", piece) and tokenizer.encode(piece.decode()) == [i]:
            found.append(piece.decode())
            if len(found) == most:
                break
    return found or ["a"]


def text_of(rng: random.Random, tokenizer: Tokenizer, words: Sequence[str], tokens: int) -> str:
    """Words that are so many tokens together."""
    said: list[str] = []
    for _ in range(100 + 10 * tokens):
        have = len(tokenizer.encode("".join(said)))
        if have == tokens:
            return "".join(said)
        if have < tokens:
            said += rng.choices(words, k=tokens - have)
        else:
            said.pop(rng.randrange(len(said)))
    raise ValueError(f"Found no text of {tokens} tokens in words such as {words[0]!r}.")


def sequential(program: Program) -> Program:
    """The same tokens of text in the reader's order, without tags: its texts stay apart, so none merge."""

    def texts(nodes: tuple[Node, ...]) -> Iterator[Node]:
        for node in nodes:
            if isinstance(node, Text):
                yield node
            elif isinstance(node, Promise):
                yield from texts(node.block)

    return Program(tuple(texts(program.nodes)))


def with_topics(program: Program, tokenizer: Tokenizer) -> Program:
    """Bare promises, such as a rule finds (`baselines.apar`), as those of PASTA-LANG: with topic and length.

    The topic is the block's first word or two, "part" where they cannot be one.
    """

    def named(node: Node) -> Node:
        if not isinstance(node, Promise):
            return node
        block = tuple(map(named, node.block))
        if not node.is_bare:
            return dataclasses.replace(node, block=block)
        text = "".join(each.text for each in sequential(Program(block)).nodes if isinstance(each, Text))
        topic = " ".join(re.findall(r"[^\W\d_]+", text)[:2])
        if not topic or len(tokenizer.encode(TOPIC_PREFIX + topic)) > MAX_TOPIC_TOKENS:
            topic = "part"
        tens = math.ceil(len(tokenizer.encode(text)) / 10)
        return Promise(topic, min(max(tens, MIN_TOKENS), MAX_TOKENS), block)

    return Program(tuple(map(named, program.nodes)))
