"""The judge that asks a language model."""

import math
import pathlib
import random
from typing import Any

import pytest

from pasta_jax.endpoint.client import Endpoint
from pasta_jax.judges import llm
from pasta_jax.judges.bulk import judge_all
from pasta_jax.judges.llm import LlmJudge
from pasta_jax.judges.protocol import NO_VERDICT, Comparison, JudgeError, Preference, compare_all
from tests.helpers.chat_server import KEY, Answer, Body, Rates, Status, chat_server


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def answers(body: Body) -> tuple[str, str]:
    task = body["messages"][1]["content"]
    a = task.split("<answer_A>\n")[1].split("\n</answer_A>")[0]
    return a, task.split("<answer_B>\n")[1].split("\n</answer_B>")[0]


def shorter(body: Body) -> str:
    a, b = answers(body)
    return "A 75" if len(a) < len(b) else "B 75"


def with_logprobs(text: str, tokens: dict[str, float]) -> Answer:
    top = [{"token": token, "logprob": math.log(chance)} for token, chance in tokens.items()]
    return {"message": {"content": text}, "logprobs": {"content": [{"token": text[:1], "top_logprobs": top}]}}


@pytest.mark.parametrize(
    ("said", "preference"),
    [
        ("A 80", (0, 0.8)),
        ("B", (1, 1.0)),
        ("**Answer B**: 62.", (1, 0.62)),
        ("<think>A 90</think>\nB 70", (1, 0.7)),
        ("A 30", (None, 0.5)),
        ("A 50", (None, 0.5)),
        ("B 99\nBecause it is right.", (1, 0.99)),
        (with_logprobs("A 99", {"A": 0.6, "B": 0.2}), (0, 0.75)),
        (with_logprobs("A 99", {"A": 0.1, " A": 0.1, "\u2581B": 0.6}), (1, 0.75)),
        (with_logprobs("A 70", {"The": 0.6, "<think>": 0.2}), (0, 0.7)),
        (with_logprobs("A", {"A": 0.4, "B": 0.4}), (None, 0.5)),
        (with_logprobs("Answer B 90", {"Answer": 0.95, "A": 0.03, "B": 0.01}), (1, 0.9)),
    ],
)
def test_a_verdict_is_read(said: Answer, preference: tuple[int | None, float]) -> None:
    with chat_server(lambda body: said) as server, Endpoint(server.url, "m") as endpoint:
        winner, confidence = LlmJudge(endpoint).compare("Why?", "So.", "Because.")
    assert (winner, round(confidence, 9)) == preference and server.total == 1


def test_what_is_asked() -> None:
    bodies: list[Body] = []

    def model(body: Body) -> str:
        bodies.append(body)
        return shorter(body)

    with chat_server(model) as server, Endpoint(server.url, "m") as endpoint:
        judge = LlmJudge(endpoint)
        braces = "a {dict} and %s"
        assert judge.compare("Why {not}?", braces, "b") == Preference(1, 0.75)
        assert judge.compare("Why {not}?", "same", "same") == Preference(None, 0.5)
    (body,) = bodies
    assert answers(body) == (braces, "b") and "Why {not}?" in body["messages"][1]["content"]
    assert body["logprobs"] is True and body["top_logprobs"] == 5 and "max_tokens" not in body


def test_a_judge_that_says_nothing_is_asked_once_more_and_then_it_has_no_verdict() -> None:
    replies = iter(["I like both.", "B 60", "A good question!", "", "Both"])
    with (
        chat_server(lambda body: next(replies)) as server,
        Endpoint(server.url, "m", concurrency=1) as endpoint,
    ):
        judge = LlmJudge(endpoint)
        assert judge.compare("1", "a", "bb") == Preference(1, 0.6)
        assert judge.compare("2", "a", "bb") == NO_VERDICT != Preference(None, 0.5)
    assert judge.tally.unreadable == 1 and "1 without a verdict" in judge.report()


def test_agreement_in_both_orders_and_its_report() -> None:
    """A judge that prefers the shorter one, but the first if there is little between them."""

    def biased(body: Body) -> str:
        a, b = answers(body)
        return "A 60" if len(a) < len(b) + 3 else "B 90"

    triples = [("p", "x" * 10, "y" * (10 + i)) for i in range(1, 6)]
    comparisons = [Comparison(*each) for p, a, b in triples for each in ((p, a, b), (p, b, a))]
    with chat_server(biased) as server, Endpoint(server.url, "m", concurrency=4) as endpoint:
        judge = LlmJudge(endpoint)
        for _ in range(2):
            said = [*compare_all(judge, comparisons)]
            assert [each.winner for each in said] == [0, 0, 0, 0, 0, 1, 0, 1, 0, 1]
    tally = judge.tally
    assert (tally.comparisons, tally.both_orders, tally.agreed, tally.first) == (20, 10, 6, 14)
    assert server.total == 10, "the second time from the cache"
    assert "the same winner in both orders for 60.0% of 10 pairs" in judge.report()
    assert "the answer shown first won 70.0%" in judge.report() and "10 requests" in judge.report()


def test_agreement_is_of_pairs_that_have_a_winner() -> None:
    """Ties in both orders are no verdict, and neither is silence; a tie in one order is another verdict."""

    def model(body: Body) -> str:
        a, b = answers(body)
        return {"t": "A 50", "x": "It depends.", "w": "A 90" if a > b else "B 90"}.get(
            a[0], "A 50" if a > b else "A 90"
        )

    comparisons = [
        Comparison(*each) for c in "txwu" for each in (("p", f"{c}1", f"{c}2"), ("p", f"{c}2", f"{c}1"))
    ]
    with chat_server(model) as server, Endpoint(server.url, "m") as endpoint:
        judge = LlmJudge(endpoint)
        said = [*compare_all(judge, comparisons)]
    assert said[:4] == [Preference(None, 0.5)] * 2 + [NO_VERDICT] * 2
    assert (judge.tally.both_orders, judge.tally.agreed, judge.tally.unreadable) == (2, 1, 2)


def test_what_has_no_verdict_is_not_kept(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is asked again by the next run; only what was said is in the file."""
    is_silent = True

    def model(body: Body) -> str:
        if is_silent and "<answer_A>" in body["messages"][-1]["content"] and answers(body)[0] == "a":
            raise Status(400, "content filter")
        return shorter(body) if len(body["messages"]) > 1 else "OK"

    path = tmp_path / "judged.jsonl"
    comparisons = [Comparison(prompt, *each) for prompt in "12" for each in (("a", "bb"), ("bb", "a"))]
    for silent, said in ((True, NO_VERDICT), (False, Preference(0, 0.75))):
        is_silent = silent
        with chat_server(model) as server, Endpoint(server.url, "m") as endpoint:
            assert judge_all(LlmJudge(endpoint), comparisons, path) == [said, Preference(1, 0.75)] * 2
        assert len(path.read_text().splitlines()) == (2 if silent else 4)
    assert server.total == 2
    assert "2 of 4 comparisons have no verdict" in caplog.text


def test_many_comparisons_whatever_goes_wrong(tmp_path: Any) -> None:
    rng = random.Random(0)
    comparisons = [Comparison(str(i), "a" * rng.randint(1, 9), "b" * rng.randint(10, 20)) for i in range(100)]
    faults = Rates(busy=0.1, error=0.05, hang=0.01, broken=0.05, altered=0)
    with chat_server(shorter, faults) as server:
        for _ in range(2):
            with Endpoint(
                server.url, "m", backoff=0.001, timeout=1.0, cache=tmp_path, concurrency=16
            ) as endpoint:
                said = [*compare_all(LlmJudge(endpoint), comparisons)]
                assert "About 0 requests" in endpoint.estimate(LlmJudge(endpoint).planned(comparisons))
            assert said == [Preference(0, 0.75)] * 100
        assert server.repeated() == {} and server.counts()["answered"] == 100


def test_an_endpoint_that_is_gone_ends_it_and_refusals_do_not() -> None:
    is_gone = False

    def model(body: Body) -> str:
        if is_gone or "bad" in body["messages"][-1]["content"]:
            raise Status(400, "content filter")
        return shorter(body) if len(body["messages"]) > 1 else "OK"

    with chat_server(model) as server, Endpoint(server.url, "m", concurrency=2) as endpoint:
        judge = LlmJudge(endpoint)
        asked = [*(Comparison(f"bad {i}", "a", "bb") for i in range(9)), Comparison("good", "a", "bb")]
        assert [*compare_all(judge, asked)] == [*[NO_VERDICT] * 9, Preference(0, 0.75)]
        is_gone = True
        with pytest.raises(JudgeError, match="^POST .*400 .content filter.; so failed .* and the question"):
            [*compare_all(judge, [Comparison(f"new {i}", "a", "bb") for i in range(9)])]
    with pytest.raises(JudgeError, match="^The judge llm: base_url must be"):
        llm.make("localhost", "m")
    with pytest.raises(JudgeError, match="Connection refused"):
        llm.make("http://127.0.0.1:9/v1", "m").compare("p", "a", "b")
