"""Judges: which of two answers to a prompt is better (`judges.protocol`).

almanac           a program that checks facts; of Almanac's own prompts
likelihood        a reference model, which prefers what it predicts; needs no endpoint (`judges.likelihood`)
llm               a model behind an OpenAI-compatible endpoint (`judges.llm`)
MODULE:FUNCTION   the user's own: function(prompt, a, b) -> (winner, confidence), or an object with `compare`
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, cast

from pasta_jax.config import JUDGES, is_judge
from pasta_jax.judges.protocol import Comparison, Judge, JudgeError, Preference, checked, compare_all
from pasta_jax.messages import message_of, shown


def make_judge(name: str, **options: Any) -> Judge:
    """The judge of this name.

    Args:
      name: as above.
      options: of `likelihood`, those of `Likelihood`: model, and the shape of its batches; of `llm`, those of
        `judges.llm.make`. The others have none.

    Raises:
      JudgeError: an unknown name, options that it does not have, or a module that cannot be imported.
    """
    if not is_judge(name):
        raise JudgeError(f"There is no judge {shown(name)}. Use {', '.join(JUDGES)} or MODULE:FUNCTION.")
    try:
        if name == "likelihood":
            from pasta_jax.judges.likelihood import Likelihood

            return Likelihood(**options)
        if name == "llm":
            from pasta_jax.judges import llm

            return llm.make(**options)
    except TypeError as error:
        raise JudgeError(f"The judge {name}: {error}.") from error
    if options:
        raise JudgeError(f"The judge {name} has no options; got {', '.join(options)}.")
    if name == "almanac":
        from pasta_jax.data import almanac

        return almanac
    return _of_user(name)


@contextlib.contextmanager
def _said_in_one_line(name: str) -> Iterator[None]:
    try:
        yield
    except JudgeError:
        raise
    except Exception as error:
        raise JudgeError(f"The judge {name} failed: {message_of(error)}") from error


@dataclasses.dataclass(frozen=True)
class _Function:
    """A function as a judge. What it raises is said in one line."""

    name: str
    function: Callable[[str, str, str], Any]

    def compare(self, prompt: str, a: str, b: str, /) -> Preference:
        with _said_in_one_line(self.name):
            return checked(self.function(prompt, a, b))


@dataclasses.dataclass(frozen=True)
class _Object:
    """An object as a judge, likewise."""

    name: str
    judge: Any

    @property
    def takes_messages(self) -> bool:
        return bool(getattr(self.judge, "takes_messages", False))

    @property
    def on_all_devices(self) -> bool:
        return bool(getattr(self.judge, "on_all_devices", False))

    def compare(self, prompt: Any, a: str, b: str, /) -> Preference:
        with _said_in_one_line(self.name):
            return checked(self.judge.compare(prompt, a, b))

    def compare_all(self, comparisons: Sequence[Comparison]) -> Iterator[Preference]:
        with _said_in_one_line(self.name):
            yield from compare_all(self.judge, comparisons)


def source_of(name: str) -> str:
    """A hash of the module of MODULE:FUNCTION; "" without a file. Raises JudgeError if it cannot be imported."""
    path = getattr(_module_of(name), "__file__", None)
    if not path:
        return ""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _module_of(name: str) -> ModuleType:
    module_name = name.partition(":")[0]
    try:
        return importlib.import_module(module_name)
    except Exception as error:
        raise JudgeError(
            f"The judge {name}: {module_name} cannot be imported ({message_of(error)}). Name a module of this "
            "folder or an installed one."
        ) from error


def _of_user(name: str) -> Judge:
    module_name, _, attribute = name.partition(":")
    found = getattr(_module_of(name), attribute, None)
    if inspect.isclass(found):
        try:
            found = found()
        except Exception as error:
            raise JudgeError(f"The judge {name} cannot be made: {message_of(error)}") from error
    if callable(getattr(found, "compare", None)):
        return cast("Judge", _Object(name, found))
    if not callable(found):
        raise JudgeError(f"The judge {name}: {module_name} has no function {attribute}.")
    return _Function(name, found)
