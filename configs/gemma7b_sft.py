r"""Supervised finetuning of Gemma 7B: the paper's PASTA-SFT (section 5.1).

The paper's batch holds 8 examples (section 5.1). Rows here are packed: 8 of 2048 tokens hold several times as many,
so there are fewer steps in its four epochs. --config.data.length=512 comes close to its batch.

    python -m pasta_jax.convert --from=hf:google/gemma-7b --to=runs/gemma-7b
    python -m pasta_jax.train --config=configs/gemma7b_sft.py --workdir=runs/gemma-7b-pasta \
        --config.data.sources=annotated.jsonl

annotated.jsonl holds a prompt and an annotated response a line (README, "Train").

It was neither compiled nor run:
python -m pasta_jax.compile --config=configs/gemma7b_sft.py --topology=v5e:4x4 says what a chip needs.
"""

import dataclasses

from ml_collections import ConfigDict

from pasta_jax.model.presets import preset


def get_config() -> ConfigDict:
    """The experiment."""
    config = ConfigDict()
    config.init_from = "runs/gemma-7b"
    config.adopt = True  # what stands here is for --print_config and pasta_jax.compile
    config.model = dataclasses.asdict(preset("gemma-7b").config)
    config.data = dict(sources="annotated.jsonl", rows=8, length=2048, threads=32)
    # The paper: 1e-5, linear to zero, four epochs; warm-up and weight decay are not stated there.
    config.optimizer = dict(lr=1e-5, warmup_steps=0, schedule="linear", final_lr=0.0, weight_decay=0.0)
    config.epochs = 4.0
    config.remat = True
    config.param_dtype = "float32"
    config.mesh = dict(tensor=2)
    return config
