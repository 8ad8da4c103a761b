r"""A Program as canonical annotated text.

>>> from pasta_jax.lang.program import Program, Promise, Sync, Text
>>> rivers = Promise("rivers", tokens=2, block=(Text("The Nile is the longest river."),))
>>> print(render(Program((Text("A fact: "), rivers, Sync(), Text(" That is all.")))))
A fact: <promise topic="rivers" tokens=2 /><async>The Nile is the longest river.</async><sync/> That is all.

Ordinary text may itself spell a tag, for example in an answer about this language. Then one backslash is written
after the `<`, and reading removes it. Text that already has such backslashes gets one more, so different texts
are never written alike:

>>> print(render(Program((Text("Write <sync/> to wait, not <\\sync/> or <b>."),))))
Write <\sync/> to wait, not <\\sync/> or <b>.

A bare promise (of the apar dialect) is read back by `parse` in that dialect only:

>>> print(render(Program((Text("- Nile:"), Promise("", tokens=0, block=(Text(" In Africa."),))))))
- Nile:<promise/><async> In Africa.</async>
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from pasta_jax.lang import tags
from pasta_jax.lang.program import MAX_TOKENS, MIN_TOKENS, Node, Program, Promise, Sync, Text

OPENINGS = (tags.PROMISE_OPEN, tags.ASYNC_OPEN, tags.ASYNC_CLOSE, tags.SYNC)
"""The pieces that start a tag. The other two have a meaning only inside a promise."""

BODY = "(?:" + "|".join(re.escape(piece.removeprefix("<")) for piece in OPENINGS) + ")"
"""A regular expression for what follows the `<` of a tag."""

_SPELLS_TAG = re.compile(rf"<(?=\\*{BODY})")


def render(program: Program) -> str:
    """The program as text. `parse` reads it back as an equal program if no two Text nodes are neighbours.

    Raises:
      ValueError: a promise has a topic or a number of tokens that could not be read back.
    """
    out: list[str] = []
    # A stack instead of recursion: a program may nest deeper than Python does.
    todo: list[Node | str] = [*reversed(joined(program.nodes))]
    while todo:
        match todo.pop():
            case Text(text):
                out.append(escape(text))
            case Sync():
                out.append(tags.SYNC)
            case Promise() as promise:
                out += _promise_tag(promise), tags.ASYNC_OPEN
                todo += tags.ASYNC_CLOSE, *reversed(joined(promise.block))
            case str(closing):
                out.append(closing)
    return "".join(out)


def escape(text: str) -> str:
    r"""Ordinary text as it is written between tags.

    >>> print(escape("if a < b: <async> and a <promise> />"))
    if a < b: <\async> and a <promise> />
    """
    return _SPELLS_TAG.sub(r"<\\", text)


def joined(nodes: Iterable[Node]) -> tuple[Node, ...]:
    """The nodes with neighbouring Text nodes merged and empty ones left out.

    >>> joined([Text("<"), Text(""), Text("sync/>"), Sync(), Text("")])
    (Text(text='<sync/>'), Sync())
    """
    out: list[Node] = []
    run: list[str] = []
    for node in nodes:
        if isinstance(node, Text):
            run.append(node.text)
            continue
        if text := "".join(run):
            out.append(Text(text))
        run.clear()
        out.append(node)
    if text := "".join(run):
        out.append(Text(text))
    return tuple(out)


def promise_problem(topic: str, tokens: int, written: str = "") -> str | None:
    """Why a promise cannot be written as a tag, or None. `written`: the number as a text has it.

    >>> promise_problem("<b>rivers</b>", 2)
    "the topic holds '<'"
    >>> promise_problem("rivers", 120)
    'tokens=120 is not between 1 and 99'
    """
    if not topic:
        return "the topic is empty"
    for character in topic:
        if character in tags.TOPIC_FORBIDS:
            return f"the topic holds {character!r}"
    if not MIN_TOKENS <= tokens <= MAX_TOKENS:
        return f"tokens={written or tokens} is not between {MIN_TOKENS} and {MAX_TOKENS}"
    return None


def _promise_tag(promise: Promise) -> str:
    if promise.is_bare:
        return tags.FORK
    if problem := promise_problem(promise.topic, promise.tokens):
        raise ValueError(f"cannot render the promise {promise.topic!r}: {problem}")
    return f"{tags.PROMISE_OPEN}{promise.topic}{tags.PROMISE_TOKENS}{promise.tokens}{tags.PROMISE_CLOSE}"
