"""Threads drawn over time, from made-up decodes whose drawing is known."""

import io
import os
import re

import numpy as np
import pytest

from pasta_jax import terminal as live
from pasta_jax.arrays import ThreadedTokens
from pasta_jax.decoding.results import Branch, DecodeResult, Stats
from pasta_jax.decoding.state import UNFED, Stop
from pasta_jax.decoding.streaming import Event
from pasta_jax.decoding.trace import Trace
from pasta_jax.lang.program import Program
from pasta_jax.terminal import timeline
from pasta_jax.testing import WordTokenizer


def decoded(steps: int, fed: list[list[int]], topics: list[str]) -> DecodeResult:
    """An answer of which thread k was fed in the steps `fed[k]`, after a prompt of one token."""
    thread = np.array([0] + [k for k, mine in enumerate(fed) for _ in mine], np.int32)
    step = np.array([0] + [s for mine in fed for s in mine], np.int32)
    nothing = np.zeros_like(thread)
    trace = Trace(
        tokens=ThreadedTokens(
            token=nothing,
            position=nothing,
            doc=nothing + 1,
            segment=nothing,
            order=(step > 0) - 1,
            sees=nothing[:, None].astype(np.uint32),
            thread=thread,
            target=nothing,
        ),
        step=step,
        logprob=np.zeros(len(thread), np.float32),
        stop=Stop.EOS,
        steps=steps,
        parent=np.array([-1] + [0] * len(topics)),
        fork_order=np.array([-1] + [0] * len(topics)),
        force_closed=np.zeros(len(fed), bool),
        finished=np.ones(len(fed), bool),
    )
    branches = tuple(
        Branch(k, 0, topic, 10, len(fed[k]), "", min(fed[k]), max(fed[k]), "done")
        for k, topic in enumerate(topics, 1)
    )
    stats = Stats(1, len(thread) - 1, steps, 1, 1, 1.0, 1.0, 0.0, 1.0, 1, 1.0)
    return DecodeResult(
        *("", "", trace.tokens.token[1:], trace.logprob[1:], branches, stats, "eos", (), Program(()), trace),
        vocabulary=WordTokenizer("").vocabulary,
    )


def test_every_step_a_column() -> None:
    # Main waits in steps 4 and 5; branch 2 finds no lane in step 4. The end of the answer is fed to nobody.
    result = decoded(6, [[1, 2, 3, 6, UNFED], [2, 3, 4, 5], [3, 5]], ["rivers", "mountains and seas"])
    assert timeline(result, width=40).splitlines() == [
        "decode step        1",
        "main               ███··█",
        "1 rivers            ████",
        "2 mountains and s…   █·█",
    ]


def test_several_steps_a_column() -> None:
    # 40 characters leave 21 columns: two steps each, the ruler saying every tenth column's first.
    main = [s for s in range(1, 31) if not 11 <= s <= 14]
    result = decoded(30, [main, [11, 12, 13, 14]], ["rivers"])
    assert timeline(result, width=40).splitlines() == [
        "decode step        1         21",
        "main               █████··████████",
        "1 rivers                ██",
    ]


def test_an_answer_that_was_never_begun() -> None:
    result = decoded(0, [[UNFED]], [])
    assert timeline(result).splitlines()[1] == "main               ·"


@pytest.mark.slow
def test_an_answer_in_a_terminal_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is settled is written once; what is not stands behind it, on one line, and is erased."""
    monkeypatch.setattr("shutil.get_terminal_size", lambda *_, **__: os.terminal_size((30, 9)))
    events = [
        Event("text", text="Two rivers: "),
        Event("promise", branch=1, parent=0, topic="Nile"),
        Event("text", text=" Both\nare very long."),
        Event("text", branch=1, text="東 the Nile"),
        Event("closed", branch=1),
        Event("closed"),
        Event("done"),
    ]
    text = "Two rivers: 東 the Nile Both\nare very long.\n"
    plain, screen = io.StringIO(), io.StringIO()
    for out, is_live in ((plain, False), (screen, True)):
        write = live.printer(out, live=is_live)
        for event in events:
            write(event)
    assert plain.getvalue() == text
    faint = re.escape(live.SAVE + live.FAINT) + "(.*?)" + re.escape(live.PLAIN + live.RESTORE)
    assert re.sub(faint, "", screen.getvalue()).replace(live.ERASE, "") == text
    assert re.findall(faint, screen.getvalue()) == ["[Nile …]", "[Nile …] Both are", "[Nile "]
    assert re.fullmatch(
        f"({re.escape(live.ERASE)}|[^\x1b]|{faint}(?={re.escape(live.ERASE)}))*", screen.getvalue()
    )


def test_a_text_does_not_control_the_terminal() -> None:
    """Neither what is settled nor what is not; in a pipe the text is as the model wrote it."""
    events = [
        Event("text", text="a\x1b[2Jb"),
        Event("promise", branch=1, parent=0, topic="Nile"),
        Event("text", text="\x07 c"),
    ]
    for is_live in (True, False):
        out = io.StringIO()
        write = live.printer(out, live=is_live)
        for event in events:
            write(event)
        assert ("\x1b[2J" in out.getvalue()) != is_live and "\x07" not in out.getvalue()
        assert ("a\ufffd[2Jb" in out.getvalue()) == is_live
