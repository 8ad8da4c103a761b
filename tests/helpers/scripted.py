"""Decoding without a model: what a thread says next is read from a script, by the compiled interpreter and by
the specification alike.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pasta_jax.arrays import Array, Tokens
from pasta_jax.decoding import interpreter, reference
from pasta_jax.decoding.sampling import Draw
from pasta_jax.decoding.state import DecodedTokens, Limits, Request, RowState, Stop, ThreadTable
from pasta_jax.lang import tags
from pasta_jax.testing import WordTokenizer
from pasta_jax.tokens.detokenize import threads_of
from pasta_jax.tokens.positions import Positions
from pasta_jax.tokens.tokenizer import Vocabulary
from pasta_jax.visibility import visible

PIECES = (
    b"",
    b"",
    b"",
    *(b"%d" % d for d in range(10)),
    b"a",
    b"b ",
    b'"',
    *(p.encode() for p in tags.PIECES),
)
VOCABULARY = Vocabulary(
    pieces=PIECES,
    tag_ids={piece: 16 + i for i, piece in enumerate(tags.PIECES)},
    pad=0,
    eos=1,
    bos=2,
    control=frozenset({0, 2}),
)
OPEN, TOKENS, CLOSE, ASYNC_OPEN, ASYNC_CLOSE, SYNC = VOCABULARY.tag_ids.values()
FORK = CLOSE
"""In the apar dialect."""
EOS, A, B = VOCABULARY.eos, 13, 14


def digit(d: int) -> int:
    return VOCABULARY.digits[d]


def request(max_new_tokens: int = 200, max_branch_tokens: int = 30) -> Request:
    """NumPy's numbers and arrays: of thousands, jax would take longer to make and to stack them than to decode."""
    return Request(
        max_new_tokens=np.int32(max_new_tokens),
        max_branch_tokens=np.int32(max_branch_tokens),
        open_bias=np.float32(0),
        draw=Draw(np.float32(0), np.int32(0), np.float32(1), np.float32(0)),
        key=np.zeros(2, np.uint32),
        script=np.zeros((1, 0), np.int32),
        script_branches=np.zeros((1, 0), np.int32),
    )


@dataclasses.dataclass(frozen=True)
class Script:
    """`lines[k, order % C]` is what the thread with the line k says as its token number `order`."""

    lines: np.ndarray  # int32 [R, C]

    def says(self, thread: reference.Thread) -> int:
        R, C = self.lines.shape
        return int(self.lines[line_of(thread, R), thread.order % C])


def line_of(thread: reference.Thread, lines: int) -> int:
    """The line of a thread, made up from where its ancestors were promised, whatever the schedule."""
    return 0 if thread.parent is None else line_after(line_of(thread.parent, lines), thread.fork_order, lines)


def line_after(parent: Any, fork_order: Any, lines: int) -> Any:
    """The line of a branch; integers or integer arrays."""
    return (31 * parent + fork_order + 1) % lines


def lines_of_table(table: ThreadTable, lines: int, max_depth: int) -> Array:
    """`line_of` for a row's threads: int32 [T]."""
    branch = functools.partial(line_after, lines=lines)
    return interpreter.down_the_tree(table, jnp.zeros_like(table.parent), branch, max_depth)


def nearest_legal(token: int, legal: Callable[[int], bool]) -> int:
    """The token itself, or the first legal one after it, round the vocabulary; the others are not asked of."""
    V = len(VOCABULARY)
    return next(t for t in ((token + i) % V for i in range(V)) if legal(t))


Views = dict[int, list[reference.Entry]]
"""What each entry of an answer sees, itself last, by `id(entry)`."""


def run_reference(
    prompt: list[int],
    script: Script,
    limits: Limits,
    ask: Request,
    positions: Positions,
    views: Views | None = None,
    dialect: tags.Dialect = "pasta",
) -> reference.Decoded:
    """`views`, if given, is filled: whenever a thread samples, its view is that of the entry it was just fed."""

    def sample(thread: reference.Thread, legal: Callable[[int], bool]) -> int:
        if views is not None:
            views[id(thread.view[-1])] = list(thread.view)
        return nearest_legal(script.says(thread), legal)

    return reference.decode(
        prompt,
        sample,
        VOCABULARY.with_dialect(dialect),
        limits,
        positions=positions,
        max_new_tokens=int(ask.max_new_tokens),
        max_branch_tokens=int(ask.max_branch_tokens),
    )


@functools.cache
def compiled(
    limits: Limits, positions: Positions, prompt_length: int, dialect: tags.Dialect = "pasta"
) -> Any:
    """(prompts [B, L], lengths [B], lines [B, R, C], requests [B]) -> RowState [B]."""
    rules = interpreter.rules_for(VOCABULARY.with_dialect(dialect), limits, positions)
    V = len(VOCABULARY)

    def sample(state: RowState, lanes: DecodedTokens, lines: Array) -> Array:
        thread = jnp.minimum(lanes.thread, limits.threads - 1)
        R, C = lines.shape
        line = lines_of_table(state.threads, R, limits.max_depth)
        said = lines[line[thread], (lanes.order + 1) % C]
        if not limits.constrained:
            return said
        legal = interpreter.legal_tokens(state, lanes, rules)
        distance = (jnp.arange(V)[None, :] - said[:, None]) % V
        return jnp.argmin(jnp.where(legal, distance, V), axis=-1).astype(jnp.int32)

    def advance(state: RowState, lanes: DecodedTokens, lines: Array, ask: Request) -> RowState:
        sampled = sample(state, lanes, lines)
        return interpreter.advance(state, ask, lanes, sampled, jnp.zeros(sampled.shape, jnp.float32), rules)

    def run(prompt: Array, length: Array, lines: Array, ask: Request) -> RowState:
        state = interpreter.begin(limits, limits.pool + limits.lanes, prompt, length)
        state = advance(state, interpreter.feed(state, ask, limits), lines, ask)

        def step(state: RowState) -> RowState:
            lanes = interpreter.feed(state, ask, limits)
            return advance(interpreter.record(state, lanes), lanes, lines, ask)

        return jax.lax.while_loop(lambda s: s.stop == Stop.RUNNING, step, state)

    return jax.jit(jax.vmap(run))


BATCHES = 8


def decoded(
    limits: Limits,
    positions: Positions,
    prompts: np.ndarray,
    lengths: np.ndarray,
    scripts: list[Script],
    asks: list[Request],
    dialect: tags.Dialect = "pasta",
) -> RowState:
    """What `compiled` makes of scripts, as NumPy's arrays [B]; B is a multiple of BATCHES.

    Rows of a batch run as long as the longest of them, so those that may be long share one.
    """
    run = compiled(limits, positions, prompts.shape[1], dialect)
    request = jax.tree.map(lambda *x: np.stack(x), *asks)
    given = prompts, lengths, np.stack([script.lines for script in scripts]), request
    order = np.argsort(request.max_new_tokens)
    parts = [run(*jax.tree.map(lambda x, i=i: x[i], given)) for i in np.split(order, BATCHES)]
    return jax.tree.map(lambda *x: np.concatenate(x)[np.argsort(order)], *parts)


def random_script(rng: np.random.Generator) -> Script:
    """From nearly well-formed programs to noise: tag pieces in order, with words, ends and accidents between."""
    tag = [OPEN, A, TOKENS, digit(1), CLOSE]
    sloppiness = rng.choice([0.0, 0.1, 0.5])
    ending = rng.choice([0.02, 0.1, 0.3])
    lines = []
    for _ in range(rng.integers(1, 9)):
        line: list[int] = []
        while len(line) < 80:
            draw = rng.random()
            if draw < sloppiness:
                line.append(int(rng.integers(len(VOCABULARY))))
            elif draw < sloppiness + ending:
                line.append(int(rng.choice([EOS, ASYNC_CLOSE])))
            elif rng.random() < 0.3:
                number = [digit(int(d)) for d in str(rng.integers(1, 100))]
                line += tag[:3] + number + tag[4:]
            elif rng.random() < 0.2:
                line.append(SYNC)
            else:
                line.append(int(rng.choice([A, B, digit(3)])))
        lines.append(line[:80])
    lines = [lines[i % len(lines)] for i in range(8)]
    return Script(np.array(lines, np.int32))


def compare(row: RowState, answer: reference.Decoded) -> None:
    n = len(answer.entries)
    assert int(row.cursor) == n
    assert Stop(int(row.stop)) == answer.stop
    assert int(row.step) == answer.steps
    for name in ("token", "thread", "order", "position", "step"):
        expected = [getattr(entry, name) for entry in answer.entries]
        np.testing.assert_array_equal(getattr(row.entries, name)[:n], expected, err_msg=name)
    t = row.threads
    assert int(row.used_threads) == len(answer.threads)
    for thread in answer.threads:
        k = thread.number
        pending = thread.pending
        assert (int(t.phase[k]) == 3) == (pending is None), "done"
        if pending is not None:
            assert (int(t.next.token[k]), int(t.next.order[k]), int(t.next.position[k])) == (
                pending.token,
                pending.order,
                pending.position,
            )
        assert bool(t.closing[k]) == thread.closing and bool(t.force_closed[k]) == thread.force_closed
        if thread.parent is not None:
            assert (int(t.parent[k]), int(t.fork_order[k])) == (thread.parent.number, thread.fork_order)


def compare_views(row: RowState, answer: reference.Decoded, views: Views) -> None:
    """What the numbering lets each entry see is what the specification's thread had in view there."""
    n = len(answer.entries)
    written = row.entries[:n]
    index = {id(entry): i for i, entry in enumerate(answer.entries)}
    ends = {id(t.view[-1]): t.view for t in answer.threads if t.closing and t.pending is None}
    expected = np.zeros((n, n), bool)
    for i, entry in enumerate(answer.entries):
        prompt = answer.entries[: i + 1] if entry.step == 0 else None
        view = prompt or ends.get(id(entry)) or views[id(entry)]
        expected[i, [index[id(seen)] for seen in view]] = True
    np.testing.assert_array_equal(visible(written, written), expected)


class ScriptTokenizer(WordTokenizer):
    """The scripted vocabulary as a tokenizer that knows three letters and writes the others as one of them."""

    def __init__(self) -> None:
        self.vocabulary = VOCABULARY

    def encode(self, text: str) -> list[int]:
        known = {"a": 13, '"': 15, **{str(d): digit(d) for d in range(10)}}
        return [known.get(letter, 13) for letter in text]


LINES = 4093
"""A prime: few threads of an answer share a line."""


def lines_of(document: Tokens) -> np.ndarray | None:
    """The script that says a layout, int32 [LINES, 1000]; None where two threads would share a line."""
    threads = threads_of(document)
    line = {0: 0}
    for thread, branches in enumerate(
        threads.branches
    ):  # in document order a parent comes before its branches
        line |= {branch: line_after(line[thread], index, LINES) for index, branch in branches.items()}
    lines = np.zeros((LINES, 1000), np.int32)
    for thread, tokens in enumerate(threads.tokens):
        lines[line[thread], : len(tokens)] = tokens
    return lines if len({*line.values()}) == len(line) else None
