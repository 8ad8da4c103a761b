"""Where an imported model came from: kept beside its checkpoints, so that it can go back as it was.

    WORKDIR/origin/origin.json        what it was known as, and how its tensors lay
                   config.json, ...   the folder's own files, byte for byte
                   headers/*.header   of its safetensors files, byte for byte

Training that starts from such a workdir takes `origin/` along (`carry`).
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from pasta_jax.checkpoints.about import CheckpointError, absolute, find
from pasta_jax.files import write_json
from pasta_jax.interchange.errors import InterchangeError
from pasta_jax.interchange.reading import Folder
from pasta_jax.interchange.tensors import INDEX, TensorFile, parse_header

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
"""Files that go with a model's weights: what they are, how to write to it, and under which terms."""

LARGEST = 200 * 2**20
"""Bytes of a file that is kept."""


@dataclasses.dataclass(frozen=True)
class Origin:
    """What an imported model was.

    Attributes:
      source: as what it is known: "google/gemma-2b-it", or a path.
      prefix: of its tensors' names.
      ignored: tensors that were there and not read.
      files: by their names in the folder.
      headers: of the safetensors files, by their names.
    """

    source: str
    prefix: str
    ignored: tuple[str, ...]
    files: Mapping[str, bytes]
    headers: Mapping[str, bytes]

    @property
    def is_text(self) -> bool:
        """Whether it was a text model alone, so that what is written has all of its tensors again.

        Rotary frequencies, which old versions of transformers stored, follow from the configuration.
        """
        return all(name.endswith(".rotary_emb.inv_freq") for name in self.ignored)

    def shards(self) -> tuple[TensorFile, ...]:
        """What its safetensors files held."""
        return tuple(parse_header(name, header) for name, header in sorted(self.headers.items()))

    def tree(self, name: str) -> dict[str, Any] | None:
        """One of its JSON files, parsed; None if it has none."""
        return json.loads(self.files[name]) if name in self.files else None


def origin_of(folder: Folder) -> Origin:
    """What is kept of a folder. Raises InterchangeError on a file that cannot be read."""
    names = []
    for parent, _, found in os.walk(folder.path):
        below = os.path.relpath(parent, folder.path)
        names += [found_name if below == "." else f"{below}/{found_name}" for found_name in found]
    files = {}
    for name in sorted(names):
        if not any(_matches(name, pattern) for pattern in KEPT):
            continue
        path = os.path.join(folder.path, name)
        try:
            if os.path.getsize(path) > LARGEST:
                raise InterchangeError(
                    f"{path} has {os.path.getsize(path)} bytes; no such file is that large."
                )
            with open(path, "rb") as file:
                files[name] = file.read()
        except OSError as error:
            raise InterchangeError(f"Cannot read {path}: {error.strerror}.") from error
    headers = {os.path.basename(file.path): file.header for file in folder.files}
    return Origin(folder.source, folder.prefix, folder.ignored, files, headers)


def write_origin(origin: Origin, workdir: str | os.PathLike[str]) -> None:
    """Keeps it in a workdir."""
    root = absolute(workdir) / ORIGIN
    (root / "headers").mkdir(parents=True, exist_ok=True)
    for name, content in origin.files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    for name, header in origin.headers.items():
        (root / "headers" / f"{name}.header").write_bytes(header)
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
    """Of the model in a workdir, or in a checkpoint of one; None if it was not imported.

    Raises:
      InterchangeError: files are missing from it.
      CheckpointError: there is no checkpoint.
    """
    root = _workdir(path) / ORIGIN
    if not (root / ABOUT).exists():
        return None
    try:
        about = json.loads((root / ABOUT).read_text())
        if about["format"] != FORMAT:
            raise InterchangeError(
                f"{root / ABOUT} has format {about['format']}, this pasta_jax knows {FORMAT}."
            )
        return Origin(
            source=str(about["source"]),
            prefix=str(about["prefix"]),
            ignored=tuple(about["ignored"]),
            files={name: (root / name).read_bytes() for name in about["files"]},
            headers={name: (root / "headers" / f"{name}.header").read_bytes() for name in about["headers"]},
        )
    except InterchangeError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InterchangeError(
            f"{root} is damaged ({type(error).__name__}: {error}). Import the model again; or delete that folder, "
            "and an export is written anew instead of as it was."
        ) from error


def carry(init_from: str | os.PathLike[str], workdir: str | os.PathLike[str]) -> None:
    """Takes the origin of a model along into the workdir of what is trained from it, if it has one.

    What a failed start from another model left there goes.

    Raises:
      CheckpointError: it is damaged.
    """
    try:
        origin = read_origin(init_from)
    except InterchangeError as error:
        raise CheckpointError(str(error)) from error
    old = absolute(workdir) / ORIGIN
    if old.exists():
        old.rmtree()
    if origin is not None:
        write_origin(origin, workdir)


def _workdir(path: str | os.PathLike[str]) -> epath.Path:
    """Of the checkpoint that `path` means."""
    found = find(path)
    return found.parent.parent if found.parent.name == "checkpoints" else found.parent


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name, pattern)
