"""Taking promises back: parts of an annotated answer become text of main again."""

from __future__ import annotations

from collections.abc import Collection

from pasta_jax.lang.assemble import text_of
from pasta_jax.lang.program import Node, Program, Promise, Sync, Text
from pasta_jax.lang.render import joined
from pasta_jax.tokens.cost import theoretical_speedup
from pasta_jax.tokens.tokenizer import Tokenizer


def taken_back(
    program: Program, blocks: Collection[int], waits: Collection[int] = (), *, sees: bool = True
) -> Program:
    """The same text with fewer promises: some blocks become text of their thread, promises in them too.

    Args:
      program: of any depth.
      blocks: numbers of promises in document order, from 1.
      waits: numbers of promises. A sync comes before the text that follows each.
      sees: a sync comes before what was a block, if the thread has open branches, so that it sees them.

    >>> from pasta_jax.lang.parse import parse
    >>> from pasta_jax.lang.render import render
    >>> a, b, c = (f'<promise topic="{name}" tokens=1 /><async>{name}.</async>' for name in "abc")
    >>> print(render(taken_back(parse(a + b + c), [2])))
    <promise topic="a" tokens=1 /><async>a.</async><sync/>b.<promise topic="c" tokens=1 /><async>c.</async>
    >>> print(render(taken_back(parse(a + b + " Both."), [], [2])).partition("<sync/>")[2])
     Both.
    """
    number = 0

    def of_thread(nodes: tuple[Node, ...]) -> tuple[Node, ...]:
        nonlocal number
        out: list[Node] = []
        is_open, wanted = False, False
        for node in nodes:
            if isinstance(node, Promise):
                number += 1
                this = number
                if this in blocks:
                    number += sum(1 for _ in Program(node.block).promises())
                    if sees:
                        out += [Sync()] * is_open
                        is_open = False
                    out.append(Text(text_of(node.block)))
                else:
                    out.append(Promise(node.topic, node.tokens, of_thread(node.block)))
                    is_open, wanted = True, this in waits
                continue
            if isinstance(node, Sync) or wanted:
                out += [Sync()] * is_open
                is_open = wanted = False
            if isinstance(node, Text):
                out.append(node)
        return joined(out)

    return Program(of_thread(program.nodes))


def that_pay(tokenizer: Tokenizer, program: Program, min_speedup: float = 1.0) -> tuple[Program, int]:
    """The program without promises that gain nothing.

    Those go whose block nothing else is written beside. Then, while the theoretical speedup is below the least that
    is wanted, the one goes that gains least.

    Returns:
      the program, and how many promises were taken back.
    """
    before = _count(program)
    program = taken_back(program, alone(program), sees=False)
    while (count := _count(program)) and theoretical_speedup(tokenizer, program) < min_speedup:
        fewer = [taken_back(program, [branch], sees=False) for branch in range(1, count + 1)]
        program = max(fewer, key=lambda each: theoretical_speedup(tokenizer, each))
        program = taken_back(program, alone(program), sees=False)
    return program, before - _count(program)


def alone(program: Program) -> set[int]:
    """The promises whose thread does nothing but wait for them, by number; nor has it other open branches.

    >>> from pasta_jax.lang.parse import parse
    >>> a, b = (f'<promise topic="{name}" tokens=1 /><async>{name}.</async>' for name in "ab")
    >>> alone(parse(f"One: {a}<sync/> Two: {b} and more")), alone(parse(a + b))
    ({1}, set())
    """
    found, number = set[int](), 0

    def visit(nodes: tuple[Node, ...]) -> None:
        nonlocal number
        opened: list[int] = []
        wrote = False
        for node in (*nodes, Sync()):  # a thread waits at its end, too
            if isinstance(node, Promise):
                number += 1
                opened.append(number)
                visit(node.block)
            elif isinstance(node, Text):
                wrote = bool(opened and (wrote or node.text.strip()))
            else:
                if len(opened) == 1 and not wrote:
                    found.add(opened[0])
                opened, wrote = [], False

    visit(program.nodes)
    return found


def _count(program: Program) -> int:
    return sum(1 for _ in program.promises())
