"""From a configuration file and the command line to a `Config`, strictly and with suggestions.

    configs/tiny.py:pasta   --config.optimizer.lr=1e-3   ->   load_config   ->   Config

Unknown fields and values of the wrong type are refused in one line. The library takes the dataclasses and never
sees a flag.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import json
import os
import re
import runpy
import traceback
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from pasta_jax.config import Config, ConfigError, remat_of
from pasta_jax.fields import FieldError
from pasta_jax.files import changes


def load_config(spec: str, overrides: Sequence[str] = ()) -> Config:
    """The configuration that a file's `get_config(variant: str = ...) -> Config` returns.

    Args:
      spec: `path.py` or `path.py:variant`.
      overrides: as "optimizer.lr=1e-3".

    Raises:
      ConfigError: no such file or variant, an unknown field, a value of the wrong type.
    """
    path, _, variant = spec.partition(":")
    if not path.endswith(".py"):
        raise ConfigError(
            f"--config={spec} is no Python file. Give an experiment, as configs/tiny.py; files of data go into "
            "--config.data.sources."
        )
    if not os.path.exists(path):
        raise ConfigError(f"No configuration file {path}. Write --config=configs/NAME.py or NAME.py:VARIANT.")
    try:
        get_config = runpy.run_path(path).get("get_config")
        if get_config is None:
            raise ConfigError("it defines no get_config(variant: str = ...) -> Config.")
        config = get_config(variant) if variant else get_config()
    except Exception as error:  # whatever the file does
        raise ConfigError(f"Cannot load the configuration {spec}: {_in_file(error, path)}") from error
    if not isinstance(config, Config):
        raise ConfigError(
            f"Cannot load the configuration {spec}: get_config returned {type(config).__name__}."
        )
    return override(config, overrides)


def _in_file(error: Exception, path: str) -> str:
    """One line about an error in a configuration file; an error that the file did not foresee with its line."""
    message = " ".join(str(error).split()) or "no message"
    if isinstance(error, ValueError | SyntaxError):  # what `get_config` says, and what names the line itself
        return message
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    where = f"line {lines[-1]}: " if lines else ""
    return f"{where}{type(error).__name__}: {message}"


def override(config: Config, overrides: Sequence[str]) -> Config:
    """A configuration with some fields changed, each written as "path=value". Raises ConfigError."""
    tree = to_dict(config)
    for text in overrides:
        path, equals, value = text.partition("=")
        kind = field_type(Config, path)
        if not equals:
            raise ConfigError(f"config.{path} has no value. Write --config.{path}=VALUE.")
        convert(value, kind, path)
        *sections, name = path.split(".")
        branch = tree
        for section in sections:
            branch = branch[section]
        branch[name] = value
    return from_dict(tree)


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Takes `--config.x=y` and `--config.x y` out of a command line.

    Returns:
      overrides as `load_config` takes them, and the rest of the command line.

    >>> split_overrides(["train", "--config=a.py", "--config.steps=5", "--config.seed", "1"])
    (['steps=5', 'seed=1'], ['train', '--config=a.py'])
    """
    overrides, rest, words = [], [], list(argv)
    while words:
        word = words.pop(0)
        if match := re.fullmatch(r"--?config\.([^=]+)(=.*)?", word, re.DOTALL):
            path, value = match.groups()
            if value is None and words and not words[0].startswith("--"):
                value = "=" + words.pop(0)
            overrides.append(path + (value or ""))
        else:
            rest.append(word)
    return overrides, rest


# ------------------------------------------------------------------------------------------- dicts and text


def to_dict(config: Config) -> dict[str, Any]:
    """As plain data that JSON can hold; `from_dict` is the inverse."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(tree: Mapping[str, Any]) -> Config:
    """From plain nested data; fields that it lacks keep their defaults. Raises ConfigError."""
    return convert(tree, Config, "")


def describe(config: Config) -> str:
    """All fields, one on a line as the command line spells it, with their documentation."""
    lines = [(f"config.{path} = {value!r}", doc) for path, value, doc in _walk(config)]
    width = min(48, max(len(left) for left, _ in lines))
    return "\n".join(f"{left:<{width}}  # {doc}" if doc else left for left, doc in lines)


def differences(a: Config, b: Config) -> list[str]:
    """The fields in which two configurations differ, as dotted paths."""
    return [change.name for change in changes(to_dict(a), to_dict(b))]


def _walk(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Path, value and documentation of every field."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _walk(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value, field.metadata.get("doc", "")


# ---------------------------------------------------------------------------------------------------- types

LONGEST = 200
"""Characters of a value in a message."""

_BOOLS = {"true": True, "1": True, "false": False, "0": False}


def convert(value: Any, kind: Any, path: str) -> Any:
    """`value`, from JSON or the command line, as the type `kind`.

    Text is parsed where a number is expected ("1e3" is an int); numbers are widened (1 is a float) and never
    narrowed. Pairs may be written "a=1,b=2".

    Raises:
      ConfigError: naming the field by `path`.
    """
    if path == "remat":
        value = remat_of(value)
    got = json.dumps(value, default=repr)
    got = got if len(got) <= LONGEST else got[:LONGEST] + " ..."
    wrong = ConfigError(f"config.{path} must be {_in_words(kind)}, got {got}.")
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    try:
        if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
            return _section(value, kind, path)
        if origin is Literal and value in parts:
            return value
        if origin is tuple and isinstance(value, str | list | tuple):
            items = _items(value, parts) if isinstance(value, str) else value
            kinds = parts[:1] * len(items) if parts[1:] == (Ellipsis,) else parts
            return tuple(convert(item, part, path) for item, part in zip(items, kinds, strict=True))
        if kind is bool and isinstance(value, str):
            value = _BOOLS[value.lower()]
        if kind in (int, float) and isinstance(value, str):
            value = int(value) if value.lstrip("-").isdigit() else float(value)
        if kind is float and type(value) is int:
            value = float(value)
        if kind is int and isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is kind:
            return value
    except ConfigError:
        raise
    except (ValueError, TypeError, KeyError, OverflowError):
        pass
    raise wrong


def _section(tree: Mapping[str, Any], cls: Any, path: str) -> Any:
    prefix = path + "." if path else ""
    values = {key: convert(value, field_type(cls, key, prefix), prefix + key) for key, value in tree.items()}
    try:
        return cls(**values)
    except ConfigError:
        raise
    except FieldError as error:
        raise ConfigError(f"config.{prefix}{error}") from None
    except ValueError as error:
        raise ConfigError(f"config.{path}: {error}") from error


def _items(text: str, parts: tuple[Any, ...]) -> Any:
    """The items of a tuple as the command line spells it: in Python's way, or as in "a,b" or "a=1,b=2"."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = [item.strip() for item in text.split(",") if item]
        if typing.get_origin(parts[0]) is tuple:
            value = [tuple(item.rsplit("=", 1)) if "=" in item else (item, 1.0) for item in value]
    return value if isinstance(value, list | tuple) else [value]


def _in_words(kind: Any) -> str:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(json.dumps(part) for part in parts)
    if origin is tuple:
        if typing.get_origin(parts[0]) is tuple:
            return "a list of pairs, as in a=1,b=2"
        return "a list, as in a,b" if parts[1:] == (Ellipsis,) else "a pair"
    return {int: "an int", float: "a number", str: "a string", bool: "true or false"}.get(kind, "a section")


# -------------------------------------------------------------------------------------------- unknown fields

_SYNONYMS = {
    "lambda": "quality_weight", "weight": "quality_weight", "learning_rate": "lr", "peak_lr": "lr",
    "wd": "weight_decay", "beta1": "b1", "beta2": "b2", "grad_clip": "clip_norm", "max_grad_norm": "clip_norm",
    "warmup": "warmup_steps", "num_steps": "steps", "max_steps": "steps", "total_steps": "steps",
    "batch": "data.rows", "batch_size": "data.rows", "global_batch": "data.rows",
    "seq_len": "length", "sequence_length": "length", "max_length": "length", "context_length": "length",
    "dataset": "sources", "tp": "tensor", "dp": "data", "hidden_size": "model_dim", "d_model": "model_dim",
    "layers": "num_layers", "num_hidden_layers": "num_layers", "save_every": "every_steps", "log_every": "every",
    "max_to_keep": "keep",
}  # fmt: skip
"""Other names that people may try for our fields."""


def field_type(cls: type, path: str, prefix: str = "") -> Any:
    """The type of the field at a dotted path below a config class. Raises ConfigError with a suggestion."""
    name, _, rest = path.partition(".")
    hints = typing.get_type_hints(cls)
    if name not in hints:
        close = _suggest(cls, name, prefix)
        raise ConfigError(
            f"No config field {json.dumps(prefix + name, ensure_ascii=False)}."
            + (f' Did you mean "{close}"?' if close else "")
            + f" Fields: {', '.join(hints)} (--print_config shows all)."
        )
    if not rest:
        return hints[name]
    if not dataclasses.is_dataclass(hints[name]):
        raise ConfigError(f"config.{prefix}{name} is {_in_words(hints[name])}, it has no fields.")
    return field_type(hints[name], rest, f"{prefix}{name}.")


def _suggest(cls: type, name: str, prefix: str) -> str | None:
    """The path of the field that was meant: of that name anywhere, of a synonym, or of similar spelling."""
    known = _SYNONYMS.get(name, name)
    names = {path: path.rsplit(".", 1)[-1] for path, _, _ in _walk(Config())}
    if exact := [path for path, last in names.items() if known in (path, last)]:
        return exact[0]
    fields = [field.name for field in dataclasses.fields(typing.cast(Any, cls))]
    if close := difflib.get_close_matches(name, fields, n=1):
        return prefix + close[0]
    close = difflib.get_close_matches(name, names.values(), n=1)
    return next((path for path, last in names.items() if close and last == close[0]), None)
