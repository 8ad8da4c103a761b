"""What an answer costs: its decode steps with unlimited lanes, against those of its text alone.

Needs no model and no jax, so annotators can weigh every promise before they write it.
"""

from __future__ import annotations

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
    _, durations = _timed(threads, vocabulary)
    return durations[0] - 1 if _is_ended(threads, vocabulary) else durations[0]


def widths(threads: Threads, vocabulary: Vocabulary) -> list[int]:
    """The threads that are fed in each step of the critical path, with unlimited lanes."""
    steps, durations = _timed(threads, vocabulary)
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


def _timed(threads: Threads, vocabulary: Vocabulary) -> tuple[list[list[int]], list[int]]:
    """For each thread, the step of each token, from 1, and the steps until it and all its branches have ended."""
    steps, durations = [list[int]() for _ in threads.tokens], [0] * len(threads.tokens)
    for thread in reversed(range(len(durations))):  # a branch has a greater number than its parent
        step = awaited = 0  # the step of the token; the step in which the last branch it may wait for ends
        waiting = {int(Kind.SYNC), int(Kind.END if thread == 0 else Kind.ASYNC_CLOSE)}
        tokens = threads.tokens[thread]
        waits = {token for token in {*tokens} if int(vocabulary.kinds[token]) in waiting}
        for index, token in enumerate(tokens):
            step += 1
            if token in waits:
                step, awaited = max(step, awaited), 0
            steps[thread].append(step)
            if branch := threads.branches[thread].get(index):
                # -1: the branch's first step is the one that feeds ` />`.
                awaited = max(awaited, step - 1 + durations[branch])
        durations[thread] = max(step, awaited)
    return steps, durations
