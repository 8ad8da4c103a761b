r"""Reads what a language model returned for an answer: the same text with tags inserted, or not quite.

>>> answer = "Two rivers: the Nile is long. The Rhine is short."
>>> reply = 'Two rivers: <async topic="Nile">the Nile is long.</async>\n<sync/>The Rhine is short.'
>>> for node in inserted(reply, answer):
...     print(node)
Text(text='Two rivers: ')
Promise(topic='Nile', tokens=0, block=(Text(text='the Nile is long.'),))
Text(text=' ')
Sync()
Text(text='The Rhine is short.')

The line break that the model put beside a tag instead of the space is no harm: the text is the answer's. Anything
else is:

>>> inserted(reply.replace("short", "shorter"), answer)
Traceback (most recent call last):
    ...
pasta_jax.annotate.insertion.NotInserted: the text is altered: the answer has 'short.' where you wrote 'shorter.'
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple, TypeAlias

from pasta_jax.lang.program import Node, Promise, Sync, Text
from pasta_jax.lang.render import joined
from pasta_jax.lang.tags import TOPIC_FORBIDS

Kind: TypeAlias = Literal["open", "close", "sync"]

_TAG = re.compile(
    r"""<\s*async\s+topic\s*=\s*(?:"(?P<double>[^"\n]*)"|'(?P<single>[^'\n]*)')\s*>"""
    r"|(?P<close><\s*/\s*async\s*>)|(?P<sync><\s*sync\s*/?\s*>(?:<\s*/\s*sync\s*>)?)",
    re.IGNORECASE,
)
_FENCE = re.compile(r"\s*```\w*\n(.*?)\n?```\s*", re.DOTALL)
_WRAPPER = re.compile(r"\s*<answer>\n?(.*?)\n?</answer>\s*", re.DOTALL)

SHOWN = 40
"""Characters that a message quotes."""


class NotInserted(ValueError):
    """A reply that is not the answer with tags inserted; says what is wrong, for the model.

    Attributes:
      kind: what is wrong, without quoting the texts.
    """

    def __init__(self, kind: str, detail: str = ""):
        super().__init__(kind + detail)
        self.kind = kind


class _Tag(NamedTuple):
    kind: Kind
    topic: str = ""


def spells_tag(answer: str) -> bool:
    """Whether an answer itself has what would be read as a tag, so that nobody could tell the two apart.

    >>> spells_tag("Write <sync/> to wait."), spells_tag("Map<Promise<void>> and <async>")
    (True, False)
    """
    return _TAG.search(answer) is not None


def inserted(reply: str, answer: str) -> tuple[Node, ...]:
    """The answer with the tags of the reply; promises have no length yet (0), their blocks are text alone.

    Tags within a block are dropped. Spaces and line breaks that differ beside a tag are the answer's.

    Raises:
      NotInserted: the text of the reply is another, or its tags do not pair.
    """
    if not answer.lstrip().startswith("<answer>") and (found := _WRAPPER.fullmatch(reply)):
        reply = found[1]
    if not answer.lstrip().startswith("```") and (found := _FENCE.fullmatch(reply)):
        reply = found[1]
    texts, tags, start = [], [], 0
    for found in _TAG.finditer(reply):
        texts.append(reply[start : found.start()])
        start = found.end()
        if found["close"]:
            tags.append(_Tag("close"))
        elif found["sync"]:
            tags.append(_Tag("sync"))
        else:
            tags.append(_Tag("open", found["double"] or found["single"] or ""))
    texts.append(reply[start:])
    if "".join(texts) != answer:
        texts = _repaired(texts, tags, answer)
    return _nodes(texts, tags)


def _repaired(texts: list[str], tags: list[_Tag], answer: str) -> list[str]:
    """The texts between the tags with the spaces of the answer, if they differ from it in nothing else."""
    fixed, at, pending = [""], 0, list[_Tag]()  # pending: tags since the last text that is not blank

    def give(gap: str) -> None:
        """Puts the spaces between two texts in front of the first tag that opens or waits, or else at the end."""
        position = next((i for i, tag in enumerate(pending) if tag.kind != "close"), len(pending))
        for i in range(len(pending) + 1):
            piece = gap if i == position else ""
            if i == 0:
                fixed[-1] += piece
            else:
                fixed.append(piece)
        pending.clear()

    for i, text in enumerate(texts):
        core = text.strip()
        if core:
            start = _not_blank(answer, at)
            if not answer.startswith(core, start):
                raise NotInserted(*_difference(answer[start:], core + "".join(texts[i + 1 :])))
            give(answer[at:start])
            fixed[-1] += core
            at = start + len(core)
        if i < len(tags):
            pending.append(tags[i])
    if answer[at:].strip():
        raise NotInserted(*_difference(answer[at:], ""))
    give(answer[at:])
    return fixed


def _not_blank(text: str, start: int) -> int:
    """Where the next character that is not blank stands, or the end."""
    return len(text) - len(text[start:].lstrip())


def _difference(answer: str, text: str) -> tuple[str, str]:
    """Where a text leaves the answer."""
    same = next((i for i, (a, b) in enumerate(zip(answer, text)) if a != b), min(len(answer), len(text)))
    start = answer.rfind(" ", 0, same) + 1 if " " in answer[max(0, same - SHOWN // 2) : same] else same
    there, here = answer[start : start + SHOWN], text[start : start + SHOWN]
    if not text.strip():
        return "the text is cut off", f" before {there!r}"
    return "the text is altered", f": the answer has {there!r} where you wrote {here!r}"


def _nodes(texts: list[str], tags: list[_Tag]) -> tuple[Node, ...]:
    nodes: list[Node] = []
    block: list[str] = []
    topic, depth = "", 0
    for text, tag in zip(texts, [*tags, None]):
        if depth:
            block.append(text)
        else:
            nodes.append(Text(text))
        if tag is None:
            break
        if tag.kind == "open":
            depth += 1
            if depth == 1:
                topic, block = tag.topic, []
        elif tag.kind == "close":
            depth -= 1
            if depth < 0:
                raise NotInserted("a </async> has no <async> before it")
            if depth == 0:
                nodes.append(Promise(_clean(topic), 0, (Text("".join(block)),)))
        elif depth == 0:
            nodes.append(Sync())
    if depth:
        raise NotInserted("an <async> has no </async>")
    return joined(nodes)


def _clean(topic: str) -> str:
    """A topic without what a tag cannot hold."""
    return " ".join("".join(" " if letter in TOPIC_FORBIDS else letter for letter in topic).split())
