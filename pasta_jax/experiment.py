"""An experiment resolved: everything that its configuration leaves open is filled in here, and nowhere else.

    resolve      model and tokenizer of the start, and the vocabulary rows that adapters train
    with_steps   epochs as steps, by the data
    round_of     what one round of preference optimization trains with

Training (`train`, `preference.rounds`) and compiling ahead of time (`compile`) both call `resolve` and `stages`.
Only training has data to count epochs with, and rounds; they set numbers in a program, never its shapes.
"""

from __future__ import annotations

import dataclasses
import logging
import operator
from collections.abc import Iterable

from pasta_jax.checkpoints.about import (
    CheckpointMetadata,
    find_checkpoint,
    has_checkpoint,
    read_metadata,
    read_newest,
)
from pasta_jax.config import Config, ConfigError, DataConfig
from pasta_jax.data.batches import Stream
from pasta_jax.data.prepared import is_prepared
from pasta_jax.data.sources import make_tokenizer, steps_of_epochs
from pasta_jax.overrides import differences
from pasta_jax.tokens.tokenizer import Tokenizer

LOG = logging.getLogger("pasta_jax")

INHERITED = ("model.", "data.tokenizer", "data.extend_tokenizer")
"""Fields that come from the checkpoint in `init_from`."""


def resolve(
    config: Config, *, workdir: str = "", overrides: Iterable[str] = (), ahead: bool = False
) -> tuple[Config, Tokenizer]:
    """The configuration as it will run, and the tokenizer of the data.

    With `init_from`, model and tokenizer are those of its checkpoint; only `model.dtype` stays, which says how to
    compute. The model of a configuration file then serves to compile before there is a checkpoint.

    Args:
      config: the experiment.
      workdir: of the run. Once it holds a checkpoint, that one is asked instead of `init_from`.
      overrides: what the command line set, as `load_config` takes it. A tokenizer that it names is meant.
      ahead: compile only: without a checkpoint in `init_from`, the model and tokenizer are those of the file.

    Raises:
      ConfigError: an override contradicts the checkpoint.
      CheckpointError: `init_from` holds no checkpoint.
      TokenizerError: the tokenizer of an experiment from scratch cannot be loaded.
    """
    goes_on = bool(workdir) and has_checkpoint(workdir)
    if config.init_from and not (ahead and not has_checkpoint(config.init_from)):
        start = workdir if goes_on else config.init_from
        metadata = read_newest(workdir) if goes_on else read_metadata(find_checkpoint(start))
        resolved, tokenizer = _inherited(config, metadata)
        for text in overrides:
            path = text.partition("=")[0]
            wanted, there = (operator.attrgetter(path)(c) for c in (config, resolved))
            if path.startswith(INHERITED) and wanted != there:
                raise ConfigError(
                    f"config.{path} is {wanted!r}, but {start} has {there!r}, and training "
                    f"starts from it. Leave --config.{path} out, or train from scratch."
                )
        replaced = [name for name in differences(config, resolved) if name.startswith("model.")]
        if replaced and start == config.init_from:  # a run that goes on has said so
            LOG.warning(
                "The model is that of %s; it differs from the configuration in %s.",
                start,
                ", ".join(replaced),
            )
        config = resolved
    else:
        tokenizer = make_tokenizer(config.data)
        if not goes_on and not any(text.startswith("data.tokenizer=") for text in overrides):
            _warn_of_tokenizer(config.data)
    _warn_of_steps(config, overrides)
    return with_lora_rows(config, tokenizer), tokenizer


def _warn_of_steps(config: Config, overrides: Iterable[str]) -> None:
    """Says so if steps were asked for that do not count."""
    if "steps" not in {text.partition("=")[0] for text in overrides}:
        return
    if config.stage == "preference":
        LOG.warning(
            "config.steps=%d does not count in the second stage: config.preference.epochs_per_round=%g does.",
            *(config.steps, config.preference.epochs_per_round),
        )
    elif config.epochs:
        LOG.warning(
            "config.steps=%d does not count: config.epochs=%g sets the steps. To count in steps add "
            "--config.epochs=0.",
            *(config.steps, config.epochs),
        )


def _warn_of_tokenizer(config: DataConfig) -> None:
    """Says so if a model learns texts of one's own with the almanac's tokenizer, and nobody asked for that."""
    own = [name for name, _ in config.sources if not name.startswith("almanac:") and not is_prepared(name)]
    if config.tokenizer == "almanac" and own:
        LOG.warning(
            "%s will be learnt with the almanac's tokenizer, which spells other words nearly letter by letter. "
            "Make one for it: python -m pasta_jax.tokenizer --text=%s --vocab_size=8000 --to=own.model, and train "
            "with --config.data.tokenizer=own.model. (--config.data.tokenizer=almanac says that it is meant.)",
            ", ".join(own),
            ",".join(own),
        )


def _inherited(config: Config, metadata: CheckpointMetadata) -> tuple[Config, Tokenizer]:
    tokenizer = metadata.load_tokenizer()
    if config.data.chat != "auto":
        tokenizer = tokenizer.with_chat(config.data.chat)
    model = dataclasses.replace(metadata.config.model, dtype=config.model.dtype)
    inherited = {name: getattr(metadata.config.data, name) for name in ("tokenizer", "extend_tokenizer")}
    data = dataclasses.replace(config.data, **inherited)
    return dataclasses.replace(config, model=model, data=data), tokenizer.with_dialect(config.data.dialect)


def with_lora_rows(config: Config, tokenizer: Tokenizer) -> Config:
    """Adapters train the embeddings of the tags, which the base never learned, unless `lora.rows` names others."""
    if not config.lora.rank or config.lora.rows:
        return config
    rows = tuple(sorted(tokenizer.vocabulary.tag_ids.values()))
    return dataclasses.replace(config, lora=dataclasses.replace(config.lora, rows=rows))


def with_steps(config: Config, source: Stream) -> Config:
    """With the steps that its epochs over the documents of `source` take, if it counts in epochs."""
    if not config.epochs:
        return config
    return dataclasses.replace(config, steps=steps_of_epochs(config.data, source, config.epochs))


def stages(config: Config) -> list[Config]:
    """The stages of an experiment, in order; a second stage after a first starts from its workdir, "sft"."""
    if config.stage != "both":
        return [config]
    first = dataclasses.replace(config, stage="sft")
    return [first, dataclasses.replace(config, stage="preference", init_from="sft")]


def round_of(config: Config, policy: str, steps: int) -> Config:
    """What a round of preference optimization trains with: from the policy, at the stage's own learning rate."""
    lr, warmup = config.preference.lr, max(1, steps // 10)
    optimizer = dataclasses.replace(config.optimizer, lr=lr, warmup_steps=warmup)
    return dataclasses.replace(config, init_from=policy, steps=steps, optimizer=optimizer)
