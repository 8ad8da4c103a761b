r"""Reads the structure of an answer: headings with sections, list items, paragraphs, table rows, code.

Answers of chat models are Markdown, more or less. The reader takes any text and changes nothing: a `Part` is three
offsets into it. From `start` to `head` stands what names it (a mark and a bold head, a heading, a first sentence),
from `head` to `end` its details.

>>> text = "Here are two:\n\n1. **Nile**: It is long.\n   - It is in Africa.\n2. **Rhine**: Short.\n\nBoth flow."
>>> for part in read(text):
...     print(f"{part.kind:9} {part.name(text)!r:13} {part.details(text)!r}")
paragraph 'Here are two:' ''
item      '1. **Nile**:' ' It is long.\n   - It is in Africa.'
item      '2. **Rhine**:' ' Short.'
paragraph 'Both flow.'  ''
>>> [child.details(text) for child in read(text)[1].children]
[' It is in Africa.']
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias

from pasta_jax.lang.sentences import SENTENCE_END

Kind: TypeAlias = Literal["section", "item", "paragraph", "verse", "row", "code", "rule"]


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece of an answer, as offsets into its text.

    Attributes:
      kind: what it is. A "verse" is a paragraph whose line breaks are meant: of a poem, a song, an address. A "row"
        is one of a table, a "rule" a line across, such as below a table's head.
      start, head, end: name and details. `head` is `start` where nothing names the part.
      marker: of an item its mark ("1.", "-"), of a section its kind ("##", "**", ":").
      children: the parts within, in order.
    """

    kind: Kind
    start: int
    head: int
    end: int
    marker: str = ""
    children: tuple[Part, ...] = ()

    def name(self, text: str) -> str:
        """What names the part, its mark included."""
        return text[self.start : self.head]

    def details(self, text: str) -> str:
        """What comes after the name."""
        return text[self.head : self.end]


# ------------------------------------------------------------------------------------------------------ lines

_BULLET = (
    "[-*+\u2013\u2014\u2022\u2023\u25a0\u25a1\u25aa\u25ab\u25b6\u25ba\u25cf\u25e6\u2605\u2713\u2714\u2705"
    "\u27a2\u27a4\U0001f449\U0001f536-\U0001f53b]\ufe0f?"
)
_COUNTED = r"\d{1,3}[.)]|[A-Za-z][.)]|[ivxIVX]{2,5}[.)]|\((?:\d{1,3}|[A-Za-z]|[ivxIVX]{2,5})\)"
_WORD = "(?:Day|Example|Idea|Month|Option|Part|Phase|Question|Reason|Scene|Step|Tip|Week|Year) \\d{1,2}[:.)]"
_ITEM = re.compile(rf"[ \t]*(?:\*\*|__)?(?P<marker>{_BULLET}|{_COUNTED}|{_WORD})(?:\*\*|__)?(?=[ \t]+\S)")
_HASHES = re.compile(r" {0,3}(?P<marker>#{1,6})[ \t]+\S")
_BOLD = re.compile(r" {0,3}(?:\*\*(?=\S)[^*\n]{1,120}\*\*|__(?=\S)[^_\n]{1,120}__):?")
_LABEL = re.compile(r"[^\W_][^\n:.!?]{0,40}:")
_INTRODUCES = re.compile(
    r"\b(?:here|below|following|follow|sure|certainly|are|is|can|should|you|i)\b", re.IGNORECASE
)
_ROW = re.compile(r"[ \t]*\|.*\|")
_RULE = re.compile(r"[ \t]*(?:(?:[-*_=][ \t]*){3,}|\|?(?:[ \t]*:?-+:?[ \t]*\|)+(?:[ \t]*:?-+:?[ \t]*)?)")
_FENCED = re.compile(
    r"[ \t]*(?P<fence>`{3,}|~{3,})[^\n]*"
    r"(?:\n(?![ \t]*(?P=fence)[`~]*[ \t]*(?:\n|\Z))[^\n]*)*"  # lines that do not close it
    r"(?:\n[ \t]*(?P=fence)[`~]*)?"
)
_PIECE = re.compile(f"^(?:{_FENCED.pattern}|[^\\n]+)", re.MULTILINE)
"""A fenced block, or a line."""


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """A line or several that belong together: a heading, the first line of an item, a paragraph, a row, code.

    `rank` orders what holds what: a part ends where one of the same or a lower rank starts. Sections come before
    items, items by their indent, and bullets may be nested below a number without an indent.
    """

    kind: Kind
    start: int
    end: int
    rank: tuple[int, ...]
    marker: str = ""


_CONTINUES = (2,)
"""The rank of a line right below another: it belongs to whatever is open."""


def _leaves(text: str) -> Iterator[_Leaf]:
    paragraph: _Leaf | None = None
    end, has_details = 0, False  # of the line above; whether it is an item's and tells of it
    for match in _PIECE.finditer(text):
        piece = match[0].rstrip()
        if not piece:
            continue
        start, above = match.start() + len(piece) - len(piece.lstrip()), end
        end = match.start() + len(piece)
        is_below = above > 0 and text.count("\n", above, start) == 1
        # A capital below a full stop starts anew, though a list without a blank line after it is no Markdown.
        goes_on = is_below and not (has_details and text[above - 1] in ".!?" and piece[0].isupper())
        leaf = _leaf(piece, start, end, _CONTINUES if goes_on else (1, _indent(piece), -1))
        has_details = (goes_on and has_details) or (leaf.kind == "item" and _head(text, "item", leaf) < end)
        if paragraph is not None and leaf.kind == "paragraph" and goes_on:
            paragraph = dataclasses.replace(paragraph, end=end)
            continue
        if paragraph is not None:
            yield paragraph
        paragraph = leaf if leaf.kind == "paragraph" else None
        if paragraph is None:
            yield leaf
    if paragraph is not None:
        yield paragraph


def _leaf(piece: str, start: int, end: int, rank: tuple[int, ...]) -> _Leaf:
    """What a line or a fenced block is by itself. `rank`: where it has no rank of its own."""
    if _FENCED.match(piece):
        return _Leaf("code", start, end, rank)
    if _RULE.fullmatch(piece):
        return _Leaf("rule", start, end, rank)
    if found := _HASHES.match(piece):
        return _Leaf("section", start, end, (0, len(found["marker"])), found["marker"])
    if found := _ITEM.match(piece):
        is_bullet = re.fullmatch(_BULLET, found["marker"]) is not None
        return _Leaf("item", start, end, (1, _indent(piece), int(is_bullet)), found["marker"])
    if _ROW.fullmatch(piece):
        return _Leaf("row", start, end, rank)
    for pattern, level, words, marker in ((_BOLD, 7, 16, "**"), (_LABEL, 8, 4, ":")):
        if pattern.fullmatch(piece) and len(piece.split()) <= words and not _INTRODUCES.search(piece):
            return _Leaf("section", start, end, (0, level), marker)
    return _Leaf("paragraph", start, end, rank)


def _indent(line: str) -> int:
    """Two columns before the first letter count as one, a tab as four."""
    before = line[: len(line) - len(line.lstrip())]
    return len(before.expandtabs(4)) // 2


# ------------------------------------------------------------------------------------------------------- tree


def read(text: str) -> tuple[Part, ...]:
    """The parts of an answer, outermost first; between them are only blanks."""
    whole = _Open(_Leaf("section", 0, 0, (-1,)), [])
    stack = [whole]
    for leaf in _leaves(text):
        rank = leaf.rank
        if leaf.kind == "paragraph" and rank == (1, 0, -1) and _holds_list(stack):
            rank = (0, 7)  # a paragraph after the list below a bold line or a label is not of that section
        while stack[-1].leaf.rank >= rank:
            stack[-2].children.append(stack.pop().part(text))
        if leaf.kind in ("section", "item"):
            stack.append(_Open(leaf, []))
        else:
            stack[-1].children.append(_Open(leaf, []).part(text))
    while len(stack) > 1:
        stack[-2].children.append(stack.pop().part(text))
    return _with_absorbed(text, whole.children)


def _holds_list(stack: Sequence[_Open]) -> bool:
    """Whether the innermost open section already has items."""
    kinds = [each.leaf.kind for each in stack]
    innermost = len(kinds) - 1 - kinds[::-1].index("section")
    return "item" in kinds[innermost:] or any(child.kind == "item" for child in stack[innermost].children)


@dataclasses.dataclass
class _Open:
    """A part that is being read: its first leaf, and the children so far."""

    leaf: _Leaf
    children: list[Part]

    def part(self, text: str) -> Part:
        leaf = self.leaf
        kind, end = leaf.kind, self.children[-1].end if self.children else leaf.end
        if kind == "paragraph" and _is_verse(text[leaf.start : leaf.end]):
            kind = "verse"
        head = _head(text, kind, leaf)
        return Part(kind, leaf.start, head, end, leaf.marker, _with_absorbed(text, self.children))


def _with_absorbed(text: str, parts: Sequence[Part]) -> tuple[Part, ...]:
    r"""The parts, with what stands between two successive numbers as children of the first of them.

    >>> text = "1. One:\n\nIt is odd.\n\n2. Two:\n\nEven."
    >>> [part.details(text) for part in read(text)]
    ['\n\nIt is odd.', '', '']
    """
    out: list[Part] = []
    for part in parts:
        number = number_of(part)
        last = next((i for i in reversed(range(len(out))) if out[i].kind in ("item", "section")), None)
        if number > 1 and last is not None and last < len(out) - 1 and number_of(out[last]) == number - 1:
            between = out[last + 1 :]
            children = (*out[last].children, *between)
            out[last:] = [dataclasses.replace(out[last], end=between[-1].end, children=children)]
        out.append(part)
    return tuple(out)


def number_of(part: Part) -> int:
    """The number of a counted item; 0 of every other part."""
    digits = re.search(r"\d+", part.marker) if part.kind == "item" else None
    return int(digits[0]) if digits else 0


def _is_verse(paragraph: str) -> bool:
    lines = paragraph.split("\n")
    return len(lines) >= 3 and len(paragraph) / len(lines) < 65


# ------------------------------------------------------------------------------------------------------ names

_BOLD_NAME = re.compile(
    r"[ \t]*(?:\*\*|__)(?=\S)[^*_\n]{1,80}?(?:\*\*|__)"
    r"(?:[ \t]*\([^)\n]{1,40}\))?(?:[ \t]*(?:\uff1a|[:\u2013\u2014-](?=\s|\Z)))?"
)
_REST_OF_BOLD = re.compile(r"[ \t]*[^*_\n]{1,160}?(?:\*\*|__)(?:[ \t]*:)?")
_PLAIN_NAME = re.compile(
    r"[ \t]*(?:[^\n:.!?;]{1,60}:(?=\s|\Z)|[^\n:.!?;,]{1,40}?[ \t][\u2013\u2014-](?=[ \t]))"
)
_PLAIN_WORDS = 8
_ABBREVIATED = re.compile(
    r"(?:\b(?:[A-Z]|Mr|Mrs|Ms|Dr|St|vs|etc|e\.g|i\.e|No|approx|U\.S|a\.m|p\.m)|^\W*\d+)\Z"
)


def _head(text: str, kind: Kind, leaf: _Leaf) -> int:
    """Where the name of a part ends."""
    line = text[leaf.start : leaf.end]
    if kind == "section":
        return leaf.end
    if kind == "item":
        mark = _ITEM.match(line)
        after = mark.end() if mark else 0
        is_in_bold = (line[:after].count("**") + line[:after].count("__")) % 2 == 1
        named = _REST_OF_BOLD.match(line, after) if is_in_bold else _named(line, after)
        return leaf.start + (named.end() if named else after)
    if kind == "row":
        return leaf.start + line.index("|", line.index("|") + 1) + 1
    if kind == "paragraph":
        named = _named(line, 0)
        return leaf.start + (named.end() if named and named.end() < len(line) else sentence_end(line))
    return leaf.start


def _named(line: str, start: int) -> re.Match[str] | None:
    """A bold beginning, or a few words before a colon or a dash."""
    if found := _BOLD_NAME.match(line, start):
        return found
    found = _PLAIN_NAME.match(line, start)
    return found if found and len(found[0].split()) <= _PLAIN_WORDS else None


def sentence_end(text: str) -> int:
    """Where the first sentence of a text ends.

    >>> text = "Dr. No met Mr. T. in the U.S. of 1950. Then he left."
    >>> text[:sentence_end(text)]
    'Dr. No met Mr. T. in the U.S. of 1950.'
    """
    for found in SENTENCE_END.finditer(text):
        if not _ABBREVIATED.search(text[: found.start()][-12:]):
            return found.end()
    return len(text)
