r"""Supervised finetuning of a published model, by the paper's recipe for Gemma 7B (PASTA-SFT, section 5.1).

The variant is the model, by the names of `pasta_jax.model.presets`: gemma-2b (the default), gemma-7b, llama-3.2-1b,
qwen3-0.6b, ... Downloads from the Hugging Face Hub need pip install -e ".[hf]", and so do all tokenizers but
Gemma's.

    python -m pasta_jax.convert --from=hf:google/gemma-2b --to=runs/gemma-2b
    python -m pasta_jax.train --config=configs/sft.py:gemma-2b --workdir=runs/gemma-2b-pasta \
        --config.data.sources=annotated.jsonl

annotated.jsonl holds a prompt and an annotated response a line (docs/usage.md, "Training").

The paper's batch holds 8 examples. Rows here are packed: 8 of 2048 tokens hold several times as many, so there are
fewer steps in its four epochs. --config.data.length=512 comes close to its batch.

gemma-2b on 8 chips of v5e (2x4): an update needs 8.0 GiB a chip, by the compiler (pasta_jax.compile, jax 0.10.2,
libtpu 0.0.51); it was not run. docs/tpu.md has others, and
python -m pasta_jax.compile --config=configs/sft.py:gemma-7b --topology=v5e:4x4 says what a chip needs.
"""

from pasta_jax.config import Config, DataConfig, MeshConfig, OptimizerConfig
from pasta_jax.model.presets import preset


def get_config(variant: str = "gemma-2b") -> Config:
    """The experiment on the published model `variant`."""
    return Config(
        init_from=f"runs/{variant}",
        model=preset(variant).config,  # for pasta_jax.compile; training takes the model of init_from
        data=DataConfig(sources=(("annotated.jsonl", 1.0),), rows=8, length=2048, threads=32),
        # The paper: 1e-5, linear to zero, four epochs; warm-up and weight decay are not stated there.
        optimizer=OptimizerConfig(lr=1e-5, warmup_steps=0, schedule="linear", final_lr=0.0, weight_decay=0.0),
        epochs=4.0,
        param_dtype="float32",
        mesh=MeshConfig(tensor=2 if variant == "gemma-7b" else 1),
    )
