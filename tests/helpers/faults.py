"""Errors that come from outside, at a chosen place."""

from __future__ import annotations

from typing import Any

import pytest

from pasta_jax.decoding.compiled import Compiled


def runs_out_of_memory_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next chunk is decoded, and then there is no memory."""
    decode_chunk = Compiled.decode_chunk

    def fails(self: Compiled, *args: Any) -> Any:
        monkeypatch.undo()
        decode_chunk(self, *args)
        raise MemoryError

    monkeypatch.setattr(Compiled, "decode_chunk", fails)
