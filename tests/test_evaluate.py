"""The table's numbers by hand, and an evaluation that goes on where it was cut off."""

import json
import math
import pathlib
from typing import Any

import pytest

from pasta_jax.data import almanac
from pasta_jax.evaluate.compare import overview, summarise, table
from pasta_jax.evaluate.systems import Measured, System, evaluate


def answer(
    family: str, prompt: str = "What is the capital of Peru?", text: str = "", **measured: float
) -> Measured:
    fields: dict[str, Any] = dict(
        truth=1.0, output_tokens=1, text_tokens=1, critical_path=1, decode_steps=1, wall_s=1.0
    )
    return Measured(
        family=family,
        prompt=prompt,
        text=text,
        annotated="",
        stop_reason="eos",
        issues=(),
        promises=0,
        **fields | measured,
    )


def test_summarise() -> None:
    baseline = [
        answer("list", output_tokens=40, wall_s=8.0, truth=1.0),
        answer("list", output_tokens=90, wall_s=3.0, truth=0.5),
        answer("single", output_tokens=6, wall_s=1.0, truth=0.0),
    ]
    test = [
        answer(
            "list",
            text="Its capital is Lima.",
            output_tokens=60,
            text_tokens=36,
            critical_path=20,
            wall_s=2.0,
            truth=0.5,
        ),
        answer("list", output_tokens=70, text_tokens=40, critical_path=5, wall_s=3.0, truth=0.5),
        answer("single", output_tokens=6, text_tokens=6, critical_path=12, wall_s=2.0, truth=1.0),
    ]
    lists, single, overall = summarise(baseline, test)
    assert [(row.name, row.prompts) for row in (lists, single, overall)] == [
        ("list", 2),
        ("single", 1),
        ("overall", 3),
    ]
    assert (lists.win_rate, single.win_rate, overall.win_rate) == (0.75, 0.5, pytest.approx(2 / 3))
    assert (lists.baseline_truth, lists.truth, overall.baseline_truth) == (0.75, 0.5, 0.5)
    # 40 / 20 = 2 and 90 / 5 = 18: root of 36. 8 / 2 = 4 and 3 / 3 = 1: root of 4. 36 / 20 and 40 / 5: root of 14.4.
    speeds = (lists.theoretical, lists.realized, lists.parallelism)
    assert speeds == pytest.approx((6.0, 2.0, math.sqrt(14.4)))
    assert (single.theoretical, single.realized, single.parallelism) == pytest.approx((0.5, 0.5, 0.5))
    # Over all: the cube roots of 36 / 2, 4 / 2 and 14.4 / 2, not the means of the families.
    speeds = (overall.theoretical, overall.realized, overall.parallelism)
    assert speeds == pytest.approx((18 ** (1 / 3), 2 ** (1 / 3), 7.2 ** (1 / 3)))
    rows = table({"m": [lists, single, overall]}).splitlines()[2:]
    assert [[cell.strip() for cell in row.strip("|").split("|")] for row in rows] == [
        ["m", "list", "2", "75.0 %", "50.0 %", "75.0 %", "6.00x", "2.00x", "3.79x"],
        ["m", "single", "1", "0.0 %", "100.0 %", "50.0 %", "0.50x", "0.50x", "0.50x"],
        ["m", "overall", "3", "50.0 %", "66.7 %", "66.7 %", "2.62x", "1.26x", "1.93x"],
    ]
    rows = overview({"m": [lists, single, overall]}).splitlines()[2:]
    assert [[cell.strip() for cell in row.strip("|").split("|")] for row in rows] == [
        ["sequential baseline", "50.0 %", "50.0 %", "1.00x", "1.00x"],
        ["m", "66.7 %", "66.7 %", "2.62x", "1.26x"],
    ]


def test_an_answer_that_says_nothing_breaks_no_mean() -> None:
    (row, _) = summarise([answer("list", output_tokens=0)], [answer("list", text_tokens=0, critical_path=2)])
    assert (row.theoretical, row.parallelism) == (0.5, 0.5)


# -------------------------------------------------------------------------------------------------- resuming

TASKS = almanac.evaluation_tasks(5)


@pytest.fixture
def asked() -> list[str]:
    """The prompts that were answered, in order; the answers are made up."""
    return []


def systems(asked: list[str]) -> dict[str, System]:
    def system(task: almanac.Task) -> Measured:
        asked.append(task.prompt)
        if len(asked) == 7:
            raise KeyboardInterrupt
        return answer(task.family, task.prompt, wall_s=0.1 + len(asked))

    return {"a": system, "b": system}


def cut_off(workdir: pathlib.Path, asked: list[str]) -> None:
    """Three prompts answered by both, the fourth by the first alone, whose line broke off."""
    with pytest.raises(KeyboardInterrupt):
        evaluate(systems(asked), 5, str(workdir), {"step": 1})
    with open(workdir / "a.jsonl", "a") as file:
        file.write('{"family": "li')
    asked.clear()


def test_it_resumes_an_interrupted_evaluation(tmp_path: pathlib.Path, asked: list[str]) -> None:
    cut_off(tmp_path, asked)
    answers = evaluate(systems(asked), 5, str(tmp_path), {"step": 1})
    assert asked == [task.prompt for task in TASKS[3:] for _ in "ab"]
    for name in "ab":
        assert [a.prompt for a in answers[name]] == [task.prompt for task in TASKS]
        lines = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert [line["wall_s"] for line in lines] == [a.wall_s for a in answers[name]]
    asked.clear()
    again = evaluate(systems(asked), 5, str(tmp_path), {"step": 1})
    assert again == answers and not asked


@pytest.mark.parametrize("step", [2, None])
def test_answers_of_other_models_are_not_kept(
    tmp_path: pathlib.Path, asked: list[str], step: int | None
) -> None:
    cut_off(tmp_path, asked)
    if step is None:
        (tmp_path / "about.json").unlink()
    evaluate(systems(asked), 2, str(tmp_path), {"step": step or 1})
    assert len(asked) == 4
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 2


def test_answers_to_other_prompts_are_not_kept(tmp_path: pathlib.Path, asked: list[str]) -> None:
    cut_off(tmp_path, asked)
    lines = (tmp_path / "b.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "b.jsonl").write_text("".join([lines[0], lines[2], lines[1]]))
    evaluate(systems(asked), 3, str(tmp_path), {"step": 1})
    assert asked == [task.prompt for task in TASKS[1:3] for _ in "ab"]
