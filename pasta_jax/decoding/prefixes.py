"""Beginnings of prompts whose keys and values are kept, so that prompts that begin alike do not feed them again.

A prompt is fed in blocks of C tokens that begin at multiples of C, and by which program a block is fed depends on
its place alone. So its keys and values depend on nothing but the tokens up to its end, bit for bit, and an answer
is the same whether they were computed for it or kept. (Fed at once, as without this, a prompt rounds differently.)
"""

from __future__ import annotations

import collections
import hashlib
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from pasta_jax.decoding.compiled import Compiled
from pasta_jax.decoding.loop import Batch
from pasta_jax.decoding.state import Request
from pasta_jax.model import Pool
from pasta_jax.model.pool import pool_bytes

PROMPT_BLOCK = 128
"""C, unless another one is asked for. Shorter blocks would use less of a TPU; and only whole ones are kept."""


class Prefixes:
    """The blocks that are kept, up to a number of bytes; those go first that were not used for longest.

    Args:
      compiled: programs with a `prompt_block`.
      most_bytes: memory that they may take, on the model's device.

    Raises:
      ValueError: not one block fits.
    """

    def __init__(self, compiled: Compiled, most_bytes: int):
        assert compiled.prompt_block
        self._compiled, self._size = compiled, compiled.prompt_block
        self._bytes_each = pool_bytes(compiled.config, 1, self._size)
        self._most = most_bytes // self._bytes_each
        self._kept: collections.OrderedDict[bytes, Pool] = collections.OrderedDict()
        self._lock = threading.Lock()
        if 0 < most_bytes < self._bytes_each:
            raise ValueError(
                f"reuse={most_bytes} bytes hold no block of {self._size} tokens. Give {self._bytes_each} or more."
            )

    @property
    def nbytes(self) -> int:
        """Memory that the blocks take now."""
        return len(self._kept) * self._bytes_each

    def clear(self) -> None:
        """Keeps nothing more."""
        with self._lock:
            self._kept.clear()

    def admit(
        self, params: Any, batch: Batch, row: int, prompt: Sequence[int], request: Request
    ) -> tuple[Batch, int]:
        """A prompt into a row: what is kept of its beginning is copied, the rest is fed and its blocks are kept.

        Args:
          params: in the form of the programs.
          batch: donated.
          row: where the prompt goes.
          prompt, request: what is asked.

        Returns:
          The batch, and how many tokens were not fed.
        """
        size = self._size
        with self._lock:
            keys = self._keys(prompt)
            known = next((i for i, key in enumerate(keys) if key not in self._kept), len(keys))
            self._use(keys[:known])
            while len(self._kept) + len(keys) - known > self._most:
                self._kept.popitem(last=False)
            reused = min(known, (len(prompt) - 1) // size)  # the last token is fed: the answer begins with it
            for i in range(reused):
                batch = self._compiled.reuse(batch, row, i * size, self._kept[keys[i]])
            for start in range(reused * size, len(prompt), size):
                batch = self._compiled.feed(params, batch, row, prompt, request, start)
                if known <= start // size < len(keys):
                    self._kept[keys[start // size]] = self._compiled.keep(batch, row, start)
            self._use(keys)
        return batch, reused * size

    def _keys(self, prompt: Sequence[int]) -> list[bytes]:
        """A name for each whole block, of all tokens up to its end; no more than may be kept."""
        tokens, said, keys = np.asarray(prompt, np.int32), hashlib.sha256(), []
        for start in range(0, min(len(prompt) // self._size, self._most) * self._size, self._size):
            said.update(tokens[start : start + self._size].tobytes())
            keys.append(said.digest())
        return keys

    def _use(self, keys: Sequence[bytes]) -> None:
        """They were used now, the first last: without a block those that follow it are of no use."""
        for key in reversed(keys):
            self._kept.move_to_end(key)
