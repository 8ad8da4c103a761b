"""Command lines of training: `--config.FIELD=VALUE` is a configuration that can be made, or one line."""

from __future__ import annotations

import random
from typing import Any

from pasta_jax.config import Config, ConfigError
from pasta_jax.overrides import (
    _SYNONYMS,
    _walk,
    describe,
    from_dict,
    load_config,
    override,
    split_overrides,
    to_dict,
)
from pasta_jax.verbs import config_file
from tests.fuzz import hostile
from tests.fuzz.runner import Target, outcome

FIELDS = [path for path, _, _ in _walk(Config())]
VALUES = (
    *(
        "",
        "0",
        "1",
        "-1",
        "3",
        "1e3",
        "1e400",
        "nan",
        "inf",
        "-inf",
        "true",
        "None",
        "50k",
        "0x10",
        "1_000",
        "٣",
    ),
    *(
        "a,b",
        "a=1,b=2",
        "((1,2),)",
        "[",
        "(" * 300,
        "{}",
        "()",
        "[[]]",
        "a=b=c",
        "=",
        ",",
        "'",
        "2**31",
        "1.5",
        "³",
    ),
    *(
        "9" * 20,
        "9" * 5_000,
        "-" + "9" * 400,
        "1" + "0" * 400,
        "almanac:none",
        "global,local",
        "\ud83d",
        "\x00",
        "--",
    ),
)
SPECS = ("tiny.py", "tiny.py:pasta", "tiny.py:nope", "tiny.py:", "none.py", "", ":", "\x00", "tiny.py:\ud83d")


def draw(rng: random.Random) -> Any:
    words = []
    for _ in range(rng.randint(1, 3)):
        name = rng.choice(
            (*FIELDS, *FIELDS, *_SYNONYMS, "model", "data", "", ".", "model.", "..a", "steps.x")
        )
        if rng.random() < 0.1:
            name = str(hostile.text(rng, large=False))
        value = rng.choice(VALUES) if rng.random() < 0.8 else str(hostile.text(rng, large=False))
        word = f"{rng.choice(('--', '--', '-'))}config.{name}"
        words += [f"{word}={value}"] if rng.random() < 0.8 else [word, value]
    return {"config": rng.choice(("tiny.py", "tiny.py:pasta", *SPECS)), "words": words}


def check(case: Any) -> None:
    spec = case["config"]
    if spec.startswith("tiny.py"):
        spec = config_file("tiny.py") + spec.removeprefix("tiny.py")
    changes, rest = split_overrides(case["words"])
    assert len(changes) + len(rest) <= len(case["words"])
    config, error = outcome(ConfigError, load_config, spec, changes)
    if error:
        return
    assert from_dict(to_dict(config)) == config and override(config, []) == config
    assert all(field in describe(config) for field in FIELDS)
    check_usable(config)


def check_usable(config: Config) -> None:
    """What a run derives from it first."""
    import jax

    from pasta_jax.training.loop import training_mesh

    outcome(ConfigError, training_mesh, config, jax.devices()[:1])
    jax.random.key(config.seed)


TARGET = Target(draw, check, cases=80)
