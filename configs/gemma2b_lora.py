r"""LoRA finetuning of Gemma 2B on one chip.

Adapters on every matrix, and the six tags' embeddings in full; the base stays frozen, in bfloat16. Rank and
rate are common ones, not tuned here.

    python -m pasta_jax.convert --from=hf:google/gemma-2b --to=runs/gemma-2b
    python -m pasta_jax.train --config=configs/gemma2b_lora.py --workdir=runs/gemma-2b-pasta \
        --config.data.sources=annotated.jsonl

annotated.jsonl holds a prompt and an annotated response a line (README, "Train").

On one chip of v5e (1x1) an update needs 6.0 GiB, by the compiler (pasta_jax.compile, jax 0.10.2, libtpu 0.0.51). It
was not run.
"""

import dataclasses

from ml_collections import ConfigDict

from pasta_jax.model.presets import preset


def get_config() -> ConfigDict:
    """The experiment."""
    config = ConfigDict()
    config.init_from = "runs/gemma-2b"
    config.adopt = True  # what stands here is for --print_config and pasta_jax.compile
    config.model = dataclasses.asdict(preset("gemma-2b").config)
    config.data = dict(sources="annotated.jsonl", rows=8, length=1024, threads=32)
    config.optimizer = dict(lr=2e-4, warmup_steps=20, schedule="linear", final_lr=0.0, weight_decay=0.0)
    config.epochs = 4.0
    config.remat = True
    config.microbatches = 8
    config.lora = dict(rank=16, alpha=32.0)
    config.param_dtype = "float32"
    return config
