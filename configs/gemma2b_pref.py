r"""Preference optimisation of Gemma 2B, by the paper's recipe for 7B.

    python -m pasta_jax.train --config=configs/gemma2b_pref.py --workdir=runs/gemma-2b-bon

It starts from the model of configs/gemma2b_sft.py. The paper's recipe (section 4): ten samples a prompt at
temperature 1, two rounds, BoNBoN at 5e-7 with alpha 0.005.

The paper's prompts are SlimOrca's and its judge is Gemini 1.5 Pro. A judge for such prompts is not built yet, so
these are Almanac's, which a program judges. The opponent is the sequential model, if one is named by
--config.preference.baseline=WORKDIR, else the model of the start.

--config.preference.weight is lambda: the paper's are 1, 2, 4, 8 and inf.

It was neither compiled nor run:
python -m pasta_jax.compile --config=configs/gemma2b_pref.py --topology=v5e:2x4 says what a chip needs.
"""

import dataclasses

from ml_collections import ConfigDict

from pasta_jax.model.presets import preset


def get_config() -> ConfigDict:
    """The experiment."""
    config = ConfigDict()
    config.stage = "preference"
    config.init_from = "runs/gemma-2b-pasta"
    config.adopt = True  # what stands here is for --print_config and pasta_jax.compile
    config.model = dataclasses.asdict(preset("gemma-2b").config)
    config.data = dict(rows=8, length=2048, threads=32)
    config.optimizer = dict(schedule="linear", final_lr=0.0, weight_decay=0.0)
    config.preference = dict(prompts_per_round=4096, samples=10, rounds=2, weight=4.0, alpha=0.005, lr=5e-7)
    config.remat = True
    config.param_dtype = "float32"
    return config
