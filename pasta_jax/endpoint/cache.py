"""Replies that are kept: a JSONL file that only grows, one line for each request that succeeded.

A run that was killed leaves a line cut off at most; the next one removes it and goes on. In memory is only where
each reply stands in the file. Two processes never write to one cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import threading
import weakref
from typing import Any

from pasta_jax.endpoint.cost import Usage
from pasta_jax.files import BROKEN, Lines, locked

FILE = "replies.jsonl"


def key_of(request: Any) -> str:
    """The hash under which the reply to a request is kept: of its JSON, whatever the order of its keys."""
    text = json.dumps(request, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Cache:
    """Replies in a folder, by hashes of their requests; several threads may use it at once."""

    def __init__(self, folder: str | os.PathLike[str] | None):
        """None: a folder that is removed at the end.

        Raises:
          InUse: another process writes there.
          WriteError: it cannot be written.
        """
        self._stack = contextlib.ExitStack()
        self.close = weakref.finalize(self, self._stack.close)
        if folder is None:
            folder = self._stack.enter_context(tempfile.TemporaryDirectory())
        self._stack.enter_context(locked(folder))
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, FILE)
        self.usage = Usage(0, 0)  # of the requests that earlier runs sent
        self._places: dict[bytes, tuple[int, int]] = {}
        self._end = 0
        self._mutex = threading.Lock()
        with open(path, "ab+") as file:
            file.seek(0)
            for line in file:
                if not line.endswith(b"\n"):
                    os.truncate(path, self._end)
                    break
                with contextlib.suppress(*BROKEN):
                    fields = json.loads(line)
                    used = Usage(*map(sum, zip(self.usage, fields["usage"], strict=True)))
                    self._places[bytes.fromhex(fields["request"])] = (self._end, len(line))
                    self.usage = used
                self._end += len(line)
        self._lines = self._stack.enter_context(Lines(path))
        self._file = self._stack.enter_context(open(path, "rb"))  # noqa: SIM115

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: str) -> bool:
        return bytes.fromhex(key) in self._places

    def get(self, key: str) -> dict[str, Any] | None:
        """The reply to a request, or None."""
        place = self._places.get(bytes.fromhex(key))
        if place is None:
            return None
        start, size = place
        fields: dict[str, Any] = json.loads(os.pread(self._file.fileno(), size, start))
        return fields

    def put(self, key: str, reply: dict[str, Any]) -> None:
        """Keeps a reply, at once. It has its `usage`: tokens of the request and of the reply."""
        line = (
            json.dumps({"request": key, **reply}, ensure_ascii=True) + "\n"
        )  # a reply may hold half characters
        with self._mutex:
            self._lines.write(line)
            self._places[bytes.fromhex(key)] = (self._end, len(line))
            self._end += len(line)
