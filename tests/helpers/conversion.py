"""Folders into workdirs and back."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
from absl import flags

from pasta_jax import convert
from pasta_jax.checkpoints.load import load_params
from pasta_jax.checkpoints.save import Checkpoints
from pasta_jax.interchange.importing import ImportOptions, Published, open_published, write_workdir
from pasta_jax.interchange.origin import carry, read_origin
from pasta_jax.interchange.writing import Exported, write_folder
from pasta_jax.lang import tags
from pasta_jax.tokens.load import load_tokenizer
from pasta_jax.training.state import TrainState, new_state


def bring_in(folder: pathlib.Path, workdir: pathlib.Path, **how: Any) -> tuple[Published, Any]:
    options = ImportOptions(**how)
    published = open_published("folder", str(folder), options)
    params = published.read(None)
    write_workdir(published, params, workdir, options)
    return published, params


def bring_out(workdir: pathlib.Path, folder: pathlib.Path, **how: Any) -> None:
    params, about = load_params(workdir)
    origin = read_origin(workdir)
    model = Exported(params, about.config.model, about.load_tokenizer(), origin, is_trained=about.step > 0)
    write_folder(folder, model, **how)


def trained(workdir: pathlib.Path, target: pathlib.Path) -> Any:
    """A step of a run that started from a workdir, without the training."""
    import optax

    params, about = load_params(workdir)
    params = jax.tree.map(lambda x: x + np.float32(0.001), params)
    config = dataclasses.replace(about.config, init_from=str(workdir))
    with Checkpoints(target, config, about.load_tokenizer()) as run:
        state = new_state(params, optax.sgd(0.1))
        run.save(TrainState(state.params, state.opt_state, jax.numpy.int32(5)), 0)
    carry(workdir, target)
    return params


def load_tokenizer_rows(model: bytes, tmp_path: pathlib.Path) -> int:
    (tmp_path / "t.model").write_bytes(model)
    return len(load_tokenizer(tmp_path / "t.model", extend=True).vocabulary) - len(tags.PIECES)


def run(*arguments: str) -> int:
    """The verb, in this process."""
    values = flags.FlagValues()
    convert.define(values)
    values(["convert", *arguments])
    try:
        convert.main(["convert"], values=values)
    except SystemExit as leaving:
        return int(str(leaving.code))
    return 0
