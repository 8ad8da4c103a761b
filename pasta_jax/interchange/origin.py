"""The origin of an imported model, kept beside its checkpoints so that an export restores its files exactly.

    WORKDIR/origin/origin.json        its name, and the names of its files
                   config.json, ...   the folder's own files, byte for byte
                   headers/*.header   headers of its safetensors files, byte for byte

Training that starts from such a workdir copies `origin/` (`carry`).
"""

from __future__ import annotations

import dataclasses
import fnmatch
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from etils import epath

from pasta_jax.checkpoints.about import CheckpointError, absolute_path, find_checkpoint
from pasta_jax.files import is_writer, replacing, write_json
from pasta_jax.foreign import parse_object, read_bytes
from pasta_jax.interchange.errors import InterchangeError
from pasta_jax.interchange.reading import Folder
from pasta_jax.interchange.tensors import INDEX, TensorFile, parse_header
from pasta_jax.messages import message_of

ORIGIN, ABOUT, FORMAT = "origin", "origin.json", 1

KEPT = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*",
    INDEX,
    "LICENSE*",
    "USE_POLICY*",
    "NOTICE*",
    "Notice*",
)
"""Files that are kept: configuration, tokenizer, chat template, index and licence."""


@dataclasses.dataclass(frozen=True)
class Origin:
    """The origin of an imported model.

    Attributes:
      source: its name, such as "google/gemma-2b-it", or a path.
      prefix: of its tensors' names.
      ignored: names of tensors that were not read.
      files: content of its files, by name.
      headers: of the safetensors files, by name.
    """

    source: str
    prefix: str
    ignored: tuple[str, ...]
    files: Mapping[str, bytes]
    headers: Mapping[str, bytes]

    @property
    def is_text(self) -> bool:
        """Whether it had a text model alone, so that an export has all of its tensors.

        Rotary frequencies, which old versions of transformers stored, do not count: the configuration gives them.
        """
        return all(name.endswith(".rotary_emb.inv_freq") for name in self.ignored)

    def shards(self) -> tuple[TensorFile, ...]:
        """The parsed headers of its safetensors files."""
        return tuple(parse_header(name, header) for name, header in sorted(self.headers.items()))

    def tree(self, name: str) -> dict[str, Any] | None:
        """A JSON file, parsed; None if there is no such file."""
        return parse_object(self.files[name], name, InterchangeError) if name in self.files else None


def origin_of(folder: Folder) -> Origin:
    """Reads the files of a folder that are kept. Raises InterchangeError if one cannot be read."""
    root, files = pathlib.Path(folder.path), {}
    names = [path.relative_to(root).as_posix() for path in root.rglob("*") if not path.is_dir()]
    for name in sorted(names):
        if not any(_matches(name, pattern) for pattern in KEPT):
            continue
        files[name] = read_bytes(os.path.join(folder.path, name), InterchangeError)
    headers = {os.path.basename(file.path): file.header for file in folder.files}
    return Origin(folder.source, folder.prefix, folder.ignored, files, headers)


def write_origin(origin: Origin, workdir: str | os.PathLike[str]) -> None:
    """Writes WORKDIR/origin."""
    root = absolute_path(workdir) / ORIGIN
    (root / "headers").mkdir(parents=True, exist_ok=True)
    for name, content in origin.files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        with replacing(root / name, "wb") as file:
            file.write(content)
    for name, header in origin.headers.items():
        with replacing(root / "headers" / f"{name}.header", "wb") as file:
            file.write(header)
    about = {
        "format": FORMAT,
        "source": origin.source,
        "prefix": origin.prefix,
        "ignored": list(origin.ignored),
        "files": sorted(origin.files),
        "headers": sorted(origin.headers),
    }
    write_json(root / ABOUT, about)


def read_origin(path: str | os.PathLike[str]) -> Origin | None:
    """The origin of the model in a workdir or checkpoint; None if that was not imported.

    Raises:
      InterchangeError: it is damaged.
      CheckpointError: there is no checkpoint.
    """
    root = _workdir(path) / ORIGIN
    if not (root / ABOUT).exists():
        return None
    try:
        about = parse_object((root / ABOUT).read_bytes(), ABOUT)
        if about["format"] != FORMAT:
            raise InterchangeError(
                f"{root / ABOUT} has format {about['format']}; this version of pasta_jax reads format {FORMAT}."
            )
        foreign = [name for name in about["files"] if not any(_matches(name, pattern) for pattern in KEPT)]
        foreign += [name for name in about["headers"] if os.path.basename(name) != name]
        if foreign:
            raise ValueError(f"it names a file that is never kept, {foreign[0]}")
        return Origin(
            source=str(about["source"]),
            prefix=str(about["prefix"]),
            ignored=tuple(about["ignored"]),
            files={name: (root / name).read_bytes() for name in about["files"]},
            headers={name: (root / "headers" / f"{name}.header").read_bytes() for name in about["headers"]},
        )
    except InterchangeError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InterchangeError(
            f"{root} is damaged ({message_of(error)}). Import the model again; or delete that folder: "
            "exports then have files of their own instead of the original ones."
        ) from error


def carry(init_from: str | os.PathLike[str], workdir: str | os.PathLike[str]) -> None:
    """Copies the origin of a model, if it has one, to the workdir of a run that starts from it.

    Deletes what a failed start from another model left there.

    Raises:
      CheckpointError: it is damaged.
    """
    try:
        origin = read_origin(init_from)
    except InterchangeError as error:
        raise CheckpointError(str(error)) from error
    if not is_writer():
        return
    old = absolute_path(workdir) / ORIGIN
    if old.exists():
        old.rmtree()
    if origin is not None:
        write_origin(origin, workdir)


def _workdir(path: str | os.PathLike[str]) -> epath.Path:
    """The workdir of a checkpoint."""
    checkpoint = find_checkpoint(path)
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name, pattern)
