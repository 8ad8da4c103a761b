"""Stop strings: an answer ends before the first of them in the reader's text, whichever thread wrote it.

The text is read from its beginning, branches in their places, as a sequential decode of the same document would
have written it. So a stop string counts only when everything before it is known, and it may begin in one thread and
end in another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from pasta_jax.decoding.state import Stop
from pasta_jax.decoding.trace import Trace
from pasta_jax.tokens.detokenize import Role, scan
from pasta_jax.tokens.tokenizer import Vocabulary, whole_characters


def check_stops(stops: Sequence[str]) -> tuple[str, ...]:
    """The stop strings of a request. ValueError if they are none."""
    if isinstance(stops, str) or not all(isinstance(stop, str) and stop for stop in stops):
        raise ValueError(
            f'stop={stops!r}: give a list of texts to stop at, none of them empty, as in stop=["\\n\\n"].'
        )
    return tuple(stops)


def find_stop(text: str, stops: Sequence[str], searched: int = 0) -> int | None:
    """Where a text has to end: the beginning of the stop string that is complete first; None if there is none.

    Of several that end together the longest counts. What is found in a text is found in any that begins with it.

    Args:
      text: from its beginning.
      stops: none empty.
      searched: so many characters of the text hold none.

    >>> find_stop("Yes. No.", ["No", "."])
    3
    """
    found = [
        (place + len(stop), place)
        for stop in stops
        if (place := text.find(stop, max(0, searched - len(stop) + 1))) >= 0
    ]
    return min(found)[1] if found else None


def held_back(text: str, stops: Sequence[str]) -> int:
    r"""How many characters at the end of a text might be the beginning of a stop string.

    >>> held_back("one\n", ["\n\nQ:", "END"])
    1
    """
    return max(
        (n for stop in stops for n in range(1, min(len(stop) - 1, len(text)) + 1) if text.endswith(stop[:n])),
        default=0,
    )


def cut(trace: Trace, vocabulary: Vocabulary, characters: int) -> Trace:
    """The trace of an answer that ends after so many characters of its text.

    Kept are, in document order, the tokens before which fewer characters stand: the last one may spell the first
    characters of what is cut off, and tags that stand at the cut are cut off too. What is left depends on nothing
    that was decoded after it.
    """
    n = trace.prompt_length
    places = [n + np.flatnonzero(trace.tokens.thread[n:] == thread) for thread in range(len(trace.parent))]
    tokens, branches = trace.tokens.token, trace.branches
    keep = np.arange(len(trace.tokens)) < n
    finished = np.zeros(len(trace.parent), bool)
    before = 0  # characters

    def walk(thread: int) -> None:
        nonlocal before
        mine = iter(places[thread])
        pending = b""
        pieces, _ = scan(vocabulary, thread, tokens[places[thread]].tolist(), branches[thread], ended=True)

        def spell(more: bytes, *, run_ends: bool = False) -> None:
            nonlocal before, pending
            spelled, pending = whole_characters(pending + more, ended=run_ends)
            before += len(spelled)

        for piece in pieces:
            if piece.role != Role.TEXT:
                spell(b"", run_ends=True)
            for token in piece.tokens:
                place = next(mine)
                if before >= characters:
                    return
                keep[place] = True
                if piece.role == Role.TEXT:
                    spell(vocabulary.spelled([token]))
            if piece.role == Role.PROMISE:
                walk(piece.branch)
            elif piece.role == Role.END:
                finished[thread] = True
        spell(b"", run_ends=True)

    walk(0)
    return dataclasses.replace(
        trace,
        tokens=dataclasses.replace(
            trace.tokens, **{name: array[keep] for name, array in trace.tokens.fields().items()}
        ),
        step=trace.step[keep],
        logprob=trace.logprob[keep],
        stop=Stop.STOP,
        forced=trace.forced & finished,
        finished=finished,
    )
