"""What a topic may be: at most 3 words (the paper's annotation prompt), at most 8 tokens (the tag grammar).

The second limit depends on the tokenizer, so an annotation that fits one model can be too long for another. A long
topic is therefore shortened where examples are read or annotated, never a reason to drop a record.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Protocol

from pasta_jax.lang.program import Node, Program, Promise
from pasta_jax.lang.tags import MAX_TOPIC_TOKENS, TOPIC_PREFIX

MAX_TOPIC_WORDS = 3

_DANGLING = re.compile(
    "a|an|and|as|at|by|for|from|in|into|is|of|on|or|that|the|their|to|with|your|&", re.IGNORECASE
)
"""Words with which a shortened topic does not end."""


class Encoder(Protocol):
    """What counts tokens: any `tokens.tokenizer.Tokenizer`."""

    def encode(self, text: str) -> list[int]: ...


def topic_tokens(tokenizer: Encoder, topic: str) -> list[int]:
    """The ids of a topic in its tag: its words as in running text."""
    return tokenizer.encode(TOPIC_PREFIX + (topic.strip() or topic))


def fits(tokenizer: Encoder, topic: str) -> bool:
    """Whether a topic keeps both limits."""
    return len(topic.split()) <= MAX_TOPIC_WORDS and len(topic_tokens(tokenizer, topic)) <= MAX_TOPIC_TOKENS


def shortened(tokenizer: Encoder, topic: str) -> str:
    """The topic, or as many of its first words as keep both limits; of a word that is too long, its first letters.

    >>> class Letters:
    ...     def encode(self, text: str) -> list[int]:
    ...         return [ord(letter) for letter in text]
    >>> [shortened(Letters(), topic) for topic in ("rivers", "the longest river", "Timbuktu", "map of Mali")]
    ['rivers', 'the', 'Timbukt', 'map']
    """
    if fits(tokenizer, topic):
        return topic
    words = _trimmed(topic.split()[:MAX_TOPIC_WORDS]) or [topic[:1]]
    while len(words) > 1 and not fits(tokenizer, " ".join(words)):
        words = _trimmed(words[:-1])
    topic = " ".join(words)
    while len(topic) > 1 and not fits(tokenizer, topic):
        topic = topic[:-1]
    return topic


def with_short_topics(tokenizer: Encoder, program: Program) -> Program:
    """The program with every topic `shortened`: what training lays out of a record, and annotators write."""

    def short(node: Node) -> Node:
        if not isinstance(node, Promise) or node.is_bare:
            return node
        block = tuple(map(short, node.block))
        return dataclasses.replace(node, topic=shortened(tokenizer, node.topic), block=block)

    return Program(tuple(map(short, program.nodes)))


def _trimmed(words: Sequence[str]) -> list[str]:
    """The words without those at the end that need another one after them; the first word stays."""
    kept = list(words)
    while len(kept) > 1 and _DANGLING.fullmatch(kept[-1]):
        kept.pop()
    return kept
