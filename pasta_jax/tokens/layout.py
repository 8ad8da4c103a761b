"""Layout: an annotated answer as `ThreadedTokens`, in document order (docs/design.md, sections 4 and 5).

The interpreter yields the same record, token by token, when it decodes the same answer; a test compares the two.
`detokenize` is the inverse.

    prompt | text <promise..> | <async> block </async> | text <sync/> text END
    main     main               branch 1                 main

A token's target is the next token of its own thread. The paper's rules follow from that (section 4): the target of
a promise's ` />` is behind the block; `<async>`, which the interpreter inserts, is never a target; nothing is
predicted from `</async>`, the last token of its thread.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from pasta_jax import visibility
from pasta_jax.arrays import NO_TARGET, ThreadedTokens, Tokens
from pasta_jax.lang import tags
from pasta_jax.lang.program import Node, Program, Promise, Text
from pasta_jax.lang.render import promise_problem
from pasta_jax.lang.topics import topic_tokens, with_short_topics
from pasta_jax.messages import shown
from pasta_jax.tokens.positions import TAGS_OF_A_BLOCK, Positions
from pasta_jax.tokens.tokenizer import TextEncoder, Tokenizer, Vocabulary

TOPIC_TOO_LONG = "topic too long"


class LayoutError(ValueError):
    """A program that cannot be laid out within the limits, and what to do about it.

    `reason` is the kind of fault in a few words that do not vary, to be counted.
    """

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


def layout_example(
    tokenizer: Tokenizer,
    prompt: str,
    program: Program,
    *,
    positions: Positions = Positions(),
    threads: int = 16,
) -> ThreadedTokens:
    """One training document: a prompt and its annotated answer.

    Args:
      tokenizer: gives ids to text and tags.
      prompt: plain text; never empty.
      program: the annotated answer; topics that are too long are shortened (`lang.topics`).
      positions: the position scheme.
      threads: T, how many threads the answer may use, main included; it fixes W.

    Returns:
      [L] fields, NumPy, one document with `doc` 1.

    Raises:
      LayoutError: more promises than threads, or one that the tag grammar forbids.
    """
    program = with_short_topics(tokenizer, program)
    return layout(tokenizer, tokenizer.encode_prompt(prompt), program, positions, threads)


def layout_text(tokenizer: Tokenizer, text: str, *, threads: int = 16) -> ThreadedTokens:
    """A plain document, all of which is learned; the prompt is BOS. [L] fields."""
    program = Program((Text(text),)) if text else Program(())
    bos = [tokenizer.vocabulary.bos]
    return layout(tokenizer, bos, program, Positions(), threads)


def layout(
    tokenizer: Tokenizer, prompt: list[int], program: Program, positions: Positions, threads: int
) -> ThreadedTokens:
    """The same as `layout_example`, from the ids of the prompt."""
    return layout_ids(tokenizer.vocabulary, prompt, answer_ids(tokenizer, program), positions, threads)


def layout_ids(
    vocabulary: Vocabulary, prompt: Sequence[int], answer: Sequence[int], positions: Positions, threads: int
) -> ThreadedTokens:
    """The same from the ids of the prompt and of the answer (`answer_ids`), which tell its structure too.

    Of an answer that was cut off, without its end, no end is learnt: nothing follows its last token.
    """
    check_threads(vocabulary, answer, threads)
    ids = [*prompt, *answer]
    scribe = _Scribe(positions, threads)
    stack = [scribe.new_thread(scribe.new_segment(), scribe.nothing, position=0, order=-len(prompt))]
    opens, closes, sync = (vocabulary.tag_ids[t] for t in (tags.ASYNC_OPEN, tags.ASYNC_CLOSE, tags.SYNC))
    for i in range(len(prompt), len(ids)):
        if ids[i] == opens:
            scribe.write_until(i, stack[-1])
            stack.append(scribe.fork(stack[-1], _promised(vocabulary, ids, i)))
        elif ids[i] in (closes, sync):
            scribe.write_until(i, stack[-1])
            scribe.join(stack[-1])
            if ids[i] == closes:
                scribe.write_until(i + 1, stack[-1])
                branch = stack.pop()
                scribe.keep(stack[-1], branch)
    [main] = stack
    if ids[-1] == vocabulary.eos:
        scribe.write_until(len(ids) - 1, main)
        scribe.join(main)
    scribe.write_until(len(ids), main)
    tokens = scribe.tokens(ids)
    return ThreadedTokens(**tokens.fields(), target=next_of_thread(tokens))


def answer_ids(tokenizer: Tokenizer, program: Program) -> list[int]:
    """The ids of an annotated answer in document order, its end included. Raises LayoutError."""
    vocabulary = tokenizer.vocabulary
    ids: list[int] = []
    todo: list[Node | int] = [*reversed(program.nodes)]  # a program may nest deeper than Python does
    while todo:
        match todo.pop():
            case Text(text):
                ids += tokenizer.encode(text)
            case Promise() as promise:
                ids += [*promise_tokens(tokenizer, promise), vocabulary.tag_ids[tags.ASYNC_OPEN]]
                todo += [vocabulary.tag_ids[tags.ASYNC_CLOSE], *reversed(promise.block)]
            case int(closing):
                ids.append(closing)
            case _:
                check_dialect(vocabulary, "pasta")
                ids.append(vocabulary.tag_ids[tags.SYNC])
    return [*ids, vocabulary.eos]


def threads_in(vocabulary: Vocabulary, answer: Sequence[int]) -> int:
    """The threads of an answer by its ids, main included."""
    return 1 + answer.count(vocabulary.tag_ids[tags.ASYNC_OPEN])


def check_threads(vocabulary: Vocabulary, answer: Sequence[int], threads: int) -> None:
    """Raises LayoutError if an answer has more threads than these."""
    if threads_in(vocabulary, answer) > threads:
        raise LayoutError(
            f"The answer promises more than {threads - 1} branches. "
            f"Raise --config.data.threads above {threads}, or promise less.",
            "too many branches",
        )


def _promised(vocabulary: Vocabulary, ids: Sequence[int], end: int) -> int:
    """The number in the promise that ends before this place; 0 in a bare one."""
    tokens, place, i = 0, 1, end - 2
    if vocabulary.dialect == "pasta":
        while ids[i] != vocabulary.tag_ids[tags.PROMISE_TOKENS]:
            tokens += place * int(vocabulary.digit_values[ids[i]])
            place, i = place * 10, i - 1
    return tokens


def next_of_thread(tokens: Tokens) -> np.ndarray:
    """The target of each token, the next token of its own thread: int32 [L].

    Tokens of the prompt are no targets, and nothing follows the last token of a thread: NO_TARGET. Takes one
    document, [L] fields, each thread in its order.
    """
    by_thread = np.argsort(tokens.thread, kind="stable")
    this, following = by_thread[:-1], by_thread[1:]
    is_target = tokens.thread[this] == tokens.thread[following]
    is_target &= tokens.order[following] >= 0
    target = np.full(len(tokens), NO_TARGET, np.int32)
    target[this[is_target]] = tokens.token[following[is_target]]
    return target


@dataclasses.dataclass
class _Thread:
    """A thread that is being written: segment, position and order of its next token."""

    number: int
    segment: int
    sees: np.ndarray
    position: int
    order: int
    promised: int = 0  # tens of tokens
    start: int = 0
    unjoined: list[_Thread] = dataclasses.field(default_factory=list)


class _Scribe:
    """Numbers threads and segments of tokens in document order, and writes the fields that they fix."""

    def __init__(self, positions: Positions, threads: int):
        self.positions = positions
        self.nothing = np.zeros(visibility.words_for(visibility.max_segments(threads)), np.uint32)
        self.threads = self.segments = self.written = 0
        self.runs: list[tuple[int, ...]] = []  # count, position, segment, order and thread of the first token
        self.sees: list[np.ndarray] = []

    def new_segment(self) -> int:
        self.segments += 1
        return self.segments - 1

    def new_thread(self, segment: int, sees: np.ndarray, position: int, order: int = 0) -> _Thread:
        self.threads += 1
        return _Thread(self.threads - 1, segment, sees, position, order, start=position)

    def write_until(self, end: int, thread: _Thread) -> None:
        """The tokens before `end` that are not written yet are this thread's."""
        count, self.written = end - self.written, end
        self.runs.append((count, thread.position, thread.segment, thread.order, thread.number))
        self.sees.append(thread.sees)
        thread.position += count
        thread.order += count

    def fork(self, thread: _Thread, promised: int) -> _Thread:
        """The branch of a promise that `thread` has completed."""
        start = thread.position
        reach = visibility.reach(thread.sees, np.int32(thread.segment))
        thread.segment, thread.sees = self.new_segment(), reach
        branch = self.new_thread(self.new_segment(), reach, start)
        branch.promised = promised
        return branch

    def keep(self, thread: _Thread, branch: _Thread) -> None:
        """`thread` goes on after the block of this branch."""
        length = branch.order - TAGS_OF_A_BLOCK
        thread.position = self.positions.resume(branch.start, branch.promised, length)
        thread.unjoined.append(branch)

    def join(self, thread: _Thread) -> None:
        """The branches that `thread` has promised since its last join become visible to it."""
        if not thread.unjoined:
            return
        for member in (thread, *thread.unjoined):
            thread.sees = thread.sees | visibility.reach(member.sees, np.int32(member.segment))
        thread.segment, thread.unjoined = self.new_segment(), []

    def tokens(self, ids: Sequence[int]) -> Tokens:
        """[L] fields of all tokens."""
        token = np.array(ids, np.int32)
        runs = np.array(self.runs, np.int32)
        count, position, segment, order, thread = runs.T
        of = np.repeat(np.arange(len(runs)), count)  # the run of each token
        step = np.arange(len(ids), dtype=np.int32) - (np.cumsum(count, dtype=np.int32) - count)[of]
        sees = np.stack(self.sees)[of]
        return Tokens(
            token, position[of] + step, np.ones_like(token), segment[of], order[of] + step, sees, thread[of]
        )


def promise_tokens(tokenizer: TextEncoder, promise: Promise) -> list[int]:
    """The ids of a promise's tag. Raises LayoutError if the tag grammar forbids it."""
    vocabulary = tokenizer.vocabulary
    check_dialect(vocabulary, "apar" if promise.is_bare else "pasta")
    if promise.is_bare:
        return [vocabulary.tag_ids[tags.PROMISE_CLOSE]]
    if problem := promise_problem(promise.topic, promise.tokens):
        raise LayoutError(f"The promise {shown(promise.topic)} cannot be written: {problem}.", "promise")
    topic = topic_tokens(tokenizer, promise.topic)
    if not 1 <= len(topic) <= tags.MAX_TOPIC_TOKENS:
        raise LayoutError(
            f"The topic {shown(promise.topic)} takes {len(topic)} tokens; 1 to {tags.MAX_TOPIC_TOKENS} are allowed."
            " Shorten it.",
            TOPIC_TOO_LONG,
        )
    return [
        vocabulary.tag_ids[tags.PROMISE_OPEN],
        *topic,
        vocabulary.tag_ids[tags.PROMISE_TOKENS],
        *(vocabulary.digits[int(digit)] for digit in str(promise.tokens)),
        vocabulary.tag_ids[tags.PROMISE_CLOSE],
    ]


def check_dialect(vocabulary: Vocabulary, needed: tags.Dialect) -> None:
    """Raises LayoutError if an answer needs tags of a dialect that is not the vocabulary's."""
    if vocabulary.dialect != needed:
        raise LayoutError(
            f"The answer has tags of the {needed} dialect, the tokenizer those of {vocabulary.dialect}. "
            f"Set --config.data.dialect={needed}.",
            "tags of another dialect",
        )
