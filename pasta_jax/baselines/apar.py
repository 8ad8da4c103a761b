r"""APAR: forks by rule (Liu et al. 2024, "LLMs can do auto-parallel auto-regressive decoding").

Its training data are plain answers in which regular expressions find a structure (the authors' repository,
data/filter_structured.py). The parent writes the head of a list item, up to and including its colon, or the first
sentence of a paragraph; then it forks, and a child writes the details. A fork costs the parent one token and has no
topic or length. The parent never sees a child, and children do not see each other: there is no sync.

>>> from pasta_jax.lang.render import render
>>> print(render(annotate("- France: Its capital is Paris.\n- Japan: Its capital is Tokyo.\n")), end="")
- France:<promise/><async> Its capital is Paris.</async>
- Japan:<promise/><async> Its capital is Tokyo.</async>

A line without a colon forks after its first sentence; a leading number is no sentence:

>>> print(render(annotate("1. First comes Iron. Its symbol is Fe.\n2. Then comes Cobalt. Its symbol is Co.")))
1. First comes Iron.<promise/><async> Its symbol is Fe.</async>
2. Then comes Cobalt.<promise/><async> Its symbol is Co.</async>

An answer with fewer than two forks stays as it is, and so do headings and details of a word or two:

>>> print(render(annotate("## Oslo\nIt is in Norway. It lies by the sea.\n- Lima: Peru.")))
## Oslo
It is in Norway. It lies by the sea.
- Lima: Peru.

Where our texts leave a choice, we choose in favour of APAR:

- Two forks are enough; the authors ask for three.
- A paragraph is a line, since our answers have no blank lines.
- Each line is judged by itself: an answer may hold both kinds of forks, and an item or paragraph that cannot be
  split does not affect the others. The authors look for paragraphs only in answers without a list, and drop a list
  if one item is too short.
- A colon counts only before a space, so 10:30 is not split. A sentence ends with a full stop before a space, as in
  the authors' code, so a question and its answer stay together.
- Spaces between head and details belong to the child, since the vocabulary spells words with a leading space.
"""

from __future__ import annotations

import re

from pasta_jax.lang.program import Node, Program, Promise, Text
from pasta_jax.lang.render import joined

MIN_FORKS = 2
MIN_DETAILS = 10
"""Characters, as in the authors' code."""

_HEADING = re.compile(r"\s*#")
_MARK = re.compile(r"\s*(?:-|\d+\.)\s+")
_COLON = re.compile(r":(?=\s)")
_FULL_STOP = re.compile(r"\.(?=\s)")


def annotate(text: str) -> Program:
    """A plain answer with bare promises as its forks; without any if there are too few."""
    nodes: list[Node] = []
    for number, line in enumerate(text.split("\n")):
        end = head_end(line)
        nodes.append(Text("\n" * (number > 0) + line[:end]))
        if end < len(line):
            nodes.append(Promise("", 0, (Text(line[end:]),)))
    forks = sum(isinstance(node, Promise) for node in nodes)
    return Program(joined(nodes if forks >= MIN_FORKS else [Text(text)]))


def head_end(line: str) -> int:
    """The offset at which a line's details start; its length if there is nothing to fork.

    >>> head_end("- France: Its capital is Paris.")
    9
    """
    if _HEADING.match(line):
        return len(line)
    mark = _MARK.match(line)
    start = mark.end() if mark else 0
    cut = (_COLON.search(line, start) if mark else None) or _FULL_STOP.search(line, start)
    return cut.end() if cut and len(line[cut.end() :].strip()) >= MIN_DETAILS else len(line)
