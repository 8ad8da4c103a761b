"""Lists everything wrong or doubtful in an annotation, for its author or generator: the one validator of them all.

>>> text = '<promise topic="the longest river anywhere" tokens=1 /><async>Nile</async><sync />'
>>> for problem in validate(text):
...     print(problem)
line 1, column 1: warning: the topic has more than 3 words. Shorten it.
line 1, column 1: warning: the block has fewer than 5 words. Write it as ordinary text.
line 1, column 75: warning: '<sync />' is not the canonical spelling. Write <sync/>.
line 1, column 75: warning: <sync/> with nothing after it. Remove it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from typing import Literal, TypeAlias

from pasta_jax.lang import tags
from pasta_jax.lang.parse import Fault, Lexeme, ParseError, Reader, parse, position
from pasta_jax.lang.program import length_in_tens
from pasta_jax.lang.tags import MAX_TOPIC_TOKENS
from pasta_jax.lang.topics import MAX_TOPIC_WORDS, Encoder, shortened, topic_tokens

_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
"""Thai, Lao, Burmese, Khmer, Chinese, Japanese."""
_WORDS = re.compile(f"[{_UNSPACED}]|[^\\s{_UNSPACED}]+")

Severity: TypeAlias = Literal["error", "warning"]

MIN_BLOCK_WORDS = 5
"""A rule of the paper's annotation prompt (appendix A), as MAX_TOPIC_WORDS is."""

MAX_BRANCHES = 15
"""What training takes by default: `data.threads` less main."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something wrong ("error": `parse` refuses the text) or doubtful ("warning")."""

    line: int
    column: int
    severity: Severity
    problem: str
    advice: str

    def __str__(self) -> str:
        return f"line {self.line}, column {self.column}: {self.severity}: {self.problem}. {self.advice}."


def validate(
    text: str, *, max_depth: int = 1, max_branches: int = MAX_BRANCHES, tokenizer: Encoder | None = None
) -> list[Problem]:
    """Every problem of an annotation, in the order of the text; never raises.

    One of them is an error exactly when `parse` raises. Near misses of tags are errors if the text does not parse;
    if it does, they were read as ordinary text and are warnings. Doubts are judged on the repaired text. What
    passes without a problem is never dropped by training for its annotation, even if it warns about the length.

    Args:
      text: the annotated text.
      max_depth: how deep promises may nest, `data.max_depth` in training.
      max_branches: how many there may be, `data.threads` less 1 in training.
      tokenizer: of the model, as in `pj.validate(text, tokenizer=model.tokenizer)`. With it topics must fit into
        the 8 tokens that the tag grammar allows, and the promised lengths are compared with the real ones.
    """
    faults: list[Fault] = []
    lexemes = Reader(text, faults.append, lenient=True, max_depth=max_depth).read()
    severity: Severity = "warning" if _parses(text, max_depth) else "error"

    def at_offset(offset: int, severity: Severity, problem: str, advice: str) -> Problem:
        return Problem(*position(text, offset), severity, problem, advice)

    problems = [at_offset(fault.offset, severity, fault.problem, fault.advice) for fault in faults]
    problems += [
        at_offset(offset, "warning", doubt, advice)
        for offset, doubt, advice in _doubts(lexemes, max_branches, tokenizer)
    ]
    return sorted(problems, key=lambda problem: (problem.line, problem.column))


@dataclasses.dataclass
class _Thread:
    """One thread, as far as it was read."""

    promise: Lexeme | None = None
    text: list[str] = dataclasses.field(default_factory=list)
    open_branches: int = 0
    last_sync: Lexeme | None = None


def _doubts(
    lexemes: Iterable[Lexeme], max_branches: int, tokenizer: Encoder | None
) -> Iterator[tuple[int, str, str]]:
    threads, branches = [_Thread()], 0
    for lexeme in lexemes:
        thread = threads[-1]
        if lexeme.kind == "text":
            thread.text.append(lexeme.text)
            if lexeme.text.strip():
                thread.last_sync = None
        elif lexeme.kind == "sync":
            if not thread.open_branches:
                yield lexeme.offset, f"{tags.SYNC} with no branch open in this thread", "Remove it"
            thread.open_branches, thread.last_sync = 0, lexeme
        elif lexeme.kind == "open":
            thread.open_branches, thread.last_sync = thread.open_branches + 1, None
            branches += 1
            if branches == max_branches + 1:
                advice = f"Promise less, or train with --config.data.threads={max_branches + 2} or more"
                yield lexeme.offset, f"more than {max_branches} promises, which training refuses", advice
            threads.append(_Thread(promise=lexeme))
        elif lexeme.kind == "close":
            yield from _thread_doubts(threads.pop(), tokenizer)
            threads[-1].text += thread.text
    yield from _thread_doubts(threads[0], tokenizer)


def _thread_doubts(thread: _Thread, tokenizer: Encoder | None) -> Iterator[tuple[int, str, str]]:
    if thread.last_sync:
        yield thread.last_sync.offset, f"{tags.SYNC} with nothing after it", "Remove it"
    if thread.promise is None:
        return
    offset, topic, block = thread.promise.offset, thread.promise.text, "".join(thread.text)
    topic_words = len(topic.split())
    if topic_words > MAX_TOPIC_WORDS:
        yield offset, f"the topic has more than {MAX_TOPIC_WORDS} words", "Shorten it"
    if not topic_words:
        yield offset, "the topic is blank", "Say what the block is about"
    if count_words(block) < MIN_BLOCK_WORDS:
        yield offset, f"the block has fewer than {MIN_BLOCK_WORDS} words", "Write it as ordinary text"
    if tokenizer is not None:
        for doubt, advice in _counted(topic, thread.promise.tokens, block, tokenizer):
            yield offset, doubt, advice


def count_words(text: str) -> int:
    r"""The words of a text; where a script writes no spaces, every letter counts as one.

    >>> count_words("The Nile is long."), count_words("\u5c3c\u7f57\u6cb3\u5f88\u957f\u3002")
    (4, 6)
    """
    return len(_WORDS.findall(text))


def _counted(topic: str, tens: int | None, block: str, tokenizer: Encoder) -> Iterator[tuple[str, str]]:
    """What a tokenizer finds doubtful in a promise and its block."""
    try:
        length, topic_length = len(tokenizer.encode(block)), len(topic_tokens(tokenizer, topic))
    except ValueError as error:  # half a character
        yield f"no tokenizer can read it: {error}".rstrip("."), "Training drops the record"
        return
    if topic_length > MAX_TOPIC_TOKENS:
        advice = f"Training takes {shortened(tokenizer, topic)!r}"
        yield f"the topic takes {topic_length} tokens, more than {MAX_TOPIC_TOKENS}", advice
    right = length_in_tens(length)
    if tens is not None and tens != right and abs(10 * tens - length) > length / 2:
        yield (
            f"tokens={tens} promises about {10 * tens} tokens, and the block has {length}",
            f"Write tokens={right}",
        )


def _parses(text: str, max_depth: int) -> bool:
    try:
        parse(text, max_depth=max_depth)
    except ParseError:
        return False
    return True
