"""What verbs share: mistakes of whoever typed the command end in one line and status 2, and what is logged."""

from __future__ import annotations

import logging
import sys
from typing import NoReturn

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
