"""Names of folders, from what they are of: two evaluations in one workdir never overwrite each other."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def name_of(checkpoint: Any) -> str:
    """A checkpoint for people: its workdir and its step; of PEFT's adapters their folder.

    >>> import pathlib
    >>> name_of(pathlib.Path("runs/pasta/checkpoints/700"))
    'pasta-700'
    >>> name_of(pathlib.Path("runs/bon/round-2/checkpoints/64"))
    'bon-round-2-64'
    """
    if (checkpoint / "adapter_config.json").exists():  # a folder of PEFT's
        return slug(checkpoint.name)
    step, parent = checkpoint.name, checkpoint.parent
    workdir = parent.parent if parent.name == "checkpoints" else parent
    outer = f"{workdir.parent.name}-" if workdir.name.startswith("round-") else ""
    return slug(f"{outer}{workdir.name}-{step}")


def slug(text: str) -> str:
    """A text as the name of a folder.

    >>> slug("my_judges:polite")
    'my_judges-polite'
    """
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in text).strip("-.") or "x"


def sha256(tree: Any) -> str:
    """A hash of plain data."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
