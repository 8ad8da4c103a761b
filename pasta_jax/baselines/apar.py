r"""APAR: forks by rule (Liu et al. 2024, "LLMs can do auto-parallel auto-regressive decoding").

Its training data are plain answers in which regular expressions find a structure (the authors' repository,
data/filter_structured.py): the head of a list item, up to and including its colon, or else the first sentence of a
paragraph stays in the parent, which then forks; the details are a child. A fork costs the parent one token and
says nothing of its child. The parent never sees a child, nor one child another: there is no sync.

>>> from pasta_jax.lang.render import render
>>> print(render(annotate("- France: Its capital is Paris.\n- Japan: Its capital is Tokyo.\n")), end="")
- France:<promise/><async> Its capital is Paris.</async>
- Japan:<promise/><async> Its capital is Tokyo.</async>

A line without a colon forks after its first sentence, a number before it not counted:

>>> print(render(annotate("1. First comes Iron. Its symbol is Fe.\n2. Then comes Cobalt. Its symbol is Co.")))
1. First comes Iron.<promise/><async> Its symbol is Fe.</async>
2. Then comes Cobalt.<promise/><async> Its symbol is Co.</async>

An answer with less than two places to fork stays as it is, as do headings, and details of a word or two:

>>> print(render(annotate("## Oslo\nIt is in Norway. It lies by the sea.\n- Lima: Peru.")))
## Oslo
It is in Norway. It lies by the sea.
- Lima: Peru.

Where our texts leave a choice, it is the one that favours APAR:

- Two forks are enough; the authors ask for three.
- A paragraph is a line, since our answers have no blank lines.
- Each line is judged by itself, so an answer may hold both kinds of forks, and an item or paragraph that cannot be
  split leaves the others theirs; the authors look for paragraphs only where they find no list, and give up a list
  of which one item is too short.
- A colon counts only before a space, so that 10:30 is not cut in two. A sentence ends with a full stop before a
  space, as theirs does, so that a question and its answer stay together.
- Spaces between head and details are the child's, which is how the vocabulary spells words.
"""

from __future__ import annotations

import re

from pasta_jax.lang.program import Node, Program, Promise, Text
from pasta_jax.lang.render import joined

MIN_FORKS = 2
MIN_DETAILS = 10
"""Characters, as the authors have it."""

_HEADING = re.compile(r"\s*#")
_MARK = re.compile(r"\s*(?:-|\d+\.)\s+")
_COLON = re.compile(r":(?=\s)")
_FULL_STOP = re.compile(r"\.(?=\s)")


def annotate(text: str) -> Program:
    """A plain answer with its forks, bare promises; without them if there are too few."""
    nodes: list[Node] = []
    for number, line in enumerate(text.split("\n")):
        end = head_end(line)
        nodes.append(Text("\n" * (number > 0) + line[:end]))
        if end < len(line):
            nodes.append(Promise("", 0, (Text(line[end:]),)))
    forks = sum(isinstance(node, Promise) for node in nodes)
    return Program(joined(nodes if forks >= MIN_FORKS else [Text(text)]))


def head_end(line: str) -> int:
    """Where the details of a line begin; its length if it has none to fork for.

    >>> head_end("- France: Its capital is Paris.")
    9
    """
    if _HEADING.match(line):
        return len(line)
    mark = _MARK.match(line)
    start = mark.end() if mark else 0
    cut = (_COLON.search(line, start) if mark else None) or _FULL_STOP.search(line, start)
    return cut.end() if cut and len(line[cut.end() :].strip()) >= MIN_DETAILS else len(line)
