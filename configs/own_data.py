r"""A small model on your own records, from scratch; docs/own-data.md goes through all of it.

    T="python -m pasta_jax.train"
    $T --config=configs/own_data.py:baseline   --workdir=runs/own/baseline   # plain answers: data.jsonl
    $T --config=configs/own_data.py:pasta      --workdir=runs/own/pasta      # annotated answers: prepared
    $T --config=configs/own_data.py:preference --workdir=runs/own/bon        # better of its own samples

It has about a million parameters, enough for one narrow subject. For anything else finetune a published model
(configs/sft.py).
"""

import dataclasses

from pasta_jax.config import Config, DataConfig, LogConfig, OptimizerConfig, PreferenceConfig
from pasta_jax.model.config import ModelConfig

VARIANTS = ("baseline", "pasta", "preference")


def get_config(variant: str = "baseline") -> Config:
    """Plain answers from scratch, annotated ones from there, or preference optimization of what came out."""
    if variant not in VARIANTS:
        raise ValueError(f"configs/own_data.py has no variant {variant!r}. Use one of {', '.join(VARIANTS)}.")
    data = DataConfig(
        sources=(("data.jsonl", 1.0),), tokenizer="runs/own/tokenizer.model", rows=6, length=320
    )
    config = Config(
        steps=400,
        model=ModelConfig(vocab_size=1024, num_kv_heads=2),
        data=data,
        optimizer=OptimizerConfig(lr=3e-3, warmup_steps=30, final_lr=0.03),
        log=LogConfig(every=50),
    )
    if variant == "baseline":
        return config
    if variant == "pasta":
        return dataclasses.replace(
            config,
            init_from="runs/own/baseline",
            steps=400,
            data=dataclasses.replace(data, sources=(("prepared:runs/own/prepared", 1.0),)),
            optimizer=dataclasses.replace(config.optimizer, lr=2.5e-3),
        )
    return dataclasses.replace(
        config,
        stage="preference",
        init_from="runs/own/pasta",
        # As in configs/tiny.py: the margin that best of 8 implies is out of reach of so small a model.
        preference=PreferenceConfig(
            baseline="runs/own/baseline",
            prompts="data.jsonl",
            judge="likelihood",
            prompts_per_round=64,
            samples=8,
            rounds=1,
            margin=4.0,
            alpha=0.1,
            lr=2e-4,
        ),
        log=LogConfig(every=10),
    )
