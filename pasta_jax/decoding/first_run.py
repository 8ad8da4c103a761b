"""The first run of each program, which takes longer than the next ones.

On a CPU XLA does something once in a program's first run: half a second for a short prompt of a model of 135M
parameters, 2.5 s for one of 900 tokens, on two cores.
"""

from __future__ import annotations

import itertools
import logging
import math
from typing import Any

from pasta_jax.decoding.compiled import Compiled
from pasta_jax.decoding.request import SamplingParams

LOG = logging.getLogger("pasta_jax")


def run_once(compiled: Compiled, params: Any) -> None:
    """Runs what a request that is alone may need: a prefill of each length, a step of each width and pool bucket.

    Where prompts go block by block, a prefill is each size of block at each place, which is then kept and reused.

    Args:
      compiled: the programs.
      params: in their form.
    """
    LOG.info("running each program once")
    bos = compiled.vocabulary.bos
    request = SamplingParams(2**30, temperature=1.0, open_bias=-math.inf).request()
    for length, size in itertools.product(compiled.prompt_buckets, compiled.part_sizes or [0]):
        batch = compiled.empty_batch()
        if compiled.prompt_block:
            start = length - compiled.prompt_block
            batch = compiled.feed(params, batch, 0, [bos] * (start + size), request, start)
            batch = compiled.reuse(batch, 0, start, compiled.keep(batch, 0, start))
        else:
            batch = compiled.admit(
                params, batch, {0: ([bos] * min(length, compiled.limits.pool - 1), request)}
            )
        compiled.read(batch, 0)
        del batch  # its memory is needed for the next one
    for used, index in itertools.product(compiled.pool_buckets, range(len(compiled.widths))):
        batch = compiled.admit(params, compiled.empty_batch(), {0: ([bos], request)})
        batch = compiled.decode_chunk(params, batch, 1, False, used, compiled.only(index))
        compiled.read(batch, 0)
        del batch
