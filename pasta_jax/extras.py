"""Packages that only the extras of setup.py install: how to import them, and what to do without them."""

from __future__ import annotations

import importlib
from typing import Any


def advice(package: str, extra: str) -> str:
    """How to install a package that an extra of setup.py has; from a clone, since pasta_jax is on no index."""
    return f'pip install {package}, or in a clone: pip install -e ".[{extra}]"'


def optional(module: str, extra: str, purpose: str, error: type[BaseException] = ImportError) -> Any:
    """A module of a package that an extra of setup.py has.

    Args:
      module: its dotted name, which begins with the package's name.
      extra: of setup.py.
      purpose: what needs it, for the message.
      error: the class to raise.

    Raises:
      error: it is not installed, and the message says what to do; or it is, and does not work, and the message
        has the cause.
    """
    try:
        return importlib.import_module(module)
    except ImportError as fault:
        package = module.partition(".")[0]
        if not isinstance(fault, ModuleNotFoundError) or fault.name != package:
            cause = " ".join(str(fault).split())
            raise error(f"{purpose} needs {package}, whose import fails: {cause}") from fault
        raise error(f"{purpose} needs {package}: {advice(package, extra)}.") from fault
