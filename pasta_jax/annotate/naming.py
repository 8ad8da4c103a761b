"""Topics: what a block is called in its promise, from its name or its first words.

A topic names its block to the branch that writes it, which sees no other block; so the topics of an answer differ.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

from pasta_jax.lang.topics import MAX_TOPIC_WORDS, Encoder, shortened

LONG_NAME = 40
"""Characters of a name, such as a first sentence, of which other words can tell it from its like."""

SENTENCE_ENDS = (".", "!", "?", "\u3002")

_WORD = re.compile(r"[^\W_](?:[\w'\u2019&+#.-]*[\w+#])?")
_MARK = re.compile(r"\W*(?:(?:(?:Chapter|Day|Part|Phase|Step|Week) )?\d+|[A-Za-z]|[ivxIVX]+)[.):]\W+(?=\w)")
_CLAUSE = re.compile(r"[:;,(\[|/\n\u2013\u2014\u3001\u3002\uff0c]|\s-\s|[.!?](?:\s|\Z)")
_INTRODUCES = re.compile(r"\b(?:here|below|following)\b", re.IGNORECASE)
_POSSESSIVE = re.compile(r"['\u2019]s\Z")
_JOINTS = "a|an|the|of|to|in|on|at|by|for|from|with|as|into|and|or|is|are|be|your|its|their"
_JOINT = re.compile(_JOINTS, re.IGNORECASE)
"""Words that a name can do without."""

_FILLER = re.compile(
    f"{_JOINTS}|this|that|these|those|some|any|was|were|been|being|has|have|had|do|does|did|will|would|can|could|may"
    "|might|should|must|it|it's|they|there|he|his|she|her|we|our|you|i|my|but|so|if|about|than|then|also|very|more"
    "|even|don't|doesn't|can't|isn't|please|note|here|let|most|which|who|what|when|how|while|not|only|just|such|one|one's|both|all|many|other|often|where",
    re.IGNORECASE,
)
"""Words that tell nothing of what a text is about."""


def topics(tokenizer: Encoder, blocks: Sequence[tuple[str, str]]) -> list[str]:
    """A topic for each block, given as its name and its details; all different.

    >>> class Words:
    ...     def encode(self, text: str) -> list[int]:
    ...         return [0] * len(text.split())
    >>> topics(Words(), [("1. **The Nile**:", " It is long."), ("-", " The Rhine is in Europe."), ("2. Nile", "")])
    ['Nile', 'Rhine Europe', 'Nile 2']
    """
    chosen: dict[str, str] = {}
    for name, details in blocks:
        topic = next(
            topic
            for words in _candidates(name, details, " ".join(chosen.values()))
            if (topic := shortened(tokenizer, _POSSESSIVE.sub("", words))) and topic.casefold() not in chosen
        )
        chosen[topic.casefold()] = topic
    return list(chosen.values())


def _candidates(name: str, details: str, others: str) -> Iterator[str]:
    """Names of a block, the best first, without end. `others`: the topics so far."""
    is_sentence = re.search(r"\w\w", name) is not None and name.rstrip("*_\"'\u201d ")[-1:] in SENTENCE_ENDS
    is_no_name = is_sentence or _INTRODUCES.search(name)
    named = [] if is_no_name else _name_words(_MARK.sub("", name, count=1))
    told = _content(_WORD.findall(name * is_sentence + details[:400]))
    base = named or told[:MAX_TOPIC_WORDS] or ["part"]
    yield " ".join(base)
    rest = [*_content(_WORD.findall(name)), *told] if len(name) > LONG_NAME or not named else []
    taken = set(others.casefold().split())
    if fresh := [word for word in rest if word.casefold() not in taken]:
        yield " ".join(fresh[:MAX_TOPIC_WORDS])
    for number in itertools.count(2):
        yield f"{base[0]} {base[1]} {number}" if len(base) > 1 else f"{base[0]} {number}"
        yield f"{base[0][:12]} {number}"
        yield f"part {number}"


def _name_words(name: str) -> list[str]:
    """The first words of a name's first clause; without those that it can do without, if there are too many."""
    clause = next((part for part in _CLAUSE.split(name.replace("*", "")) if _WORD.search(part)), "")
    words = _WORD.findall(clause) if re.search(r"[^\W\d_]", clause) else []
    while len(words) > 1 and words[0].lower() in ("the", "a", "an"):
        words = words[1:]
    if len(words) > MAX_TOPIC_WORDS:
        words = [word for word in words if not _JOINT.fullmatch(word)] or words
    return words[:MAX_TOPIC_WORDS]


def _content(words: Iterable[str]) -> list[str]:
    """The words that tell what a text is about, each once; all of them if none does."""
    words = list(dict.fromkeys(words))
    return [word for word in words if not _FILLER.fullmatch(word)] or words
