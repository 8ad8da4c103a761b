"""What an answer costs: its decode steps with unlimited lanes, against those of its text alone.

Needs no model and no jax, so annotators can weigh every promise before they write it.
"""

from __future__ import annotations

from typing import NamedTuple

from pasta_jax.lang import tags
from pasta_jax.lang.assemble import assemble
from pasta_jax.lang.grammar import Kind
from pasta_jax.lang.program import Node, Program, Promise, Text
from pasta_jax.tokens.detokenize import Threads
from pasta_jax.tokens.layout import check_dialect, promise_tokens
from pasta_jax.tokens.tokenizer import TextEncoder, Vocabulary


def theoretical_speedup(tokenizer: TextEncoder, program: Program) -> float:
    """The tokens of the answer as plain text, divided by its critical path; 1 for an empty answer."""
    tokens = len(tokenizer.encode(assemble(program)))
    return max(1, tokens) / max(
        1, critical_path(threads_of_program(tokenizer, program), tokenizer.vocabulary)
    )


def threads_of_program(tokenizer: TextEncoder, program: Program) -> Threads:
    """The threads that write an annotated answer, in document order, its end included: those of its layout.

    Raises LayoutError for a promise or sync that the tokenizer cannot spell.
    """
    vocabulary = tokenizer.vocabulary
    threads = Threads(tokens := list[list[int]](), branches := list[dict[int, int]]())

    def write(nodes: tuple[Node, ...], first: list[int], last: int) -> int:
        thread, ids = len(tokens), first
        tokens.append(ids)
        branches.append({})
        for node in nodes:
            if isinstance(node, Text):
                ids += tokenizer.encode(node.text)
            elif isinstance(node, Promise):
                ids += promise_tokens(tokenizer, node)
                index = len(ids) - 1
                opened, closed = (vocabulary.tag_ids[tag] for tag in (tags.ASYNC_OPEN, tags.ASYNC_CLOSE))
                branches[thread][index] = write(node.block, [opened], closed)
            else:
                check_dialect(vocabulary, "pasta")
                ids.append(vocabulary.tag_ids[tags.SYNC])
        ids.append(last)
        return thread

    write(program.nodes, [], vocabulary.eos)
    return threads


def critical_path(threads: Threads, vocabulary: Vocabulary) -> int:
    """The number of decode steps that an answer needs with unlimited lanes.

    - A token is fed one step after the one before it in its thread.
    - `<async>` is fed in the same step as its promise's ` />`.
    - A token that waits for branches (a sync, the `</async>` of a branch, the end of the answer) is not fed before
      the step that feeds the last `</async>` it waits for.
    - The end of the answer is not counted: it is sampled, but never fed.

    For an answer without promises this is its number of tokens, without the end.
    """
    timing = _timed(threads, vocabulary)
    return timing.durations[0] - _is_ended(threads, vocabulary)


def critical_tokens(threads: Threads, vocabulary: Vocabulary) -> list[tuple[int, int]]:
    """A longest chain of an answer's tokens, from the first: each as (thread, index in the thread).

    With unlimited lanes each is fed one step after the one before it, but `<async>` in the step of its promise's
    ` />`, and a token that waits in the step of the `</async>` that it waited for. The ends of main and of branches
    that ended together with it are in the chain, though they are never fed.
    """
    timing = _timed(threads, vocabulary)
    promised = {
        branch: (thread, index)
        for thread, branches in enumerate(threads.branches)
        for index, branch in branches.items()
    }
    chain: list[tuple[int, int]] = []
    thread, index = (
        0,
        len(threads.tokens[0]),
    )  # behind the last token, where a thread waits for what it left open
    while True:
        if index < len(threads.tokens[thread]):
            chain.append((thread, index))
        if (branch := timing.waited[thread].get(index)) is not None:
            thread, index = branch, len(threads.tokens[branch])
        elif index:
            index -= 1
        elif thread:
            thread, index = promised[thread]
        else:
            return chain[::-1]


def widths(threads: Threads, vocabulary: Vocabulary) -> list[int]:
    """The threads that are fed in each step of the critical path, with unlimited lanes."""
    steps, durations, _ = _timed(threads, vocabulary)
    first = [0] * len(steps)  # of each thread: the step before its first token
    fed = [0] * durations[0]
    for thread, own in enumerate(steps):
        for index, step in enumerate(own):
            fed[first[thread] + step - 1] += 1
            if branch := threads.branches[thread].get(index):
                first[branch] = first[thread] + step - 1
    return fed[:-1] if _is_ended(threads, vocabulary) else fed


def _is_ended(threads: Threads, vocabulary: Vocabulary) -> bool:
    return bool(threads.tokens[0]) and threads.tokens[0][-1] in vocabulary.stops


class _Timing(NamedTuple):
    """When the tokens of an answer are fed with unlimited lanes.

    Attributes:
      steps: of each thread, the step of each token, from 1.
      durations: of each thread, the steps until it and all its branches have ended.
      waited: of each thread, the branch that a token waited for, by its index; the index behind the last token is
        for branches that no token waited for.
    """

    steps: list[list[int]]
    durations: list[int]
    waited: list[dict[int, int]]


def _timed(threads: Threads, vocabulary: Vocabulary) -> _Timing:
    count = len(threads.tokens)
    steps, durations = [list[int]() for _ in range(count)], [0] * count
    waited = [dict[int, int]() for _ in range(count)]
    for thread in reversed(range(count)):  # a branch has a greater number than its parent
        step = awaited = last = (
            0  # of the token; in which the last branch that it may wait for ends; which one
        )
        waiting = {int(Kind.SYNC), int(Kind.END if thread == 0 else Kind.ASYNC_CLOSE)}
        tokens = threads.tokens[thread]
        waits = {token for token in {*tokens} if int(vocabulary.kinds[token]) in waiting}
        for index, token in enumerate(tokens):
            step += 1
            if token in waits:
                if awaited > step:
                    step, waited[thread][index] = awaited, last
                awaited = 0
            steps[thread].append(step)
            branch = threads.branches[thread].get(index)
            # -1: the branch's first step is the one that feeds ` />`.
            if branch and (end := step - 1 + durations[branch]) > awaited:
                awaited, last = end, branch
        if awaited > step:
            step, waited[thread][len(tokens)] = awaited, last
        durations[thread] = step
    return _Timing(steps, durations, waited)
