"""The client of chat endpoints, against one on this machine that misbehaves."""

import json
import pathlib
import threading
import time
from typing import Any

import pytest

from pasta_jax.endpoint import client
from pasta_jax.endpoint.cache import FILE, Cache, key_of
from pasta_jax.endpoint.client import TEST, Endpoint, Planned
from pasta_jax.endpoint.cost import Prices, Usage
from pasta_jax.endpoint.post import EndpointError, RequestError
from pasta_jax.files import InUse
from tests.helpers.chat_server import FAULTLESS, KEY, Answer, Body, ChatServer, Rates, Status, chat_server


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def echo(body: Body) -> str:
    return f"You said: {body['messages'][-1]['content']}"


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def endpoint(server: ChatServer, **options: Any) -> Endpoint:
    return Endpoint(server.url, "tiny", **{"backoff": 0.001, "timeout": 1.0, "concurrency": 16, **options})


def test_faults_are_asked_again_and_what_succeeded_is_not(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    """200 requests, 25 % of which go wrong at first; then the same again, from the cache alone."""
    words = [f"word {i}" for i in range(200)]
    with chat_server(echo, Rates(altered=0.0), seconds=0.002) as server:
        for _ in range(2):
            with endpoint(server, cache=tmp_path / "cache") as asked:
                replies = [*asked.each(lambda word: (word, asked.ask(said(word)).text), words)]
            assert sorted(replies) == sorted((word, f"You said: {word}") for word in words)
        counts = server.counts()
        assert counts["answered"] == 200 and server.repeated() == {}
        assert min(counts[kind] for kind in ("busy", "error", "hang", "broken")) >= 3
        assert 2 <= server.busiest <= 16
    assert asked.meter.requests == 200, "those of the earlier run"
    written = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert b"You said" in written and KEY.encode() not in written and KEY not in caplog.text


def test_the_order_of_the_items_is_kept_if_asked_for() -> None:
    def slow_first(body: Body) -> str:
        time.sleep(0.2 if body["messages"][0]["content"] == "0" else 0)
        return echo(body)

    with chat_server(slow_first) as server, endpoint(server) as asked:
        numbers = [str(i) for i in range(20)]
        replies = [*asked.each(lambda number: asked.ask(said(number)).text, numbers, in_order=True)]
        assert replies == [f"You said: {number}" for number in numbers]
        taken = iter(numbers)
        results = asked.each(lambda number: asked.ask(said(number)).text, taken)
        next(results)
        results.close()
    assert server.total == 20


def test_it_waits_as_long_as_it_is_told() -> None:
    times: list[float] = []

    def busy_at_first(body: Body) -> str:
        times.append(time.monotonic())
        return echo(body)

    with chat_server(busy_at_first, Rates(1.0), retry_after="0.3") as server:
        began = time.monotonic()
        with endpoint(server, attempts=3) as asked, pytest.raises(RequestError, match="429 .*, 3 times"):
            asked.ask(said("hello"))
        assert time.monotonic() - began >= 0.6
    assert times == []


@pytest.mark.parametrize("attempts", [1, 4])
@pytest.mark.parametrize("status", [400, 500])
def test_requests_that_fail_are_no_end_while_others_are_answered(status: int, attempts: int) -> None:
    """However many fail one after another; an endpoint that answers nothing at all is given up."""
    is_gone = False

    def fails(body: Body) -> str:
        if is_gone or body["messages"][0]["content"].startswith("bad"):
            raise Status(status, f"maximum context length exceeded by Bearer {KEY}")
        return echo(body)

    times = ", 4 times" if (status, attempts) == (500, 4) else ""
    message = rf"no answer: {status} \(maximum context .* by Bearer \[key\]\){times}$"
    with chat_server(fails) as server, endpoint(server, attempts=attempts, concurrency=1) as asked:
        for number in range(12):
            with pytest.raises(RequestError, match=message) as caught:
                asked.ask(said(f"bad {number}"))
            assert caught.value.is_refusal == (status == 400)
        assert asked.ask(said("2")).text == "You said: 2"
        is_gone = True
        for number in range(4 if status == 500 else 0):
            with pytest.raises(RequestError):
                asked.ask(said(f"word {number}"))
        failed = "so failed 5 requests one after another" if status == 500 else "so failed a request"
        lost = f"^POST http.*: {status} .*{failed}, and the question"
        for word in ("last", "next"):
            with pytest.raises(EndpointError, match=lost):
                asked.ask(said(word))


@pytest.mark.parametrize(
    ("path", "key", "message"),
    [
        ("/v1", "", r"401 \(Incorrect API key provided: nothing\) \(\$OPENAI_API_KEY is not set\)"),
        (
            "/v1",
            "sk-another-secret",
            r"401 \(Incorrect API key provided: Bearer \[key\]\) \(it refuses the key in \$OPENAI_API_KEY\)\.$",
        ),
        ("/v1", "a b", r"\$OPENAI_API_KEY holds what cannot be a key"),
        ("/v2", KEY, r"404 \(no such path: /v2/chat/completions\)"),
    ],
)
def test_what_every_request_would_get_ends_the_run_at_once(
    path: str, key: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)

    def run(url: str) -> None:
        asked = Endpoint(url, "tiny")
        list(asked.each(lambda word: asked.ask(said(word)), map(str, range(100))))

    with chat_server(echo) as server, pytest.raises(EndpointError, match=message) as caught:
        run(server.url.replace("/v1", path))
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)
    assert server.total == 0


def test_an_account_without_money_ends_the_run_at_once() -> None:
    def model(body: Body) -> str:
        raise Status(429, "You exceeded your current quota, please check your plan and billing details.")

    with chat_server(model) as server, endpoint(server) as asked:
        with pytest.raises(EndpointError, match="^POST http.*: 429 .You exceeded your current quota"):
            asked.ask(said("hello"))
        assert server.total == 1


def test_a_redirection_is_not_followed() -> None:
    """The key is for one address."""
    with chat_server(echo) as server, endpoint(server) as elsewhere:
        aside = Status(307, "moved", {"Location": elsewhere.url})

        def moved(body: Body) -> str:
            raise aside

        lost = pytest.raises(EndpointError, match="307 .moved")
        with chat_server(moved) as first, endpoint(first) as asked, lost:
            asked.ask(said("hello"))
        assert (first.total, server.total) == (1, 0)


def test_what_follows_a_failure_is_not_taken_for_it() -> None:
    """In order, with a failure amid answers: what comes after the end of the run is not yielded."""

    def model(body: Body) -> str:
        if body["messages"][0]["content"] == "3":
            time.sleep(0.1)
            raise Status(401, "no")
        return echo(body)

    def run(asked: Endpoint) -> None:
        for text in asked.each(lambda number: asked.ask(said(str(number))).text, range(9), in_order=True):
            done.append(text)

    done: list[str] = []
    lost = pytest.raises(EndpointError, match="401 .no")
    with chat_server(model) as server, endpoint(server, concurrency=3) as asked, lost:
        run(asked)
    assert done == [f"You said: {number}" for number in range(3)]


def test_nobody_there() -> None:
    with pytest.raises(
        EndpointError, match="^POST http://127.0.0.1:9/v1/chat/completions: Connection refused"
    ):
        Endpoint("http://127.0.0.1:9/v1/", "tiny").ask(said("hello"))


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("localhost:8000/v1", {}, "base_url must be like http://localhost:8000/v1"),
        ("http://me:word@host/v1", {}, "holds a name or a password"),
        ("http://host/v1", {"key_variable": "NO_SUCH_KEY"}, r"\$NO_SUCH_KEY is not set"),
        ("http://host/v1", {"budget_dollars": 1.0}, "needs the prices"),
    ],
)
def test_arguments_that_cannot_be_used(url: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(EndpointError, match=message) as caught:
        Endpoint(url, "tiny", **options)
    assert "word@" not in str(caught.value)


@pytest.mark.parametrize("options", [{"budget_requests": 7}, {"budget_dollars": 0.0077}])
def test_the_budget_is_never_exceeded_and_holds_over_runs(tmp_path: pathlib.Path, options: dict) -> None:
    """A request takes 100 tokens and 10, hence $0.0011."""

    def run(server: ChatServer) -> tuple[list[str], Endpoint]:
        done: list[str] = []
        with endpoint(server, cache=tmp_path, prices=Prices(1.0, 100.0), **options) as asked:
            results = asked.each(lambda word: asked.ask(said(word), expected=10).text, map(str, range(40)))
            with pytest.raises(EndpointError, match="^The budget is used up"):
                done.extend(results)
        return done, asked

    with chat_server(echo) as server:
        for _ in range(2):
            done, asked = run(server)
            assert len(done) == 7 and server.total == 7, "what is in the cache costs nothing"
            assert asked.meter.dollars == pytest.approx(0.0077)


def test_costs_are_estimated_where_they_are_not_counted() -> None:
    with chat_server(echo, usage=False) as server, endpoint(server, prices=Prices(1.0, 1.0)) as asked:
        asked.ask(said("four" * 10))
    assert asked.meter.dollars == pytest.approx((10 + 4 + 13) / 1e6)


def test_a_dry_run_sends_nothing(tmp_path: pathlib.Path) -> None:
    with chat_server(echo) as server, endpoint(server, cache=tmp_path, prices=Prices(1e6, 0)) as asked:
        asked.ask(said("kept"))
        planned = [Planned(said(word), 20) for word in ("kept", "first word", "second", "third")]
        shown = asked.estimate(planned, shown=2)
        assert server.total == 1
    assert "first word" in shown and "second" in shown and "third" not in shown and "kept\n" not in shown
    assert "About 3 requests would be sent, of 19 tokens and replies of 60, about $19.00" in shown
    assert "1 are in the cache. Nothing was sent." in shown


def test_fields_that_a_model_refuses_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    def reasoning(body: Body) -> str:
        for name in ("temperature", "logprobs", "top_logprobs", "max_tokens"):
            if name in body:
                raise Status(400, f"Unsupported parameter: '{name}' is not supported with this model.")
        return "B"

    with chat_server(reasoning) as server, endpoint(server, concurrency=1) as asked:
        for word in ("one", "two"):
            assert asked.ask(said(word), max_tokens=1, top_logprobs=5).text == "B"
    assert server.total == 5, "the second request is right at once"


@pytest.mark.parametrize(
    ("message", "param", "left_out"),
    [
        ("Unsupported value: 'temperature' does not support 0 with this model.", "temperature", True),
        ("Use max_completion_tokens instead.", "temperature", True),
        ('Invalid JSON payload received. Unknown name "temperature": Cannot find field.', None, True),
        ("This model takes its own temperature.", None, True),
        ("The prompt 'What is the temperature of the sun?' was stopped by the content filter.", None, False),
        ("This is not supported: [[What is the temperature, and where?]]", "messages", False),
    ],
)
def test_a_field_is_left_out_only_if_it_is_what_is_refused(
    message: str, param: str | None, left_out: bool
) -> None:
    """Without it the same request is answered then, and so are all others."""
    has_field: list[bool] = []

    def model(body: Body) -> str:
        has_field.append("temperature" in body)
        is_stopped = body["messages"][0]["content"] != TEST[0]["content"]
        if has_field[-1] if left_out else is_stopped:
            raise Status(400, message, param=param)
        return "B"

    with chat_server(model) as server, endpoint(server) as asked:
        if left_out:
            assert asked.ask(said("?")).text == asked.ask(said("again")).text == "B"
        else:
            with pytest.raises(RequestError, match="no answer: 400"):
                asked.ask(said("?"))
    assert has_field[0] and has_field[-1] != left_out, "the last is another question"


def test_likely_first_tokens_are_read() -> None:
    top = [{"token": "A", "logprob": -0.1}, {"token": "B", "logprob": -2.5}]

    def answer(body: Body) -> Answer:
        assert body["logprobs"] is True and body["top_logprobs"] == 5
        content = [{"token": "A", "logprob": -0.1, "top_logprobs": top}]
        return {"message": {"content": "A"}, "logprobs": {"content": content}}

    with chat_server(answer) as server, endpoint(server) as asked:
        for _ in range(2):
            reply = asked.ask(said("?"), top_logprobs=5)
            assert reply.first == (("A", -0.1), ("B", -2.5)) and reply.usage == Usage(100, 10)
    assert server.total == 1


@pytest.mark.parametrize(
    "choice",
    [{"message": {"content": 7}}, {"message": None}, {"text": "old"}, {"message": {"content": [{}]}}],
)
def test_a_reply_that_is_none(choice: dict) -> None:
    none = pytest.raises(RequestError, match="no chat completion in JSON, 2 times")
    with chat_server(lambda body: choice) as server, endpoint(server, attempts=2) as asked, none:
        asked.ask(said("?"))


def test_equal_requests_at_once_are_sent_once() -> None:
    with chat_server(echo, seconds=0.1) as server, endpoint(server) as asked:
        assert len({*asked.each(lambda _: asked.ask(said("same")).text, range(10))}) == 1
        assert server.total == 1


def test_the_cache_survives_a_cut_anywhere(tmp_path: pathlib.Path) -> None:
    names = [key_of(i) for i in range(3)]
    cache = Cache(tmp_path)
    for i, name in enumerate(names):
        cache.put(name, {"text": f"näme \ud83d {i}", "usage": [1, 2]})
    cache.close()
    whole = (tmp_path / FILE).read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for cut in [*range(0, len(whole), 11), *ends, *(end - 1 for end in ends)]:
        (tmp_path / FILE).write_bytes(whole[:cut])
        cache = Cache(tmp_path)
        kept = sum(end <= cut for end in ends)
        assert [name in cache for name in names] == [i < kept for i in range(3)]
        assert cache.usage == Usage(kept, 2 * kept)
        if cut % 3 == 0:
            for i, name in enumerate(names[kept:], start=kept):
                cache.put(name, {"text": f"näme \ud83d {i}", "usage": [1, 2]})
            assert [(cache.get(name) or {})["text"][-1] for name in names] == ["0", "1", "2"]
            assert (tmp_path / FILE).read_bytes() == whole
        cache.close()
    (tmp_path / FILE).write_bytes(b"garbage\n[1]\n" + whole)
    cache = Cache(tmp_path)
    assert (cache.get(names[2]) or {})["text"] == "näme \ud83d 2" and len(cache) == 3
    cache.close()


def test_two_processes_have_no_cache_in_common(tmp_path: pathlib.Path) -> None:
    first = Cache(tmp_path / "cache")
    with pytest.raises(InUse, match="is in use"):
        Cache(tmp_path / "cache")
    first.close()
    Cache(tmp_path / "cache").close()


def test_waiting_threads_end_when_the_run_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """One is told to wait for an hour; the budget of the others ends."""
    waits = threading.Event()

    def answer(body: Body) -> str:
        if body["messages"][0]["content"] == "0":
            waits.set()
            raise Status(503, "later")
        waits.wait(5)
        return echo(body)

    monkeypatch.setattr(client.random, "uniform", lambda low, high: 1.0)
    with (
        chat_server(answer, FAULTLESS) as server,
        endpoint(server, backoff=60.0, budget_requests=10) as asked,
    ):
        began = time.monotonic()
        with pytest.raises(EndpointError, match="budget"):
            list(asked.each(lambda number: asked.ask(said(str(number))), range(50)))
        assert time.monotonic() - began < 20


def test_requests_are_kept_under_their_content() -> None:
    assert key_of({"a": 1, "b": [2]}) == key_of({"b": [2], "a": 1}) != key_of({"a": 1, "b": [3]})
    assert json.loads('"\\ud83d"') and key_of("\ud83d")
