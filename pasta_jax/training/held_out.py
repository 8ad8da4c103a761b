"""The loss on examples that are held out: never trained on, and measured now and then as in training."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from pasta_jax.arrays import Array, ThreadedTokens
from pasta_jax.config import Config
from pasta_jax.data.batches import prefetch
from pasta_jax.model.forms import Params
from pasta_jax.sharding import from_host
from pasta_jax.training.update import LossFn, Update, make_measure


class HeldOut:
    """Measures a loss on all of some examples.

    Args:
      config: sizes of the batches.
      mesh: of all arrays.
      update: of the run, for shardings.
      loss_fn, record, batches: as in `training.loop.Stage`.
      examples: what `batches` takes as its source; of a known length.

    Attributes:
      compiles: whether the next measurement compiles what it runs.
    """

    compiles = True

    def __init__(
        self,
        config: Config,
        mesh: Any,
        update: Update,
        loss_fn: LossFn,
        record: type[ThreadedTokens],
        batches: Callable[..., Iterator[tuple[ThreadedTokens, int]]],
        examples: Sequence[Any],
    ):
        self._measure = make_measure(config, mesh, loss_fn, record, update)
        self._sharding = update.batch_sharding
        self._batches = lambda: batches(examples, 0, config.data.rows, config.data.length, end=len(examples))

    def __call__(
        self, params: Params, base: Params, cut_off: Callable[[], object]
    ) -> dict[str, float] | None:
        """Means over all targets or pairs, by name: held_out_loss and others; None if it was cut off.

        Args:
          params: the trained weights.
          base: those below adapters.
          cut_off: asked before each batch.
        """
        totals, count = collections.Counter[str](), 0
        with prefetch(self._batches()) as batches:
            for batch, _ in batches:
                if cut_off():
                    return None
                sums = jax.device_get(self._of(params, base, batch))
                self.compiles = False
                totals.update({name: float(value) for name, value in sums.values.items()})
                count += int(sums.count)
        return {f"held_out_{name}": total / max(count, 1) for name, total in sorted(totals.items())}

    def _of(self, params: Params, base: Params, batch: ThreadedTokens) -> Array:
        return self._measure(params, base, from_host(batch.fields(), self._sharding))
