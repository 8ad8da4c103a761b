"""What a checkpoint says of itself, and which one a path means.

    WORKDIR/checkpoints/500/pasta/pasta.json    format, step, data position, configuration, tokenizer
                            params/             the weights, a nested dict with stable names, or adapters
                            optimizer/          the optimiser's state

A directory is renamed into place once it is complete, so a directory named by a number is whole. A checkpoint of
adapters names the weights that they belong to by path and fingerprint.
"""

from __future__ import annotations

import base64
import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import sys
from typing import Any

import jax
from etils import epath

from pasta_jax import overrides
from pasta_jax.config import Config, ConfigError
from pasta_jax.files import write_json
from pasta_jax.tokens.base import TextTokenizer
from pasta_jax.tokens.load import tokenizer_from_bytes
from pasta_jax.tokens.tokenizer import MissingPackage, Tokenizer, TokenizerError

FORMAT, FORMAT_VERSION = "pasta_jax", 2


class CheckpointError(ValueError):
    """A checkpoint is missing, foreign, damaged, or of another experiment; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Base:
    """The weights that adapters belong to."""

    path: str
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class About:
    """Everything in a checkpoint but its arrays.

    Attributes:
      path: of the checkpoint.
      step: optimiser steps taken.
      data_index: the document with which the next batch begins.
      config: the experiment, as it was resolved.
      tokenizer_model, tag_ids: the tokenizer, and its ids of the tags.
      versions: of Python and the packages that wrote it.
      base: of a checkpoint of adapters: the weights that they belong to.
      merged: the fingerprint of base and adapters, if they were merged when they were loaded.
    """

    path: str
    step: int
    data_index: int
    config: Config
    tokenizer_model: bytes
    tag_ids: dict[str, int]
    versions: dict[str, str]
    base: Base | None = None
    merged: str = ""

    def is_of(self, tokenizer: Tokenizer) -> bool:
        """Whether it was trained with this tokenizer, or with one whose ids mean the same.

        Dialect and chat format may differ: they say which ids are used, not what they are.
        """
        if self.tokenizer_model == tokenizer.to_bytes():
            return True
        other = tokenizer.vocabulary
        own = self.tokenizer().vocabulary.with_dialect(other.dialect)
        return (own.pieces, own.tag_ids) == (other.pieces, other.tag_ids)

    def tokenizer(self) -> TextTokenizer:
        """The tokenizer that it was trained with. Raises CheckpointError."""
        try:
            tokenizer = tokenizer_from_bytes(self.tokenizer_model)
        except MissingPackage as error:
            raise CheckpointError(f"{self.path}: {error}") from error
        except TokenizerError as error:
            raise CheckpointError(f"{self.path} is damaged: its tokenizer: {error}") from error
        if tokenizer.vocabulary.tag_ids != self.tag_ids:
            raise CheckpointError(f"{self.path} is damaged: its tag ids are not those of its tokenizer.")
        return tokenizer.with_dialect(self.config.data.dialect)


def read_about(path: epath.Path) -> About:
    """The description in a checkpoint directory, such as `find` returns. Raises CheckpointError."""
    file = path / "pasta" / "pasta.json"
    if not file.exists():
        raise CheckpointError(f"{path} is not a checkpoint of pasta_jax: it has no pasta/pasta.json.")
    try:
        tree = json.loads(file.read_text())
        if tree["format"] != FORMAT:
            raise CheckpointError(f"{path} is not a checkpoint of pasta_jax but of {tree['format']!r}.")
        if tree["format_version"] != FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format {tree['format_version']}, this pasta_jax knows {FORMAT_VERSION}. "
                "Upgrade pasta_jax."
            )
        return About(
            path=os.fspath(path),
            step=int(tree["step"]),
            data_index=int(tree["data_index"]),
            config=overrides.from_dict(tree["config"]),
            tokenizer_model=base64.b64decode(tree["tokenizer"], validate=True),
            tag_ids=dict(tree["tag_ids"]),
            versions=dict(tree["versions"]),
            base=Base(**tree["base"]) if tree.get("base") else None,
        )
    except CheckpointError:
        raise
    except ConfigError as error:
        raise CheckpointError(f"The configuration in {file} is not one of this pasta_jax: {error}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(damaged(path, f"{file.name}: {type(error).__name__}: {error}")) from error


def damaged(path: epath.Path, reason: str) -> str:
    """The message about a damaged checkpoint, and the older one that can be used instead."""
    older = sorted(int(c.name) for c in path.parent.iterdir() if c.name.isdigit() and c.name != path.name)
    advice = f"Delete it and step {older[-1]} is used." if older else "It is the only one here."
    return f"{path} is damaged. {advice} ({reason.splitlines()[0][:300]})"


# --------------------------------------------------------------------------------------------------- paths


def absolute(path: str | os.PathLike[str]) -> epath.Path:
    """An absolute path, as Orbax needs it; addresses such as gs://bucket/run stay as they are."""
    text = os.fspath(path)
    return epath.Path(text if "://" in text else os.path.abspath(os.path.expanduser(text)))


def find(path: str | os.PathLike[str]) -> epath.Path:
    """The directory of the newest checkpoint in a workdir or its `checkpoints`, or `path` if it is a checkpoint.

    In a workdir of preference optimisation it is that of the last round.

    Raises:
      CheckpointError: there is none.
    """
    text, root = os.fspath(path), absolute(path)
    weights = ("model.safetensors", "model.safetensors.index.json")
    if text.startswith("hf:") or any((root / name).exists() for name in weights):
        source = text if text.startswith("hf:") else f"hf:{text}"
        raise CheckpointError(
            f"{text} is no checkpoint of pasta_jax but published weights. Bring them in first: "
            f"python -m pasta_jax.convert --from={source} --to=WORKDIR."
        )
    if not root.exists():
        hint = f"hf:{text}" if re.fullmatch(r"[\w.-]+/[\w.-]+", text) else "hf:org/name, hf:DIRECTORY"
        raise CheckpointError(
            f"No checkpoint at {root}: no such directory. Train one there. Published weights are named {hint}, "
            "or as in gemma-2b-it."
        )
    if not root.is_dir():
        raise CheckpointError(f"{root} is a file. Give a workdir, or a checkpoint within it.")
    if (root / "pasta" / "pasta.json").exists() and (root / "params").exists():
        return root
    children = sorted(root.iterdir(), key=lambda child: child.name)
    rounds = [child for child in children if re.fullmatch(r"round-\d+", child.name)]
    rounds.sort(key=lambda child: int(child.name.removeprefix("round-")), reverse=True)
    for directory in (root / "checkpoints", root, *(child / "checkpoints" for child in rounds)):
        if newest := _newest(directory):
            return newest
    if models := [child.name for child in children if _newest(child / "checkpoints")]:
        raise CheckpointError(f"{root} holds models: {', '.join(models)}. Give one of them.")
    names = ", ".join(child.name for child in children[:8]) or "nothing"
    raise CheckpointError(f"{root} holds no finished checkpoint of pasta_jax (found: {names}).")


def checkpoint_mark(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Identifies the checkpoint that `find` returns: its path, and when it was written (seconds)."""
    checkpoint = find(path)
    return {
        "checkpoint": os.fspath(checkpoint),
        "written": (checkpoint / "pasta" / "pasta.json").stat().mtime,
    }


def is_started(workdir: str | os.PathLike[str]) -> bool:
    """Whether a workdir holds a checkpoint."""
    try:
        find(workdir)
    except CheckpointError:
        return False
    return True


def _newest(directory: epath.Path) -> epath.Path | None:
    """The checkpoint with the greatest step in a directory, which need not exist."""
    steps = [c for c in directory.iterdir() if c.name.isdigit()] if directory.is_dir() else []
    return max(steps, key=lambda step: int(step.name), default=None)


# -------------------------------------------------------------------------------------- for the reader


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a checkpoint holds."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages}


def write_about(workdir: str, config: Config) -> None:
    """Writes config.json and env.json, for people: resuming reads the checkpoint's own description."""
    os.makedirs(workdir, exist_ok=True)
    device = jax.devices()[0]
    env = {
        "versions": versions(),
        "devices": f"{jax.device_count()} x {device.device_kind}",
        "processes": jax.process_count(),
        "command": sys.argv,
    }
    write_json(os.path.join(workdir, "config.json"), overrides.to_dict(config))
    write_json(os.path.join(workdir, "env.json"), env)
