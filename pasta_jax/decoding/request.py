"""What a caller may ask of one request. None of it recompiles anything, but for the size of a script."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np

from pasta_jax.decoding.options import real, whole
from pasta_jax.decoding.sampling import Draw
from pasta_jax.decoding.script import NOTHING, Script, no_script
from pasta_jax.decoding.state import Request
from pasta_jax.decoding.stops import check_stops
from pasta_jax.rounding import next_power_of_two

Conversation: TypeAlias = Sequence[Mapping[str, str]]
"""Messages {"role": "system" | "user" | "assistant", "content": text}, of which the user's is the last."""


def seed_of(*numbers: int) -> int:
    """A seed made of several numbers (none below 0): requests with different numbers are drawn independently.

    >>> len({seed_of(0, 1), seed_of(1, 0), seed_of(0)})
    3
    """
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How one request is answered.

    Attributes:
      max_new_tokens: tokens of the answer over all threads, tags included.
      max_branch_tokens: content tokens of one branch; then its end is forced.
      temperature: 0 is greedy.
      top_k, top_p, min_p: draw among the most likely tokens only (`sampling.sample`); 0, 1 and 0 turn them off.
      seed: 0 to 2**64 - 1; the same seed gives the same text, whatever else is decoded in the batch, but for
        rounding (`batch_invariant` of `Compiled`).
      open_bias: added to the logit that opens a promise: above 0 more parallel, below 0 more careful,
        -inf sequential.
      stop: texts; the answer ends before the first of them (`decoding.stops`).
      script: tokens that the threads are forced to write (`decoding.script`). Its size, rounded up to powers of
        two, is compiled in.

    Raises:
      ValueError: an option out of range or of the wrong type.
    """

    max_new_tokens: int = 512
    max_branch_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    open_bias: float = 0.0
    stop: tuple[str, ...] = ()
    script: Script | None = None

    def __post_init__(self) -> None:
        checked = dict(
            max_new_tokens=whole("max_new_tokens", self.max_new_tokens, 1),
            max_branch_tokens=whole("max_branch_tokens", self.max_branch_tokens, 1),
            temperature=real("temperature", self.temperature, 0),
            top_k=whole("top_k", self.top_k, 0),
            top_p=real("top_p", self.top_p, 0, 1, above=True),
            min_p=real("min_p", self.min_p, 0, 1),
            seed=whole("seed", self.seed, 0, 2**64 - 1),
            open_bias=real("open_bias", self.open_bias, -math.inf),
            stop=check_stops(self.stop),
        )
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if not isinstance(self.script, Script | None):
            raise ValueError(f"script is a {type(self.script).__name__}. Give one of `script.script_of`.")

    def request(self, script_size: tuple[int, int] = NOTHING) -> Request:
        """The same as NumPy arrays, for a row of a batch whose scripts have the size (R, C)."""
        script = (self.script or no_script()).padded(script_size)
        return Request(
            max_new_tokens=np.int32(self.max_new_tokens),
            max_branch_tokens=np.int32(self.max_branch_tokens),
            open_bias=np.float32(self.open_bias),
            draw=Draw(
                temperature=np.float32(self.temperature),
                top_k=np.int32(self.top_k),
                top_p=np.float32(self.top_p),
                min_p=np.float32(self.min_p),
            ),
            key=np.array([self.seed >> 32, self.seed % 2**32], np.uint32),
            script=script.tokens,
            script_branches=script.branches,
        )


def script_size(sampling: Sequence[SamplingParams]) -> tuple[int, int]:
    """(R, C) that holds the scripts of all these requests: powers of two, so that few sizes are compiled."""
    sizes = [params.script.size for params in sampling if params.script is not None]
    if not sizes:
        return NOTHING
    R, C = (max(dimension) for dimension in zip(*sizes))
    return next_power_of_two(R), next_power_of_two(C)
