"""One answer's threads drawn over time, in characters: what was decoded beside what."""

from __future__ import annotations

import numpy as np

from pasta_jax.decoding.results import DecodeResult

FED, HELD = "█", "·"
_LABEL = 18


def timeline(result: DecodeResult, width: int = 80) -> str:
    """A line for each thread, a column for one or several decode steps; `·` is main waiting at a sync.

    Args:
      result: a decoded answer.
      width: characters of a line, at least 40.
    """
    trace = result.trace
    steps = max(trace.steps, 1)
    columns = max(width, 40) - _LABEL - 1
    per_column = -(-steps // columns)
    labels = ["main", *(f"{branch.id} {branch.topic}" for branch in result.branches)]
    threads = [0, *(branch.id for branch in result.branches)]
    ruler = _ruler(steps, per_column)
    lines = [f"{'decode step':<{_LABEL}} {ruler}"]
    for label, thread in zip(labels, threads):
        fed = np.zeros(-(-steps // per_column), bool)
        mine = trace.step[(trace.tokens.thread == thread) & (trace.step > 0)]
        fed[(mine - 1) // per_column] = True
        active = range(int(np.argmax(fed)), len(fed) - int(np.argmax(fed[::-1]))) if fed.any() else range(0)
        if thread == 0:
            active = range(len(fed))
        cells = [FED if fed[c] else HELD if c in active else " " for c in range(len(fed))]
        lines.append(f"{_shorten(label):<{_LABEL}} {''.join(cells).rstrip()}")
    return "\n".join(lines)


def _ruler(steps: int, per_column: int) -> str:
    """Step numbers over their columns, every ten columns."""
    ruler = ""
    for column in range(0, -(-steps // per_column), 10):
        ruler = ruler.ljust(column) + str(column * per_column + 1)
    return ruler


def _shorten(label: str) -> str:
    return label if len(label) <= _LABEL else label[: _LABEL - 1] + "…"
