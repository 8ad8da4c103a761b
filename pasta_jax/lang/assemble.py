"""What the reader of an answer gets: the tags removed, every block in its place."""

from __future__ import annotations

from collections.abc import Sequence

from pasta_jax.lang.program import Node, Program, Promise, Text


def assemble(program: Program) -> str:
    """The reader's text.

    >>> from pasta_jax.lang.parse import parse
    >>> assemble(parse('One: <promise topic="one" tokens=1 /><async>1.</async><sync/> Done.'))
    'One: 1. Done.'
    """
    return text_of(program.nodes)


def text_of(nodes: Sequence[Node]) -> str:
    """The reader's text of some nodes, of a block for instance."""
    out: list[str] = []
    todo = [*reversed(nodes)]
    while todo:
        node = todo.pop()
        if isinstance(node, Text):
            out.append(node.text)
        elif isinstance(node, Promise):
            todo += reversed(node.block)
    return "".join(out)
