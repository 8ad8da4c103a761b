"""The tiny model on the embedded benchmark; two CPU cores, a few minutes, no download.

    python -m pasta_jax.train --config=configs/tiny.py --workdir=runs/tiny

trains PASTA from scratch in one run, on a mixture of facts and annotated answers. `make almanac` does as the paper
does: it finetunes a sequential baseline and PASTA from one base, then optimizes preferences:

    T="python -m pasta_jax.train"
    $T --config=configs/tiny.py:base       --workdir=runs/base
    $T --config=configs/tiny.py:baseline   --workdir=runs/baseline --config.init_from=runs/base
    $T --config=configs/tiny.py:pasta      --workdir=runs/pasta    --config.init_from=runs/base
    $T --config=configs/tiny.py:preference --workdir=runs/bon      --config.init_from=runs/pasta \
        --config.preference.baseline=runs/baseline

Without init_from, `preference` starts from what `make almanac` leaves in runs/almanac; without a baseline the
opponent is the model of init_from itself, decoding sequentially. `both` runs `pasta` and `preference` in one.
--config.preference.quality_weight is lambda: 1 for speed, inf for quality alone.

The rivals, on the same engine and from the same base, trained for as long: APAR, and the model of
Skeleton-of-Thought, on skeletons and points:

    $T --config=configs/tiny.py:apar       --workdir=runs/apar     --config.init_from=runs/base
    $T --config=configs/tiny.py:sot        --workdir=runs/sot      --config.init_from=runs/base

Any field can be changed, as in --config.optimizer.lr=1e-3; --print_config shows them all.
"""

import dataclasses

from pasta_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    LogConfig,
    OptimizerConfig,
    PreferenceConfig,
)
from pasta_jax.model.config import ModelConfig
from pasta_jax.tokens.positions import Positions

SOURCES = {
    "": (("almanac:base", 0.5), ("almanac:annotated", 0.5)),
    "base": (("almanac:base", 1.0),),
    "baseline": (("almanac:plain", 1.0),),
    "pasta": (("almanac:annotated", 1.0),),
    "apar": (("almanac:apar", 1.0),),
    "sot": (("almanac:skeletons", 1.0),),
}


def get_config(variant: str = "") -> Config:
    """The experiment: base, baseline, pasta, apar, sot, preference, both, or all of PASTA-SFT in one."""
    if variant in SOURCES:
        return sft(variant)
    if variant in ("preference", "both"):
        return preference(variant)
    names = ", ".join(filter(None, [*SOURCES, "preference", "both"]))
    raise ValueError(f"configs/tiny.py has no variant {variant!r}. Use one of {names}.")


def sft(variant: str) -> Config:
    """Training from scratch (none, base), or finetuning, which takes the same number of steps for every method."""
    data = DataConfig(sources=SOURCES[variant], rows=6, length=320)
    if variant == "apar":  # its fork states no length: parent and child go on from the same position
        data = dataclasses.replace(data, dialect="apar", positions=Positions("shared"))
    lr = 3e-3 if variant in ("", "base") else 2.5e-3
    return Config(
        steps={"": 1800, "base": 1150}.get(variant, 700),
        model=ModelConfig(vocab_size=1408, num_kv_heads=2),  # the tokenizer has 1332 ids; the rest is padding
        data=data,
        optimizer=OptimizerConfig(lr=lr, warmup_steps=30, final_lr=0.03),
        checkpoint=CheckpointConfig(every_steps=500),
        log=LogConfig(every=50),
    )


def preference(variant: str) -> Config:
    """The second stage alone, or both; learning rate and steps of the second come from its own section."""
    return dataclasses.replace(
        sft("pasta"),
        stage="both" if variant == "both" else "preference",
        init_from="runs/almanac/base" if variant == "both" else "runs/almanac/pasta",
        # An answer of this model has about -5 nats in all: the 18 nats that best of 8 implies are out of reach, and
        # training towards them ruins what it knows. Hence a small margin, and more weight on the better answer.
        preference=PreferenceConfig(
            prompts_per_round=256,
            samples=8,
            rounds=2,
            quality_weight=4.0,
            margin=4.0,
            alpha=0.1,
            lr=2e-4,
        ),
        log=LogConfig(every=10),
    )
