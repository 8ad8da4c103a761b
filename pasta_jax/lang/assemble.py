"""What the reader of an answer gets: the tags removed, every block in its place."""

from __future__ import annotations

import dataclasses
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


def shortened(program: Program, characters: int) -> Program:
    """The program without what comes after the first so many characters of its text; tags right there go too.

    >>> from pasta_jax.lang.parse import parse
    >>> program = parse('One: <promise topic="one" tokens=1 /><async>1.</async><sync/> Done.')
    >>> assemble(shortened(program, 6)), len(shortened(program, 5).nodes)
    ('One: 1', 1)
    """
    left = characters

    def first(nodes: Sequence[Node]) -> tuple[Node, ...]:
        nonlocal left
        out: list[Node] = []
        for node in nodes:
            if left <= 0:
                break
            if isinstance(node, Text):
                node, left = Text(node.text[:left]), left - len(node.text)
            elif isinstance(node, Promise):
                node = dataclasses.replace(node, block=first(node.block))
            out.append(node)
        return tuple(out)

    return Program(first(program.nodes))
