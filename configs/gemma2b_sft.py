r"""Supervised finetuning of Gemma 2B, by the paper's recipe for 7B.

The paper's batch holds 8 examples (section 5.1). Rows here are packed: 8 of 2048 tokens hold several times as many,
so there are fewer steps in its four epochs. --config.data.length=512 comes close to its batch.

    python -m pasta_jax.convert --from=hf:google/gemma-2b --to=runs/gemma-2b
    python -m pasta_jax.train --config=configs/gemma2b_sft.py --workdir=runs/gemma-2b-pasta \
        --config.data.sources=annotated.jsonl

annotated.jsonl holds a prompt and an annotated response a line (README, "Train").

On 8 chips of v5e (2x4) an update needs 6.8 GiB a chip, by the compiler (pasta_jax.compile, jax 0.10.2, libtpu
0.0.51). It was not run.
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
    config.data = dict(sources="annotated.jsonl", rows=8, length=2048, threads=32)
    # The paper: 1e-5, linear to zero, four epochs; warm-up and weight decay are not stated there.
    config.optimizer = dict(lr=1e-5, warmup_steps=0, schedule="linear", final_lr=0.0, weight_decay=0.0)
    config.epochs = 4.0
    config.remat = True
    config.param_dtype = "float32"
    return config
