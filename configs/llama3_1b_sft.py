r"""Supervised finetuning of Llama 3.2 1B.

Needs pip install 'pasta_jax[hf]', for its tokenizer. The recipe is the paper's for Gemma 7B.

    python -m pasta_jax.convert --from=hf:meta-llama/Llama-3.2-1B --to=runs/llama-3.2-1b
    python -m pasta_jax.train --config=configs/llama3_1b_sft.py --workdir=runs/llama-3.2-1b-pasta \
        --config.data.sources=annotated.jsonl

annotated.jsonl holds a prompt and an annotated response a line (README, "Train").

It was neither compiled nor run:
python -m pasta_jax.compile --config=configs/llama3_1b_sft.py --topology=v5e:2x4 says what a chip needs.
"""

import dataclasses

from ml_collections import ConfigDict

from pasta_jax.model.presets import preset


def get_config() -> ConfigDict:
    """The experiment."""
    config = ConfigDict()
    config.init_from = "runs/llama-3.2-1b"
    config.adopt = True  # what stands here is for --print_config and pasta_jax.compile
    config.model = dataclasses.asdict(preset("llama-3.2-1b").config)
    config.data = dict(sources="annotated.jsonl", rows=8, length=2048, threads=32)
    # The paper: 1e-5, linear to zero, four epochs; warm-up and weight decay are not stated there.
    config.optimizer = dict(lr=1e-5, warmup_steps=0, schedule="linear", final_lr=0.0, weight_decay=0.0)
    config.epochs = 4.0
    config.remat = True
    config.param_dtype = "float32"
    return config
