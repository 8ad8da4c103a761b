"""pasta_jax: learned asynchronous decoding for JAX.

The public names, loaded when first used, so that `pasta_jax.parse` needs no jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    # the language
    "Program": "pasta_jax.lang.program",
    "Text": "pasta_jax.lang.program",
    "Promise": "pasta_jax.lang.program",
    "Sync": "pasta_jax.lang.program",
    "parse": "pasta_jax.lang.parse",
    "parse_lenient": "pasta_jax.lang.parse",
    "ParseError": "pasta_jax.lang.parse",
    "render": "pasta_jax.lang.render",
    "assemble": "pasta_jax.lang.assemble",
    "validate": "pasta_jax.lang.validate",
    # decoding
    "load": "pasta_jax.loading",
    "decode": "pasta_jax.decoding.api",
    "DecodeResult": "pasta_jax.decoding.results",
    "Event": "pasta_jax.decoding.streaming",
    "Draft": "pasta_jax.decoding.streaming",
    "settled_text": "pasta_jax.decoding.streaming",
    "Decoder": "pasta_jax.decoding.engine",
    "PendingAnswer": "pasta_jax.decoding.pending",
    "Load": "pasta_jax.decoding.session",
    "QueueFull": "pasta_jax.decoding.session",
    "Closed": "pasta_jax.decoding.session",
    "Model": "pasta_jax.decoding.model",
    "SamplingParams": "pasta_jax.decoding.request",
    "Limits": "pasta_jax.decoding.state",
    # training
    "Config": "pasta_jax.config",
}

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from pasta_jax.config import Config as Config
    from pasta_jax.decoding.api import decode as decode
    from pasta_jax.decoding.engine import Decoder as Decoder
    from pasta_jax.decoding.model import Model as Model
    from pasta_jax.decoding.pending import PendingAnswer as PendingAnswer
    from pasta_jax.decoding.request import SamplingParams as SamplingParams
    from pasta_jax.decoding.results import DecodeResult as DecodeResult
    from pasta_jax.decoding.session import Closed as Closed
    from pasta_jax.decoding.session import Load as Load
    from pasta_jax.decoding.session import QueueFull as QueueFull
    from pasta_jax.decoding.state import Limits as Limits
    from pasta_jax.decoding.streaming import Draft as Draft
    from pasta_jax.decoding.streaming import Event as Event
    from pasta_jax.decoding.streaming import settled_text as settled_text
    from pasta_jax.lang.assemble import assemble as assemble
    from pasta_jax.lang.parse import ParseError as ParseError
    from pasta_jax.lang.parse import parse as parse
    from pasta_jax.lang.parse import parse_lenient as parse_lenient
    from pasta_jax.lang.program import Program as Program
    from pasta_jax.lang.program import Promise as Promise
    from pasta_jax.lang.program import Sync as Sync
    from pasta_jax.lang.program import Text as Text
    from pasta_jax.lang.render import render as render
    from pasta_jax.lang.validate import validate as validate
    from pasta_jax.loading import load as load


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pasta_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
