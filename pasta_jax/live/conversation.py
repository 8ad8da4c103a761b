"""A conversation on a terminal. Its answers are drawn while they are decoded, and Ctrl-C breaks one off."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import signal
import sys
from collections.abc import Iterator
from typing import Any

from pasta_jax.decoding.engine import Decoder
from pasta_jax.decoding.model import Model
from pasta_jax.decoding.pending import PendingAnswer
from pasta_jax.decoding.request import SamplingParams
from pasta_jax.decoding.results import DecodeResult
from pasta_jax.decoding.state import Limits
from pasta_jax.live import screen
from pasta_jax.terminal import CUT

POOL = 2048
"""Tokens that a conversation may have, if the user does not say."""

PROMPT_BUCKETS = (64, 256, 1024)
"""Lengths that it is padded to, besides the whole pool. They are few: all are compiled before it begins."""

HELP = """\
/reset  begins a new conversation
/quit   ends this one, as Ctrl-D does
Ctrl-C  breaks an answer off; what there is of it stays in the conversation"""


def converse(
    model: Model,
    *,
    mode: str,
    max_branches: int,
    lanes: int,
    grammar: bool,
    cache_len: int | None,
    batch_invariant: bool,
    **sampling: Any,
) -> None:
    """Asks for prompts and answers them, until the user ends it. Options are those of `decode`.

    Raises:
      ValueError: an option out of range, or a pool that does not fit into memory.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # with it `input` edits lines and has a history
    params, threads = SamplingParams(**sampling), max_branches + 1
    if mode == "sequential":
        params = dataclasses.replace(params, open_bias=-math.inf)
    limits = Limits(min(lanes, threads), threads, cache_len or POOL, model.max_depth, constrained=grammar)
    decoder = Decoder(model, limits=limits, prompt_buckets=PROMPT_BUCKETS, batch_invariant=batch_invariant)
    decoder.warm_up()
    _note("/help says what can be done.")
    said = list[dict[str, str]]()
    while (line := _asked()) not in (None, "/quit"):
        if line == "/reset":
            said = []
            _note("A new conversation.")
        elif re.fullmatch(r"/\w+", line):
            print(HELP if line == "/help" else f"There is no {line}.\n{HELP}")
        elif line:
            said = _answered(decoder, [*said, {"role": "user", "content": line}], params) or said


def _asked() -> str | None:
    """What the user types; None for the end."""
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def _answered(
    decoder: Decoder, said: list[dict[str, str]], sampling: SamplingParams
) -> list[dict[str, str]] | None:
    """The conversation with the answer, which is shown; None if it cannot be asked, for a reason that is told."""
    try:
        ids, pool = decoder.model.tokenizer.encode_chat(said), decoder.limits.pool
        if len(ids) >= pool:
            raise ValueError(
                f"The conversation has {len(ids)} tokens, and --cache_len={pool} has to hold its answer too. "
                "/reset begins a new one."
            )
        answer = decoder.submit(ids, sampling)
    except ValueError as error:
        print(error)
        return None
    with _ctrl_c_cancels(answer):
        result = screen.show(answer, sys.stdout)
    _note(_account(result))
    return [*said, {"role": "assistant", "content": result.text}]


@contextlib.contextmanager
def _ctrl_c_cancels(answer: PendingAnswer) -> Iterator[None]:
    """Ctrl-C ends this answer at the next look, and interrupts neither a step nor the drawing."""

    def cancel(*_: object) -> None:
        answer.cancelled = True

    before = signal.signal(signal.SIGINT, cancel)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _account(result: DecodeResult) -> str:
    """What an answer took, and why it ended early, if it did."""
    stats, cut = result.stats, CUT.get(result.stop_reason)
    if result.stop_reason == "cache_full":
        cut = f"{cut}: /reset begins a new conversation"
    counts = f"branches: {len(result.branches)}, steps: {stats.decode_steps}, seconds: {stats.wall_s:.1f}"
    return f"[{counts}{f'; {cut}' if cut else ''}]"


def _note(line: str) -> None:
    print(screen.faint(line) if screen.is_live(sys.stdout) else line)
