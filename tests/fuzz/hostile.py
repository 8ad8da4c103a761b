"""Hostile values, drawn from a `random.Random`: texts, numbers, JSON, and damage to bytes; all as plain data."""

from __future__ import annotations

import copy
import pathlib
import random
from collections.abc import Callable, Sequence
from typing import Any

from pasta_jax.lang import tags

# ------------------------------------------------------------------------------------------------------- values

ODD: dict[str, Any] = {
    "bytes": b"5",
    "object": object(),
    "set": {1},
    "complex": 1j,
    "range": range(3),
    "function": len,
    "class": int,
    "nothing": ...,
}
"""Values that JSON cannot hold."""


def expand(value: Any) -> Any:
    """The value that an input stands for.

    {"$repeat": [x, n]} is a text or list n times in a row, {"$nest": [x, n]} is x in n lists, {"$odd": name} is an
    entry of ODD.
    """
    match value:
        case {"$repeat": [part, int(count)]}:
            return expand(part) * count
        case {"$nest": [inner, int(depth)]}:
            nested = expand(inner)
            for _ in range(depth):
                nested = [nested]
            return nested
        case {"$odd": str(name)}:
            return ODD[name]
        case dict():
            return {key: expand(inner) for key, inner in value.items()}
        case list():
            return [expand(inner) for inner in value]
    return value


# -------------------------------------------------------------------------------------------------------- texts

_WORDS = (
    "the ",
    "Nile",
    " is long",
    ". ",
    "42",
    " 7",
    "\n",
    "\n\n- ",
    "\r\n",
    "a",
    " ",
    "  ",
    "Rivers and seas",
)
_SIGNS = (
    "'",
    '"',
    "<",
    ">",
    "\\",
    "\\\\",
    "/>",
    "{",
    "}",
    "[",
    "%s",
    "{0}",
    "\x00",
    "\x02",
    "\t",
    "\x1b[2J",
    "\x7f",
)
_FOREIGN = (
    *(
        "Zürich",
        "e\u0301",
        "東京",
        "🌍",
        "👩‍👩‍👧",
        "\u00a0",
        "\u2028",
        "\x85",
        "\u200b",
        "\u202e",
        "\ufeff",
        "\ufffd",
    ),
    *("\uffff", "\U0010ffff", "\u2581", "\u2581\u2581", "ﬁ", "Ａ", "ẛ̣", "İ", "߷", "\U000e0041", "١٢"),
)
HALVES = ("\ud83d", "\udf0d", "\udc80", "\ud800")
"""Halves of surrogate pairs, which no encoding has."""
_CONTROL = (
    *(
        "<s>",
        "</s>",
        "<unk>",
        "<pad>",
        "<bos>",
        "<eos>",
        "<0x41>",
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
    ),
    *(
        "<start_of_turn>user\n",
        "<end_of_turn>",
        "<|eot_id|>",
        "<|start_header_id|>",
        "<|begin_of_text|>",
        "[INST]",
    ),
    *(
        "[/INST]",
        "<<SYS>>",
        "<unused0>",
        "<|reserved_special_token_3|>",
        "[control_8]",
        "<think>",
        "</think>",
    ),
)
_NEAR = (
    *(
        "<b>",
        "<sync />",
        "< async >",
        "</ async>",
        "<promise tokens=2 />",
        "<\\sync/>",
        "<\\\\async>",
        "<promise/>",
    ),
    *(
        "<promise topic='a' tokens='3'/>",
        '<promise topic="a" tokens=0 />',
        '<promise topic="a" tokens=100 />',
    ),
    *('<promise topic="a" tokens=00000000000007 />'[i:] for i in (0, 9, 20)),
    *('<promise topic="a" tokens=3 /><async>' for _ in range(4)),
    "</async>",
)


def text(rng: random.Random, *, halves: bool = True, large: bool = True) -> Any:
    """Of words, signs, foreign letters, control tokens, tags and their pieces; now and then very long.

    Args:
      rng: draws.
      halves: whether it may hold halves of surrogate pairs.
      large: whether it may stand for a very long one (`expand`).
    """
    kinds = [_WORDS, _WORDS, _SIGNS, _FOREIGN, _CONTROL, _NEAR, tags.PIECES]
    parts = [rng.choice(rng.choice(kinds)) for _ in range(rng.choice((0, 1, 2, 3, 5, 9, 20)))]
    if halves and rng.random() < 0.1:
        parts.insert(rng.randint(0, len(parts)), rng.choice(HALVES))
    if rng.random() < 0.1:
        parts = [part[: rng.randint(0, len(part))] for part in parts]
    if large and rng.random() < 0.03:
        part = rng.choice([*parts, "a", " ", "<", "0", '"', "<promise ", "\\"]) or "a"
        return {"$repeat": [part, rng.choice((100, 5_000, 200_000 // len(part)))]}
    return "".join(parts)


# ------------------------------------------------------------------------------------------------- numbers, JSON

_INTEGERS = (
    0,
    1,
    -1,
    2,
    3,
    7,
    255,
    2**15,
    2**31 - 1,
    2**31,
    2**32,
    2**53 + 1,
    2**63,
    2**64,
    -(2**31),
    10**9,
    10**30,
)
_FLOATS = (0.0, -0.0, 0.5, 1.5, -1.5, 1e-320, 1e30, 1.7e308, float("nan"), float("inf"), float("-inf"))


def number(rng: random.Random) -> Any:
    return rng.choice((*_INTEGERS, *_FLOATS))


def value(rng: random.Random, depth: int = 2) -> Any:
    """Any JSON: of every type, deep or wide now and then."""
    draw = rng.random()
    if draw < 0.35:
        return number(rng)
    if draw < 0.5:
        return text(rng)
    if draw < 0.65:
        return rng.choice((None, True, False, "", "5", "null", [], {}, [[]], [None]))
    if draw < 0.7:
        return rng.choice(({"$nest": [1, 300]}, {"$repeat": [[0], 50_000]}))
    if depth and draw < 0.85:
        return [value(rng, depth - 1) for _ in range(rng.randint(0, 3))]
    if depth:
        return {str(text(rng, large=False)): value(rng, depth - 1) for _ in range(rng.randint(0, 3))}
    return number(rng)


def odd(rng: random.Random) -> Any:
    """Any value of Python."""
    return {"$odd": rng.choice([*ODD])} if rng.random() < 0.2 else value(rng)


# --------------------------------------------------------------------------------------------------------- edits

Edit = list[Any]
"""[path, value] puts a value where a path of keys and indices leads, [path] removes what is there."""


def edits(rng: random.Random, tree: Any, names: Sequence[str], count: int) -> list[Edit]:
    """Changes of a parsed JSON file, some of them at keys that it may lack (`names`)."""
    places = [*_places(tree)]
    made = []
    for _ in range(count):
        path = [rng.choice(names)] if names and rng.random() < 0.3 else rng.choice(places)
        made.append([path] if rng.random() < 0.15 else [path, value(rng)])
    return made


def _places(tree: Any, path: tuple[Any, ...] = ()) -> list[list[Any]]:
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [[*path], *(place for key, child in children for place in _places(child, (*path, key)))]


def edited(tree: Any, changes: Sequence[Edit]) -> Any:
    """The tree with its edits; an edit whose place is gone does nothing."""
    tree = copy.deepcopy(tree)
    for path, *new in changes:
        if not path:
            tree = expand(new[0]) if new else None
            continue
        parent = tree
        try:
            for key in path[:-1]:
                parent = parent[key]
            if new:
                parent[path[-1]] = expand(new[0])
            else:
                del parent[path[-1]]
        except (LookupError, TypeError):
            continue
    return tree


# -------------------------------------------------------------------------------------------------------- damage

Damage = list[Any]
"""A verb of `_VERBS` and its arguments: what happens to a file. Places are fractions of its length."""


def damage(rng: random.Random, *, flips: bool = True) -> Damage:
    """Something that may happen to a file, or that somebody may do to it."""
    at = rng.choice((0.0, 1.0, rng.random(), rng.random()))
    junk = rng.choice(
        ("\x00" * 8, "\xff\xfe", "\xef\xbb\xbf", "[" * 50, "version https://git-lfs", "PK\x03\x04", "\n")
    )
    kinds: list[Damage] = [["missing"], ["empty"], ["cut", at], ["folder"]]
    if flips:
        kinds += [
            ["flip", at, rng.randrange(8)],
            ["flip", rng.random(), rng.randrange(8)],
            ["insert", at, junk],
        ]
        kinds += [["is", junk], ["is", {"$repeat": [rng.choice(("[", '{"a":', "9", "\x00")), 100_000]}]]
    return rng.choice(kinds)


def _flip(data: bytes, at: float, bit: int) -> bytes:
    place = min(int(at * len(data)), len(data) - 1)
    return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :] if data else data


_VERBS: dict[str, Callable[..., bytes | None]] = {
    "missing": lambda data: None,
    "empty": lambda data: b"",
    "cut": lambda data, at: data[: int(at * len(data))],
    "flip": _flip,
    "insert": lambda data, at, junk: data[: int(at * len(data))] + latin(junk) + data[int(at * len(data)) :],
    "is": lambda data, junk: latin(junk),
    "folder": lambda data: None,
}


def damaged(data: bytes, what: Damage) -> bytes | None:
    """The bytes after the damage; None if the file is gone ("folder": a folder has its name)."""
    verb, *arguments = what
    return _VERBS[verb](data, *arguments)


def hurt(file: pathlib.Path, damage: Damage) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    data = damaged(file.read_bytes() if file.is_file() else b"", damage)
    file.unlink(missing_ok=True)
    if data is not None:
        file.write_bytes(data)
    elif damage == ["folder"]:
        file.mkdir()


def latin(junk: Any) -> bytes:
    """Bytes from the text that stands for them, a character each."""
    return expand(junk).encode("latin-1")
