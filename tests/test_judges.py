"""Judges: the likelihood of a reference model by hand and in batches, and those of a user's own."""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest

from pasta_jax.data import almanac
from pasta_jax.data.prompts import read_questions
from pasta_jax.decoding.model import Model
from pasta_jax.judges import likelihood, make_judge
from pasta_jax.judges.likelihood import Likelihood, preferred, score
from pasta_jax.judges.protocol import NO_VERDICT, Comparison, JudgeError, Preference, Prompt, compare_all
from pasta_jax.lang.parse import parse
from pasta_jax.model import ModelConfig, init_params
from pasta_jax.tokens.layout import layout_example
from pasta_jax.training.logprobs import reference_logprobs

# ------------------------------------------------------------------------------------------------ likelihood


def test_the_score_by_hand() -> None:
    tokens, logprob = np.arange(4), np.array([-1.0, -2.0, -3.0, -0.5])
    # The answer could have ended with probability 0.5 before its second token; before the others it could not.
    end = np.array([-50.0, np.log(0.5), -50.0, -0.5])
    assert score(tokens, logprob, end) == pytest.approx(-6.5 / 4 + 0.1 * (np.log(0.5) - 0.5), abs=1e-4)
    cut = np.array([-50.0, np.log(0.5), -50.0, -30.0])  # more was to come: no less than -20 in all
    assert score(tokens, logprob, cut) == pytest.approx(-6.5 / 4 + 0.1 * -20, abs=1e-4)
    assert score(tokens[:1], logprob[:1], logprob[:1]) == pytest.approx(
        -1.0 - 0.1, abs=1e-4
    )  # an empty answer


def test_a_repeated_run_is_not_likely() -> None:
    """What stands there already is what models predict best."""
    once, twice = np.arange(10), np.arange(20) % 10
    sure, never = np.full(20, -0.01), np.full(20, -50.0)
    assert score(once, sure[:10], never[:10]) == pytest.approx(-0.01 - 2.0, abs=1e-4)
    # Tokens 17, 18 and 19 end runs of 8 that stood there before.
    assert score(twice, sure, never) == pytest.approx((17 * -0.01 + 3 * -5.0) / 20 - 2.0, abs=1e-4)


def test_confidence_is_logistic_and_equals_tie() -> None:
    assert preferred(-1.0, -1.5) == (0, pytest.approx(1 / (1 + np.exp(-2.0))))
    assert preferred(-1.5, -1.0) == preferred(-1.0, -1.5).swapped
    assert preferred(-1.0, -1.0) == (None, 0.5)


@pytest.fixture(scope="module")
def model() -> Model:
    config = ModelConfig(vocab_size=1408, num_layers=1, model_dim=16, head_dim=8, mlp_dim=16, num_heads=2)
    return Model(init_params(config, jax.random.key(1)), config, almanac.load_tokenizer())


@pytest.fixture(scope="module")
def judge(model: Model) -> Likelihood:
    return Likelihood(model, rows=4, length=64)


PROMPT = "What is the capital of Peru?"
ANSWERS = ["Its capital is Lima.", "Its capital is Quito.", "- Peru: Its capital is Lima.\n", ""]


def test_swapped_answers_swap_the_winner_and_nothing_else(judge: Likelihood) -> None:
    pairs = [(a, b) for a in ANSWERS for b in ANSWERS]
    forth = [*judge.compare_all([Comparison(PROMPT, a, b) for a, b in pairs])]
    back = [*judge.compare_all([Comparison(PROMPT, b, a) for a, b in pairs])]
    assert back == [preference.swapped for preference in forth]
    assert judge.compare(PROMPT, ANSWERS[0], ANSWERS[2]) == forth[2]
    assert {preference.winner for preference in forth} == {0, 1, None}
    assert all((said.winner is None) == (a == b) for said, (a, b) in zip(forth, pairs))


def test_verdicts_come_while_others_are_read(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a run which is stopped has kept them."""
    read = 0

    def scores(asked: Sequence[tuple[Prompt, str]]) -> list[float]:
        nonlocal read
        read += len(asked)
        return [0.0] * len(asked)

    monkeypatch.setattr(likelihood, "TOGETHER", 2)
    judge = Likelihood(model)
    monkeypatch.setattr(judge, "scores", scores)
    pairs = [Comparison(f"prompt {n}", "a", "b") for n in range(5)]
    said = [read for _ in judge.compare_all(pairs)]
    assert said == [4, 4, 8, 8, 10]


def test_an_answer_scores_as_the_reference_predicts_it(model: Model, judge: Likelihood) -> None:
    """In any batch, as part of a conversation, and in a longer row; text and end by another forward pass."""
    long = " ".join(f"River {n} is long." for n in range(30))
    messages = ({"role": "user", "content": PROMPT},)
    asked: list[tuple[Prompt, str]] = [(PROMPT, answer) for answer in (*ANSWERS, long)]
    asked.append((messages, ANSWERS[0]))
    found = judge.scores(asked)
    assert found[-1] == pytest.approx(found[0], abs=1e-4)
    assert judge.scores(asked[::-1]) == pytest.approx(found[::-1], abs=2e-4)
    document = layout_example(model.tokenizer, PROMPT, parse(ANSWERS[0]), threads=1)
    end = dataclasses.replace(
        document, target=np.where(document.target < 0, document.target, model.tokenizer.vocabulary.eos)
    )
    logprob, ended = reference_logprobs(model, [document, end], 4, 64)
    learnt = document.target >= 0
    assert score(document.target[learnt], logprob[learnt], ended[learnt]) == pytest.approx(found[0], abs=2e-4)
    assert ended[learnt][-1] == pytest.approx(logprob[learnt][-1], abs=1e-5)
    assert (ended[learnt][:-1] < 0).all() and logprob[learnt].mean() != pytest.approx(found[0], abs=1e-2)


def test_an_answer_without_ids_has_no_verdict(judge: Likelihood, caplog: pytest.LogCaptureFixture) -> None:
    """A character that the reference's tokenizer lacks, or half a character: the other comparisons are judged."""
    pairs = [(ANSWERS[0], "a \ud83d"), ("a \ud83d", ANSWERS[1]), (ANSWERS[0], ANSWERS[1])]
    found = [*judge.compare_all([Comparison(PROMPT, a, b) for a, b in pairs])]
    assert found == [NO_VERDICT, NO_VERDICT, judge.compare(PROMPT, ANSWERS[0], ANSWERS[1])]
    assert judge.compare("\ud83d", *pairs[2]) == NO_VERDICT
    assert "A comparison has no verdict: The text holds half a character" in caplog.text


# ------------------------------------------------------------------------------------------------ by name


def test_judges_by_name(model: Model, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_judges.py").write_text(
        "class Shorter:\n"
        "    def compare(self, prompt, a, b):\n"
        "        return int(len(b) < len(a)), 0.9\n"
        "def first(prompt, a, b):\n"
        "    return 0, 0.6\n"
        "def fails(prompt, a, b):\n"
        "    raise KeyError('x')\n"
        "class Broken:\n"
        "    def compare(self, prompt, a, b):\n"
        "        return {}[a]\n"
        "shorter, number, broken = Shorter(), 3, Broken()\n"
    )
    (tmp_path / "broken_judges.py").write_text("import nothing_of_this_name\n")
    monkeypatch.syspath_prepend(tmp_path)
    comparisons = [
        Comparison(PROMPT, "long", "no"),
        Comparison(({"role": "user", "content": "?"},), "a", "bc"),
    ]

    def said(name: str) -> list[Preference]:
        return [*compare_all(make_judge(f"own_judges:{name}"), comparisons)]

    assert said("first") == [(0, 0.6)] * 2
    assert said("Shorter") == said("shorter") == [(1, 0.9), (0, 0.9)]
    task = Comparison(PROMPT, ANSWERS[0], ANSWERS[1])
    assert [*compare_all(make_judge("almanac"), [task])] == [(0, 1.0)]
    assert make_judge("likelihood", model=model, rows=4, length=64)
    for name, options, message in (
        ("polite", {}, r"There is no judge 'polite'. Use almanac, likelihood, llm or MODULE:FUNCTION"),
        ("own_judges:polite", {}, r"own_judges has no function polite"),
        ("own_judges:number", {}, r"own_judges has no function number"),
        ("no_such_module:f", {}, r"no_such_module cannot be imported \(ModuleNotFoundError"),
        ("broken_judges:f", {}, r"broken_judges cannot be imported .*nothing_of_this_name"),
        ("almanac", {"model": 1}, r"almanac has no options; got model"),
        ("likelihood", {}, r"likelihood needs a reference model"),
        ("likelihood", {"url": 1}, r"The judge likelihood: .*unexpected keyword argument 'url'"),
    ):
        given: dict[str, Any] = options
        with pytest.raises(JudgeError, match=message):
            make_judge(name, **given)
    with pytest.raises(JudgeError, match=r"own_judges:fails failed: KeyError: 'x'"):
        said("fails")
    with pytest.raises(JudgeError, match=r"own_judges:broken failed: KeyError: 'long'"):
        said("broken")
    with pytest.raises(JudgeError, match=r"own_judges:broken failed: KeyError: 'long'"):
        make_judge("own_judges:broken").compare(PROMPT, "long", "no")
    sys.modules.pop("own_judges")


def test_a_judge_that_answers_too_little_or_too_much_is_refused() -> None:
    @dataclasses.dataclass
    class Careless:
        count: int

        def compare(self, prompt: str, a: str, b: str, /) -> Preference:
            return Preference(0, 0.9)

        def compare_all(self, comparisons: Any) -> list[Preference]:
            return [Preference(0, 0.9)] * self.count

    two = [Comparison(PROMPT, a, "") for a in ANSWERS[:2]]
    assert len([*compare_all(Careless(2), two)]) == 2
    for count in (1, 3):
        with pytest.raises(JudgeError, match=f"asked about 2 comparisons, and answered {count}"):
            [*compare_all(Careless(count), two)]


# ----------------------------------------------------------------------------------------------- what is asked


def test_the_questions_of_a_file_need_no_answers(tmp_path: pathlib.Path) -> None:
    def said(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    tagged = '<promise topic="b" tokens=1 /><async>B.</async>'
    records: list[Any] = [
        {"prompt": "a"},
        {"prompt": "b", "response": tagged},
        {"instruction": "c", "input": "d"},
        {"instruction": "e", "output": ""},
        {"messages": [said("user", "f"), said("assistant", tagged), said("user", "g")]},
        {"messages": [said("user", "h"), said("assistant", "i")]},
        {"conversations": [{"from": "human", "value": "j"}]},
        {"question": "k"},
        {"prompt": ""},
        [1],
        {"messages": []},
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, records)) + "\nno JSON\n")
    questions, problems = read_questions(path)
    assert [(each.line, each.prompt, each.answer) for each in questions] == [
        (1, "a", None),
        (2, "b", "B."),
        (3, "c\n\nd", None),
        (4, "e", None),
        (5, (said("user", "f"), said("assistant", "B."), said("user", "g")), None),
        (6, "h", "i"),
        (7, "j", None),
    ]
    assert questions[4].raw == json.dumps(records[4])
    assert [problem.line for problem in problems] == [8, 9, 10, 11, 12]
    assert "no known layout" in problems[0].message and "not JSON" in problems[-1].message
    (found,), _ = read_questions(path, {"prompt": "question"})
    assert (found.prompt, found.answer, found.line) == ("k", None, 8)
