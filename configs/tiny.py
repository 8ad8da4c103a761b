"""The tiny model on the embedded benchmark; two CPU cores, a few minutes, no download.

    python -m pasta_jax.train --config=configs/tiny.py --workdir=runs/tiny

trains PASTA from scratch in one run, on a mixture of facts and annotated answers. The demo does as the paper
does, and finetunes a sequential baseline and PASTA from one base:

    T="python -m pasta_jax.train"
    $T --config=configs/tiny.py:base     --workdir=runs/base
    $T --config=configs/tiny.py:baseline --workdir=runs/baseline --config.init_from=runs/base
    $T --config=configs/tiny.py:pasta    --workdir=runs/pasta    --config.init_from=runs/base

The rivals, on the same engine and from the same base, trained for as long: APAR, and the model of
Skeleton-of-Thought, on skeletons and points:

    $T --config=configs/tiny.py:apar     --workdir=runs/apar     --config.init_from=runs/base
    $T --config=configs/tiny.py:sot      --workdir=runs/sot      --config.init_from=runs/base

Any field can be changed, as in --config.optimizer.lr=1e-3; --print_config shows them all.
"""

from ml_collections import ConfigDict

_SOURCES = {
    "": "almanac:base=0.5,almanac:annotated=0.5",
    "base": "almanac:base",
    "baseline": "almanac:plain",
    "pasta": "almanac:annotated",
    "apar": "almanac:apar",
    "sot": "almanac:skeletons",
}


def get_config(arg: str = "") -> ConfigDict:
    """The experiment `arg`: base, baseline, pasta, apar, sot, or none for all in one."""
    if arg not in _SOURCES:
        raise ValueError(
            f"configs/tiny.py has no variant {arg!r}. Use one of {', '.join(filter(None, _SOURCES))}."
        )
    config = ConfigDict()
    config.steps = {"": 1800, "base": 1300}.get(arg, 800)  # all that is finetuned gets the same
    # The almanac's tokenizer has 1332 ids; the rest is padding.
    config.model = dict(vocab_size=1408, num_kv_heads=2)
    config.data = dict(sources=_SOURCES[arg], rows=6, length=320)
    if arg == "apar":  # its fork says no length: parent and child go on from the same position
        config.data.dialect = "apar"
        config.data.positions = dict(scheme="shared")
    config.optimizer = dict(lr=3e-3 if arg in ("", "base") else 2.5e-3, warmup_steps=30, final_lr=0.03)
    config.checkpoint = dict(every_steps=500)
    config.log = dict(every=50)
    return config
