"""`pasta_jax.load`: a trained model, from what `pasta_jax.train` wrote."""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Any

import jax

from pasta_jax.decoding.engine import Model
from pasta_jax.model import ModelConfig, init_params
from pasta_jax.model.quantize import quantize as quantized
from pasta_jax.sharding import param_shardings
from pasta_jax.training.checkpoints import find, load_params, read_about

DTYPES = ("float32", "bfloat16")


def load(
    path: str | os.PathLike[str],
    *,
    mesh: jax.sharding.Mesh | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    base: str | os.PathLike[str] | None = None,
) -> Model:
    """A model ready to decode.

    Args:
      path: a workdir, or one checkpoint within it; all that is needed is in the checkpoint. Adapters are merged
        into the weights that they were trained beside.
      mesh: devices (`sharding.make_mesh`) over which the parameters are spread; by default all is on the first.
      dtype: of parameters and compute, "float32" or "bfloat16"; by default that of the model's training.
      quantize: "int8" for matrices in int8, each as soon as it is read.
      base: of adapters: where those weights are now, if not where they were.

    Raises:
      CheckpointError: no checkpoint there, a foreign or a damaged one.
      ValueError: a dtype or a quantisation that is not known, or sizes that the mesh does not divide.
    """
    as_asked(ModelConfig(), dtype, quantize)  # what is refused is refused before anything is read
    plain = as_asked(read_about(find(path)).config.model, dtype, None)
    shapes = jax.eval_shape(functools.partial(init_params, plain), jax.random.key(0))

    def finish(part: Any) -> Any:
        return quantized(part, plain, donate=True)[0]

    params, about = load_params(
        path,
        shardings=None if mesh is None else functools.partial(param_shardings, mesh=mesh),
        expected=shapes,
        base=base,
        finish=finish if quantize else None,
    )
    config, data = as_asked(plain, None, quantize), about.config.data
    return Model(params, config, about.tokenizer(), data.positions, data.max_depth)


def as_asked(config: ModelConfig, dtype: str | None, quantize: str | None) -> ModelConfig:
    """The configuration of a model that is loaded so. Raises ValueError, as `load`."""
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype={dtype!r} is unknown. Use {' or '.join(DTYPES)}.")
    if quantize not in (None, "int8"):
        raise ValueError(f"quantize={quantize!r} is unknown. Use int8, or leave it out.")
    config = dataclasses.replace(config, dtype=dtype or config.dtype)
    return config if quantize is None else dataclasses.replace(config, weights="int8")
