"""The harness finds what is wrong; the corpus, and some random inputs of every target that starts no processes."""

from __future__ import annotations

import contextlib
import json
import pathlib
import random
import re
import signal
import subprocess
import sys
import time
import types
from typing import Any

import numpy as np
import pytest

from tests.fuzz import __main__ as command
from tests.fuzz import hostile
from tests.fuzz.runner import CORPUS, NAMES, Target, attempt, bounded, corpus, draw, minimised, target

SLOW = ("decoding", "options", "checkpoints", "folders", "gguf")
QUICK = [
    pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in NAMES if n not in ("verbs", "kills")
]


@pytest.mark.parametrize("name", QUICK)
def test_what_was_found_once(name: str) -> None:
    assert {file.stem for file in CORPUS.iterdir()} <= set(NAMES)
    for entry in corpus(name):
        finding = attempt(target(name), entry.input)
        assert finding is None, f"{entry.what}\n{finding.trace}"


@pytest.mark.parametrize("name", QUICK)
def test_random_inputs(name: str, seed: int) -> None:
    for number in range(target(name).cases):
        case = draw(name, seed, number)
        assert json.loads(json.dumps(case)) == case or "NaN" in json.dumps(case), "an input is plain data"
        finding = attempt(target(name), case)
        assert finding is None, f"{case}\n{finding.trace}"


# ------------------------------------------------------------------------------------------------ the harness


def fails(check: Any) -> Target:
    return Target(lambda rng: hostile.value(rng), check, seconds=0.5, memory=2**28)


def test_a_finding_is_named_and_made_smaller() -> None:
    def check(case: Any) -> None:
        assert "x" not in case["text"] or 7 not in case["list"]

    aim, case = fails(check), {"text": "abcxdef" * 50, "list": [*range(30)], "other": {"a": [1, 2]}}
    finding = attempt(aim, case)
    assert finding is not None and finding.fault.startswith("AssertionError") and "check" in finding.place
    assert minimised(aim, case, finding, 20.0) == {"text": "x", "list": [7]}
    assert attempt(aim, {"text": "", "list": []}) is None


def test_time_and_memory_are_bounded() -> None:
    def endless(case: Any) -> None:
        while True:
            with contextlib.suppress(Exception):  # as a reader of foreign files would
                time.sleep(0.01)

    finding = attempt(fails(endless), None)
    assert finding is not None and "not done after 0.5 s" in finding.fault
    finding = attempt(fails(lambda case: np.ones(2**28)), None)
    assert finding is not None and "MemoryError" in finding.fault
    with bounded(60, 2**30):
        np.ones(2**20)


def test_a_seed_and_a_number_are_an_input() -> None:
    assert draw("texts", 5, 7) == draw("texts", 5, 7) != draw("texts", 5, 8) != draw("texts", 6, 8)


def test_edits_and_damage_as_data() -> None:
    tree = {"a": [1, {"b": 2}]}
    assert hostile.edited(tree, [[["a", 1, "b"], 5], [["a", 0]], [["c", "d"], 1]]) == {"a": [{"b": 5}]}
    assert hostile.edited(tree, [[["c"], {"$nest": [1, 2]}]])["c"] == [[1]]
    assert hostile.expand({"$repeat": ["ab", 3]}) == "ababab"
    for seed in range(50):
        what = hostile.damage(random.Random(seed))
        assert hostile.damaged(b"abc", what) != b"abc" or what[0] == "cut"


def test_the_command(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """It counts, keeps a finding, and says both; a finding's file shows it again."""
    monkeypatch.chdir(tmp_path)
    given = command.options(["--only=texts", "--seed=3", "--minutes=1"])
    run = command.Run(given, 3)
    finding = attempt(fails(lambda case: 1 / 0), None)
    assert finding is not None
    run.keep("texts", 4, finding, {"text": "a"})
    run.keep("texts", 6, finding, {"text": "b"})
    run.counts["texts"] = 1234
    assert run.summary() == "fuzz: 1,234 inputs in 0 min (texts 1,234), 1 finding, seed 3"
    kept = pathlib.Path("fuzz-findings/texts-3-4.json")
    assert json.loads(kept.read_text())["input"] == {"text": "a"} and str(kept) in capsys.readouterr().out
    kept.write_text(json.dumps({"target": "texts", "input": {"text": "a", "depth": 1, "cut": 0}}))
    assert command.again(kept) == 0
    kept.write_text(json.dumps({"target": "texts", "input": {"text": 5, "depth": 1, "cut": 0}}))
    assert command.again(kept) == 1
    assert "Traceback" in capsys.readouterr().out


def test_a_process_that_does_not_end_is_killed_and_a_finding(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "OVERTIME", 0.0)
    run = command.Run(command.options(["--only=texts", "--minutes=0", "--processes=1"]), 3)
    endless = types.SimpleNamespace(exitcode=None)
    endless.kill = lambda: setattr(endless, "exitcode", -9)
    monkeypatch.setattr(run, "_started", lambda first: (endless, [5, 0, 5], first))
    monkeypatch.setattr(run, "_take", lambda: None)
    run.watch()
    assert run.counts["texts"] == 5
    (kept,) = pathlib.Path("fuzz-findings").iterdir()
    assert json.loads(kept.read_text())["fault"] == "Died: the process ended with status -9"


@pytest.mark.slow
def test_a_run_that_is_stopped_leaves_no_process() -> None:
    """What it did until then is said, if anything can be: SIGKILL ends a process without a word."""
    code = """if True:
        import sys
        from tests.fuzz import __main__ as command
        take = command.Run._take
        def told(run):
            take(run)
            if run.workers and run.workers[0][1][0]:
                print("busy", flush=True)
        command.Run._take = told
        sys.exit(command.main())
    """
    line = [sys.executable, "-c", code, "--only=texts", "--processes=1", "--seed=3"]
    runs = {
        number: subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for number in (signal.SIGTERM, signal.SIGKILL)
    }
    for number, run in runs.items():
        assert run.stdout is not None and "30 min" in run.stdout.readline()
        assert run.stdout.readline() == "busy\n"
        run.send_signal(number)
        said, faults = run.communicate(
            timeout=20
        )  # until its process, which has the same pipes, has ended too
        assert "Traceback" not in faults
        counts = re.findall(r"fuzz: [\d,]+ inputs in 0 min \(texts ([\d,]+)\), 0 findings, seed 3\n$", said)
        assert run.returncode == (0 if counts else -signal.SIGKILL)
        assert bool(counts) == (number == signal.SIGTERM) and counts != ["0"]
