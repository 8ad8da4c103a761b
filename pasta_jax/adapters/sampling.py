"""What other packages ask of an answer, as `SamplingParams`."""

from __future__ import annotations

import math
from collections.abc import Iterable

from pasta_jax.decoding.request import SamplingParams


def sampling_of(
    tokens: int,
    *,
    sequential: bool,
    stop: Iterable[str] | None,
    temperature: float | None,
    seed: int,
    **draw: float | None,
) -> SamplingParams:
    """The parameters of one answer. None, and an empty text to stop at, are as good as not given.

    Args:
      tokens: of the answer over all threads; one branch may have them all.
      sequential: forbid promises.
      stop, temperature, seed: as in `SamplingParams`; without a temperature the answer is greedy.
      draw: top_k, top_p, min_p.
    """
    return SamplingParams(
        max_new_tokens=tokens,
        max_branch_tokens=tokens,
        temperature=temperature or 0.0,
        seed=seed,
        open_bias=-math.inf if sequential else 0.0,
        stop=tuple(text for text in stop or () if text),
        **{name: value for name, value in draw.items() if value is not None},  # type: ignore[arg-type]
    )
