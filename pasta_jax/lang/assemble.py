"""The text of an answer as its reader gets it: without tags, every block in its place."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from pasta_jax.lang.program import Node, Program, Promise, Text


def assemble(program: Program) -> str:
    """The reader's text.

    >>> from pasta_jax.lang.parse import parse
    >>> assemble(parse('One: <promise topic="one" tokens=1 /><async>1.</async><sync/> Done.'))
    'One: 1. Done.'
    """
    return text_of(program.nodes)


def text_of(nodes: Sequence[Node]) -> str:
    """The reader's text of some nodes, for example a block."""
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
    """The program cut off after this many characters of its text; tags at the cut go too.

    >>> from pasta_jax.lang.parse import parse
    >>> program = parse('One: <promise topic="one" tokens=1 /><async>1.</async><sync/> Done.')
    >>> assemble(shortened(program, 6)), len(shortened(program, 5).nodes)
    ('One: 1', 1)
    """
    # A stack instead of recursion: a promise, the nodes kept of its thread, and the nodes left of it.
    levels: list[tuple[Promise | None, list[Node], Iterator[Node]]] = [(None, [], iter(program.nodes))]
    while True:
        promise, kept, rest = levels[-1]
        node = next(rest, None) if characters > 0 else None
        if isinstance(node, Promise):
            levels.append((node, [], iter(node.block)))
        elif node is not None:
            if isinstance(node, Text):
                node, characters = Text(node.text[:characters]), characters - len(node.text)
            kept.append(node)
        elif promise is None:
            return Program(tuple(kept))
        else:
            levels.pop()
            levels[-1][1].append(dataclasses.replace(promise, block=tuple(kept)))
