"""`pasta_jax.load`: a trained model, from what `pasta_jax.train` wrote."""

from __future__ import annotations

import os

from pasta_jax.decoding.engine import Model
from pasta_jax.training.checkpoints import load_params


def load(path: str | os.PathLike[str]) -> Model:
    """A model ready to decode.

    Args:
      path: a workdir, or one checkpoint within it; all that is needed is in the checkpoint.

    Raises:
      CheckpointError: no checkpoint there, a foreign or a damaged one.
    """
    params, about = load_params(path)
    data = about.config.data
    return Model(params, about.config.model, about.tokenizer(), data.positions, data.max_depth)
