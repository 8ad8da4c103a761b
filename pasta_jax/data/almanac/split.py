"""The split: which combinations belong to evaluation, as a pure function.

The combination of a prompt is the set of its entities; for `single` its fact, for `chain` kind, start and length,
for `mixed` the set of starts. A stable hash assigns one in eight to evaluation.

Examples:
  >>> entities(["Japan", "France"]) == entities(["France", "Japan"])
  True
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable

ONE_IN = 8
"""One in this many combinations is held out."""


def entities(names: Iterable[str]) -> str:
    return "entities|" + "|".join(sorted(set(names)))


def fact(entity: str, noun: str) -> str:
    return f"fact|{entity}|{noun}"


def chain(kind: str, start: str, length: int) -> str:
    return f"chain|{kind}|{start}|{length}"


def chains(starts: Iterable[str]) -> str:
    return "chains|" + "|".join(sorted(set(starts)))


@functools.lru_cache(maxsize=4096)
def held_out(combination: str) -> bool:
    """Whether a combination belongs to evaluation. Not Python's `hash`, which changes from run to run."""
    digest = hashlib.blake2b(combination.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % ONE_IN == 0
