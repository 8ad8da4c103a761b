"""The spelling of PASTA-LANG: the fixed pieces of its tags (docs/design.md, decision 1).

Each fixed piece is one vocabulary id; topic words and digits are ordinary tokens. Every other file takes the
spelling from here.

A model speaks one *dialect*: `pasta`, all of this, or `apar`, whose only promise is the bare `<promise/>` and
which has no sync (Liu et al. 2024; see `baselines.apar`).
"""

from typing import Literal, TypeAlias

Dialect: TypeAlias = Literal["pasta", "apar"]

PROMISE_OPEN = '<promise topic="'
PROMISE_TOKENS = '" tokens='
PROMISE_CLOSE = " />"
ASYNC_OPEN = "<async>"
ASYNC_CLOSE = "</async>"
SYNC = "<sync/>"
FORK = "<promise/>"
"""A bare promise; in its dialect it has the id of PROMISE_CLOSE, so one tokenizer serves both dialects."""

PIECES = (PROMISE_OPEN, PROMISE_TOKENS, PROMISE_CLOSE, ASYNC_OPEN, ASYNC_CLOSE, SYNC)
"""Every fixed piece, in the order in which a tokenizer numbers them."""

MAX_TOPIC_TOKENS = 8
"""A topic holds 1 to this many tokens; the tag grammar forbids more."""

TOPIC_PREFIX = " "
"""A topic's words are the tokens that they are in running text, after a space; the text of the tag omits it."""

TOPIC_FORBIDS = '"<>\\\n\r'
"""Characters that a topic may not hold, since the tag could then not be read back."""
