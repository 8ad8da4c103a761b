r"""The form of an annotated answer in numbers: lists, doubles, loops, topics, and the lengths that it promised.

All is counted from the answer alone, so it can be asked of what a model wrote and of what it is to learn. How
branches agree that do not see each other shows in the lists that several of them wrote.

>>> from pasta_jax.lang.parse import parse
>>> one = '<promise topic="Nile" tokens=1 /><async>1. **Nile**: It is long.</async>'
>>> two = '<promise topic="nile" tokens=1 /><async>- **Rhine**: It is short.</async>'
>>> form = form_of(parse(f"Rivers:\n{one}\n{two}"))
>>> form.lists, form.one_marker, form.branched_lists, form.topics, form.repeated_topics
(1, 0, 1, 2, 1)
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from pasta_jax.lang import markdown
from pasta_jax.lang.assemble import assemble, text_of
from pasta_jax.lang.markdown import Part, number_of
from pasta_jax.lang.program import Node, Program, Promise, Text, length_in_tens

ALIKE = 0.8
"""The share of common words from which two parts are nearly equal (Jaccard's index of their sets of words)."""

NGRAM = 4
"""Words of a run that repeats."""

LOOP = 12, 3
"""An answer ends in a loop if so many words at its end, and its last words so many times, repeat."""


@dataclasses.dataclass(frozen=True)
class Form:
    """What is counted in an answer.

    Attributes:
      answers: 1.
      promises: how many.
      lists: of two items or more, at any depth.
      one_marker: those whose items have the same kind of mark: "-", "*", "1.", "1)", "a.", "Step 1:", ...
      numbered, in_order: lists of numbers, and those in which each is one above the one before.
      branched_lists: lists of which two items or more begin a block.
      neat_branched: those of them with one kind of mark, and in order if they are numbered.
      named, repeated_names: items of lists with a name (a bold head, words before a colon), and those with the name
        of an earlier item of the list.
      parts: items and paragraphs, items with all that is in them.
      doubled: parts nearly equal (`ALIKE`) to an earlier one that does not hold them.
      topics, repeated_topics: of promises, and those that an earlier promise has, without regard to case.
      block_tokens: of all blocks, by the tokenizer.
      length_error: the sum of |announced tokens - tokens|, a promise announcing ten times its number.
      length_bias: the sum of announced tokens - tokens.
      length_rounding: `length_error`, had each promise the nearest number there is.
      ngrams, repeated_ngrams: runs of `NGRAM` words, and those that occurred before.
      loops: 1 if the answer ends in a loop.
    """

    answers: int
    promises: int
    lists: int
    one_marker: int
    numbered: int
    in_order: int
    branched_lists: int
    neat_branched: int
    named: int
    repeated_names: int
    parts: int
    doubled: int
    topics: int
    repeated_topics: int
    block_tokens: int
    length_error: int
    length_bias: int
    length_rounding: int
    ngrams: int
    repeated_ngrams: int
    loops: int


@dataclasses.dataclass(frozen=True)
class Share:
    """A measure: the sum of one count over all answers, divided by that of another.

    Attributes:
      title: for people.
      above, below: fields of `Form`.
      is_part: whether `above` counts some of what `below` counts.
      of: what `below` counts, for people.
    """

    title: str
    above: str
    below: str
    of: str
    is_part: bool = True


SHARES: Mapping[str, Share] = {
    "one_marker": Share("lists with one marker style", "one_marker", "lists", "lists"),
    "in_order": Share("numbered lists in order", "in_order", "numbered", "numbered lists"),
    "neat_branched": Share("neat lists of branches", "neat_branched", "branched_lists", "lists"),
    "repeated_names": Share("repeated names of items", "repeated_names", "named", "named items"),
    "doubled": Share("doubled items and paragraphs", "doubled", "parts", "items and paragraphs"),
    "repeated_topics": Share("repeated topics", "repeated_topics", "topics", "topics"),
    "length_error": Share(
        "error of promised lengths", "length_error", "block_tokens", "tokens of blocks", is_part=False
    ),
    "length_bias": Share(
        "bias of promised lengths", "length_bias", "block_tokens", "tokens of blocks", is_part=False
    ),
    "length_rounding": Share(
        "error of promised lengths by rounding",
        "length_rounding",
        "block_tokens",
        "tokens of blocks",
        is_part=False,
    ),
    "repetition": Share("repeated runs of four words", "repeated_ngrams", "ngrams", "runs"),
    "loops": Share("answers that end in a loop", "loops", "answers", "answers"),
}
"""What is reported of forms. Lengths are in shares of the tokens that blocks have."""


def form_of(program: Program, tokens_of: Callable[[str], int] | None = None) -> Form:
    """The form of an answer.

    Args:
      program: the answer.
      tokens_of: counts the tokens of a block's text. Without it, and of bare promises, nothing is said of lengths.
    """
    promises = [*program.promises()]
    told = [promise for promise in promises if not promise.is_bare]
    topics = [" ".join(promise.topic.casefold().split()) for promise in told]
    lengths = [(promise, tokens_of(text_of(promise.block))) for promise in told] if tokens_of else []
    text = assemble(program)
    parts = markdown.read(text)
    begun = _begun(program, text, parts)
    lists = [*_lists(parts, begun)]
    styles = [len({_style(item.marker) for item in each}) == 1 for each in lists]
    orders = [_order([number_of(item) for item in each]) for each in lists]
    branched = [sum(item.start in begun for item in each) > 1 for each in lists]
    names = [[name for item in each if (name := _name(text, item))] for each in lists]
    runs = [*_ngrams(_words(text))]
    units = [part for part in _parts(parts) if part.kind in ("item", "paragraph")]
    return Form(
        answers=1,
        promises=len(promises),
        lists=len(lists),
        one_marker=sum(styles),
        numbered=sum(order is not None for order in orders),
        in_order=sum(order is True for order in orders),
        branched_lists=sum(branched),
        neat_branched=sum(
            of_several and style and order is not False
            for of_several, style, order in zip(branched, styles, orders)
        ),
        named=sum(map(len, names)),
        repeated_names=sum(len(each) - len({*each}) for each in names),
        parts=len(units),
        doubled=_doubled(text, units),
        topics=len(topics),
        repeated_topics=len(topics) - len({*topics}),
        block_tokens=sum(tokens for _, tokens in lengths),
        length_error=sum(abs(10 * promise.tokens - tokens) for promise, tokens in lengths),
        length_bias=sum(10 * promise.tokens - tokens for promise, tokens in lengths),
        length_rounding=sum(abs(10 * length_in_tens(tokens) - tokens) for _, tokens in lengths),
        ngrams=len(runs),
        repeated_ngrams=len(runs) - len({*runs}),
        loops=int(ends_in_loop(text)),
    )


# ------------------------------------------------------------------------------------------------------ lists


def _begun(program: Program, text: str, parts: Sequence[Part]) -> dict[int, int]:
    """Where blocks begin in the reader's text, each with the thread that promised it.

    A block begins where its item does, if its parent wrote the mark; else at its own first letter.
    """
    items = {part.start for part in _parts(parts) if part.kind == "item"}
    begun: dict[int, int] = {}
    written, line, threads = 0, 0, 1  # `line`: since where the thread has written this line itself
    todo: list[tuple[int, Node | None]] = [(0, node) for node in reversed(program.nodes)]
    while todo:
        thread, node = todo.pop()
        if node is None:
            line = written
        elif isinstance(node, Text):
            written += len(node.text)
            line = max(line, text.rfind("\n", 0, written) + 1)
        elif isinstance(node, Promise):
            own, first = (_first_letter(text, start) for start in (line, written))
            begun[own if own < written and own in items else first] = thread
            todo += (thread, None), *((threads, inner) for inner in reversed(node.block))
            line, threads = written, threads + 1
    return begun


def _first_letter(text: str, start: int) -> int:
    """Where the first that is no blank stands."""
    found = re.compile(r"\s*").match(text, start)
    return found.end() if found else start


def _lists(parts: Sequence[Part], begun: Mapping[int, int]) -> Iterator[list[Part]]:
    """The lists of two items or more: items that follow one another, whatever their marks."""
    flat = [each for part in parts for each in _side_by_side(part, begun)]
    for is_item, run in itertools.groupby(flat, key=lambda part: part.kind == "item"):
        if is_item and len(items := [*run]) > 1:
            yield items
    for part in flat:
        yield from _lists(part.children, begun)


def _side_by_side(part: Part, begun: Mapping[int, int]) -> list[Part]:
    """A part, and the items read as within it that are not: they begin a block of the same thread, as it does.

    The reader takes a bullet right below a number for one of its details, which it is if one thread wrote both.
    """
    thread = begun.get(part.start)
    beside = [
        child
        for child in part.children
        if part.kind == child.kind == "item" and thread is not None and begun.get(child.start) == thread
    ]
    within = tuple(child for child in part.children if child not in beside)
    rest = [each for child in beside for each in _side_by_side(child, begun)]
    return [dataclasses.replace(part, children=within), *rest]


def _style(marker: str) -> str:
    """The kind of a mark: any number is 1, any letter or Roman number a or A.

    >>> [_style(marker) for marker in ("12.", "(3)", "b)", "IV.", "-", "Step 2:")]
    ['1.', '(1)', 'a)', 'A.', '-', 'Step 1:']
    """
    if re.fullmatch(r"\(?[A-Za-z]+[.)]", marker):
        return re.sub("[A-Z]+", "A", re.sub("[a-z]+", "a", marker))
    return re.sub(r"\d+", "1", marker).removesuffix("\ufe0f")


def _name(text: str, item: Part) -> tuple[str, ...]:
    """The words of an item's name without its mark."""
    return (*_words(item.name(text).lstrip("*_").removeprefix(item.marker)),)


def _order(numbers: Sequence[int]) -> bool | None:
    """Whether each number is one above the one before; None of a list in which an item has none."""
    if not all(numbers):
        return None
    return all(after == before + 1 for before, after in itertools.pairwise(numbers))


# ---------------------------------------------------------------------------------------------------- doubles


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _parts(parts: Sequence[Part]) -> Iterator[Part]:
    """The parts and those within them."""
    for part in parts:
        yield part
        yield from _parts(part.children)


def _doubled(text: str, units: Sequence[Part]) -> int:
    """How many of these parts are nearly equal to an earlier one that does not hold them."""
    words = [{*_words(text[part.start : part.end].lstrip("*_").removeprefix(part.marker))} for part in units]
    return sum(
        any(
            before.end <= part.start and len(own & theirs) >= ALIKE * len(own | theirs) > 0
            for before, theirs in zip(units[:index], words)
        )
        for index, (part, own) in enumerate(zip(units, words))
    )


def _ngrams(words: Sequence[str]) -> Iterator[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(NGRAM)))


def ends_in_loop(text: str) -> bool:
    """Whether the last words of a text repeat to its end, three times or more. Numbers do not count.

    >>> ends_in_loop("Go on. " + "1. It is long and wide. 2. It is long and wide. " * 2)
    True
    >>> ends_in_loop("It is long and wide, it is long and narrow, and it is long and deep.")
    False
    """
    words = [word for word in _words(text) if not word.isdecimal()][::-1]
    least, times = LOOP
    for period in range(1, len(words) // times + 1):
        same = sum(
            1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(words, words[period:]))
        )
        if same + period >= max(least, times * period):
            return True
    return False
