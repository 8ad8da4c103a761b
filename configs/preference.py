r"""Preference optimization of a published model after configs/sft.py: the paper's PASTA-BoN (section 4).

The variant is the model, as in configs/sft.py: gemma-2b (the default), gemma-7b (the paper's), ...

    python -m pasta_jax.train --config=configs/preference.py:gemma-2b --workdir=runs/gemma-2b-bon

The paper's recipe: ten samples a prompt at temperature 1, two rounds, BoNBoN at 5e-7 with alpha 0.005.

The paper's prompts are SlimOrca's and its judge is Gemini 1.5 Pro. These are Almanac's, which a program judges; for
others add --config.preference.prompts=FILE and --config.preference.judge=likelihood or llm (docs/usage.md). The
opponent is the sequential model, if one is named by --config.preference.baseline=WORKDIR, else that of init_from.

--config.preference.quality_weight is lambda: the paper's are 1, 2, 4, 8 and inf.

gemma-2b on 8 chips of v5e (2x4): an update needs 7.9 GiB a chip, by the compiler (pasta_jax.compile, jax 0.10.2,
libtpu 0.0.51); it was not run. docs/tpu.md has others, and
python -m pasta_jax.compile --config=configs/preference.py:gemma-7b --topology=v5e:4x4 says what a chip needs.
"""

from pasta_jax.config import Config, DataConfig, MeshConfig, OptimizerConfig, PreferenceConfig
from pasta_jax.model.presets import preset


def get_config(variant: str = "gemma-2b") -> Config:
    """The experiment on the published model `variant`."""
    return Config(
        stage="preference",
        init_from=f"runs/{variant}-pasta",
        model=preset(variant).config,  # for pasta_jax.compile; training takes the model of init_from
        data=DataConfig(rows=8, length=2048, threads=32),
        optimizer=OptimizerConfig(schedule="linear", final_lr=0.0, weight_decay=0.0),
        preference=PreferenceConfig(
            prompts_per_round=4096, samples=10, rounds=2, quality_weight=4.0, alpha=0.005, lr=5e-7
        ),
        param_dtype="float32",
        mesh=MeshConfig(tensor=2 if variant == "gemma-7b" else 1),
    )
