r"""The layouts in which people keep questions and answers, recognised record by record.

    prompt/response     {"prompt": ..., "response": ...}, texts or lists of messages
    messages            {"messages": [{"role": ..., "content": ...}, ...]}
    ShareGPT            {"conversations": [{"from": ..., "value": ..., "weight": 0 or 1}, ...]}
    prompt/completion   {"prompt": ..., "completion": ...}, texts or lists of messages, as in TRL
    Alpaca              {"instruction": ..., "input": ..., "output": ...}
    Dolly               {"instruction": ..., "context": ..., "response": ...}

The first that fits is taken, in this order. An input or a context that is not blank follows its instruction after
an empty line, and both are one message of the user: "INSTRUCTION\n\nINPUT". (The sentences that Alpaca writes
around them, "Below is an instruction ...", are left out: the model's chat format takes their place.) Names that a
file has for itself are mapped by columns.

In a list an optional system message comes first, in the list or as the record's "system"; then user and assistant
take turns. An answer with "weight": 0 is not learnt. A question at the end that has no answer is left out.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, Literal, TypeAlias

from pasta_jax.messages import name_shown, shown
from pasta_jax.tokens.tokenizer import TextError, check_text

Role: TypeAlias = Literal["system", "user", "assistant"]
Path: TypeAlias = tuple[str | int, ...]

COLUMNS = ("prompt", "response", "system", "messages")
"""What a file's own names can be mapped to. `prompt` and `system` may join several names, as in a+b."""

KEYS = frozenset(
    ("prompt", "response", "completion", "instruction", "input", "context", "output", "system")
) | {"messages", "conversations"}
"""The keys that layouts read; all others are the file's own."""

ROLES: Mapping[str, Role] = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "bing": "assistant", "bard": "assistant", "claude": "assistant",
}  # fmt: skip
"""Roles by the names that files have for them, in lower case."""

TOOLS = ("tool", "function", "observation", "function_call", "tool_call", "function_response", "ipython")
"""Names for the roles of tools, which no chat format here writes."""

ADVICE = (
    "Map the names that the file uses (annotate and evaluate have --columns for it), "
    "as in --config.data.columns=prompt=question,response=answer"
)


class Fault(Exception):
    """What is wrong with a record.

    Attributes:
      reason: its kind, one of few, to be counted.
      message: what and where in the record, and what to do.
      column: in the line, from 1; None if the fault is not at one position.
    """

    def __init__(self, reason: str, message: str, column: int | None = None):
        super().__init__(reason, message, column)
        self.reason, self.message, self.column = reason, message, column


@dataclasses.dataclass(frozen=True)
class Turn:
    """What one side says.

    Attributes:
      role: who says it.
      text: as the record has it; an answer may be annotated.
      path: where the record has it: keys, and indices from 0.
      is_learnt: whether it is an answer to learn.
    """

    role: Role
    text: str
    path: Path
    is_learnt: bool

    @property
    def key(self) -> str:
        """The path, for messages: `messages[2].content`."""
        parts = [f"[{part}]" if isinstance(part, int) else f".{name_shown(part)}" for part in self.path]
        return "".join(parts).removeprefix(".")


@dataclasses.dataclass(frozen=True)
class Conversation:
    """What a record says: perhaps a system message, then a question, its answer, and so on up to an answer."""

    layout: str
    turns: tuple[Turn, ...]


def conversation(record: Any, columns: Mapping[str, str] = {}) -> Conversation:
    """What a record says, in whichever layout.

    Args:
      record: from JSON.
      columns: the file's own names for some of COLUMNS; then no other layout is tried.

    Raises:
      Fault: the record has no known layout, or something in it cannot be used.
    """
    if not isinstance(record, dict):
        raise Fault("not an object", "not an object. Write one with the keys prompt and response.")
    layout, turns = _mapped(record, columns) if columns else _recognised(record)
    return Conversation(layout, tuple(_in_turn(turns)))


def replaced(
    record: Mapping[str, Any], turn: int, text: str, columns: Mapping[str, str] = {}
) -> dict[str, Any]:
    """A copy of a record with another text of one answer.

    Args:
      record: from JSON.
      turn: the number of the answer among those of the record, from 0 (`Example.turn`).
      text: of the answer.
      columns: as in `conversation`.

    Raises:
      Fault: as `conversation`.

    >>> replaced({"instruction": "Hi", "output": "Ho", "id": 7}, 0, "Hello")
    {'instruction': 'Hi', 'output': 'Hello', 'id': 7}
    """
    answers = [each for each in conversation(record, columns).turns if each.role == "assistant"]
    changed: Any = copy.deepcopy(dict(record))
    *outer, last = answers[turn].path
    inner = changed
    for part in outer:
        inner = inner[part]
    inner[last] = text
    return dict(changed)


# ------------------------------------------------------------------------------------------- recognition


def _recognised(record: Mapping[str, Any]) -> tuple[str, list[Turn]]:
    there = {key for key, value in record.items() if value is not None}
    for keys in (there, record.keys()):  # a null counts where nothing else fits, so that it is named
        for layout, needed, turns in _LAYOUTS:
            if keys >= needed:
                return layout, turns(record)
    for key in ("prompt", "instruction"):
        if key in record:
            raise Fault(
                "no answer", f'"{key}" has no answer (found: {_keys(record)}). Add its "response". {ADVICE}.'
            )
    raise Fault("no known layout", f"no known layout (found: {_keys(record)}). {ADVICE}.")


_LAYOUTS: Sequence[tuple[str, Set[str], Callable[[Mapping[str, Any]], list[Turn]]]] = (
    ("prompt/response", {"prompt", "response"}, lambda r: _asked(r, "prompt") + _answered(r, "response")),
    ("messages", {"messages"}, lambda r: _with_system(r, _listed(r, "messages"))),
    ("ShareGPT", {"conversations"}, lambda r: _with_system(r, _listed(r, "conversations"))),
    (
        "prompt/completion",
        {"prompt", "completion"},
        lambda r: _asked(r, "prompt") + _answered(r, "completion"),
    ),
    ("Alpaca", {"instruction", "output"}, lambda r: _instructed(r, "input") + _answered(r, "output")),
    ("Dolly", {"instruction", "response"}, lambda r: _instructed(r, "context") + _answered(r, "response")),
)


def _mapped(record: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[str, list[Turn]]:
    names = {"prompt": "prompt", "response": "response"} if "messages" not in columns else {}
    names |= columns
    for key, name in names.items():
        for part in [name] if key in ("response", "messages") else name.split("+"):
            if part not in record:
                raise Fault("missing key", f'missing "{part}" (found: {_keys(record)}). {ADVICE}.')
    turns = _joined(record, names["system"].split("+"), "system") if names.get("system") else []
    if "messages" in names:
        return "columns", turns + _listed(record, names["messages"])
    prompt = names["prompt"].split("+")
    asked = _joined(record, prompt, "user") if len(prompt) > 1 else _asked(record, *prompt)
    return "columns", turns + asked + _answered(record, names["response"])


def _keys(record: Mapping[str, Any]) -> str:
    return ", ".join(map(name_shown, record))[:500] or "none"


def _in_turn(turns: Iterable[Turn]) -> Iterator[Turn]:
    """The turns up to the last answer. Raises Fault if they are not in order, or nothing is to be learnt."""
    given = list(turns)
    said = given[1:] if given and given[0].role == "system" else given
    for number, turn in enumerate(said):
        if turn.role != (expected := "assistant" if number % 2 else "user"):
            raise Fault(
                "turns out of order",
                f'"{turn.key}" is of the {turn.role}; the {expected} is expected there. An optional system message '
                "comes first, then user and assistant take turns.",
            )
    answers = len(said) // 2
    if not answers:
        raise Fault("no answer", "nothing answers the user. Add an answer, or remove the line.")
    if not any(turn.is_learnt for turn in said[: 2 * answers]):
        raise Fault("nothing to learn", "every answer has the weight 0. Remove the line.")
    yield from given[: len(given) - len(said) + 2 * answers]


# -------------------------------------------------------------------------------------------------- parts


def _asked(record: Mapping[str, Any], key: str) -> list[Turn]:
    """A prompt: a text, or messages none of which is learnt."""
    if isinstance(record[key], list):
        return [dataclasses.replace(turn, is_learnt=False) for turn in _listed(record, key)]
    return [Turn("user", _text(record[key], key), (key,), False)]


def _answered(record: Mapping[str, Any], key: str) -> list[Turn]:
    """An answer: a text, or messages."""
    if isinstance(record[key], list):
        return _listed(record, key)
    return [Turn("assistant", _text(record[key], key), (key,), True)]


def _instructed(record: Mapping[str, Any], extra: str) -> list[Turn]:
    return _joined(record, ["instruction", extra], "user")


def _joined(record: Mapping[str, Any], keys: Sequence[str], role: Role) -> list[Turn]:
    """Texts with empty lines between them; blank ones are left out, of a user's the first must not be blank."""
    texts = [
        "" if record.get(key) is None else _text(record[key], key, blank=bool(i) or role == "system")
        for i, key in enumerate(keys)
    ]
    if role == "user":
        _text(record.get(keys[0]), keys[0])
    text = "\n\n".join(filter(str.strip, texts))
    return [Turn(role, text, (keys[0],), False)] if text else []


def _with_system(record: Mapping[str, Any], turns: list[Turn]) -> list[Turn]:
    """The record's "system" before its messages, unless they have a system message."""
    if isinstance(record.get("system"), str) and turns and turns[0].role != "system":
        return _joined(record, ["system"], "system") + turns
    return turns


def _listed(record: Mapping[str, Any], key: str) -> list[Turn]:
    if not isinstance(record[key], list):
        raise Fault("not a list", f'"{key}" must be a list of {{"role": ..., "content": ...}}.')
    return [_message(item, (key, number)) for number, item in enumerate(record[key])]


def _message(item: Any, path: Path) -> Turn:
    where = f"{path[0]}[{path[1]}]"
    keys = item.keys() if isinstance(item, dict) else ()
    names = next((pair for pair in (("role", "content"), ("from", "value")) if {*pair} <= {*keys}), None)
    if names is None:
        raise Fault(
            "not a message",
            f'"{where}" is {shown(item)}; write {{"role": ..., "content": ...}}, or "from" and "value".',
        )
    name, text = (item[each] for each in names)
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if isinstance(name, str) and name.lower() in TOOLS:
        raise Fault("a tool's turn", f'"{where}.{names[0]}" is {shown(name)}: no chat format here has tools.')
    if role is None:
        raise Fault(
            "unknown role", f'"{where}.{names[0]}" is {shown(name)}. Write system, user or assistant.'
        )
    weight = item.get("weight")
    if weight not in (None, 0, 1):
        raise Fault("weight", f'"{where}.weight" is {shown(weight)}; write 1 for an answer to learn, or 0.')
    is_learnt = role == "assistant" and weight != 0
    blank = role == "system" or (role == "assistant" and not is_learnt)
    return Turn(role, _text(text, f"{where}.{names[1]}", blank=blank), (*path, names[1]), is_learnt)


def _text(value: Any, key: str, *, blank: bool = False) -> str:
    if not isinstance(value, str) or not (blank or value.strip()):
        reason = "empty text" if isinstance(value, str) or value is None else "not a text"
        raise Fault(reason, f'"{key}" must be a text that is not empty. Fix or remove the line.')
    try:
        check_text(value)
    except TextError as error:
        raise Fault("half a character", f'in "{key}": {error}') from None
    return value
