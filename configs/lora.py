r"""LoRA finetuning of a published model on one chip.

Adapters on every matrix, and the six tags' embeddings in full; the base stays frozen, in bfloat16. Rank and
learning rate are common ones, not tuned here. The variant is the model, as in configs/sft.py: gemma-2b (the
default), ...

    python -m pasta_jax.convert --from=hf:google/gemma-2b --to=runs/gemma-2b
    python -m pasta_jax.train --config=configs/lora.py:gemma-2b --workdir=runs/gemma-2b-pasta \
        --config.data.sources=annotated.jsonl

annotated.jsonl holds a prompt and an annotated response a line (docs/usage.md, "Training").

gemma-2b on one chip of v5e (1x1): an update needs 6.0 GiB, by the compiler (pasta_jax.compile, jax 0.10.2, libtpu
0.0.51). It was not run.
"""

from pasta_jax.config import Config, DataConfig, OptimizerConfig
from pasta_jax.model.config import Lora
from pasta_jax.model.presets import preset


def get_config(variant: str = "gemma-2b") -> Config:
    """The experiment on the published model `variant`."""
    return Config(
        init_from=f"runs/{variant}",
        model=preset(variant).config,  # for pasta_jax.compile; training takes the model of init_from
        data=DataConfig(sources=(("annotated.jsonl", 1.0),), rows=8, length=1024, threads=32),
        optimizer=OptimizerConfig(
            lr=2e-4, warmup_steps=20, schedule="linear", final_lr=0.0, weight_decay=0.0
        ),
        epochs=4.0,
        microbatches=8,
        lora=Lora(rank=16, alpha=32.0),
        param_dtype="float32",
    )
