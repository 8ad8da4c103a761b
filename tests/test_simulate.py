"""Simulated servers against closed forms of queueing theory, and what the command says of them."""

from __future__ import annotations

import json
import pathlib
import re

import numpy as np
import pytest

from pasta_jax.simulate import Replica, StepTimes, Traffic, costs, equal_branches, simulate, table
from tests.helpers import only_full
from tests.helpers.commands import ROOT, python

SECOND = StepTimes((1,), (1.0,))
"""A step takes a second, whatever its lanes."""


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


def test_steps_that_take_as_long_as_they_are_wide_share_the_processor() -> None:
    """Whatever the length of the answers, one of S seconds then takes S / (1 - load) (M/G/1-PS)."""
    by_width, load = StepTimes((1, 2), (0.02, 0.04)), 0.3
    traffic = Traffic.drawn([steps(20), steps(80)], 2_000, seed=2)
    run = traffic.at(Replica(1000, by_width, chunk=1), load)  # an answer takes a second on average
    load = 0.02 * float(run.tokens.sum()) / run.arrived[-1]  # as it was drawn
    for length in (20, 80):
        chosen = np.array([len(answer) == length for answer in traffic.answers])
        assert run.latency[chosen].mean() == pytest.approx(length / 50 / (1 - load), rel=0.1)


def test_steps_that_cost_the_same_at_any_width_delay_nobody() -> None:
    run = Traffic.drawn([steps(100)], 500, seed=3).at(Replica(500, StepTimes((1,), (0.01,)), chunk=1), 2.0)
    assert run.latency.min() >= 1.0 - 1e-9 and run.latency.max() <= 1.01 + 1e-9, (
        "a step is waited for at most"
    )


def test_a_worked_schedule() -> None:
    """Two rows, chunks of 4 steps, a prefill of half a second; a step of w lanes takes w seconds."""
    replica = Replica(2, StepTimes((1, 2), (1.0, 2.0)), prefill_s=0.5, chunk=4)
    answers = [np.array([1, 2, 2, 1, 1]), steps(2), steps(3)]
    run = simulate(replica, np.array([0.0, 0.0, 1.0]), answers)
    # Both are prefilled until 1; the third waits from 1 on, so the chunk ends with the second answer: steps of 2
    # and 3 lanes. The third is prefilled from 6 on; steps of 3, 2 and 2 lanes, in which nobody waits.
    assert run.started.tolist() == [0.0, 0.5, 6.0]
    assert run.ended.tolist() == [13.5, 6.0, 13.5]
    assert run.tokens.tolist() == [7, 2, 3] and run.span == 13.5
    assert run.goodput(6.0) == pytest.approx(1 / 13.5)
    assert run.in_system == pytest.approx((13.5 + 6.0 + 12.5) / 13.5)


def test_tables_of_step_times() -> None:
    times = StepTimes.read("1:10, 3:20,4:40")
    assert times.upto(6).tolist() == pytest.approx([0.0, 0.010, 0.015, 0.020, 0.040, 0.060, 0.080])
    assert StepTimes.read("4:2").upto(8).tolist() == [0.0, *[0.002] * 8]
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
        ("--step_ms=1:10", "--rates=0"): "--rates=0 must be above 0",
        ("--step_ms=1:10", f"--answers={file}"): "Name the tokenizer",
        ("--step_ms=1:10", "--answers=no/such", "--tokenizer=almanac"): "",
    }.items():
        done = python("-m", "pasta_jax.simulate", *wrong)
        assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith(message)
        assert done.stderr.count("\n") == 1
