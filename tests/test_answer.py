"""Batched answers: the same as alone, resumed where a run broke off, and the good ones kept."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from absl import flags

from pasta_jax import answer
from pasta_jax.answer import Answer, Asked, Settings
from pasta_jax.data.prompts import Question, read_questions
from pasta_jax.decoding.results import result
from tests.helpers.chatty import PROMPTS, WORDS, decoder, ids
from tests.helpers.commands import python

QUESTIONS = [
    Question(prompt, None, line, json.dumps({"prompt": prompt})) for line, prompt in enumerate(PROMPTS, 1)
]


def test_every_answer_is_what_it_is_alone() -> None:
    settings = Settings(max_new_tokens=40, temperature=1.0, seed=7)
    asked = [Asked(i, j) for j in range(4) for i in range(len(PROMPTS))]
    found = [*answer.answer_all(decoder(), QUESTIONS, settings, asked)]
    assert [Asked(each.question, each.sample) for each in found] == asked
    for each, request in list(zip(found, asked))[::3]:
        (trace,), _ = decoder(rows=1).decode([ids(PROMPTS[request.question])], [settings.sampling(request)])
        alone = result(WORDS, trace)
        assert (each.text, each.annotated, each.stop_reason) == (
            alone.text,
            alone.annotated,
            alone.stop_reason,
        )
    assert settings.sampling(asked[0]).open_bias == 0
    assert dataclasses.replace(settings, mode="sequential").sampling(asked[0]).open_bias == -math.inf
    seeds = {settings.sampling(request).seed for request in asked}
    assert len(seeds) == len(asked) and seeds != {Settings().sampling(request).seed for request in asked}


def made(question: int, sample: int, text: str = "", stop_reason: str = "eos") -> Answer:
    text = text or f"Answer {sample} to question {question}."
    return Answer(question, sample, text, f"<sync/>{text}", len(text.split()), stop_reason)


def test_what_is_kept() -> None:
    loop = "and then it goes on " * 9
    answers = [
        made(1, 0), made(0, 0, "Yes."), made(0, 1, "Yes."), made(1, 1, "Yes."), made(0, 2, loop),
        made(0, 3, "and so", "length"), made(2, 0, "\n"), made(2, 1, "Never.", "stop"),
    ]  # fmt: skip
    kept = answer.kept(answers)
    assert [Asked(each.question, each.sample) for each in kept.answers] == [(0, 0), (1, 0), (1, 1), (2, 1)]
    assert kept.dropped == {"equal": 1, "repetitive": 1, "truncated": 1, "empty": 1}
    assert len(answer.kept(answers, keep_all=True).answers) == len(answers)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Any:
    """The command on a file of prompts, with a model that gives `made` answers; returns what it asked for."""
    (tmp_path / "asked.jsonl").write_text(
        '{"prompt": "One?", "kind": "list", "question": "1?"}\n'
        '{"instruction": "Two?", "output": "Old.", "id": 7}\n'
        '{"messages": [{"role": "user", "content": "Three?"}], "kind": "story"}\n'
    )
    asked: list[Asked] = []

    def answers(decoder: Any, questions: Any, settings: Any, wanted: Sequence[Asked]) -> Iterator[Answer]:
        for each in wanted:
            asked.append(each)
            if len(asked) == stop_after[0]:
                raise KeyboardInterrupt
            yield made(*each, stop_reason="length" if each == (1, 1) else "eos")

    stop_after = [0]
    monkeypatch.setattr(answer, "answer_all", answers)
    monkeypatch.setattr(answer, "_decoder", lambda *_: None)
    monkeypatch.setattr("pasta_jax.loading.identity_of", lambda path: {"step": 3})

    def run(*words: str, stop: int = 0) -> list[Asked]:
        asked.clear()
        stop_after[0] = stop
        values = flags.FlagValues()
        answer.define(values)
        values(
            [
                "answer",
                "--ckpt=W",
                f"--prompts={tmp_path}/asked.jsonl",
                f"--output={tmp_path}/out.jsonl",
                *words,
            ]
        )
        answer.run(values)
        return [*asked]

    return run


def test_the_command(command: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--samples=2", "--temperature=0.7")
    with pytest.raises(KeyboardInterrupt):
        command(*words, stop=5)
    assert not (tmp_path / "out.jsonl").exists()
    with (tmp_path / "out.jsonl.run" / "answers.jsonl").open("a") as file:
        file.write('{"question": 1, "samp')  # what a kill leaves
    assert command(*words) == [(1, 1), (2, 1)]
    assert "3 prompts, 6 answers: 5 kept, 1 truncated. Wrote" in capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert records[0] == {"prompt": "One?", "response": made(0, 0).text, "kind": "list", "question": "1?"}
    assert records[2] == {"prompt": "Two?", "response": made(1, 0).text, "id": 7}
    assert records[3]["prompt"] == "Three?" and records[3]["kind"] == "story"
    assert next(question.answer for question in read_questions(tmp_path / "out.jsonl")[0]) == made(0, 0).text
    assert command("--samples=3", "--temperature=0.7", "--annotated") == [(0, 2), (1, 2), (2, 2)]
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(records) == 8 and records[0]["response"] == made(0, 0).annotated
    assert command(*words) == []  # fewer again
    with pytest.raises(
        ValueError, match=r"out.jsonl.run is of other answers \(settings.seed\). Use another --output"
    ):
        command(*words, "--seed=1")


def test_a_file_without_prompts(command: Any, tmp_path: pathlib.Path) -> None:
    (tmp_path / "asked.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"asked\.jsonl is empty\."):
        command()
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "Add --ckpt and --prompts and --output."),
        ("--ckpt=W --prompts=p.jsonl --output=o.json", "--output=o.json is written as JSON lines."),
        (
            "--ckpt=W --prompts=p.jsonl --output=o.jsonl --samples=2",
            "--samples above 1 are all the same at --temp",
        ),
    ],
)
def test_mistakes_are_one_line(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    values = flags.FlagValues()
    answer.define(values)
    values(["answer", *words.split()])
    with pytest.raises(SystemExit, match="2"):
        answer.main(["answer"], values=values)
    said = capsys.readouterr().err
    assert said.startswith(message) and said.count("\n") == 1


def test_a_file_that_is_not_there(tmp_path: pathlib.Path) -> None:
    done = python(
        *("-m", "pasta_jax.answer", "--ckpt=W", "--prompts=none.jsonl", f"--output={tmp_path}/o.jsonl")
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "none.jsonl" in done.stderr
