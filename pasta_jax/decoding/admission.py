"""Which of the threads that are ready a step feeds, where many requests share it: admission of branches by cost.

All rows of a step have the same number of lanes. So a branch of one request makes the step longer for all, and it
may be better that it waits. That changes the schedule and no text (docs/design.md, decision 3). TAPER (arXiv
2605.06914) regulates the branches of a server in this way.

The host gives a cost for each width, and each step has the width that feeds most threads for its cost:

    all       1 for every width: as many threads as are ready
    cap:N     1 up to the first width that is N or more, infinite above
    cost      the measured seconds of a step: the most tokens a second
    cost:T    the same, but infinite where a request would be late: each is to have a token every T seconds, and
              may spend what it is ahead. A step gives it a token for each of its threads that are ready, as far
              as the width has lanes for them. Where someone is late with every width, the one with which the
              latest has the least seconds a token is left. A request that is alone has what it has with `cost`,
              its tokens as soon as can be.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import pathlib
import re
import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from pasta_jax import sharding
from pasta_jax.decoding.compiled import Compiled
from pasta_jax.decoding.loop import Batch
from pasta_jax.decoding.request import SamplingParams
from pasta_jax.files import replacing
from pasta_jax.messages import shown

LOG = logging.getLogger("pasta_jax")

POLICY = r"all|cap:([1-9]\d{0,8})|cost(?::(\d{0,9}\.?\d{1,9}))?"

STEPS, REPEATS = 4, 3
"""Steps that are timed together, and how often; the shortest time counts."""


class Admission:
    """A policy for the steps of some programs.

    Args:
      compiled: the programs.
      policy: one of those above.

    Attributes:
      times: seconds of a step of each of the programs' widths, by the pool entries that it reads. None until
        `measure`; until then "cost" is as "all".

    Raises:
      ValueError: no such policy, or one that has no choice.
    """

    def __init__(self, compiled: Compiled, policy: str = "all"):
        found = re.fullmatch(POLICY, policy) if isinstance(policy, str) else None
        if found is None:
            raise ValueError(
                f'admission={shown(policy)} is unknown. Use "all", "cap:4", "cost" or "cost:0.05".'
            )
        if policy != "all" and len(compiled.widths) == 1:
            raise ValueError(
                f"admission={policy} has no choice: every step has {compiled.limits.lanes} lanes. Leave it out, or "
                "give several widths, such as widths=(1, 4), and no batch_invariant."
            )
        self.policy = policy
        self.times: Mapping[int, tuple[float, ...]] | None = None
        self._compiled = compiled
        self._cap = int(found[1]) if found[1] else math.inf
        self._token_s = float(found[2]) if found[2] else math.inf

    @property
    def is_bounded(self) -> bool:
        """Whether the costs follow from who is ahead and what is ready, and have to be asked for often."""
        return math.isfinite(self._token_s)

    def costs(self, used: int, steps: int, pace: Iterable[tuple[int, float, int]]) -> np.ndarray:
        """What a step of each width costs: float32 [number of widths].

        Args:
          used: pool entries that steps read.
          steps: how many there will be at most.
          pace: of each request, its tokens so far, the seconds that they took, and its threads that are ready.
        """
        widths = np.array(self._compiled.widths)
        if self.times is None:
            last = np.searchsorted(widths, self._cap)
            return np.where(np.arange(len(widths)) <= last, 1, np.inf).astype(np.float32)
        times = np.array(self.times[used], np.float32)
        if self.is_bounded and len(each := [*pace]) > 1:
            tokens, seconds, ready = np.array(each).T[..., None]
            ahead = (self._token_s * tokens - seconds) / steps
            latest = np.max((times - ahead) / np.minimum(ready, widths), axis=0)  # seconds a token, by width
            times[latest > max(self._token_s, latest.min())] = np.inf
        return times

    def measure(self, params: Any) -> None:
        """The times of steps, if this policy needs them: measured, or read where an earlier start has kept them.

        Args:
          params: in the form of the programs.
        """
        if self.times is not None or not self.policy.startswith("cost"):
            return
        compiled, file = self._compiled, self._compiled.file_of_times()
        if file is not None and (times := self._kept(file)):
            LOG.info("steps take what an earlier start measured; to measure anew, delete %s", file)
        else:
            times = {used: self._measured(params, used) for used in compiled.pool_buckets}
            if not all(map(math.isfinite, itertools.chain(*times.values()))):
                LOG.warning(
                    "The times of steps could not be measured: each answer ended at once. No branch waits."
                )
                return
            if file is not None:
                with contextlib.suppress(OSError), replacing(file) as out:
                    json.dump(times, out)
        for used, seconds in times.items():
            each = ", ".join(f"{1000 * s:.3g}" for s in seconds)
            LOG.info("steps over %d entries, of %s lanes: %s ms", used, compiled.widths, each)
        self.times = times

    def _kept(self, file: pathlib.Path) -> dict[int, tuple[float, ...]] | None:
        """The times in a file; None if they are not there, or not those of these programs."""
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            return {used: tuple(map(float, found[str(used)])) for used in self._compiled.pool_buckets}
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def _measured(self, params: Any, used: int) -> tuple[float, ...]:
        """Seconds of a step of each width, in rows that each have one thread: idle lanes cost what others do."""
        compiled, prompt = self._compiled, [self._compiled.vocabulary.bos]
        widths = range(len(compiled.widths))
        best = [math.inf for _ in widths]
        for repeat, index in itertools.product(range(REPEATS), widths):
            sampling = SamplingParams(2**30, temperature=1.0, seed=repeat, open_bias=-math.inf)
            asked = prompt, sampling.request()
            batch = compiled.admit(params, compiled.empty_batch(), dict.fromkeys(range(compiled.rows), asked))
            before, start = _steps(batch), time.perf_counter()
            batch = compiled.decode_chunk(params, batch, STEPS, False, used, compiled.only(index))
            if done := _steps(batch) - before:
                best[index] = min(best[index], (time.perf_counter() - start) / done)
            del batch  # its memory is needed for the next one
        return tuple(best)


def _steps(batch: Batch) -> int:
    """Steps of the row that has had most; waits for them."""
    return int(sharding.on_host(batch.rows.step).max())
