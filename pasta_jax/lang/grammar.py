"""The tag automaton: which tags a sequence of tokens spells, and which token may come next.

It reads token *kinds*, not text, so one small table serves the compiled interpreter (one gather per step), the
specification and the reading of traces. The language that it accepts, per thread:

    text* ( OPEN topic{1..8} TOKENS [1-9] [0-9]? CLOSE text* | FORK text* | SYNC text* )* ( ASYNC_CLOSE | END )

No vocabulary has all of it: the pasta dialect lacks FORK, and the apar dialect has no other promise and no SYNC
(`Vocabulary.kinds`).

A token that does not continue the tag that has started *breaks* it: the pieces so far are literal text, and the
token is read as if no tag had started. That is the whole policy for malformed output (docs/design.md, decision 7).

The tables are plain tuples: `NEXT[state][kind]`, `EFFECT[state][kind]`, `BREAKS[state][kind]` and
`LEGAL[state][kind]`. What depends on the thread (no end of answer in a branch, no `</async>` in main, no
promise without a free thread) is not in them; the interpreter adds it.

>>> state = TEXT
>>> for kind in (Kind.OPEN, Kind.TOPIC, Kind.TOKENS, Kind.DIGIT, Kind.CLOSE):
...     effect, state = Effect(EFFECT[state][kind]), NEXT[state][kind]
>>> effect.name, state == TEXT
('FORK', True)
"""

from __future__ import annotations

import enum

from pasta_jax.lang.tags import MAX_TOPIC_TOKENS


class Kind(enum.IntEnum):
    """The class of a token in the tag grammar."""

    TEXT = 0  # ordinary text that a topic may not hold
    TOPIC = 1  # ordinary text that a topic may hold
    ZERO = 2  # the digit 0; a topic may hold it
    DIGIT = 3  # a digit from 1 to 9; a topic may hold it
    OPEN = 4  # <promise topic="
    TOKENS = 5  # " tokens=
    CLOSE = 6  # />
    ASYNC_OPEN = 7  # <async>, which only the interpreter writes
    ASYNC_CLOSE = 8  # </async>
    SYNC = 9  # <sync/>
    END = 10  # end of answer
    CONTROL = 11  # padding, turn markers, tags of another dialect: never part of an answer
    FORK = 12  # <promise/>, a whole promise in one token


class Effect(enum.IntEnum):
    """What happens when a token is sampled."""

    NONE = 0
    FORK = 1  # a promise is complete
    SYNC = 2
    FINISH = 3  # </async>
    END = 4
    STRAY = 5  # a tag piece or control token out of place: literal text


TEXT = 0
"""State: no tag has started."""
_TOPIC = 1  # states 1 .. 1 + MAX_TOPIC_TOKENS: 0 .. MAX_TOPIC_TOKENS topic tokens read
_NUMBER = _TOPIC + MAX_TOPIC_TOKENS + 1  # states _NUMBER .. _NUMBER + 2: 0 .. 2 digits read
STATES = _NUMBER + 3

LONGEST_TAG = 1 + MAX_TOPIC_TOKENS + 1 + 2 + 1
"""Tokens of the longest legal promise tag."""

OPENS = (Kind.OPEN, Kind.FORK)
"""The kinds that start a promise."""

FITS_TOPIC = (Kind.TOPIC, Kind.ZERO, Kind.DIGIT)

_FROM_TEXT = {
    Kind.OPEN: (_TOPIC, Effect.NONE),
    Kind.TOKENS: (TEXT, Effect.STRAY),
    Kind.CLOSE: (TEXT, Effect.STRAY),
    Kind.ASYNC_OPEN: (TEXT, Effect.STRAY),
    Kind.ASYNC_CLOSE: (TEXT, Effect.FINISH),
    Kind.SYNC: (TEXT, Effect.SYNC),
    Kind.END: (TEXT, Effect.END),
    Kind.CONTROL: (TEXT, Effect.STRAY),
    Kind.FORK: (TEXT, Effect.FORK),
}


def _continues(state: int, kind: Kind) -> tuple[int, Effect] | None:
    """(next state, effect) of a token that continues the tag; None if it breaks the tag."""
    if _TOPIC <= state < _NUMBER:
        topic_tokens = state - _TOPIC
        if kind in FITS_TOPIC and topic_tokens < MAX_TOPIC_TOKENS:
            return state + 1, Effect.NONE
        if kind == Kind.TOKENS and topic_tokens > 0:
            return _NUMBER, Effect.NONE
    else:
        digits = state - _NUMBER
        if (kind == Kind.DIGIT and digits < 2) or (kind == Kind.ZERO and digits == 1):
            return state + 1, Effect.NONE
        if kind == Kind.CLOSE and digits > 0:
            return TEXT, Effect.FORK
    return None


def _transition(state: int, kind: Kind) -> tuple[int, Effect, bool]:
    """(next state, effect, whether the token breaks a tag)."""
    if state != TEXT:
        continued = _continues(state, kind)
        if continued is not None:
            return *continued, False
    return *_FROM_TEXT.get(kind, (TEXT, Effect.NONE)), state != TEXT


_TABLE = [[_transition(state, kind) for kind in Kind] for state in range(STATES)]

NEXT = tuple(tuple(int(cell[0]) for cell in row) for row in _TABLE)
EFFECT = tuple(tuple(int(cell[1]) for cell in row) for row in _TABLE)
BREAKS = tuple(tuple(cell[2] for cell in row) for row in _TABLE)
LEGAL = tuple(tuple(not cell[2] and cell[1] != Effect.STRAY for cell in row) for row in _TABLE)
