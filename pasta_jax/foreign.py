"""Files that others wrote, read with care; what is wrong with one is said in a line that names it.

`parse_object` makes an object of the bytes of a JSON file, and `Fields` takes values of the right type out of it.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from pasta_jax.arrays import LARGEST_INT
from pasta_jax.messages import name_shown, shown

DEPTH = 64
"""Levels of nesting that are read. Files of models have less than ten."""

MOST_BYTES = 200 * 2**20
"""Of a file that is read whole; the largest tokenizers have 35 MB."""


class _Refused(Exception):
    """What is wrong, said while JSON is parsed. No ValueError: Python's own do not say what file it is."""


def read_bytes(path: str | os.PathLike[str], error: type[ValueError] = ValueError) -> bytes:
    """A local file of at most MOST_BYTES, whole. Raises `error` if it is larger, or cannot be read."""
    try:
        with open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as fault:
        raise error(f"Cannot read {os.fspath(path)}: {fault.strerror}.") from fault
    if len(data) > MOST_BYTES:
        raise error(
            f"{os.fspath(path)} has more than {MOST_BYTES:,} bytes, more than such a file should have."
        )
    return data


def parse_object(
    data: bytes,
    name: str | os.PathLike[str],
    error: type[ValueError] = ValueError,
    *,
    allow_nan: bool = False,
    unique: bool = False,
) -> dict[str, Any]:
    r"""The object that a JSON file holds.

    Args:
      data: the file, in UTF-8.
      name: of the file, for the message.
      error: the class to raise.
      allow_nan: take NaN and Infinity, which Python writes although JSON has no such numbers.
      unique: refuse an object in which a name stands twice; else the last one counts.

    Raises:
      error: it is no such file; nested deeper than DEPTH; has a number of thousands of digits, or half a character
        (an escape such as \ud83d alone, which no file in UTF-8 can hold).
    """

    def refuse(fault: str) -> NoReturn:
        raise error(f"{os.fspath(name)} {fault}.")

    def constant(text: str) -> float:
        if not allow_nan:
            raise _Refused(f"is not JSON: it has no number {text}")
        return float(text)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(tree := dict(pairs)) < len(pairs):
            name = collections.Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise _Refused(f"is damaged: {shown(name)} stands twice in it")
        return tree

    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        refuse(f"is not UTF-8: byte 0x{data[fault.start]:02x} at {fault.start}")
    try:
        tree = json.loads(text, parse_constant=constant, object_pairs_hook=once if unique else None)
    except json.JSONDecodeError as fault:
        refuse(f"is not JSON: {fault}")
    except _Refused as fault:
        refuse(str(fault))
    except ValueError:  # Python's limit of 4300 digits
        refuse("has a number of thousands of digits")
    except RecursionError:
        refuse(f"is nested deeper than {DEPTH} levels")
    if not isinstance(tree, dict):
        refuse(f"holds {shown(tree)}, not an object")
    if _is_deep(tree):
        refuse(f"is nested deeper than {DEPTH} levels")
    if "\\u" in text:  # the only way to write one
        try:
            json.dumps(tree, ensure_ascii=False).encode()
        except UnicodeEncodeError as fault:
            refuse(f"holds half a character (U+{ord(fault.object[fault.start]):04X})")
    return tree


def _is_deep(tree: Any) -> bool:
    level = [tree]
    for _ in range(DEPTH):
        inside = (node.values() if isinstance(node, dict) else node for node in level)
        level = [child for nodes in inside for child in nodes if isinstance(child, dict | list)]
        if not level:
            return False
    return True


@dataclasses.dataclass(frozen=True)
class Fields:
    """Typed fields of an object.

    Attributes:
      tree: the object.
      path: of the file, and within it, for messages.
      defaults: values of fields that it leaves out.
      error: the class to raise.
    """

    tree: Mapping[str, Any]
    path: str
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    error: type[ValueError] = ValueError

    def __getitem__(self, key: str) -> Any:
        return self.tree.get(key, self.defaults.get(key))

    def fault(self, key: str, reason: str, value: Any = None) -> ValueError:
        value = self[key] if value is None else value
        return self.error(f"{self.path}: {name_shown(key)}={shown(value)}: {reason}.")

    def number(self, key: str, default: float | None = None) -> float:
        """A number above 0; `default` stands for null."""
        value = self[key]
        if value is None and default is not None:
            return float(default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.fault(key, "must be a number above 0")
        try:
            return float(value)
        except OverflowError:
            raise self.fault(key, "is too large") from None

    def size(self, key: str, default: int | None = None, *, most: int = LARGEST_INT) -> int:
        """A whole number from 1 to `most`; `default` stands for null."""
        value = self.number(key, default)
        if not value.is_integer() or value > most:
            raise self.fault(key, f"must be a whole number, at most {most:,}")
        return int(value)

    def flag(self, key: str) -> bool:
        if not isinstance(self[key], bool):
            raise self.fault(key, "must be true or false")
        return bool(self[key])

    def choice(self, key: str, options: Sequence[str] | Mapping[str, Any], what: str) -> str:
        """One of some texts; `what` is wrong with others."""
        if not isinstance(value := self[key], str) or value not in options:
            raise self.fault(key, f"{what}. We have {', '.join(options)}")
        return value

    def inner(self, key: str, **defaults: Any) -> Fields:
        """The fields of an object in it; none if it is null."""
        value = {} if self[key] is None else self[key]
        if not isinstance(value, Mapping):
            raise self.fault(key, "must be an object")
        return Fields(value, f"{self.path}: {key}", defaults, self.error)
