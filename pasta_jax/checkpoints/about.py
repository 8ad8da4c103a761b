"""The metadata of a checkpoint, and how a path is resolved to one.

    WORKDIR/checkpoints/500/pasta/pasta.json    format, step, data and position in it, configuration, tokenizer,
                                                checksums
                            params/             weights or adapters: a nested dict with stable names
                            optimizer/          the state of the optimizer

A checkpoint's directory gets its number as its name only when it is complete. A checkpoint of adapters names the
weights that they belong to, by path and fingerprint.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import importlib.metadata
import os
import platform
import re
import sys
from typing import Any

import jax
from etils import epath

from pasta_jax import overrides
from pasta_jax.config import Config, ConfigError
from pasta_jax.files import LOCK, write_json
from pasta_jax.foreign import parse_object
from pasta_jax.messages import message_of, shown
from pasta_jax.tokens.base import TextTokenizer
from pasta_jax.tokens.load import tokenizer_from_bytes
from pasta_jax.tokens.tokenizer import MissingPackage, Tokenizer, TokenizerError

FORMAT, FORMAT_VERSION = "pasta_jax", 3


class CheckpointError(ValueError):
    """A checkpoint is missing, foreign, damaged, of another experiment, or not written; says what to do."""


class DamagedCheckpoint(CheckpointError):
    """One checkpoint is damaged; another one beside it may be whole.

    Args:
      path: of the checkpoint.
      reason: what is wrong.
      items: that another one must have too, as "optimizer" to go on training.
    """

    def __init__(self, path: epath.Path, reason: str, *items: str):
        self.path, self.reason = path, (reason.strip() or "no reason given").splitlines()[0][:300]
        super().__init__(f"{path} is damaged. {_way_out(path, *items)} ({self.reason})")


class NoCheckpoint(DamagedCheckpoint):
    """A directory has no metadata."""

    def __init__(self, path: epath.Path):
        super().__init__(path, "it has no pasta/pasta.json")
        way_out = f" {_way_out(path)}" if _whole_beside(path) else ""
        self.args = (f"{path} is not a checkpoint of pasta_jax: {self.reason}.{way_out}",)


@dataclasses.dataclass(frozen=True)
class BaseWeights:
    """The weights that adapters belong to.

    Attributes:
      path: where they were, as the configuration named it.
      fingerprint: of the weights (`checkpoints.fingerprint`).
    """

    path: str
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class CheckpointMetadata:
    """What a checkpoint holds besides arrays. `path` and `merged_fingerprint` are not saved, but known on loading.

    Attributes:
      path: the checkpoint's directory.
      step: optimizer steps taken.
      data_index: the document with which the next batch begins.
      config: the configuration of the experiment, with everything filled in.
      tokenizer_model: the tokenizer (`Tokenizer.to_bytes`).
      tag_ids: the ids of the tags, by name.
      versions: of Python and of the packages that wrote the checkpoint, by name.
      window: what was measured since the last line of metrics (`training.loop.Meter`).
      data: of each file of examples, their number and a hash, when the run began.
      checksums: of each item's arrays ("params", "optimizer"), by name (`checkpoints.fingerprint`); empty in
        checkpoints of before there were any.
      base: the weights that the adapters belong to; None if the checkpoint holds a whole model.
      merged_fingerprint: of base and adapters, if those were merged on loading; "" otherwise.
    """

    path: str
    step: int
    data_index: int
    config: Config
    tokenizer_model: bytes
    tag_ids: dict[str, int]
    versions: dict[str, str]
    window: dict[str, float] = dataclasses.field(default_factory=dict)
    data: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    checksums: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
    base: BaseWeights | None = None
    merged_fingerprint: str = ""

    def matches_tokenizer(self, tokenizer: Tokenizer) -> bool:
        """Whether the model was trained with this tokenizer, or with one whose ids mean the same.

        Dialect and chat format may differ: they decide which ids are used, not what the ids mean.

        Raises:
          CheckpointError: as `load_tokenizer`.
        """
        if self.tokenizer_model == tokenizer.to_bytes():
            return True
        other = tokenizer.vocabulary
        own = self.load_tokenizer().vocabulary.with_dialect(other.dialect)
        return (own.pieces, own.tag_ids) == (other.pieces, other.tag_ids)

    def load_tokenizer(self) -> TextTokenizer:
        """The tokenizer that the model was trained with.

        Raises:
          CheckpointError: it is damaged, has other tag ids than were saved, or needs a package that is missing.
        """
        try:
            tokenizer = tokenizer_from_bytes(self.tokenizer_model)
        except MissingPackage as error:
            raise CheckpointError(f"{self.path}: {error}") from error
        except TokenizerError as error:
            raise CheckpointError(f"{self.path} is damaged: its tokenizer: {error}") from error
        if tokenizer.vocabulary.tag_ids != self.tag_ids:
            raise CheckpointError(f"{self.path} is damaged: its tag ids are not those of its tokenizer.")
        return tokenizer.with_dialect(self.config.data.dialect)


def read_metadata(path: epath.Path) -> CheckpointMetadata:
    """The metadata of a checkpoint.

    Args:
      path: the checkpoint's directory, as `find_checkpoint` returns it.

    Raises:
      CheckpointError: it is not a checkpoint of pasta_jax, has another format or an unknown configuration, is
        damaged, or cannot be read.
    """
    file = path / "pasta" / "pasta.json"
    if not is_there(file):
        raise NoCheckpoint(path)
    try:
        fields = parse_object(file.read_bytes(), file.name, allow_nan=True)
        if fields["format"] != FORMAT:
            raise CheckpointError(
                f"{path} is not a checkpoint of pasta_jax but of {shown(fields['format'])}."
            )
        version = int(fields["format_version"])
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format {shown(version)}, this version of pasta_jax reads format {FORMAT_VERSION}. "
                + (
                    "Upgrade pasta_jax."
                    if version > FORMAT_VERSION
                    else "Use the older version that wrote it."
                )
            )
        step = int(fields["step"])
        if not 0 <= step < 2**31:
            raise ValueError("no such step")
        return CheckpointMetadata(
            path=os.fspath(path),
            step=step,
            data_index=int(fields["data_index"]),
            config=overrides.from_dict(fields["config"]),
            tokenizer_model=base64.b64decode(fields["tokenizer"], validate=True),
            tag_ids=dict(fields["tag_ids"]),
            versions=dict(fields["versions"]),
            window={str(name): float(value) for name, value in fields.get("window", {}).items()},
            data={str(name): dict(about) for name, about in fields.get("data", {}).items()},
            checksums={str(item): dict(sums) for item, sums in fields.get("checksums", {}).items()},
            base=BaseWeights(**fields["base"]) if fields.get("base") else None,
        )
    except CheckpointError:
        raise
    except ConfigError as error:
        raise CheckpointError(
            f"{file}: this version of pasta_jax cannot use the configuration: {error}"
        ) from error
    except OSError as error:
        raise unread(file, error) from error
    except (ValueError, KeyError, TypeError, OverflowError, AttributeError) as error:
        raise DamagedCheckpoint(path, f"{file.name}: {message_of(error)}") from error


def unread(path: epath.Path, error: BaseException) -> CheckpointError:
    """The error about a part of a checkpoint that may be in order, though it could not be read."""
    reason = message_of(error).rstrip(".")
    return CheckpointError(
        f"{path} could not be read: {reason}. It may be in order: run the same command again."
    )


def is_there(path: epath.Path) -> bool:
    """Whether something is at a path. Raises CheckpointError where that cannot be told: `exists` is False then."""
    if path.exists():
        return True
    try:
        if "://" not in os.fspath(path):
            os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise unread(path, error) from error
    return False


def read_newest(workdir: str | os.PathLike[str]) -> CheckpointMetadata:
    """The metadata of the newest checkpoint of a run whose metadata is whole. Raises CheckpointError."""
    newest = find_checkpoint(workdir)
    older = [path for path in checkpoints_in(newest.parent) if path.name != newest.name]
    try:
        return read_metadata(newest)
    except DamagedCheckpoint:
        for path in sorted(older, key=lambda path: int(path.name), reverse=True):
            with contextlib.suppress(DamagedCheckpoint):
                return read_metadata(path)
        raise


def _way_out(path: epath.Path, *items: str) -> str:
    """What to do about a checkpoint that cannot be used."""
    whole = _whole_beside(path, *items)
    if not whole:
        return "There is no whole one beside it."
    newest = max(whole)
    if not path.name.isdecimal() or newest > int(path.name):
        return f"Use another step: {', '.join(map(str, sorted(whole)))}."
    newer = sorted(step for child in checkpoints_in(path.parent) if (step := int(child.name)) > newest)
    what = "it" if len(newer) == 1 else f"steps {', '.join(map(str, newer))}"
    return f"Delete {what} and step {newest} is used."


def _whole_beside(path: epath.Path, *items: str) -> list[int]:
    """The steps beside a checkpoint that have metadata, weights and these items."""
    needed = ("pasta/pasta.json", "params", *items)
    others = (other for other in checkpoints_in(path.parent) if other.name != path.name)
    return [int(other.name) for other in others if all((other / name).exists() for name in needed)]


# --------------------------------------------------------------------------------------------------- paths


def absolute_path(path: str | os.PathLike[str]) -> epath.Path:
    """An absolute path, as Orbax needs it; addresses such as gs://bucket/run stay as they are."""
    text = os.fspath(path)
    return epath.Path(text if "://" in text else os.path.abspath(os.path.expanduser(text)))


def find_checkpoint(path: str | os.PathLike[str]) -> epath.Path:
    """The checkpoint that a path means.

    - A checkpoint means itself.
    - A workdir, or its `checkpoints`, means its checkpoint with the highest step.
    - A workdir of preference optimization means that of its last round that has a checkpoint.

    Raises:
      CheckpointError: the path does not exist, is a file, or holds published weights, PEFT's adapters or no
        checkpoint.
    """
    text, root = os.fspath(path), absolute_path(path)
    weights = ("model.safetensors", "model.safetensors.index.json")
    if text.startswith("hf:") or any((root / name).exists() for name in weights):
        source = text if text.startswith("hf:") else f"hf:{text}"
        raise CheckpointError(
            f"{text} holds published weights, not a checkpoint of pasta_jax. Convert them first: "
            f"python -m pasta_jax.convert --from={source} --to=WORKDIR."
        )
    if (root / "adapter_config.json").exists():
        raise CheckpointError(
            f"{text} holds PEFT's adapters, not a checkpoint of pasta_jax. Put them beside their base first: "
            f"python -m pasta_jax.convert --from=peft:{text} --base=WORKDIR --to=WORKDIR."
        )
    if not root.exists():
        if made := re.match(r"(?:\./)?runs/(almanac|demo)\b", text):
            raise CheckpointError(f"No checkpoint at {root}: no such directory. Run `make {made[1]}` first.")
        is_local = (
            root.parent.is_dir() or text.startswith("runs/") or not re.fullmatch(r"[\w.-]+/[\w.-]+", text)
        )
        raise CheckpointError(
            f"No checkpoint at {root}: no such directory. Train a model there first, or import published weights: "
            f"python -m pasta_jax.convert --from=hf:{'org/name' if is_local else text} --to=WORKDIR."
        )
    if not root.is_dir():
        raise CheckpointError(f"{root} is a file. Give the directory of a run, or of one of its checkpoints.")
    if (root / "pasta" / "pasta.json").exists() and (root / "params").exists():
        return root
    children = sorted(root.iterdir(), key=lambda child: child.name)
    rounds = [child for child in children if re.fullmatch(r"round-\d+", child.name)]
    rounds.sort(key=lambda child: int(child.name.removeprefix("round-")), reverse=True)
    for directory in (root / "checkpoints", root, *(child / "checkpoints" for child in rounds)):
        if checkpoints := checkpoints_in(directory):
            return max(checkpoints, key=lambda checkpoint: int(checkpoint.name))
    inside = ("checkpoints", "round-*/checkpoints")
    if runs := [c for c in children if any(checkpoints_in(d) for place in inside for d in c.glob(place))]:
        raise CheckpointError(
            f"{root} has no checkpoints of its own, but these directories in it have. Give one of them: "
            f"{', '.join(os.path.join(text, run.name) for run in runs)}."
        )
    names = ", ".join(child.name for child in children[:8] if child.name != LOCK) or "nothing"
    raise CheckpointError(f"{root} has no complete checkpoint of pasta_jax (it contains: {names}).")


def checkpoint_identity(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Path and modification time (seconds) of the checkpoint that `find_checkpoint` returns.

    Raises:
      CheckpointError: as `find_checkpoint`.
    """
    checkpoint = find_checkpoint(path)
    return {
        "checkpoint": os.fspath(checkpoint),
        "written": (checkpoint / "pasta" / "pasta.json").stat().mtime,
    }


def has_checkpoint(workdir: str | os.PathLike[str]) -> bool:
    """Whether a workdir holds a checkpoint."""
    try:
        find_checkpoint(workdir)
    except CheckpointError:
        return False
    return True


def checkpoints_in(directory: epath.Path) -> list[epath.Path]:
    """The checkpoints in a directory, which need not exist."""
    children = directory.iterdir() if directory.is_dir() else ()
    return [child for child in children if re.fullmatch("[0-9]+", child.name)]


# ----------------------------------------------------------------------------------------------- versions


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a checkpoint holds."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages}


def write_run_info(workdir: str, config: Config) -> None:
    """Writes config.json and env.json, for human readers only: resuming uses the checkpoint's metadata."""
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
