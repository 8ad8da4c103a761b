"""Trains a model: `python -m pasta_jax.train --config=configs/tiny.py --workdir=W [--config.seed=1]`.

Running the same command again resumes an interrupted run. The workdir holds config.json, env.json,
metrics.jsonl, checkpoints/, and invalid.jsonl if some records could not be used.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Sequence

from absl import flags

from pasta_jax.config import Config, ConfigError
from pasta_jax.files import locked
from pasta_jax.memory import is_out_of_memory, with_large_pages
from pasta_jax.messages import message_of
from pasta_jax.overrides import describe, load_config, split_overrides
from pasta_jax.processes.agreement import check_shared
from pasta_jax.processes.launchers import ProcessError
from pasta_jax.processes.meeting import report
from pasta_jax.verbs import begin, define_processes, refuse, run_main


def main(argv: Sequence[str], *, values: flags.FlagValues, overrides: Sequence[str]) -> None:
    """Runs the command. Mistakes in it or in the data end in one line and status 2, not in a traceback."""
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
    begin()
    run(config, values.workdir, overrides)


def run(config: Config, workdir: str, overrides: Sequence[str] = ()) -> str:
    """Trains `config` in `workdir`.

    Args:
      config: the experiment.
      workdir: of the run; the same one resumes.
      overrides: what the command line set, so that a contradiction to the model of `init_from` is refused.

    Returns:
      the workdir of the trained model: this one, or that of the last round of preference optimization.
    """
    # These load jax: the refusals above, and --print_config, come at once.
    from pasta_jax.checkpoints.about import CheckpointError, has_checkpoint
    from pasta_jax.data.records import RecordError
    from pasta_jax.data.sources import contents, make_sources
    from pasta_jax.experiment import resolve, stages, with_steps
    from pasta_jax.interchange.origin import carry
    from pasta_jax.preference import rounds
    from pasta_jax.tokens.layout import LayoutError
    from pasta_jax.tokens.tokenizer import TokenizerError
    from pasta_jax.training.loop import SFT, NonFiniteLoss, train

    try:
        with locked(workdir):
            check_shared(workdir)
            if config.stage == "both":
                first, second = stages(config)
                finetuned = run(first, os.path.join(workdir, "sft"), overrides)
                second = dataclasses.replace(second, init_from=finetuned)
                return run(second, os.path.join(workdir, "preference"), overrides)
            config, tokenizer = resolve(config, workdir=workdir, overrides=overrides)
            if config.stage == "preference":
                return rounds.run(config, workdir)
            invalid = os.path.join(workdir, "invalid.jsonl")
            source, held = make_sources(config.data, tokenizer, config.seed, invalid=invalid)
            if config.init_from and not has_checkpoint(workdir):
                carry(config.init_from, workdir)
            config, data = with_steps(config, source), contents(source)
            held_out = (SFT, held) if held else None
            train(config, source=source, tokenizer=tokenizer, workdir=workdir, data=data, held_out=held_out)
            return workdir
    except (
        *(ConfigError, CheckpointError, RecordError, LayoutError, TokenizerError),
        *(ProcessError, OSError),
    ) as error:
        refuse(str(error))
    except NonFiniteLoss as error:
        report(str(error))
        sys.exit(1)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        refuse(
            "Out of memory. Lower --config.data.rows or --config.data.length, or try --config.microbatches=2, "
            "--config.lora.rank=16 or more devices; python -m pasta_jax.compile --config=FILE says what fits. "
            + message_of(error)
        )


def command() -> None:
    """Parses the command line and runs `main`."""
    with_large_pages()
    # Defined here, not on import: importing two verbs into one process must not clash.
    flags.DEFINE_string(
        "config",
        None,
        "The experiment, as configs/tiny.py or configs/tiny.py:pasta. --config.FIELD=VALUE changes a field.",
    )
    flags.DEFINE_string("workdir", None, "Directory of the run.")
    flags.DEFINE_bool(
        "print_config", False, "Print every field of the configuration, with its meaning, and exit."
    )
    define_processes()
    overrides, rest = split_overrides(sys.argv)
    run_main(functools.partial(main, values=flags.FLAGS, overrides=overrides), argv=rest)


if __name__ == "__main__":
    command()
