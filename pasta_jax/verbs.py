"""What all verbs share: a mistake of whoever typed the command ends in one line and status 2."""

from __future__ import annotations

import sys
from typing import NoReturn

BAD_USAGE = 2


def refuse(message: str) -> NoReturn:
    """Says what is wrong on stderr and leaves."""
    print(message, file=sys.stderr)
    sys.exit(BAD_USAGE)
