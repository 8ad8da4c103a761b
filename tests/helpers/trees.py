"""Documents numbered by the visibility rule alone, and random trees of forks and joins."""

import random

import numpy as np

from pasta_jax.arrays import Tokens
from pasta_jax.visibility import max_segments, reach, words_for


def tokens_of(doc: np.ndarray, segment: np.ndarray, order: np.ndarray, sees: np.ndarray) -> Tokens:
    """Tokens of which nothing is known but what the rule reads."""
    zeros = np.zeros_like(doc)
    return Tokens(token=zeros, position=zeros, doc=doc, segment=segment, order=order, sees=sees, thread=zeros)


class Thread:
    """A thread being written: its segment and what it sees, changed by fork and join."""

    def __init__(self, writer: "Writer", segment: int, sees: np.ndarray, order: int = 0):
        self.writer, self.segment, self.sees, self.order = writer, segment, sees, order

    def write(self, count: int = 1) -> None:
        for _ in range(count):
            self.writer.rows.append((self.writer.doc, self.segment, self.order, self.sees))
            self.order += 1

    def fork(self) -> "Thread":
        self.sees = reach(self.sees, np.int32(self.segment))
        self.segment = self.writer.new_segment()
        return Thread(self.writer, self.writer.new_segment(), self.sees)

    def join(self, *children: "Thread") -> None:
        self.sees = reach(self.sees, np.int32(self.segment))
        for child in children:
            self.sees = self.sees | reach(child.sees, np.int32(child.segment))
        self.segment = self.writer.new_segment()


class Writer:
    """Numbers one document's tokens with `reach` alone; `main` is its first thread."""

    def __init__(self, words: int = 1, doc: int = 1):
        self.doc, self.segments, self.rows = doc, 0, []  # type: int, int, list
        self.main = Thread(self, self.new_segment(), np.zeros(words, np.uint32))

    def new_segment(self) -> int:
        self.segments += 1
        return self.segments - 1

    def tokens(self) -> Tokens:
        doc, segment, order, sees = zip(*self.rows, strict=True)
        as_int = [np.array(x, np.int32) for x in (doc, segment, order)]
        return tokens_of(as_int[0], as_int[1], as_int[2], np.stack(sees))


def random_tree(rng: random.Random, threads: int, events: int = 60) -> tuple[Writer, np.ndarray]:
    """A random nested program of at most `threads` threads, and who sees whom by plain sets of tokens."""
    writer = Writer(words_for(max_segments(threads)))
    known: dict[Thread, set[int]] = {writer.main: set()}
    open_children: dict[Thread, list[Thread]] = {writer.main: []}
    seen_by: list[set[int]] = []
    running, made = [writer.main], 1
    for _ in range(rng.randrange(10, events)):
        thread = rng.choice(running)
        event = rng.random()
        ready = [c for c in open_children[thread] if not open_children[c]]
        if event < 0.2 and made < threads:
            child = thread.fork()
            made += 1
            known[child], open_children[child] = set(known[thread]), []
            open_children[thread].append(child)
            running.append(child)
        elif event < 0.4 and ready and len(ready) == len(open_children[thread]):
            thread.join(*ready)
            known[thread] |= set().union(*(known[c] for c in ready))
            open_children[thread] = []
            running = [t for t in running if t not in ready]
        else:
            thread.write()
            known[thread].add(len(seen_by))
            seen_by.append(set(known[thread]))
    expected = np.array([[k in seen for k in range(len(seen_by))] for seen in seen_by])
    return writer, expected
