"""One experiment as typed frozen dataclasses, and the strict road from a file and the command line to them.

    configs/tiny.py:pasta   --config.optimizer.lr=1e-3   ->   load_config   ->   Config

A file in `configs/` names only what it changes; every default lives here. Unknown fields and values of the
wrong type are refused in words. The library takes the dataclasses and never sees a flag or a ConfigDict.
The comment beside a field is its documentation: `--print_config` shows it.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import json
import os
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

from absl import flags
from ml_collections import config_flags

from pasta_jax.lang.tags import Dialect
from pasta_jax.model.config import Lora, ModelConfig
from pasta_jax.tokens.chat import Chat
from pasta_jax.tokens.positions import Positions

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be meant, and what to do about it."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is learnt from, and how it is cut into batches."""

    sources: tuple[tuple[str, float], ...] = (("almanac:annotated", 1.0),)  # almanac:NAME or JSONL, weight
    columns: tuple[tuple[str, str], ...] = ()  # keys of foreign JSONL: prompt=instruction,response=output
    tokenizer: str = "almanac"  # almanac, or a tokenizer.model, a tokenizer.json, a folder that holds one
    extend_tokenizer: bool = False  # tags for which it has no free ids get new ones after its own
    chat: Chat = "auto"  # format of prompts; auto goes by the folder's chat template or the control tokens
    rows: int = 8  # B, rows of a batch
    length: int = 512  # L, tokens of a row; no document may be longer
    threads: int = 16  # T, the most threads of an answer, main included
    max_depth: int = 1  # how deep promises may nest; 1 is the paper
    positions: Positions = Positions()  # where a thread goes on after a promise
    dialect: Dialect = "pasta"  # the tags there are: pasta, or apar's bare promises without sync


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up, a schedule and gradient clipping."""

    lr: float = 1e-3  # peak learning rate
    warmup_steps: int = 50  # linear, from zero to lr
    schedule: Literal["constant", "linear", "cosine"] = "cosine"  # from lr down to lr * final_lr
    final_lr: float = 0.1  # at the last step, as a fraction of lr
    weight_decay: float = 0.01  # on matrices only, never on norms
    b1: float = 0.9  # decay of the mean of gradients
    b2: float = 0.95  # decay of the mean of squared gradients
    eps: float = 1e-8  # added to the root of the latter
    clip_norm: float = 1.0  # gradients with a larger global norm are scaled down to it; 0 is off


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices along each mesh axis; -1, once, is all the rest."""

    data: int = 1  # rows
    fsdp: int = -1  # rows, parameters and optimiser
    tensor: int = 1  # heads and the inner dimension of the MLP


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save; the last step always is. Whatever comes first, steps or minutes."""

    every_steps: int = 500  # 0 is off
    every_minutes: float = 10.0  # 0 is off
    keep: int = 3  # older ones are deleted


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What is written down on the way."""

    every: int = 10  # steps between lines of metrics.jsonl
    tb: bool = False  # TensorBoard too (pip install 'pasta_jax[tb]')


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    """The second stage, in rounds: sample, score, pair, train (paper section 4)."""

    baseline: str = ""  # workdir of a sequential model, the opponent; empty: the model of the start
    prompts: str = "almanac"  # almanac (fresh ones each round), or a JSONL file of prompts and responses
    prompts_per_round: int = 256
    rounds: int = 2
    samples: int = 8  # N, answers to each prompt
    temperature: float = 1.0
    weight: float = 4.0  # lambda: score = efficiency + weight * quality; inf is quality alone
    efficiency: Literal["speedup", "parallelism", "harmonic", "arithmetic"] = "speedup"  # means: of both
    judge: Literal["almanac"] = "almanac"  # who compares answers
    loss: Literal["bonbon", "ipo", "dpo"] = "bonbon"
    alpha: float = 0.005  # bonbon: weight of the better answer's likelihood
    margin: float = 0.0  # bonbon, ipo: nats; 0 is (N-1) H_(N-1), what best-of-N implies
    beta: float = 0.1  # dpo: steepness
    lr: float = 5e-7  # peak learning rate of this stage; the rest is as in config.optimizer
    epochs: float = 1.0  # passes over the pairs of a round
    rows: int = 32  # answers sampled at once
    lanes: int = 4  # S while sampling


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment."""

    stage: Literal["sft", "preference", "both"] = "sft"  # both: supervised finetuning, then preference
    seed: int = 0  # of the weights and the order of the data
    steps: int = 1000  # optimiser steps
    epochs: float = 0.0  # passes over the data; above 0 they say how many steps
    init_from: str = ""  # workdir or checkpoint whose weights to start from; empty starts from scratch
    adopt: bool = False  # model and tokenizer are those of init_from; of config.model only the dtype counts
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: Lora = Lora()  # with a rank: adapters are trained, the weights of init_from stay
    param_dtype: Literal["", "float32", "bfloat16"] = ""  # of what is trained, optimiser too; "": model.dtype
    microbatches: int = 1  # parts of a batch, worked through in turn: memory for one; divides data.rows
    remat: bool = False  # compute layers again in the backward pass: a third more time, memory for one layer
    preference: PreferenceConfig = PreferenceConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    def __post_init__(self) -> None:
        counts = ["steps", "data.rows", "data.length", "data.threads", "data.max_depth", "log.every"]
        counts += ["microbatches"]
        counts += [f"preference.{name}" for name in ("prompts_per_round", "rounds", "rows", "lanes")]
        for name in counts:
            if (value := _look_up(self, name)) < 1:
                raise ConfigError(f"config.{name} must be at least 1, got {value}.")
        if self.epochs < 0:
            raise ConfigError(f"config.epochs must be at least 0, got {self.epochs}.")
        if self.seed < 0:
            raise ConfigError(f"config.seed must be at least 0, got {self.seed}.")
        if self.preference.samples < 2:
            raise ConfigError(
                f"config.preference.samples must be at least 2, to have a better and a worse answer, "
                f"got {self.preference.samples}."
            )
        self._check_preference()
        self._check_what_is_trained()
        if self.stage == "preference" and not self.init_from:
            raise ConfigError(
                "config.init_from is empty: preference optimisation starts from a finetuned model. Add "
                "--config.init_from=WORKDIR, or set stage to both."
            )
        if self.adopt and not self.init_from:
            raise ConfigError(
                "config.adopt is set and config.init_from is empty: whose model and tokenizer? Add "
                "--config.init_from=WORKDIR, such as pasta_jax.convert writes."
            )
        if not self.data.sources:
            raise ConfigError("config.data.sources is empty. Name at least one, as in almanac:annotated.")
        if any(weight <= 0 for _, weight in self.data.sources):
            raise ConfigError(f"config.data.sources: weights must be positive, got {self.data.sources}.")

    def _check_what_is_trained(self) -> None:
        if self.data.rows % self.microbatches:
            raise ConfigError(
                f"config.microbatches={self.microbatches} does not divide config.data.rows={self.data.rows}. "
                "Each part has the same number of rows; change one of them."
            )
        if self.model.weights != "plain":
            raise ConfigError(
                "config.model.weights: int8 is for decoding. Train plain weights, quantise at load."
            )
        if self.lora.rank and not self.init_from:
            raise ConfigError(
                "config.init_from is empty: adapters go beside the weights of a trained model. Add "
                "--config.init_from=WORKDIR, or set --config.lora.rank=0."
            )
        rows = self.lora.rows
        if len(set(rows)) < len(rows) or not all(0 <= row < self.model.vocab_size for row in rows):
            raise ConfigError(
                f"config.lora.rows must be different ids below model.vocab_size={self.model.vocab_size}, "
                f"got {rows}."
            )

    @property
    def trained_dtype(self) -> str:
        """The dtype of what is trained."""
        return self.param_dtype or self.model.dtype

    def _check_preference(self) -> None:
        p = self.preference
        for name, good, wanted in (
            ("weight", p.weight >= 0, "at least 0, inf for quality alone"),
            ("temperature", p.temperature > 0, "above 0: at 0 all samples are the same"),
            ("alpha", 0 <= p.alpha <= 1, "from 0 to 1"),
            ("margin", p.margin >= 0, "at least 0"),
            ("beta", p.beta > 0, "above 0"),
            ("epochs", p.epochs > 0, "above 0"),
            ("lr", p.lr > 0, "above 0"),
        ):
            if not good:
                raise ConfigError(f"config.preference.{name} must be {wanted}, got {getattr(p, name)}.")


# ------------------------------------------------------------------------------------------- files and flags


def load_config(spec: str, overrides: Sequence[str] = ()) -> Config:
    """A file in `configs/` as a Config.

    Args:
      spec: `path.py` or `path.py:argument`, the argument for its `get_config`.
      overrides: such as "optimizer.lr=1e-3".

    Raises:
      ConfigError: no such file, an unknown field, a value of the wrong type.
    """
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values, lock_config=False, sys_argv=[])
    if not os.path.exists(path := spec.partition(":")[0]):
        raise ConfigError(f"No configuration file {path}. Write --config=configs/NAME.py or NAME.py:VARIANT.")
    try:
        values(["", f"--config={spec}"])
        with holder.value.ignore_type():  # the file may say lr=1 and the command line 0.5; from_dict checks
            for override in overrides:
                _override(holder.value, override)
        return from_config_dict(holder.value)
    except (OSError, flags.Error) as error:
        raise ConfigError(f"Cannot load the configuration {spec}: {error}") from error


def _override(tree: Any, override: str) -> None:
    """Sets `path=value` in the tree itself, so that what the file derives from it follows."""
    path, equals, value = override.partition("=")
    if not equals:
        raise ConfigError(f"config.{path} has no value. Write --config.{path}=VALUE.")
    kind = field_type(Config, path)
    *sections, name = path.split(".")
    for section in sections:
        if section not in tree:
            tree[section] = type(tree)()
        tree = tree[section]
    tree[name] = convert(value, kind, path)


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


def from_config_dict(tree: Any) -> Config:
    """An ml_collections ConfigDict, or a plain nested mapping, as a Config. Raises ConfigError."""
    return from_dict(tree.to_dict() if hasattr(tree, "to_dict") else tree)


# -------------------------------------------------------------------------------------------- dicts and JSON


def to_dict(config: Config) -> dict[str, Any]:
    """As plain data that JSON can hold; `from_dict` is the way back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(tree: Mapping[str, Any]) -> Config:
    """From plain nested data; fields that are not named keep their defaults. Raises ConfigError."""
    return convert(tree, Config, "")


def describe(config: Config) -> str:
    """The resolved tree, a field a line as the command line spells it, with its documentation."""
    lines = [(f"config.{path} = {value!r}", doc) for path, value, doc in _walk(config)]
    width = min(48, max(len(left) for left, _ in lines))
    return "\n".join(f"{left:<{width}}  # {doc}" if doc else left for left, doc in lines)


def differences(a: Config, b: Config) -> list[str]:
    """The fields in which two configurations differ, as dotted paths."""
    other = {path: value for path, value, _ in _walk(b)}
    return [path for path, value, _ in _walk(a) if value != other[path]]


def _walk(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    docs = _field_docs(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _walk(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value, docs.get(field.name, "")


def _field_docs(cls: type) -> dict[str, str]:
    try:
        source = inspect.getsource(cls)
    except OSError:  # no source at hand, as in a zip: the tree is shown without its documentation
        return {}
    return dict(re.findall(r"^    (\w+): .*  # (.+)$", source, re.MULTILINE))


# ------------------------------------------------------------------------------------------ types, in words


def convert(value: Any, kind: Any, path: str) -> Any:
    """`value`, from a file, JSON or the command line, as the type `kind`.

    Text is read where a number is due ("1e3" is an int), numbers are widened (1 is a float) and never
    narrowed. Pairs may be written "a=1,b=2".

    Raises:
      ConfigError: naming the field by `path`.
    """
    wrong = ConfigError(f"config.{path} must be {_in_words(kind)}, got {json.dumps(value, default=repr)}.")
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, Mapping):
            raise wrong
        return _convert_section(value, kind, path)
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value not in parts:
            raise wrong
        return value
    if origin is tuple:
        return _convert_tuple(value, parts, path, wrong)
    if kind is bool:
        if isinstance(value, str) and value.lower() in ("true", "false", "1", "0"):
            return value.lower() in ("true", "1")
        if not isinstance(value, bool):
            raise wrong
        return value
    if kind is str:
        if not isinstance(value, str):
            raise wrong
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise wrong
    try:
        number = float(value)
        if kind is float:
            return number
        return int(value) if isinstance(value, int) or str(value).lstrip("-").isdigit() else _whole(number)
    except (ValueError, OverflowError):
        raise wrong from None


def _whole(number: float) -> int:
    if number != int(number):
        raise ValueError
    return int(number)


def _convert_section(tree: Mapping[str, Any], cls: type[T], path: str) -> T:
    prefix = path + "." if path else ""
    values = {key: convert(value, field_type(cls, key, prefix), prefix + key) for key, value in tree.items()}
    try:
        return cls(**values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"config.{path}: {error}") from error


def _convert_tuple(value: Any, parts: tuple[Any, ...], path: str, wrong: ConfigError) -> tuple[Any, ...]:
    repeated = len(parts) == 2 and parts[1] is Ellipsis
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            value = [item.strip() for item in value.split(",") if item]
            if typing.get_origin(parts[0]) is tuple:
                value = [tuple(item.rsplit("=", 1)) if "=" in item else (item, 1.0) for item in value]
        if repeated and isinstance(value, int | float | str):  # a list of one
            value = [value]
    if not isinstance(value, list | tuple) or not (repeated or len(value) == len(parts)):
        raise wrong
    return tuple(convert(v, parts[0] if repeated else parts[i], path) for i, v in enumerate(value))


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
    "lambda": "weight",
    "learning_rate": "lr",
    "peak_lr": "lr",
    "wd": "weight_decay",
    "beta1": "b1",
    "beta2": "b2",
    "grad_clip": "clip_norm",
    "max_grad_norm": "clip_norm",
    "warmup": "warmup_steps",
    "batch_size": "data.rows",
    "global_batch": "data.rows",
    "batch": "data.rows",
    "seq_len": "length",
    "sequence_length": "length",
    "max_length": "length",
    "context_length": "length",
    "num_steps": "steps",
    "max_steps": "steps",
    "total_steps": "steps",
    "dataset": "sources",
    "tp": "tensor",
    "dp": "data",
    "hidden_size": "model_dim",
    "d_model": "model_dim",
    "layers": "num_layers",
    "num_hidden_layers": "num_layers",
    "save_every": "every_steps",
    "log_every": "every",
    "max_to_keep": "keep",
}


def field_type(cls: type, path: str, prefix: str = "") -> Any:
    """The type of the field at a dotted path below a config class. Raises ConfigError with a suggestion."""
    name, _, rest = path.partition(".")
    hints = typing.get_type_hints(cls)
    if name not in hints:
        close = _suggest(cls, name, prefix)
        raise ConfigError(
            f'No config field "{prefix}{name}".'
            + (f' Did you mean "{close}"?' if close else "")
            + f" Fields: {', '.join(hints)} (--print_config shows all)."
        )
    if not rest:
        return hints[name]
    if not dataclasses.is_dataclass(hints[name]):
        raise ConfigError(f"config.{prefix}{name} is {_in_words(hints[name])}, it has no fields.")
    return field_type(hints[name], rest, f"{prefix}{name}.")


def _suggest(cls: type, name: str, prefix: str) -> str | None:
    """The field that was meant: of that name or a synonym, or spelled much like it."""
    meant = _SYNONYMS.get(name, name)
    here = [field.name for field in dataclasses.fields(typing.cast(Any, cls))]
    everywhere = {path: path.rsplit(".", 1)[-1] for path, _, _ in _walk(Config())}
    elsewhere = [path for path, last in everywhere.items() if meant in (path, last)]
    if elsewhere:
        return elsewhere[0]
    if close := difflib.get_close_matches(name, here, n=1):
        return prefix + close[0]
    close = difflib.get_close_matches(name, everywhere.values(), n=1)
    return next((path for path, last in everywhere.items() if close and last == close[0]), None)


def _look_up(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config
