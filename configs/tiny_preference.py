r"""Preference optimisation of the tiny model, on the embedded benchmark; two CPU cores, a few minutes.

From the models that `make demo` leaves in runs/demo:

    python -m pasta_jax.train --config=configs/tiny_preference.py --workdir=runs/preference

Both stages in one run, PASTA-SFT from the base and then the rounds:

    python -m pasta_jax.train --config=configs/tiny_preference.py:both --workdir=runs/both

--config.preference.weight is lambda: 1 for speed, inf for quality alone.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """The second stage alone, or `both`."""
    if arg not in ("", "both"):
        raise ValueError(f"configs/tiny_preference.py has no variant {arg!r}. Use both, or none.")
    config = ConfigDict()
    config.stage = arg or "preference"
    config.init_from = "runs/demo/base" if arg else "runs/demo/pasta"
    config.model = dict(vocab_size=1408, num_kv_heads=2)
    config.data = dict(sources="almanac:annotated", rows=6, length=320)
    # The first stage, as configs/tiny.py:pasta; the second takes its rate and its steps from `preference`.
    config.steps = 800
    config.optimizer = dict(lr=2.5e-3, warmup_steps=30, final_lr=0.03)
    # An answer of this model has about -5 nats in all: the 18 nats that best of 8 implies are not there to be had,
    # and striving for them ruins what it knows. Hence a small margin, and more weight on the better answer.
    config.preference = dict(
        baseline="runs/demo/baseline",
        prompts_per_round=256,
        samples=8,
        rounds=2,
        weight=4.0,
        margin=4.0,
        alpha=0.1,
        lr=2e-4,
    )
    config.checkpoint = dict(every_steps=500)
    config.log = dict(every=10)
    return config
