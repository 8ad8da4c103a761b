"""Stop strings: an answer ends before the first of them in the reader's text, whichever thread wrote it.

The text is read in document order, as a sequential decode would have written it. So a stop string counts only when
all text before it is known, and it may start in one thread and end in another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from pasta_jax.decoding.state import Stop
from pasta_jax.decoding.trace import Trace
from pasta_jax.messages import shown
from pasta_jax.tokens.detokenize import Role, Speller, scan_all
from pasta_jax.tokens.tokenizer import TextError, Vocabulary, check_text


def check_stops(stops: Sequence[str]) -> tuple[str, ...]:
    """The stop strings of a request. Raises ValueError unless they are texts that can be written, none empty."""
    given = None if isinstance(stops, str) or not isinstance(stops, Iterable) else tuple(stops)
    if given is None or not all(isinstance(stop, str) and stop for stop in given):
        raise ValueError(
            f'stop={shown(stops)}: give a list of texts to stop at, none of them empty, as in stop=["\\n\\n"].'
        )
    for stop in given:
        try:
            check_text(stop)
        except TextError as error:
            raise TextError(f"stop={shown(stop)}: {error}") from None
    return given


def find_stop(text: str, stops: Sequence[str], searched: int = 0) -> int | None:
    """Where a text has to end: at the start of the stop string that is complete first; None if it has none.

    Of several that end together the longest counts. Adding text at the end never changes an offset once found.

    Args:
      text: the whole text so far.
      stops: the stop strings, none empty.
      searched: how many characters of the text are known to hold none.

    >>> find_stop("Yes. No.", ["No", "."])
    3
    """
    ends = [
        (start + len(stop), start)
        for stop in stops
        if (start := text.find(stop, max(0, searched - len(stop) + 1))) >= 0
    ]
    return min(ends)[1] if ends else None


def held_back(text: str, stops: Sequence[str]) -> int:
    r"""How many characters at the end of a text might start a stop string.

    >>> held_back("one\n", ["\n\nQ:", "END"])
    1
    """
    return max(
        (n for stop in stops for n in range(1, min(len(stop) - 1, len(text)) + 1) if text.endswith(stop[:n])),
        default=0,
    )


def cut(trace: Trace, vocabulary: Vocabulary, characters: int) -> Trace:
    """The trace of the same answer, cut off after this many characters of its text.

    It keeps the tokens, in document order, that have fewer characters before them. So the last one may spell the
    first characters of what is cut off, and tags at the cut are cut off too. The result does not depend on what was
    decoded after the cut.
    """
    keep = np.arange(len(trace.tokens)) < trace.prompt_length
    finished = np.zeros(len(trace.parent), bool)
    for index, role, before in characters_before(trace, vocabulary):
        if before >= characters:
            break
        keep[index] = True
        finished[trace.tokens.thread[index]] |= role == Role.END
    return dataclasses.replace(
        trace,
        tokens=trace.tokens[keep],
        step=trace.step[keep],
        logprob=trace.logprob[keep],
        stop=Stop.STOP,
        force_closed=trace.force_closed & finished,
        finished=finished,
    )


def characters_before(trace: Trace, vocabulary: Vocabulary) -> Iterator[tuple[int, Role, int]]:
    """The answer's tokens in document order: index in the trace, role, and characters of text before the token."""
    indices = trace.answer_indices
    before = 0
    for (thread, start, stop, _), pieces, _ in scan_all(vocabulary, trace.threads):
        speller, rest = Speller(vocabulary), iter(indices[thread][start:stop].tolist())
        for piece in pieces:
            if piece.role != Role.TEXT:
                before += len(speller.end_run())
            for token in piece.tokens:
                yield next(rest), piece.role, before
                if piece.role == Role.TEXT:
                    before += len(speller.feed([token]))
        before += len(speller.end_run())
