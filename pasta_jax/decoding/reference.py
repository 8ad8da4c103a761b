"""The interpreter's specification: the same semantics in plain Python.

One thread at a time, no cache, no arrays: what a thread sees is a list of entries. It is slow, and meant to be
read beside docs/design.md, sections 4 and 6. The compiled interpreter is tested against it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from pasta_jax.decoding.state import Limits, Stop
from pasta_jax.lang import grammar, tags
from pasta_jax.lang.grammar import Effect, Kind
from pasta_jax.tokens.detokenize import Threads
from pasta_jax.tokens.positions import Positions
from pasta_jax.tokens.tokenizer import Vocabulary


@dataclasses.dataclass(eq=False)
class Entry:
    """A token and where it is; `step` is 0 in the prompt, where `order` is negative, and None before it is fed."""

    token: int
    thread: int
    order: int
    position: int
    step: int | None = None


@dataclasses.dataclass(eq=False)
class Thread:
    """One thread. `pending` is its sampled token that is not yet in the pool."""

    number: int
    depth: int
    view: list[Entry]
    position: int
    budget: int
    order: int = 0
    fork_order: int = -1
    parent: Thread | None = None
    pending: Entry | None = None
    tag_state: int = grammar.TEXT
    value: int = 0
    unjoined: list[Thread] = dataclasses.field(default_factory=list)
    waiting_for: list[Thread] = dataclasses.field(default_factory=list)
    held: bool = False
    closing: bool = False
    force_closed: bool = False

    @property
    def ready(self) -> bool:
        return self.pending is not None and not self.held

    @property
    def turn(self) -> tuple[int, ...]:
        """Its rank in a step: by number, but after the branches whose end it is about to see."""
        unfed = [branch for branch in self.waiting_for if branch.pending is not None]
        return (*max(branch.turn for branch in unfed), 1) if unfed else (self.number,)


Sample = Callable[[Thread, Callable[[int], bool]], int]
"""Draws the token that follows a thread's view, given which ids the tag grammar allows."""


@dataclasses.dataclass
class Decoded:
    """What a decode did."""

    entries: list[Entry]
    threads: list[Thread]
    stop: Stop
    steps: int

    @property
    def by_thread(self) -> Threads:
        """The answer's tokens by thread: pool entries, and after a whole answer what was sampled last."""
        tokens: list[list[int]] = [[] for _ in self.threads]
        branches: list[dict[int, int]] = [{} for _ in self.threads]
        for entry in self.entries:
            if entry.order >= 0:
                tokens[entry.thread].append(entry.token)
        for thread in self.threads:
            if self.stop == Stop.EOS and thread.pending is not None:
                tokens[thread.number].append(thread.pending.token)
            if thread.parent is not None:
                branches[thread.parent.number][thread.fork_order] = thread.number
        return Threads(tokens, branches)


def decode(
    prompt: Sequence[int],
    sample: Sample,
    vocabulary: Vocabulary,
    limits: Limits,
    *,
    positions: Positions = Positions(),
    max_new_tokens: int,
    max_branch_tokens: int,
) -> Decoded:
    """Decodes one prompt."""
    run = _Run(sample, vocabulary, limits, positions, max_new_tokens, max_branch_tokens)
    return run.answer(prompt)


@dataclasses.dataclass
class _Run:
    sample: Sample
    vocabulary: Vocabulary
    limits: Limits
    positions: Positions
    max_new_tokens: int
    max_branch_tokens: int
    threads: list[Thread] = dataclasses.field(default_factory=list)
    entries: list[Entry] = dataclasses.field(default_factory=list)
    stop: Stop = Stop.RUNNING
    steps: int = 0

    def answer(self, prompt: Sequence[int]) -> Decoded:
        n = len(prompt)
        self.entries = [Entry(token, 0, i - n, i, step=0) for i, token in enumerate(prompt)]
        main = Thread(0, 0, list(self.entries), position=n, budget=0)
        self.threads = [main]
        limit = n + self.max_new_tokens
        self.go_on([main])
        while self.stop == Stop.RUNNING:
            room = min(self.limits.pool, limit) - len(self.entries)
            if room <= 0:
                self.stop = Stop.LENGTH if len(self.entries) >= limit else Stop.CACHE_FULL
                break
            ready = sorted((t for t in self.threads if t.ready), key=lambda t: t.turn)
            fed = ready[: min(self.limits.lanes, room)]
            self.steps += 1
            for thread in fed:
                assert thread.pending is not None
                thread.pending.step = self.steps
                self.entries.append(thread.pending)
            went_on = [thread for thread in fed if not thread.closing]
            for thread in fed:
                thread.pending, thread.waiting_for = None, []
            self.go_on(went_on)
        return Decoded(self.entries, self.threads, self.stop, self.steps)

    def go_on(self, threads: list[Thread]) -> None:
        """Sample a token for each thread, in the order of the lanes, then apply all of them."""
        may_open = self.may_open(threads)
        events = [(thread, self.take(thread, thread in may_open)) for thread in threads]
        events.sort(key=lambda pair: pair[0].number)
        for thread, event in events:
            if event == Effect.FORK:
                self.fork(thread)
        for thread, event in events:
            if event in (Effect.SYNC, Effect.FINISH, Effect.END):
                thread.held = bool(thread.unjoined)
                if not thread.held:
                    self.end(thread, event)
        for thread in sorted(self.threads, key=lambda t: -t.depth):  # a branch that ends may free its parent
            if thread.held and all(branch.closing for branch in thread.unjoined):
                self.join(thread)

    def take(self, thread: Thread, may_open: bool) -> Effect:
        """Sample a token; it becomes the thread's pending entry."""
        kinds = self.vocabulary.kinds

        def legal(token: int) -> bool:
            kind = kinds[token]
            if not self.limits.constrained:
                return True
            if kind in (Kind.END, Kind.ASYNC_CLOSE) and (kind == Kind.END) != (thread.depth == 0):
                return False
            return grammar.LEGAL[thread.tag_state][kind] and (kind not in grammar.OPENS or may_open)

        token = self.sample(thread, legal)
        if thread.depth and (
            kinds[token] == Kind.END or (thread.budget <= 0 and kinds[token] != Kind.ASYNC_CLOSE)
        ):
            token, thread.force_closed = self.vocabulary.tag_ids[tags.ASYNC_CLOSE], True
        thread.budget -= 1
        kind = Kind(kinds[token])
        event = Effect(grammar.EFFECT[thread.tag_state][kind])
        thread.tag_state = grammar.NEXT[thread.tag_state][kind]
        if kind in (Kind.TOKENS, Kind.FORK):
            thread.value = 0
        elif kind in (Kind.ZERO, Kind.DIGIT):
            thread.value = 10 * thread.value + int(self.vocabulary.digit_values[token])
        thread.pending = Entry(token, thread.number, thread.order, thread.position)
        thread.view.append(thread.pending)
        thread.order += 1
        thread.position += 1
        return Effect.STRAY if event == Effect.FINISH and thread.depth == 0 else event

    def may_open(self, threads: list[Thread]) -> list[Thread]:
        """Those that may open a promise now: a free thread is reserved for each, and for each open tag."""
        open_tags = sum(thread.tag_state != grammar.TEXT for thread in self.threads)
        free = self.limits.threads - len(self.threads) - open_tags
        might = [
            thread
            for thread in threads
            if thread.tag_state == grammar.TEXT
            and thread.depth < self.limits.max_depth
            and (thread.depth == 0 or thread.budget > grammar.LONGEST_TAG)
        ]
        return might[: max(0, free)]

    def fork(self, parent: Thread) -> None:
        if parent.depth == self.limits.max_depth or len(self.threads) == self.limits.threads:
            return
        branch = Thread(
            number=len(self.threads),
            depth=parent.depth + 1,
            view=list(parent.view),
            position=parent.position + 1,
            budget=self.max_branch_tokens,
            order=1,
            fork_order=parent.order - 1,
            parent=parent,
        )
        opening = self.vocabulary.tag_ids[tags.ASYNC_OPEN]
        branch.pending = Entry(opening, branch.number, 0, parent.position)
        branch.view.append(branch.pending)
        parent.position = self.positions.resume(parent.position, parent.value)
        parent.unjoined.append(branch)
        self.threads.append(branch)

    def join(self, thread: Thread) -> None:
        """`thread` and its pending token see what its branches wrote."""
        thread.held = False
        thread.waiting_for, thread.unjoined = thread.unjoined, []
        for branch in thread.waiting_for:
            known = set(map(id, thread.view))
            thread.view[-1:-1] = [entry for entry in branch.view if id(entry) not in known]
        assert thread.pending is not None
        kind = self.vocabulary.kinds[thread.pending.token]
        if kind != Kind.SYNC:
            self.end(thread, Effect.END if kind == Kind.END else Effect.FINISH)

    def end(self, thread: Thread, event: Effect) -> None:
        """Nothing is open in `thread`: a branch has sampled its last token, the main thread the answer's."""
        if event == Effect.FINISH:
            thread.closing = True
        elif event == Effect.END:
            self.stop = Stop.EOS
