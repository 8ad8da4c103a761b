"""Files that are whole or not there: what a run leaves when it is cut off must be good for the next."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import IO, Any


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """A file to write that takes the place of `path` when the block has ended well, and never before.

    Args:
      path: of the file; what stands there is kept until then.
      mode: "w" for text (UTF-8), "wb" for bytes.
    """
    unfinished = f"{os.fspath(path)}.tmp"
    with open(unfinished, mode, encoding=None if "b" in mode else "utf-8") as file:
        yield file
    os.replace(unfinished, path)
