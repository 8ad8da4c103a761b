"""Checkpoints: all that is needed to decode from one, or to go on training as if nothing had happened.

    WORKDIR/checkpoints/500/pasta/pasta.json    format, step, data position, configuration, tokenizer
                            params/             the weights, a nested dict with stable names, or adapters
                            optimizer/          the optimiser's state

A directory is renamed into place once it is complete, so one with a number for a name is whole. Reading wants
to know where the arrays should lie, never where they lay when they were written. A checkpoint of adapters says
which weights they go beside: where those were found, and their fingerprint, by which they are known.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from pasta_jax import config as config_lib
from pasta_jax.checkpoints.fingerprint import fingerprint
from pasta_jax.config import Config, ConfigError
from pasta_jax.model import init_params, lora
from pasta_jax.tokens.base import TextTokenizer
from pasta_jax.tokens.load import tokenizer_from_bytes
from pasta_jax.tokens.tokenizer import MissingPackage, Tokenizer, TokenizerError
from pasta_jax.training.state import Params, TrainState

FORMAT, FORMAT_VERSION = "pasta_jax", 2

_MAY_CHANGE = ("steps", "epochs", "mesh.", "microbatches", "remat", "checkpoint.", "log.")
"""What a rerun may change without being another experiment."""


class CheckpointError(ValueError):
    """A checkpoint that is not there, not ours, damaged, or of something else; and what to do about it."""


@dataclasses.dataclass(frozen=True)
class Base:
    """The weights that adapters go beside: where they were found, and what they are."""

    path: str
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class About:
    """All in a checkpoint that is not arrays."""

    path: str
    step: int
    data_index: int  # the document with which the next batch begins
    config: Config
    tokenizer_model: bytes
    tag_ids: dict[str, int]
    versions: dict[str, str]
    base: Base | None = None  # with adapters
    merged: str = ""  # of weights into which adapters were merged at load: the fingerprint of both

    def is_of(self, tokenizer: Tokenizer) -> bool:
        """Whether it was trained with this tokenizer, or with one whose ids mean the same.

        Dialect and chat format may differ: they say which ids are used, not what they are.
        """
        if self.tokenizer_model == tokenizer.to_bytes():
            return True
        mine, theirs = self.tokenizer().vocabulary, tokenizer.vocabulary
        mine = mine.with_dialect(theirs.dialect)
        return (mine.pieces, mine.tag_ids) == (theirs.pieces, theirs.tag_ids)

    def tokenizer(self) -> TextTokenizer:
        """The tokenizer that it was trained with."""
        try:
            tokenizer = tokenizer_from_bytes(self.tokenizer_model, extend=self.config.data.extend_tokenizer)
        except MissingPackage as error:
            raise CheckpointError(f"{self.path}: {error}") from error
        except TokenizerError as error:
            raise CheckpointError(f"{self.path} is damaged: its tokenizer: {error}") from error
        if tokenizer.vocabulary.tag_ids != self.tag_ids:
            raise CheckpointError(f"{self.path} is damaged: its tag ids are not those of its tokenizer.")
        return tokenizer.with_dialect(self.config.data.dialect)


# ------------------------------------------------------------------------------------------------ writing


class Checkpoints:
    """The checkpoints of one training run. Saving goes on in the background; `close` waits for it."""

    def __init__(self, workdir: str | os.PathLike[str], config: Config, tokenizer: Tokenizer):
        self._config, self._tokenizer = config, tokenizer
        self.directory = absolute(workdir) / "checkpoints"
        # Weights compress by less than a tenth, and while they are compressed Orbax holds them twice.
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(max_to_keep=config.checkpoint.keep, create=True),
            item_handlers={
                "pasta": ocp.JsonCheckpointHandler("pasta.json"),
                "params": ocp.PyTreeCheckpointHandler(use_compression=False),
                "optimizer": ocp.PyTreeCheckpointHandler(use_compression=False),
            },
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def latest(self) -> int | None:
        """The newest step, if any."""
        return self._manager.latest_step()

    def save(self, state: TrainState, data_index: int, base: Base | None = None) -> None:
        """Saves under the state's step, unless that is saved already; `base` if the state holds adapters."""
        step = int(state.step)
        if step == self.latest():
            return
        self._save(
            step,
            data_index,
            base,
            params=ocp.args.PyTreeSave(state.params),
            optimizer=ocp.args.PyTreeSave(state.opt_state),
        )

    def save_weights(self, params: Params) -> None:
        """Saves a model that was not trained here, to decode with or to start from, as step 0."""
        self._save(0, 0, None, params=ocp.args.PyTreeSave(params))

    def _save(self, step: int, data_index: int, base: Base | None, **arrays: Any) -> None:
        about = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "step": step,
            "data_index": data_index,
            "config": config_lib.to_dict(self._config),
            "versions": versions(),
            "tag_ids": self._tokenizer.vocabulary.tag_ids,
            "tokenizer": base64.b64encode(self._tokenizer.to_bytes()).decode("ascii"),
        }
        if base:
            about["base"] = dataclasses.asdict(base)
        items = ocp.args.Composite(pasta=ocp.args.JsonSave(about), **arrays)
        self._manager.save(step, args=items, force=True)

    def restore(self, target: TrainState, base: Base | None = None) -> tuple[TrainState, About]:
        """The newest state.

        Args:
          target: `jax.ShapeDtypeStruct`s with the shardings that the arrays should have.
          base: what the state's adapters go beside now.

        Raises:
          CheckpointError: damaged, or of another experiment.
        """
        path = self.directory / str(self.latest())
        about = read_about(path)
        if not (path / "optimizer").exists():
            raise CheckpointError(
                f"{self.directory.parent} holds weights alone, of a model that was not trained there. "
                f"Use a new --workdir; --config.init_from={self.directory.parent} starts from them."
            )
        changed = [
            name
            for name in config_lib.differences(about.config, self._config)
            if not name.startswith(_MAY_CHANGE)
            and not (about.base and name == "init_from")  # it may be elsewhere: its content is compared
        ]
        if changed:
            raise CheckpointError(
                f"{self.directory.parent} already has step {about.step} of a different config "
                f"({', '.join(changed)}). Use a new --workdir; --config.init_from starts from its weights."
            )
        if not about.is_of(self._tokenizer):
            raise CheckpointError(
                f"{path} was trained with another tokenizer than {self._config.data.tokenizer!r} is now. "
                "Use a new --workdir."
            )
        if about.base and base:
            _check_base(path, about.base, base)
        _check_shapes(path, _saved_shapes(path, "params"), target.params)
        params = _restore(path, "params", target.params)
        opt_state = _restore(path, "optimizer", target.opt_state)
        step = jax.device_put(jax.numpy.int32(about.step), target.step.sharding)
        return TrainState(params, opt_state, step), about


def versions() -> dict[str, str]:
    """Of Python and of what shapes a checkpoint."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages}


def absolute(path: str | os.PathLike[str]) -> epath.Path:
    """As Orbax wants it; addresses such as gs://bucket/run stay as they are."""
    text = os.fspath(path)
    return epath.Path(text if "://" in text else os.path.abspath(os.path.expanduser(text)))


# ------------------------------------------------------------------------------------------------ reading


def find(path: str | os.PathLike[str]) -> epath.Path:
    """The newest checkpoint in a workdir or its `checkpoints`, or the checkpoint that `path` itself is.

    In a workdir of preference optimisation, that of the last round.

    Raises:
      CheckpointError: there is none.
    """
    text, root = os.fspath(path), absolute(path)
    if text.startswith("hf:") or (root / "model.safetensors").exists() or _is_sharded(root):
        source = text if text.startswith("hf:") else f"hf:{text}"
        raise CheckpointError(
            f"{text} is no checkpoint of pasta_jax but published weights. Bring them in first: "
            f"python -m pasta_jax.convert --from={source} --to=WORKDIR."
        )
    if not root.exists():
        hint = f"hf:{text}" if re.fullmatch(r"[\w.-]+/[\w.-]+", text) else "hf:org/name, hf:DIRECTORY"
        raise CheckpointError(
            f"No checkpoint at {root}: no such directory. Train one there; or are published weights meant: {hint}, "
            "or a name such as gemma-2b-it?"
        )
    if not root.is_dir():
        raise CheckpointError(f"{root} is a file. Give a workdir, or a checkpoint within it.")
    if (root / "pasta" / "pasta.json").exists() and (root / "params").exists():
        return root
    for directory in (root / "checkpoints", root):
        if steps := _steps(directory):
            return max(steps, key=lambda step: int(step.name))
    children = sorted(root.iterdir(), key=lambda child: child.name)
    rounds = [child for child in children if re.fullmatch(r"round-\d+", child.name)]
    if rounds:  # of preference optimisation: the last that holds a model
        rounds.sort(key=lambda child: int(child.name.removeprefix("round-")), reverse=True)
        if trained := next(filter(None, (_steps(child / "checkpoints") for child in rounds)), None):
            return max(trained, key=lambda step: int(step.name))
    if models := [child.name for child in children if _steps(child / "checkpoints")]:
        raise CheckpointError(f"{root} holds models: {', '.join(models)}. Give one of them.")
    found = ", ".join(child.name for child in children[:8]) or "nothing"
    raise CheckpointError(f"{root} holds no finished checkpoint of pasta_jax (found: {found}).")


def checkpoint_mark(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Which checkpoint `find` finds, and when it was written: trained anew to the same step, it is another."""
    found = find(path)
    return {"checkpoint": os.fspath(found), "written": (found / "pasta" / "pasta.json").stat().mtime}


def _is_sharded(directory: epath.Path) -> bool:
    """Whether a folder is Hugging Face's, of several files."""
    return (directory / "model.safetensors.index.json").exists()


def _steps(directory: epath.Path) -> list[epath.Path]:
    """The checkpoints in a directory, which need not exist."""
    return [child for child in directory.iterdir() if child.name.isdigit()] if directory.is_dir() else []


def read_about(path: epath.Path) -> About:
    """What the checkpoint directory `path` says of itself. Raises CheckpointError."""
    file = path / "pasta" / "pasta.json"
    if not file.exists():
        raise CheckpointError(f"{path} is not a checkpoint of pasta_jax: it has no pasta/pasta.json.")
    try:
        tree = json.loads(file.read_text())
        if tree["format"] != FORMAT:
            raise CheckpointError(f"{path} is not a checkpoint of pasta_jax but of {tree['format']!r}.")
        if tree["format_version"] > FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format {tree['format_version']}, this pasta_jax knows {FORMAT_VERSION}. "
                "Upgrade pasta_jax."
            )
        return About(
            path=os.fspath(path),
            step=int(tree["step"]),
            data_index=int(tree["data_index"]),
            config=config_lib.from_dict(tree["config"]),
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
        raise CheckpointError(_damaged(path, f"{file.name}: {type(error).__name__}: {error}")) from error


def load_params(
    path: str | os.PathLike[str],
    *,
    shardings: Callable[[Params], Any] | None = None,
    expected: Params | None = None,
    base: str | os.PathLike[str] | None = None,
    finish: Callable[[Params], Params] | None = None,
) -> tuple[Params, About]:
    """The weights alone, of the newest checkpoint in a workdir or of the one that `path` is.

    Adapters are merged into the weights that they go beside.

    Args:
      path: a workdir, its `checkpoints`, or one checkpoint.
      shardings: from the tree of shapes (`jax.ShapeDtypeStruct`) to one of shardings; by default all lies on
        the first device.
      expected: a tree of shapes that the weights must have, and of the dtypes in which they come; by default
        those in which they were saved.
      base: of adapters: where the weights are now that they go beside, if not where they were.
      finish: what is made of each top-level part (embed, layer_0, ...) as soon as it is read, before the next is.

    Raises:
      CheckpointError: missing, foreign, damaged, or not as expected.
    """
    found = find(path)
    about = read_about(found)
    if about.base is not None:
        dtype = None if expected is None else jax.tree.leaves(expected)[0].dtype
        params, trained, _ = load_parts(found, shardings=shardings, base=base)
        if expected is not None:
            _check_shapes(found, params, expected)
        # Of what was saved, for sums round differently on other machines.
        both = fingerprint({"base": {about.base.fingerprint: np.zeros(1)}, "adapters": trained})
        about = dataclasses.replace(about, merged=both)
        params = lora.merge(lora.join(params, trained), about.config.lora, dtype=dtype, donate=True)
        return params if finish is None else _finished(params, params.pop, finish), about
    shapes = _saved_shapes(found, "params")
    if expected is not None:
        _check_shapes(found, shapes, expected)
        shapes = expected
    target = _placed(shapes, shardings)
    if finish is None:
        return _restore(found, "params", target), about

    def read(name: str) -> Params:
        return _restore(found, "params", {name: target[name]}, partial=True)[name]

    return _finished(target, read, finish), about


def load_parts(
    path: str | os.PathLike[str],
    *,
    shardings: Callable[[Params], Any] | None = None,
    base: str | os.PathLike[str] | None = None,
) -> tuple[Params, Params, About]:
    """Of a checkpoint of adapters: the weights that they go beside, in the model's dtype, and the adapters.

    Args:
      path, shardings, base: as in `load_params`.

    Raises:
      CheckpointError: as `load_params`; the weights are not there, or are others.
    """
    found = find(path)
    about = read_about(found)
    if about.base is None:
        raise CheckpointError(f"{found} holds a whole model, not adapters.")
    where = os.fspath(base) if base else find_base(found, about.base.path)
    shapes = jax.eval_shape(functools.partial(init_params, about.config.model), jax.random.key(0))
    params, theirs = load_params(where, shardings=shardings, expected=shapes)
    _check_base(found, about.base, Base(where, theirs.merged or fingerprint(params)))
    target = _placed(_saved_shapes(found, "params"), shardings)
    return params, _restore(found, "params", target), about


def load_adapters(path: str | os.PathLike[str]) -> tuple[Params, About]:
    """The adapters of a checkpoint alone, on the first device. Raises CheckpointError, as `load_parts`."""
    found = find(path)
    about = read_about(found)
    if about.base is None:
        raise CheckpointError(f"{found} holds a whole model, not adapters.")
    return _restore(found, "params", _placed(_saved_shapes(found, "params"), None)), about


def find_base(found: epath.Path, path: str) -> str:
    """Where the weights are that the checkpoint `found` has adapters for, by the path that it names.

    A relative path is looked up from here, and then from each folder above the checkpoint.

    Raises:
      CheckpointError: nowhere.
    """
    places = [absolute(path)]
    if "://" not in path and not os.path.isabs(os.path.expanduser(path)):
        places += [parent / path for parent in found.parents]
    for place in places:
        if place.exists():
            return os.fspath(place)
    raise CheckpointError(
        f"{found} has adapters for the weights in {path}, which is not there. Say where those are now: "
        "base=DIRECTORY of load, --base=DIRECTORY of pasta_jax, evaluate and convert; or put a link there."
    )


def _check_base(found: epath.Path, wanted: Base, base: Base) -> None:
    if wanted.fingerprint != base.fingerprint:
        raise CheckpointError(
            f"{found} has adapters for other weights than those in {base.path}: it was trained beside what was "
            f"then in {wanted.path}, and their fingerprints differ. Find those; adapters are of no use to others."
        )


def _finished(names: Any, part: Callable[[str], Params], finish: Callable[[Params], Params]) -> Params:
    """Of each of the top-level parts what `finish` makes of it, one after the other."""
    done: dict[str, Any] = {}
    for name in [*names]:
        done |= finish({name: part(name)})
    return done


def _placed(shapes: Params, shardings: Callable[[Params], Any] | None) -> Params:
    """Shapes that say where the arrays are to lie."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    lie = jax.tree.map(lambda _: here, shapes) if shardings is None else shardings(shapes)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, lie)


def _saved_shapes(path: epath.Path, item: str) -> Any:
    try:
        metadata = ocp.PyTreeCheckpointHandler().metadata(path / item)
        tree = metadata.tree if hasattr(metadata, "tree") else metadata
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
    except Exception as error:  # whatever a damaged file makes Orbax raise
        raise CheckpointError(_damaged(path, f"{item}: {error}")) from error


def _restore(path: epath.Path, item: str, target: Any, *, partial: bool = False) -> Any:
    """Arrays with the shapes, dtypes and shardings of `target`; with `partial` that is a part of what was saved."""
    try:
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        wanted = ocp.args.PyTreeRestore(item=target, restore_args=restore_args, partial_restore=partial)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            return checkpointer.restore(path / item, args=wanted)
    except Exception as error:  # whatever a damaged file makes Orbax raise
        raise CheckpointError(_damaged(path, f"{item}: {error}")) from error


def _check_shapes(path: epath.Path, saved: Any, expected: Any) -> None:
    have, want = _named_shapes(saved), _named_shapes(expected)
    for name in [*want, *have]:
        if have.get(name) != want.get(name):
            raise CheckpointError(
                f"{path} is of another model. First difference: {name} is {have.get(name, 'not there')} "
                f"in the checkpoint, {want.get(name, 'not there')} by the config."
            )


def _named_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(x.shape) for path, x in leaves}


def _damaged(path: epath.Path, reason: str) -> str:
    older = sorted(int(c.name) for c in path.parent.iterdir() if c.name.isdigit() and c.name != path.name)
    advice = f"Delete it and step {older[-1]} is used." if older else "It is the only one here."
    return f"{path} is damaged. {advice} ({reason.splitlines()[0][:300]})"
