"""A training run of a few steps, on documents that count upwards."""

import dataclasses
import functools
import pathlib
from typing import Any
from unittest import mock

import jax
import numpy as np

from pasta_jax.arrays import NO_TARGET, ThreadedTokens
from pasta_jax.config import CheckpointConfig, Config, DataConfig, LogConfig, MeshConfig, OptimizerConfig
from pasta_jax.model.config import ModelConfig
from pasta_jax.testing import WordTokenizer
from pasta_jax.training import loop
from pasta_jax.training.state import TrainState
from pasta_jax.training.update import LossFn, Update, make_update

TOKENIZER = WordTokenizer("the Nile is long")


VOCABULARY = len(TOKENIZER.vocabulary)


CONFIG = Config(
    steps=8,
    model=ModelConfig(
        vocab_size=-(-VOCABULARY // 8) * 8,
        num_layers=1,
        model_dim=16,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        mlp_dim=32,
    ),
    data=DataConfig(rows=8, length=32),
    # A large eps, so that where a gradient is next to nothing its rounding error is not blown up to a step.
    optimizer=OptimizerConfig(lr=1e-2, warmup_steps=2, eps=1e-4),
    mesh=MeshConfig(fsdp=1),
    checkpoint=CheckpointConfig(every_steps=4),
    log=LogConfig(every=1),
)


class Counting:
    """Documents that count upwards from a token that depends on the index."""

    def __getitem__(self, index: int) -> ThreadedTokens:
        rng = np.random.default_rng(index)
        line = np.arange(rng.integers(5, 15), dtype=np.int32)
        token = line + rng.integers(10, 20, dtype=np.int32)
        return ThreadedTokens(
            token=token,
            position=line,
            doc=np.ones_like(line),
            segment=np.zeros_like(line),
            order=line,
            sees=np.zeros((len(line), 1), np.uint32),
            thread=np.zeros_like(line),
            target=np.append(token[1:], NO_TARGET).astype(np.int32),
        )


def train(workdir: pathlib.Path, config: Config = CONFIG, source: Any = None, **kwargs: Any) -> TrainState:
    devices = jax.devices()[: config.mesh.data * config.mesh.fsdp * config.mesh.tensor]
    source = source or Counting()
    mesh = loop.training_mesh(config, devices)
    with mock.patch.object(loop, "make_update", one_update):
        return loop.train(config, source=source, tokenizer=TOKENIZER, workdir=workdir, mesh=mesh, **kwargs)


def one_update(config: Config, mesh: Any, loss_fn: LossFn, record: Any = ThreadedTokens) -> Update:
    """`make_update`, once for all runs of this process that differ in nothing that it reads: it traces for long."""
    some = config.init_from and "some weights"
    same = dataclasses.replace(config, init_from=some, log=CONFIG.log, checkpoint=CONFIG.checkpoint)
    return _update(same, mesh, loss_fn, record, jax.config.read("jax_disable_most_optimizations"))


@functools.cache
def _update(config: Config, mesh: Any, loss_fn: LossFn, record: Any, quick: bool) -> Update:
    return make_update(config, mesh, loss_fn, record)


def assert_same(a: Any, b: Any) -> None:
    """Equal to the bit."""
    jax.tree.map(np.testing.assert_array_equal, a, b)


def changed(config: Config = CONFIG, **sections: dict[str, Any]) -> Config:
    new = {name: dataclasses.replace(getattr(config, name), **fields) for name, fields in sections.items()}
    return dataclasses.replace(config, **new)
