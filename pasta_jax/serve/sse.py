"""Server-sent events, as bytes."""

from __future__ import annotations

import json
from typing import Any

DONE = b"data: [DONE]\n\n"

PING = b": ping\n\n"
"""A comment, which clients skip: it tells proxies that the connection is alive."""


def data(tree: Any, name: str | None = None) -> bytes:
    """An event, with a name if it has one. In ASCII: some clients take U+2028 for the end of a line.

    Raises ValueError for NaN and infinity, which are no JSON.
    """
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(tree, separators=(',', ':'), allow_nan=False)}\n\n".encode()
