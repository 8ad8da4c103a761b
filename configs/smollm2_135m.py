r"""SmolLM2-135M-Instruct, finetuned on its own answers: docs/real-model.md goes through all of it.

    T="python -m pasta_jax.train"
    $T --config=configs/smollm2_135m.py:pasta --workdir=runs/real/pasta   # promises that the audit let pass
    $T --config=configs/smollm2_135m.py:plain --workdir=runs/real/plain   # the sequential baseline: no tags
    $T --config=configs/smollm2_135m.py:apar  --workdir=runs/real/apar    # the forks of APAR's rules
    $T --config=configs/smollm2_135m.py:block --workdir=runs/real/block   # marks and heads of items in the blocks
    $T --config=configs/smollm2_135m.py:bon-4 --workdir=runs/real/bon-4   # preference optimization with lambda 4

The first four learn the same answers. `python -m pasta_jax.real_model` runs these and what comes before and after
them. The adapters have rank 8, so that they fit into a file of 5 MB. Everything is computed in float32, in which a
CPU is fastest.
"""

import dataclasses
import math

from pasta_jax.config import Config, DataConfig, LogConfig, OptimizerConfig, PreferenceConfig
from pasta_jax.model.config import Lora
from pasta_jax.model.presets import preset
from pasta_jax.tokens.positions import Positions

FOLDER = "runs/real"
FILES = {"plain": "plain.jsonl", "apar": "apar.jsonl", "block": "block.jsonl", "pasta": "self.jsonl"}
LAMBDAS = {"bon-1": 1.0, "bon-4": 4.0, "bon-inf": math.inf}


def get_config(variant: str = "pasta") -> Config:
    """Finetuning on one file of answers, or preference optimization after `pasta` with one lambda."""
    if variant not in {**FILES, **LAMBDAS}:
        known = ", ".join([*FILES, *LAMBDAS])
        raise ValueError(f"configs/smollm2_135m.py has no variant {variant!r}. Use one of {known}.")
    name = FILES.get(variant, FILES["pasta"])
    config = Config(
        init_from=f"{FOLDER}/base",
        model=dataclasses.replace(preset("smollm2-135m-instruct").config, dtype="float32"),
        # Answers are learnt as answers to `question`; they were asked for by `prompt`, with a hint at their form.
        data=DataConfig(
            sources=((f"{FOLDER}/{name}", 1.0),), columns=(("prompt", "question"),), rows=2, length=512
        ),
        optimizer=OptimizerConfig(
            lr=1e-3, warmup_steps=10, schedule="linear", final_lr=0.0, weight_decay=0.0
        ),
        epochs=3.0,
        lora=Lora(rank=8, alpha=16.0),
        param_dtype="float32",
        log=LogConfig(every=5),
    )
    if variant == "apar":  # its fork states no length: parent and child go on from the same position
        data = dataclasses.replace(config.data, dialect="apar", positions=Positions("shared"))
        return dataclasses.replace(config, data=data)
    if variant in FILES:
        return config
    return dataclasses.replace(
        config,
        stage="preference",
        init_from=f"{FOLDER}/pasta",
        preference=PreferenceConfig(
            baseline=f"{FOLDER}/plain",
            prompts=f"{FOLDER}/prompts.jsonl",
            judge="likelihood",
            judge_model=f"{FOLDER}/base",
            quality_weight=LAMBDAS[variant],
            prompts_per_round=48,
            samples=4,
            rounds=1,
            temperature=0.7,
            # The margin that best of 4 implies (5.5 nats) moves so small a model too far.
            margin=3.0,
            alpha=0.05,
            lr=2e-4,
            sampling_rows=16,
        ),
    )
