"""Trains a model: `python -m pasta_jax.train --config=configs/tiny.py --workdir=W [--config.seed=1]`.

Running the same command again goes on where it was cut off. The workdir holds config.json, env.json,
metrics.jsonl, checkpoints/, and invalid.jsonl if some records could not be used.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import app, flags

from pasta_jax.config import Config, ConfigError, describe, load_config, split_overrides
from pasta_jax.verbs import refuse, show_log

if TYPE_CHECKING:
    from pasta_jax.tokens.tokenizer import Tokenizer


def main(argv: Sequence[str], *, values: flags.FlagValues, overrides: Sequence[str]) -> None:
    """The verb. Mistakes in the command or the data end in one line and status 2, not in a traceback."""
    if len(argv) > 1:
        refuse(f"Cannot make sense of {' '.join(argv[1:])!r}. {__doc__.splitlines()[0]}")
    if not values.config:
        refuse("Which experiment? Add --config=configs/tiny.py.")
    try:
        config = load_config(values.config, overrides)
    except ConfigError as error:
        refuse(str(error))
    if values.print_config:
        print(describe(config))
        return
    if not values.workdir:
        refuse("Where to? Add --workdir=DIRECTORY.")
    show_log()
    run(config, values.workdir)


def run(config: Config, workdir: str) -> str:
    """Trains `config` in `workdir`, data and all.

    Returns:
      the workdir of the model that came out: this one, or that of the last round of preference optimisation.
    """
    # These load jax: the refusals above, and --print_config, come at once.
    from pasta_jax.checkpoints.about import CheckpointError
    from pasta_jax.data.records import RecordError
    from pasta_jax.data.sources import make_source, make_tokenizer, steps_of_epochs
    from pasta_jax.interchange.origin import carry
    from pasta_jax.preference import rounds
    from pasta_jax.tokens.layout import LayoutError
    from pasta_jax.tokens.tokenizer import TokenizerError
    from pasta_jax.training.loop import NonFiniteLoss, train

    try:
        os.makedirs(workdir, exist_ok=True)
        if config.stage == "both":
            first = run(dataclasses.replace(config, stage="sft"), os.path.join(workdir, "sft"))
            second = dataclasses.replace(config, stage="preference", init_from=first)
            return run(second, os.path.join(workdir, "preference"))
        if config.adopt:
            config, tokenizer = adopted(config, workdir)
        if config.stage == "preference":
            return rounds.run(config, workdir)
        if not config.adopt:
            tokenizer = make_tokenizer(config.data)
        invalid = os.path.join(workdir, "invalid.jsonl")
        source = make_source(config.data, tokenizer, config.seed, invalid=invalid)
        if config.epochs:
            steps = steps_of_epochs(config.data, source, config.epochs)
            config = dataclasses.replace(config, steps=steps)
        if config.init_from and not is_started(workdir):
            carry(config.init_from, workdir)
        train(config, source=source, tokenizer=tokenizer, workdir=workdir)
        return workdir
    except (ConfigError, CheckpointError, RecordError, LayoutError, TokenizerError, OSError) as error:
        refuse(str(error))
    except NonFiniteLoss as error:
        print(error, file=sys.stderr)
        sys.exit(1)


def adopted(config: Config, workdir: str) -> tuple[Config, Tokenizer]:
    """The configuration with the model that it starts from, and that model's tokenizer.

    Once the workdir holds a checkpoint, they are those of that.

    Raises:
      CheckpointError: there is none in `init_from` either.
    """
    from pasta_jax.checkpoints.about import find, read_about

    about = read_about(find(workdir if is_started(workdir) else config.init_from))
    tokenizer = about.tokenizer()
    if config.data.chat != "auto":
        tokenizer = tokenizer.with_chat(config.data.chat)
    theirs = about.config.data
    return dataclasses.replace(
        config,
        model=dataclasses.replace(about.config.model, dtype=config.model.dtype),
        data=dataclasses.replace(
            config.data, tokenizer=theirs.tokenizer, extend_tokenizer=theirs.extend_tokenizer
        ),
    ), tokenizer.with_dialect(config.data.dialect)


def is_started(workdir: str) -> bool:
    """Whether a workdir holds a checkpoint."""
    from pasta_jax.checkpoints.about import CheckpointError, find

    try:
        find(workdir)
    except CheckpointError:
        return False
    return True


def command() -> None:
    """Parses the command line and runs `main`."""
    # Defined here, not on import: importing two verbs into one process must not clash.
    flags.DEFINE_string("config", None, "The experiment, as configs/tiny.py or configs/tiny.py:pasta.")
    flags.DEFINE_string("workdir", None, "Where the run lives.")
    flags.DEFINE_bool("print_config", False, "Show every field of the configuration and leave.")
    overrides, rest = split_overrides(sys.argv)
    app.run(functools.partial(main, values=flags.FLAGS, overrides=overrides), argv=rest)


if __name__ == "__main__":
    command()
