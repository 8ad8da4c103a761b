"""Simulated servers against closed forms of queueing theory, and what the command says of them."""

from __future__ import annotations

import json
import math
import pathlib
import re

import numpy as np
import pytest

from pasta_jax.simulate import Replica, StepTimes, Traffic, costs, equal_branches, simulate, table
from tests.helpers import only_full
from tests.helpers.commands import ROOT, python
from tests.load import widths_of

SECOND = StepTimes((1,), (1.0,))
"""A step of one lane a row takes a second."""


def steps(count: int) -> np.ndarray:
    """An answer without branches."""
    return np.ones(count, np.int64)


def waited(answers: list[np.ndarray], load: float, mean: float) -> float:
    """The mean seconds in the queue of a server of one row, whose answers take `mean` seconds."""
    run = Traffic.drawn(answers, 20_000, seed=1).at(Replica(1, SECOND, chunk=1), load / mean)
    return float((run.started - run.arrived).mean())


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_one_row_and_equal_answers_is_m_d_1(load: float) -> None:
    assert waited([steps(1)], load, 1.0) == pytest.approx(load / (2 * (1 - load)), rel=0.05)


def test_one_row_and_unequal_answers_is_m_g_1() -> None:
    """The formula of Pollaczek and Khinchine: answers of 1 and of 9 steps."""
    mean, square, load = 5.0, 41.0, 0.5
    expected = load / mean * square / (2 * (1 - load))
    assert waited([steps(1), steps(9)], load, mean) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("rows", "load"), [(2, 0.7), (4, 0.8)])
def test_several_rows_and_random_lengths_is_m_m_c(rows: int, load: float) -> None:
    """The formula of Erlang for the share that waits, and how long all do on average. Steps are short."""
    rng = np.random.default_rng(2)
    answers = [steps(1 + int(length)) for length in rng.exponential(60, 4_000)]
    traffic = Traffic.drawn(answers, 12_000, seed=2)
    mean = float(np.mean([len(answer) for answer in traffic.answers])) / 100
    run = traffic.at(Replica(rows, StepTimes((1,), (0.01,)), chunk=1), load * rows / mean)
    offered = mean * len(traffic.answers) / float(run.arrived[-1])  # as they were drawn
    terms = [offered**k / math.factorial(k) for k in range(rows)]
    last = offered**rows / math.factorial(rows) * rows / (rows - offered)
    waits = last / (sum(terms) + last)
    assert float((run.started - run.arrived).mean()) == pytest.approx(
        waits * mean / (rows - offered), rel=0.1
    )


def test_as_many_rows_as_requests_delay_nobody() -> None:
    run = Traffic.drawn([steps(100)], 500, seed=3).at(Replica(500, StepTimes((1,), (0.01,)), chunk=1), 2.0)
    assert run.latency.min() >= 1.0 - 1e-9 and run.latency.max() <= 1.01 + 1e-9, (
        "a step is waited for at most"
    )


def test_a_worked_schedule() -> None:
    """Two rows, chunks of 4 steps, a prefill of half a second; steps of 1, 2, 4 lanes take 1, 2, 4 seconds."""
    replica = Replica(2, StepTimes((1, 2, 4), (1.0, 2.0, 4.0)), prefill_s=0.5, chunk=4)
    answers = [np.array([1, 3, 2, 1, 1]), steps(2), np.array([1, 1, 5])]
    run = simulate(replica, np.array([0.0, 0.0, 1.0]), answers)
    # Both are prefilled until 1; the third waits from 1 on, so the chunk ends with the second answer: steps of 1
    # and 4 lanes a row. The third is prefilled from 6 on; then steps of 2, 1 and 4 lanes, and one of 1 for the last
    # of its five threads.
    assert run.started.tolist() == [0.0, 0.5, 6.0]
    assert run.ended.tolist() == [14.5, 6.0, 14.5]
    assert run.tokens.tolist() == [8, 2, 7] and run.span == 14.5
    assert run.goodput(6.0) == pytest.approx(1 / 14.5)
    assert run.in_system == pytest.approx((14.5 + 6.0 + 13.5) / 14.5)


def test_tables_of_step_times() -> None:
    times = StepTimes.read("1:10, 3:20,4:40")
    assert times.of(np.arange(1, 5)).tolist() == [0.010, 0.020, 0.020, 0.040]
    assert times.in_turns(np.array([1, 9, 4, 5])).tolist() == [1, 4, 4, 1, 4, 4, 1]
    for text in ("", "1", "2:5,1:6", "0:1", "1:0", "1:5,1:6", "1:5,x"):
        with pytest.raises(ValueError, match="write increasing lanes with milliseconds"):
            StepTimes.read(text)


def test_answers_of_equal_branches() -> None:
    assert equal_branches(5, 0).tolist() == [1] * 5
    widths = equal_branches(400, 4)
    # Main writes 28 tokens; the branches of 93 begin with the last token of each promise.
    assert (widths.sum(), len(widths), widths.max(), widths[-1]) == (400, 27 + 93, 5, 1)


def test_the_rate_in_time_is_where_the_share_is_reached() -> None:
    traffic, replica = Traffic.drawn([steps(2)], 500, seed=4), Replica(2, StepTimes((1,), (0.5,)), chunk=1)
    most = traffic.most(replica)
    assert most == pytest.approx(2.0, rel=0.01)
    rate = traffic.most_in_time(replica, 2.0, 0.95)
    shares = [float((traffic.at(replica, rate * by).latency <= 2.0).mean()) for by in (0.95, 1.05)]
    assert shares[0] > 0.95 > shares[1]
    assert traffic.most_in_time(replica, 0.5, 0.95) == 0.0, "an answer takes a second"
    assert traffic.most_in_time(replica, 1e9, 0.95) == pytest.approx(0.9 * most, rel=0.001)
    assert table(replica, traffic, [1.0], 2.0).splitlines()[2].split("|")[1:3] == [" 50%  ", "          1 "]


def test_costs() -> None:
    assert costs(2.0, 500.0, chips=4, dollars_per_chip_hour=1.8, demand=9.0) == [
        "0.5 requests/s a chip.",
        "1 dollars for 1,000 requests, 2 for a million tokens.",
        "5 replicas for 9 requests/s, and one more while one restarts.",
    ]
    assert costs(0.0, 500.0, chips=1, dollars_per_chip_hour=1.0, demand=1.0)[0].startswith(
        "No replica answers"
    )


def test_the_widths_of_an_answer_that_a_server_tells() -> None:
    """Main has steps 1, 2 and 6 alone, and of the branch's steps the first two."""
    told = {"steps": 6, "branches": [{"start_step": 3, "end_step": 5}]}
    assert widths_of(told, 8).tolist() == [1, 1, 2, 2, 1, 1]


@only_full
def test_the_numbers_of_the_page_are_those_of_its_commands() -> None:
    page = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    commands = re.findall(r"^python (-m pasta_jax\.simulate .+)$", page, re.MULTILINE)
    for command, shown in zip(commands, (slice(0, 7), slice(7, None)), strict=True):
        done = python(*command.split())
        assert "\n".join(done.stdout.splitlines()[shown]) in page, done.stdout


@pytest.mark.slow
def test_the_command(tmp_path: pathlib.Path) -> None:
    """With the widths of annotated answers: two branches of about the same length beside main."""
    block = "<async>Its symbol is Fe. Its atomic number is 26. Its period is 4.</async>"
    answer = f'<promise topic="Iron" tokens=2 />{block}<promise topic="Iron" tokens=2 />{block}<sync/>Iron.'
    file = tmp_path / "answers.jsonl"
    file.write_text(json.dumps({"prompt": "?", "response": answer}) + "\nno record\n")
    words = ["--step_ms=1:10", f"--answers={file}", "--tokenizer=almanac", "--requests=50", "--rates=0.5"]
    done = python("-m", "pasta_jax.simulate", *words)
    assert done.returncode == 0, done.stderr
    assert "Saturated at" in done.stdout and done.stderr.startswith(
        "1 records cannot be read; the first: line 2"
    )
    for wrong, message in {
        (): "Give the time of a step",
        ("--step_ms=1:10", "--rates=0"): "--rates=0: give numbers above 0",
        ("--step_ms=1:10", f"--answers={file}"): "Name the tokenizer",
        ("--step_ms=1:10", "--answers=no/such", "--tokenizer=almanac"): "",
    }.items():
        done = python("-m", "pasta_jax.simulate", *wrong)
        assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith(message)
        assert done.stderr.count("\n") == 1
