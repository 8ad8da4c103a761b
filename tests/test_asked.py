"""What a server is asked, and what it refuses before it decodes."""

from __future__ import annotations

import types
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from starlette.requests import Request

from pasta_jax.decoding.session import Load
from pasta_jax.serve.__main__ import LOOPBACK, _settings
from pasta_jax.serve.app import check_count, check_origin
from pasta_jax.serve.asked import (
    Defaults,
    asked_of_chat,
    asked_of_completions,
    asked_of_responses,
    conversation,
    parsed,
)
from pasta_jax.serve.errors import ApiError
from pasta_jax.serve.rates import Rates
from tests.helpers.served import SAID


def test_what_is_asked() -> None:
    here = Defaults("m", 77)
    parts = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]
    body = {
        "messages": [
            {"role": "system", "content": "Be short."},
            {"role": "developer", "content": "In words."},
            {"role": "user", "content": parts},
        ],
        **dict(
            model="m", n=2, seed=2**64 - 1, stop="\n", temperature=0.5, max_tokens=3, max_completion_tokens=5
        ),
        **dict(top_k=-1, user="u", tools=[], frequency_penalty=0.0, logprobs=None, unknown={"a": 1}),
        **dict(stream=True, stream_options={"include_usage": True}),
    }
    asked = asked_of_chat(body, here)
    assert asked.prompts == (
        [{"role": "system", "content": "Be short.\n\nIn words."}, {"role": "user", "content": "a\nb"}],
    )
    assert [sampling.seed for sampling in asked.samplings] == [2**64 - 1, 0]
    first = asked.samplings[0]
    assert (first.max_new_tokens, first.stop, first.temperature, first.top_k) == (5, ("\n",), 0.5, 0)
    assert asked.stream and asked.usage and not asked.branches
    assert asked_of_chat({"messages": SAID}, here).samplings[0].max_new_tokens == 77
    for prompt, prompts in ((["a", [1, 2]], ("a", [1, 2])), ([1, 2], ([1, 2],)), ("a", ("a",))):
        assert asked_of_completions({"prompt": prompt, "n": 2}, here).prompts == prompts
    # The items of an answer that a client sends back are one answer.
    items = [
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]}
        for text in ("The Nile", ", and the Don")
    ]
    said = {"input": [*SAID, *items, *SAID], "instructions": "Be short.", "max_output_tokens": 9}
    assert [*asked_of_responses(said, here).prompts[0]] == [
        {"role": "system", "content": "Be short."},
        *SAID,
        {"role": "assistant", "content": "The Nile, and the Don"},
        *SAID,
    ]
    texts = [Joined("a"), Joined("b"), Joined("c")]
    (joined,) = conversation([{"role": "user", "content": text} for text in texts], "messages")
    assert joined["content"] == "a\n\nb\n\nc"
    wordy = {
        "input": "a",
        "text": {"format": {"type": "text"}, "verbosity": "low"},
        "metadata": {"for": "me"},
    }
    assert asked_of_responses(wordy, here).echoed == {"instructions": None, "metadata": {"for": "me"}}
    seeds = {asked_of_responses({"input": "a"}, here).samplings[0].seed for _ in range(3)}
    assert len(seeds) == 3, "without a seed, each request has its own"


class Joined(str):
    """A text that is not to be added to others one by one: of a thousand, the first would be copied as often."""

    def __radd__(self, other: str) -> str:
        raise AssertionError("joined one by one")


@pytest.mark.parametrize(
    ("read", "body", "param"),
    [
        (asked_of_chat, {}, "messages"),
        (asked_of_chat, {"messages": [5]}, "messages[0]"),
        (asked_of_chat, {"messages": [{"role": "tool", "content": ""}]}, "messages[0].role"),
        (asked_of_chat, {"messages": [{"role": "user"}]}, "messages[0].content"),
        (
            asked_of_chat,
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0]",
        ),
        (asked_of_chat, {"messages": SAID, "temperature": "hot"}, "temperature"),
        (asked_of_chat, {"messages": SAID, "max_completion_tokens": 0}, "max_completion_tokens"),
        (asked_of_chat, {"messages": SAID, "n": 1.5}, "n"),
        (asked_of_chat, {"messages": SAID, "stop": [""]}, "stop"),
        (asked_of_chat, {"messages": SAID, "stop": 5}, "stop"),
        (asked_of_chat, {"messages": SAID, "stop": ["a"] * 17}, "stop"),
        (asked_of_chat, {"messages": SAID, "stop": "a" * 257}, "stop"),
        (asked_of_chat, {"messages": SAID, "tools": [{}]}, "tools"),
        (asked_of_chat, {"messages": SAID, "top_logprobs": 3}, "top_logprobs"),
        (asked_of_chat, {"messages": SAID, "response_format": {"type": "json_object"}}, "response_format"),
        (asked_of_chat, {"messages": SAID, "stream": "yes"}, "stream"),
        (asked_of_chat, {"messages": SAID, "stream_options": 1}, "stream_options"),
        (asked_of_chat, {"messages": SAID, "mode": "both"}, "mode"),
        (asked_of_chat, {"messages": SAID, "model": "gpt"}, "model"),
        (asked_of_completions, {"prompt": []}, "prompt"),
        (asked_of_completions, {"prompt": ["a", 1]}, "prompt"),
        (asked_of_completions, {"prompt": "a", "echo": True}, "echo"),
        (asked_of_completions, {"prompt": "a", "logprobs": 2}, "logprobs"),
        (asked_of_responses, {"input": "a", "previous_response_id": "r"}, "previous_response_id"),
        (asked_of_responses, {"input": "a", "stop": "b"}, "stop"),
        (asked_of_responses, {"input": "a", "instructions": ["b"]}, "instructions"),
        (asked_of_responses, {"input": "a", "metadata": {"for": 5}}, "metadata"),
        (asked_of_responses, {"input": "a", "metadata": {"for": "cut \ud83d"}}, "metadata"),
        (asked_of_responses, {"input": "a", "text": 5}, "text"),
        (asked_of_responses, {"input": "a", "text": {"format": {"type": "json_schema"}}}, "text"),
    ],
)
def test_what_cannot_be_served_is_named(read: Any, body: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        read(body, Defaults("m"))
    error = caught.value.body["error"]
    assert error["param"] == param and param.partition("[")[0] in error["message"].lower() and error["code"]
    assert caught.value.status == (404 if param == "model" else 400)


def test_where_a_body_is_no_json() -> None:
    with pytest.raises(ApiError, match=r"no JSON: .*, line 2, column 5\. Send an object"):
        parsed(b'{"a":\n 1, }')


def test_more_answers_than_are_taken_at_once() -> None:
    """They are counted before anything is made for each of them."""
    counts = dict(running=0, waiting=0, submitted=0, failed=0, reused=0, kept_bytes=0)
    taken = Load(rows=6, queue=2, serving=True, worked_s=0.0, **counts)
    for prompts, n, param in ((4, 2, None), (4, 3, "n"), (9, 1, "prompt"), (300_000, 128, "prompt")):
        asked = asked_of_completions({"prompt": [""] * prompts, "n": n}, Defaults("m"))
        if param is None:
            check_count(asked, taken)
            continue
        with pytest.raises(ApiError, match=f"{prompts * n} answers at once .* takes, 8") as caught:
            check_count(asked, taken)
        assert caught.value.status == 400 and caught.value.param == param


def test_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    rates = Rates(2, lambda: now)
    for client in "aab":
        rates.check(client)
    with pytest.raises(ApiError, match="Try again in 30 s") as caught:
        rates.check("a")
    assert caught.value.status == 429 and caught.value.headers["Retry-After"] == "30"
    now = 30.0
    rates.check("a")
    with pytest.raises(ApiError):
        rates.check("a")
    monkeypatch.setattr("pasta_jax.serve.rates.MOST_CLIENTS", 2)
    rates.check("b")
    rates.check("c")  # a is forgotten: its last was before b's
    rates.check("a")


def test_what_a_server_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a key, and where only this machine reaches it, it has this machine's names."""
    monkeypatch.delenv("PASTA_API_KEY", raising=False)
    values = types.SimpleNamespace(
        key_variable="PASTA_API_KEY", host="127.0.0.1", proxies=["10.0.0.0/8", "::1"], name="m",
        max_new_tokens=9, most_bytes=9, rate=0, drain_delay=0.0, log_prompts=False,
    )  # fmt: skip
    told = _settings(values)
    assert (told.keys, told.hosts, told.proxies) == ((), LOOPBACK, ("10.0.0.0/8", "::1"))
    values.host = "0.0.0.0"
    assert _settings(values).hosts == ()
    values.host = "localhost"
    monkeypatch.setenv("PASTA_API_KEY", "one, two,")
    assert (_settings(values).keys, _settings(values).hosts) == (("one", "two"), ())
    for wrong in ("gateway", "10.0.0.1/8", "*", ""):
        values.proxies = ["127.0.0.1", wrong]
        with pytest.raises(SystemExit):
            _settings(values)
        assert "Give addresses or networks, such as 127.0.0.1,10.0.0.0/8." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "origin", "hosts", "code"),
    [
        ("localhost:8000", None, LOOPBACK, None),
        ("LOCALHOST", None, LOOPBACK, None),
        ("127.0.0.1:8000", "http://127.0.0.1:8000", LOOPBACK, None),
        ("[::1]:8000", "http://[::1]:8000", LOOPBACK, None),
        ("x.example", "https://x.example", (), None),
        ("127.0.0.1:8000", "http://evil.example", (), "foreign_origin"),
        ("127.0.0.1:8000", "http://localhost:8000", LOOPBACK, "foreign_origin"),
        ("evil.example:8000", "http://evil.example:8000", LOOPBACK, "foreign_host"),
        ("evil.example:8000", None, LOOPBACK, "foreign_host"),  # a GET of the page itself
        ("localhost.evil.example", None, LOOPBACK, "foreign_host"),
        ("localhost:8000:evil.example", None, LOOPBACK, "foreign_host"),
        ("", None, LOOPBACK, "foreign_host"),
    ],
)
def test_pages_of_other_hosts(
    host: str, origin: str | None, hosts: tuple[str, ...], code: str | None
) -> None:
    """Also of one whose owner has pointed its name at this machine, which is then the server's to a browser."""
    headers = {"host": host} | ({"origin": origin} if origin else {})
    scope = {"type": "http", "headers": [(k.encode(), v.encode()) for k, v in headers.items()]}
    if code is None:
        return check_origin(Request(scope), hosts)
    with pytest.raises(ApiError) as caught:
        check_origin(Request(scope), hosts)
    assert (caught.value.status, caught.value.code) == (403, code)
