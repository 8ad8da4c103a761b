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

import numpy as np

from pasta_jax import visibility
from pasta_jax.arrays import NO_TARGET, ThreadedTokens, Tokens
from pasta_jax.lang import tags
from pasta_jax.lang.program import Node, Program, Promise, Text
from pasta_jax.lang.render import promise_problem
from pasta_jax.lang.topics import topic_tokens, with_short_topics
from pasta_jax.messages import shown
from pasta_jax.tokens.positions import Positions
from pasta_jax.tokens.tokenizer import Tokenizer, Vocabulary


class LayoutError(ValueError):
    """A program that cannot be laid out within the limits, and what to do about it."""


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
    scribe = _Scribe(tokenizer, positions, threads)
    main = scribe.new_thread(scribe.new_segment(), scribe.nothing, position=0, order=-len(prompt))
    for token in prompt:
        scribe.write(main, token)
    scribe.write_nodes(main, program.nodes)
    scribe.join(main)
    scribe.write(main, tokenizer.vocabulary.eos)
    tokens = scribe.tokens()
    return ThreadedTokens(**tokens.fields(), target=next_of_thread(tokens))


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
    unjoined: list[_Thread] = dataclasses.field(default_factory=list)


class _Scribe:
    """Writes the tokens of a program in document order, and numbers threads and segments."""

    def __init__(self, tokenizer: Tokenizer, positions: Positions, threads: int):
        self.tokenizer, self.vocabulary, self.positions = tokenizer, tokenizer.vocabulary, positions
        self.max_threads = threads
        self.nothing = np.zeros(visibility.words_for(visibility.max_segments(threads)), np.uint32)
        self.threads = self.segments = 0
        self.rows: list[tuple[int, int, int, int, int]] = []
        self.sees: list[np.ndarray] = []

    def new_segment(self) -> int:
        self.segments += 1
        return self.segments - 1

    def new_thread(self, segment: int, sees: np.ndarray, position: int, order: int = 0) -> _Thread:
        if self.threads == self.max_threads:
            raise LayoutError(
                f"The answer promises more than {self.max_threads - 1} branches. "
                f"Raise --config.data.threads above {self.max_threads}, or promise less."
            )
        self.threads += 1
        return _Thread(self.threads - 1, segment, sees, position, order)

    def write(self, thread: _Thread, token: int) -> None:
        self.rows.append((token, thread.position, thread.segment, thread.order, thread.number))
        self.sees.append(thread.sees)
        thread.position += 1
        thread.order += 1

    def write_nodes(self, thread: _Thread, nodes: tuple[Node, ...]) -> None:
        for node in nodes:
            if isinstance(node, Text):
                for token in self.tokenizer.encode(node.text):
                    self.write(thread, token)
            elif isinstance(node, Promise):
                self.write_promise(thread, node)
            else:
                check_dialect(self.vocabulary, "pasta")
                self.join(thread)
                self.write(thread, self.vocabulary.tag_ids[tags.SYNC])

    def write_promise(self, thread: _Thread, promise: Promise) -> None:
        for token in promise_tokens(self.tokenizer, promise):
            self.write(thread, token)
        start = thread.position
        reach = visibility.reach(thread.sees, np.int32(thread.segment))
        thread.segment, thread.sees = self.new_segment(), reach
        branch = self.new_thread(self.new_segment(), reach, start)
        self.write(branch, self.vocabulary.tag_ids[tags.ASYNC_OPEN])
        self.write_nodes(branch, promise.block)
        length = branch.order - 1
        self.join(branch)
        self.write(branch, self.vocabulary.tag_ids[tags.ASYNC_CLOSE])
        thread.position = self.positions.resume(start, promise.tokens, length)
        thread.unjoined.append(branch)

    def join(self, thread: _Thread) -> None:
        """The branches that `thread` has promised since its last join become visible to it."""
        if not thread.unjoined:
            return
        for member in (thread, *thread.unjoined):
            thread.sees = thread.sees | visibility.reach(member.sees, np.int32(member.segment))
        thread.segment, thread.unjoined = self.new_segment(), []

    def tokens(self) -> Tokens:
        token, position, segment, order, thread = np.array(self.rows, np.int32).T.copy()
        return Tokens(token, position, np.ones_like(token), segment, order, np.stack(self.sees), thread)


def promise_tokens(tokenizer: Tokenizer, promise: Promise) -> list[int]:
    """The ids of a promise's tag. Raises LayoutError if the tag grammar forbids it."""
    vocabulary = tokenizer.vocabulary
    check_dialect(vocabulary, "apar" if promise.is_bare else "pasta")
    if promise.is_bare:
        return [vocabulary.tag_ids[tags.PROMISE_CLOSE]]
    if problem := promise_problem(promise.topic, promise.tokens):
        raise LayoutError(f"The promise {shown(promise.topic)} cannot be written: {problem}.")
    topic = topic_tokens(tokenizer, promise.topic)
    if not 1 <= len(topic) <= tags.MAX_TOPIC_TOKENS:
        raise LayoutError(
            f"The topic {shown(promise.topic)} takes {len(topic)} tokens; 1 to {tags.MAX_TOPIC_TOKENS} are allowed."
            " Shorten it."
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
            f"Set --config.data.dialect={needed}."
        )
