"""The first answers of a model beside the baseline's, as they came, with visible branches: Markdown and HTML."""

from __future__ import annotations

import dataclasses
import html
import re
from collections.abc import Callable, Sequence

from pasta_jax.evaluate.answers import Answered
from pasta_jax.lang.parse import parse
from pasta_jax.lang.program import Node, Promise, Sync, Text
from pasta_jax.lang.tags import Dialect

SHOWN = 20
"""Prompts: the first of the file, whatever the answers."""

OVER = "Speedups are over the other answer to the same prompt, which may be longer or shorter."

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b07800", "#3a8fc4")
"""Of branches in HTML, in turn."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """A prompt, and what both models made of it.

    Attributes:
      prompt: for people.
      kind: of the record, or "".
      baseline, test: the answers.
    """

    prompt: str
    kind: str
    baseline: Answered
    test: Answered


def numbers_of(answer: Answered, baseline: Answered | None = None) -> str:
    """The numbers of an answer in a line."""
    if answer.error:
        return f"failed: {answer.error}"
    words = [f"{answer.promises} branches"] * (answer.promises > 0)
    words += [f"{answer.text_tokens} tokens", f"{answer.decode_steps} steps"]
    words += [f"{answer.wall_s:.2f} s"] * (answer.wall_s > 0)
    if baseline is not None and not baseline.error:
        words.append(f"theoretical {max(1, baseline.output_tokens) / answer.critical_path:.2f}x")
        if answer.wall_s and baseline.wall_s:
            words.append(f"realized {baseline.wall_s / answer.wall_s:.2f}x")
    words += ["cut off"] * answer.is_cut + ["malformed"] * answer.is_malformed
    return ", ".join(words)


def _walked(
    annotated: str,
    dialect: Dialect,
    text: Callable[[str], str],
    begin: Callable[[int, Promise], str],
    end: str,
    sync: str,
) -> str:
    """An annotated answer with something else for its tags; branches are numbered in document order."""
    out: list[str] = []
    count = 0
    todo: list[Node | None] = [*reversed(parse(annotated, dialect=dialect).nodes)]
    while todo:
        node = todo.pop()
        if isinstance(node, Text):
            out.append(text(node.text))
        elif isinstance(node, Promise):
            count += 1
            out.append(begin(count, node))
            todo += None, *reversed(node.block)
        else:
            out.append(sync if isinstance(node, Sync) else end)
    return "".join(out)


def with_marks(annotated: str, dialect: Dialect) -> str:
    """An answer with its branches between brackets.

    >>> print(with_marks('Two: <promise topic="Nile" tokens=1 /><async>Long.</async><sync/> Done.', "pasta"))
    Two: ⟦1 Nile, 10: Long.⟧⟦sync⟧ Done.
    """

    def begin(number: int, promise: Promise) -> str:
        topic = "" if promise.is_bare else f" {promise.topic}, {10 * promise.tokens}"
        return f"⟦{number}{topic}: "

    return _walked(annotated, dialect, str, begin, "⟧", "⟦sync⟧")


def as_markdown(pairs: Sequence[Pair], names: tuple[str, str], dialect: Dialect) -> str:
    """The page in Markdown: the baseline's answer, then the model's with its branches between ⟦ ⟧.

    Args:
      pairs: the prompts.
      names: of the baseline and of the model.
      dialect: of the model.
    """
    parts = [
        f"# {names[1]} beside {names[0]}",
        f"The first {len(pairs)} prompts, as they came. ⟦1 topic, 20: ...⟧ is what branch 1 wrote, after a promise "
        "of 20 tokens.",
        OVER,
    ]
    for number, pair in enumerate(pairs, start=1):
        kind = f" ({pair.kind})" if pair.kind else ""
        parts += [f"## {number}. {' '.join(pair.prompt.split())}{kind}"]
        shown = with_marks(pair.test.annotated, dialect)
        for name, text, line in (
            (names[0], pair.baseline.text, numbers_of(pair.baseline)),
            (names[1], shown, numbers_of(pair.test, pair.baseline)),
        ):
            runs = [len(run) for run in re.findall("`+", text)]
            fence = "`" * max(3, 1 + max(runs, default=0))
            parts += [f"**{name}**: {line}", f"{fence}text\n{text}\n{fence}"]
    return "\n\n".join(parts) + "\n"


STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 90rem; margin: 0 auto; padding: 1rem; }
h2 { font-size: 1.05rem; margin: 2rem 0 .4rem; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1.5rem; }
@media (max-width: 50rem) { .pair { grid-template-columns: 1fr; } }
.numbers { color: #666; font-size: .85rem; margin: 0 0 .4rem; }
.answer { white-space: pre-wrap; overflow-wrap: anywhere; }
.block { border-left: 3px solid; padding-left: .3rem; background: #f5f6f8; }
.label { font-size: .75rem; font-weight: 600; margin-right: .3rem; }
.sync { color: #888; font-size: .75rem; }"""


def as_html(pairs: Sequence[Pair], names: tuple[str, str], dialect: Dialect) -> str:
    """The same as one HTML file, the two answers beside each other, each branch with its label and colour."""

    def begin(number: int, promise: Promise) -> str:
        color = COLORS[(number - 1) % len(COLORS)]
        topic = "" if promise.is_bare else f" {html.escape(promise.topic)}, {10 * promise.tokens}"
        return (
            f'<span class="block" style="border-color:{color}"><span class="label" style="color:{color}">'
            f"{number}{topic}</span>"
        )

    def column(name: str, line: str, body: str) -> str:
        return (
            f'<div><p class="numbers"><b>{html.escape(name)}</b>: {html.escape(line)}</p>\n'
            f'<div class="answer">{body}</div></div>'
        )

    title = html.escape(f"{names[1]} beside {names[0]}")
    parts = []
    for number, pair in enumerate(pairs, start=1):
        kind = f" ({pair.kind})" if pair.kind else ""
        body = _walked(
            pair.test.annotated, dialect, html.escape, begin, "</span>", '<span class="sync">sync</span>'
        )
        parts.append(
            f"<h2>{number}. {html.escape(pair.prompt + kind)}</h2>\n"
            f'<div class="pair">{column(names[0], numbers_of(pair.baseline), html.escape(pair.baseline.text))}\n'
            f"{column(names[1], numbers_of(pair.test, pair.baseline), body)}</div>"
        )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f"<style>\n{STYLE}\n</style>\n</head>\n<body>\n<h1>{title}</h1>\n<p>The first {len(pairs)} prompts, as "
        "they came. A label has the number of the branch, its topic, and the tokens that were promised. "
        f"{OVER}</p>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )
