"""What verbs share: mistakes of whoever typed the command end in one line and status 2, and what is logged."""

from __future__ import annotations

import logging
import sys
from typing import Any, NoReturn

from absl import flags
from absl import logging as absl_logging

BAD_USAGE = 2


def refuse(message: str) -> NoReturn:
    """Says what is wrong on stderr and leaves."""
    print(message, file=sys.stderr)
    sys.exit(BAD_USAGE)


def show_log() -> None:
    """Shows on stderr what the library logs as it goes along, and of other libraries warnings only."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    log = logging.getLogger("pasta_jax")
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
        log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def define_loading() -> None:
    """The flags of a verb that loads a model to decode: what `pasta_jax.load` takes."""
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of the weights; by default as in training.")
    flags.DEFINE_enum("quantize", None, ["int8"], "Load matrices in int8.")
    flags.DEFINE_string("base", None, "Of adapters: the weights they go beside, if not where they were.")
    flags.DEFINE_string(
        "tokenizer", None, "Of published weights: tokenizer file or folder, if not their own."
    )
    flags.DEFINE_bool(
        "extend_tokenizer", False, "Of published weights: new ids and rows for tags without one."
    )
    flags.DEFINE_string("chat", "auto", "Format of prompts; auto goes by the model's chat template.")


def loading_options(values: flags.FlagValues) -> dict[str, Any]:
    """What the flags of `define_loading` say, for `load`."""
    names = ("dtype", "quantize", "base", "tokenizer", "extend_tokenizer", "chat")
    return {name: values[name].value for name in names}
