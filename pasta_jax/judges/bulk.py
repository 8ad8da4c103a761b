"""Many comparisons at once: none is asked twice, and what was answered is kept in a file, line by line."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from pasta_jax.files import LOG_EVERY_S, Lines, json_line, read_jsonl, shows_progress, write_jsonl
from pasta_jax.judges.protocol import Comparison, Judge, Preference, checked, compare_all

LOG = logging.getLogger("pasta_jax")


def judge_all(
    judge: Judge, comparisons: Sequence[Comparison], path: str | os.PathLike[str] | None = None
) -> list[Preference]:
    """What a judge says of each comparison. Equal answers are a tie, which nobody needs to be asked.

    Args:
      judge: asked once about each comparison that PATH does not have.
      comparisons: any number, some perhaps the same.
      path: a JSONL file of this judge's preferences, each under a hash of its comparison. It is appended to as the
        judge answers, so that a run that was cut off goes on there. What has no verdict is not written. By default
        nothing is kept.

    Raises:
      JudgeError: the judge cannot say.
    """
    keys = [key_of(comparison) for comparison in comparisons]
    known = dict(read_jsonl(path, _entry, skip=True)) if path else {}
    todo = {
        key: comparison
        for key, comparison in zip(keys, comparisons, strict=True)
        if key not in known and comparison.a != comparison.b
    }
    if todo:
        if path:
            write_jsonl(path, (_line(key, said) for key, said in known.items()))  # without a broken last line
        LOG.info("Judging %d comparisons; %d are known.", len(todo), len(known))
        asked, logged_at = compare_all(judge, [*todo.values()]), time.monotonic()
        interactive = shows_progress()
        bar = tqdm(asked, total=len(todo), desc="judging", unit="comparison", disable=not interactive)
        with Lines(path or os.devnull) as file:
            for count, (key, said) in enumerate(zip(todo, bar, strict=True), start=1):
                known[key] = said
                if said.is_verdict:
                    file.write(json_line(_line(key, said)))
                if not interactive and time.monotonic() - logged_at > LOG_EVERY_S:
                    LOG.info("%d of %d comparisons are judged.", count, len(todo))
                    logged_at = time.monotonic()
        if missing := sum(not known[key].is_verdict for key in todo):
            LOG.warning(
                "%d of %d comparisons have no verdict. None is kept of these, so that another run asks again.",
                missing,
                len(todo),
            )
    return [
        Preference(None, 0.5) if each.a == each.b else known[key]
        for key, each in zip(keys, comparisons, strict=True)
    ]


def key_of(comparison: Comparison) -> str:
    """A hash of a prompt and two answers, in this order."""
    return hashlib.sha256(json.dumps([*comparison], sort_keys=True).encode()).hexdigest()[:32]


def _line(key: str, said: Preference) -> dict[str, Any]:
    return {"key": key, **said._asdict()}


def _entry(line: dict[str, Any]) -> tuple[str, Preference]:
    return str(line["key"]), checked((line["winner"], line["confidence"]))
