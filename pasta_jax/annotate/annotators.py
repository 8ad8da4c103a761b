"""Annotators by name. What an annotator needs is imported when it is made."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

from pasta_jax.annotate.protocol import Annotator, ManyAnnotator
from pasta_jax.lang import tags
from pasta_jax.lang.validate import MAX_BRANCHES
from pasta_jax.messages import shown
from pasta_jax.tokens.tokenizer import Tokenizer

MAKERS = {
    "rule:structure": "pasta_jax.annotate.structure",
    "rule:apar": "pasta_jax.annotate.apar",
    "llm": "pasta_jax.annotate.llm",
    "self": "pasta_jax.annotate.itself",
}
"""The module of each annotator; its function `make(options)` gives one."""

MAX_LOSS = 0.2
"""Nats per token that a block may lose by not seeing its siblings (`audit`). On Almanac, read by a model trained
on it, the steps of chains lose more, and 99 of 100 items of lists and prose lose less."""


ROW = 2048
"""Tokens of a row, if --length does not say; long enough for almost all answers of chat models."""


class AnnotatorError(ValueError):
    """There is no such annotator, or it cannot be made; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What annotators are made of.

    Attributes:
      tokenizer: of the model that will be trained.
      folder: of the run, for what an annotator keeps between runs, such as answers of an endpoint.
      marker, min_block, max_branches, length, min_speedup: as in `structure.Structure`.
      flags: the values of the command's flags, by name; an annotator of a kind of its own reads its flags there.
    """

    tokenizer: Tokenizer
    folder: str
    marker: Literal["main", "block"] = "main"
    min_block: int = 16
    max_branches: int = MAX_BRANCHES
    length: int = 0
    min_speedup: float = 1.1
    flags: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def dialect_of(name: str) -> tags.Dialect:
    """The dialect in which an annotator writes."""
    return "apar" if name == "rule:apar" else "pasta"


def make_annotator(name: str, options: Options) -> Annotator | ManyAnnotator:
    """An annotator: one of MAKERS, or the user's own as module:function, with the signature of `Annotator`.

    Raises:
      AnnotatorError: there is none of this name.
    """
    if module := MAKERS.get(name):
        make: Callable[[Options], Annotator | ManyAnnotator] = importlib.import_module(module).make
        return make(options)
    module, _, function = name.partition(":")
    if not function or module in ("rule", "llm", "self"):
        names = ", ".join(MAKERS)
        raise AnnotatorError(f"--annotator={shown(name)} is none of {names}, and no module:function.")
    try:
        return cast("Annotator", getattr(importlib.import_module(module), function))
    except ImportError as error:
        raise AnnotatorError(f"--annotator={name}: cannot import {module}: {error}.") from error
    except AttributeError:
        raise AnnotatorError(f"--annotator={name}: {module} has no {function}.") from None
