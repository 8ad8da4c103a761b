"""The server: whatever clients do, an answer is the one that the request has alone, and nothing is lost."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import inspect
import io
import json
import logging
import math
import random
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import requests

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from starlette.requests import Request

from pasta_jax.decoding.compiled import Compiled
from pasta_jax.decoding.engine import Decoder
from pasta_jax.decoding.pending import PendingAnswer
from pasta_jax.decoding.session import Load
from pasta_jax.decoding.state import Stop
from pasta_jax.decoding.streaming import Draft, Event
from pasta_jax.demo import __main__ as demo_command
from pasta_jax.serve import app as serve_app
from pasta_jax.serve import server as serve_server
from pasta_jax.serve import sse
from pasta_jax.serve.__main__ import LOOPBACK, _settings, log_for_programs
from pasta_jax.serve.app import (
    ROOM,
    Endpoint,
    Record,
    Service,
    Settings,
    _Out,
    check_count,
    check_origin,
    page,
)
from pasta_jax.serve.asked import (
    Defaults,
    asked_of_chat,
    asked_of_completions,
    asked_of_responses,
    conversation,
)
from pasta_jax.serve.errors import ApiError
from pasta_jax.serve.rates import Rates
from pasta_jax.serve.replies import LEAST_LOGPROB, text_logprobs
from pasta_jax.serve.responses import InOrder, Items
from pasta_jax.simulate import Replica, StepTimes
from tests import load as loads
from tests.helpers.chatty import WORDS, chatty_model, decoder
from tests.helpers.commands import python
from tests.helpers.contrast import contrast
from tests.helpers.served import MODEL, Served, alone, asked, events_of, served

SAID = [{"role": "user", "content": "rivers"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served() as running:
        yield running


# ------------------------------------------------------------------------------------------------- what is asked


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


# -------------------------------------------------------------------------------------------- branches as items


def random_events(rng: random.Random) -> list[Event]:
    """Threads that promise others, up to four deep, and write in turn; a thread ends after its branches."""
    events, depth, todo, open_below = list[Event](), {0: 0}, {0: rng.randint(0, 6)}, {0: set[int]()}
    while todo:
        thread = rng.choice([*todo])
        if todo[thread]:
            todo[thread] -= 1
            if depth[thread] < 4 and rng.random() < 0.4:
                branch = len(depth)
                depth[branch], todo[branch], open_below[branch] = depth[thread] + 1, rng.randint(0, 4), set()
                open_below[thread].add(branch)
                events.append(Event("promise", branch=branch, parent=thread, topic=f"t{branch}"))
            else:
                events.append(Event("text", branch=thread, text=f"{thread}.{todo[thread]} "))
        elif not open_below[thread] & todo.keys():
            del todo[thread]
            events.append(Event("closed", branch=thread, finished=rng.random() < 0.8))
    return events


class Accumulated:
    """What OpenAI's client makes of the events of a stream, and that it would accept them."""

    def __init__(self) -> None:
        self.items: dict[int, list[str]] = {}
        self.done: dict[int, str] = {}
        self.statuses: dict[int, str] = {}
        self.ids: dict[int, str] = {}

    def add(self, event: dict[str, Any]) -> None:
        index, kind = event["output_index"], event["type"].removeprefix("response.")
        match kind:
            case "output_item.added":
                assert index == len(self.items), "items come in order"
                self.items[index], self.ids[index] = [], event["item"]["id"]
            case "content_part.added":
                assert event["content_index"] == len(self.items[index])
                self.items[index].append("")
            case "output_text.delta":
                assert event["delta"] and index not in self.done
                self.items[index][event["content_index"]] += event["delta"]
            case "output_text.done":
                assert event["text"] == self.items[index][event["content_index"]]
            case "output_item.done":
                assert event["item"]["id"] == self.ids[index] and index not in self.done
                self.done[index] = "".join(part["text"] for part in event["item"]["content"])
                self.statuses[index] = event["item"]["status"]
        if "item_id" in event:
            assert event["item_id"] == self.ids[index]

    @property
    def text(self) -> str:
        return "".join(part for index in sorted(self.items) for part in self.items[index])


def test_items_are_the_document(seed: int) -> None:
    rng, interleaved, deepest, cut = random.Random(seed), 0, 0, 0
    for _ in range(200):
        draft, client, items, last = Draft(), Accumulated(), Items("x", branches=False), -1
        settled, order, ordered = "", InOrder(), list[Event]()
        for event in random_events(rng):
            draft.add(event)
            ordered += order.add(event)
            settled = "".join(each.text for each in ordered)
            assert settled == draft.settled, "each comes as soon as it may"
            for sent in items.add(event):
                client.add(sent)
                interleaved += sent["output_index"] < last
                last = sent["output_index"]
        for sent in items.end("incomplete"):
            client.add(sent)
        unfinished = {event.branch for event in ordered if not event.finished}
        for item in items.items[:-1]:
            ends_early = item.promise is not None and item.promise.branch in unfinished
            assert client.statuses[item.index] == ("incomplete" if ends_early else "completed")
        cut += items.items[-1].promise is None and client.statuses[items.items[-1].index] == "incomplete"
        assert client.text == str(draft) == "".join(client.done[i] for i in sorted(client.items))
        assert all(part.done for item in items.items for part in item.parts)
        follows = Items("y", branches=False)
        texts = [sent.get("delta", "") for event in ordered for sent in follows.add(event)]
        texts += [sent.get("delta", "") for sent in follows.end("completed")]
        assert "".join(texts) == str(draft)
        assert [[part.text for part in item.parts] for item in follows.items] == [*client.items.values()]
        deepest = max(deepest, *(len(parts) for parts in client.items.values()))
    assert interleaved and deepest > 3 and cut


# ------------------------------------------------------------------------------------------------ whole replies


@pytest.mark.slow
def test_every_endpoint_has_the_text_of_the_request_alone(server: Served) -> None:
    for number in range(4):
        fields = asked(number)
        expected = alone("rivers", fields)
        chat = server.post("/v1/chat/completions", model=MODEL, messages=SAID, **fields).json()
        assert chat["choices"][0]["message"]["content"] == expected.text
        stats = expected.stats
        assert chat["usage"] == {
            "prompt_tokens": stats.prompt_tokens,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens": stats.output_tokens,
            "total_tokens": stats.prompt_tokens + stats.output_tokens,
        }
        finish = "stop" if expected.stop_reason == "eos" else "length"
        assert chat["choices"][0]["finish_reason"] == finish
        completion = server.post("/v1/completions", prompt="rivers", **fields).json()
        assert completion["choices"][0]["text"] == expected.text
        items = fields | {"max_output_tokens": fields["max_tokens"], "metadata": {"number": str(number)}}
        response = server.post("/v1/responses", input="rivers", **items).json()
        assert response["metadata"] == items["metadata"] and response["instructions"] is None
        assert response["status"] == {"stop": "completed", "length": "incomplete"}[finish]
        statuses = {item["status"] for item in response["output"]}
        assert ("incomplete" in statuses) == (response["status"] == "incomplete")
        texts = [part["text"] for item in response["output"] for part in item["content"]]
        assert "".join(texts) == expected.text
        assert len(response["output"]) > len(expected.branches) or not expected.text


@pytest.mark.slow
def test_several_choices_stops_and_logprobs(server: Served) -> None:
    fields = asked(7)
    texts = [alone(p, asked(7 + i)).text for p in ("rivers", "world") for i in range(3)]
    several = server.post("/v1/completions", prompt=["rivers", "world"], **fields | {"n": 3}).json()
    assert [choice["text"] for choice in several["choices"]] == texts
    before, stop, _ = alone("rivers", asked(3)).text.partition("cities")
    assert before and stop
    body = {"messages": SAID, "logprobs": True, **asked(3), "stop": [stop]}
    choice = server.post("/v1/chat/completions", **body).json()["choices"][0]
    assert choice["message"]["content"] == before and choice["finish_reason"] == "stop"
    pieces = [bytes(token["bytes"]) for token in choice["logprobs"]["content"]]
    said = before.encode()
    assert b"".join(pieces).startswith(said) and len(b"".join(pieces[:-1])) < len(said)
    whole = server.post("/v1/chat/completions", messages=SAID, logprobs=True, **fields).json()["choices"][0]
    spelled = bytes(byte for token in whole["logprobs"]["content"] for byte in token["bytes"])
    assert spelled.decode(errors="replace") == texts[0]
    assert all(token["logprob"] < 0 for token in whole["logprobs"]["content"])
    old = server.post("/v1/completions", prompt="rivers", logprobs=0, **fields).json()["choices"][0][
        "logprobs"
    ]
    assert old["token_logprobs"] == [token["logprob"] for token in whole["logprobs"]["content"]]
    sequential = server.post("/v1/chat/completions", messages=SAID, mode="sequential", **fields).json()
    assert (
        sequential["choices"][0]["message"]["content"]
        == alone("rivers", fields | {"open_bias": -float("inf")}).text
    )


@pytest.mark.slow
def test_tokens_have_their_places_in_the_text(server: Served) -> None:
    """Also behind a character that several tokens spell."""
    choice = server.post("/v1/completions", prompt="rivers", logprobs=0, **asked(4)).json()["choices"][0]
    logprobs, whole_before = choice["logprobs"], True
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        is_whole = "\N{REPLACEMENT CHARACTER}" not in token
        assert not (whole_before and is_whole) or choice["text"].startswith(token, offset)
        whole_before = is_whole
    assert logprobs["text_offset"][-1] < sum(map(len, logprobs["tokens"][:-1])), "there is no such character"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(server: Served) -> None:
    """As docs/server.md has it: curl names no type of the body's."""
    body = json.dumps({"messages": SAID, **asked(3)})
    line = ["curl", "-s", f"{server.url}/v1/chat/completions", "-d", body]
    done = subprocess.run(line, capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == alone("rivers", asked(3)).text


@pytest.mark.slow
@pytest.mark.parametrize("logprob", [-math.inf, math.nan])
def test_what_is_sent_is_json(logprob: float) -> None:
    """It has neither infinity nor NaN, which the parsers of many clients refuse."""
    answer = alone("rivers", asked(3))
    trace = dataclasses.replace(answer.trace, logprob=np.full_like(answer.trace.logprob, logprob))
    broken = dataclasses.replace(answer, trace=trace)
    assert {value for _, value, _ in text_logprobs(broken, WORDS.vocabulary)} == {LEAST_LOGPROB}
    with pytest.raises(ValueError, match="JSON"):
        sse.data({"logprob": logprob})


# ------------------------------------------------------------------------------------------------------ streams


@pytest.mark.slow
def test_chat_streams(server: Served) -> None:
    fields = asked(3)
    expected = alone("rivers", fields)
    options = {"include_usage": True, "include_branches": True}
    *chunks, usage, end = events_of(
        server.post("/v1/chat/completions", messages=SAID, stream=True, stream_options=options, **fields)
    )
    assert end is None and usage["choices"] == [] and usage["usage"]["total_tokens"]
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    deltas = [choice["delta"].get("content", "") for choice in choices]
    assert "".join(deltas) == expected.text and sum(map(bool, deltas)) > 2
    assert all(choice["delta"].get("content", "") is not None and "error" not in choice for choice in choices)
    assert [choice["finish_reason"] for choice in choices][-1] is not None
    told = [each for chunk in chunks for each in chunk.get("pasta", [])]
    assert [each["branch"] for each in told if each["kind"] == "promise"] == [b.id for b in expected.branches]
    for branch in expected.branches:
        texts = [e["text"] for e in told if e["kind"] == "text" and e["branch"] == branch.id]
        nested = any(other.parent == branch.id for other in expected.branches)
        assert nested or "".join(texts) == branch.text
    done = told[-1]
    assert (done["kind"], done["steps"]) == ("done", expected.stats.decode_steps)
    assert max(each["step"] for each in told if "step" in each) <= done["steps"]
    plain = events_of(server.post("/v1/chat/completions", messages=SAID, stream=True, **fields))
    assert not any("pasta" in chunk for chunk in plain[:-1])
    several = events_of(server.post("/v1/completions", prompt="rivers", stream=True, **fields | {"n": 2}))
    for index in range(2):
        parts = [c["choices"][0]["text"] for c in several[:-1] if c["choices"][0]["index"] == index]
        assert "".join(parts) == alone("rivers", asked(3 + index)).text


@pytest.mark.slow
def test_responses_stream(server: Served) -> None:
    fields = asked(3) | {"max_output_tokens": 60}
    for options in ({}, {"include_branches": True}):
        sent = events_of(
            server.post("/v1/responses", input="rivers", stream=True, stream_options=options, **fields)
        )
        order = [event["output_index"] for event in sent if "output_index" in event]
        assert (order == sorted(order)) == (not options)
    first, _, *middle, last = sent
    assert first["type"] == "response.created" and last["response"]["id"] == first["response"]["id"]
    assert [event["sequence_number"] for event in middle] == [*range(2, 2 + len(middle))]
    client = Accumulated()
    for event in middle:
        client.add(event)
    assert client.text == alone("rivers", asked(3)).text
    assert [item["id"] for item in last["response"]["output"]] == [*client.ids.values()]
    assert [item["status"] for item in last["response"]["output"]] == [*client.statuses.values()]
    whole = server.post("/v1/responses", input="rivers", **fields).json()
    strip = [[part["text"] for part in item["content"]] for item in whole["output"]]
    assert strip == [*client.items.values()]


# ---------------------------------------------------------------------------------------- clients of every kind


class Raw(socket.socket):
    """A client that sends what it likes and reads when it likes."""

    def __init__(self, server: Served):
        super().__init__()
        self.settimeout(60)
        self.connect(("127.0.0.1", server.port))

    def ask(self, path: str, **body: Any) -> None:
        data = json.dumps(body).encode()
        self.sendall(
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data
        )

    def until(self, end: bytes) -> bytes:
        """What comes, as far as this text or the end."""
        reply = b""
        while end not in reply and (part := self.recv(4096)):
            reply += part
        return reply


RUBBISH = (
    b"\x16\x03\x01\x02\x00\x01\x00",
    b"GET\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\n\r\n",
    b"\x00" * 4096,
)


def test_a_load_that_comes_at_random(server: Served) -> None:
    """Each answer has its text and its tokens, and a simulation of the same requests gives each its steps."""
    load = loads.Load(server.url, 40, ("rivers", "the"))
    arrivals = asyncio.run(load.at_random(40.0, 10, seed=0))
    assert not load.faults and len(arrivals.answers) == 10
    assert (arrivals.latency > 0).all() and (np.diff(arrivals.arrived) > 0).all()
    alike = alone("the", asked(1, max_tokens=40, open_bias=0.0, min_p=0.05))
    assert load.texts[1] == {alike.text}
    assert (load.widths[1].sum(), len(load.widths[1])) == (
        alike.stats.output_tokens,
        alike.stats.decode_steps,
    )
    simulated = arrivals.simulated(Replica(8, StepTimes((1, 8), (1.0, 2.0))))
    assert (simulated.latency >= [len(answer) for answer in arrivals.answers]).all()


@pytest.mark.slow
def test_clients_of_every_kind(server: Served) -> None:
    """64 at once: some slow, some vanish, some send rubbish. Each other has the text of its request alone."""
    texts, cancelled = dict[int, str](), server.service.decoder.session
    words = ("rivers", "cities of the world", "the", "and the rivers")

    def client(i: int) -> None:
        prompt, fields = words[i % 4], asked(i)
        body = {"messages": [{"role": "user", "content": prompt}], **fields}
        match i % 8:
            case 0:
                with Raw(server) as slow:
                    slow.ask("/v1/chat/completions", stream=True, **body)
                    data = b""
                    while b"[DONE]" not in data and (part := slow.recv(512)):
                        data += part
                        time.sleep(0.002)
                found = re.findall(r'"content":("(?:[^"\\]|\\.)*")', data.decode())
                texts[i] = "".join(map(json.loads, found))
            case 1:
                with Raw(server) as leaves:
                    leaves.ask("/v1/chat/completions", stream=bool(i & 8), **body | {"max_tokens": 100})
                    if i & 8:
                        leaves.recv(64)
            case 2:
                with Raw(server) as rubbish, contextlib.suppress(OSError):
                    rubbish.sendall(RUBBISH[i // 8 % len(RUBBISH)])
                    rubbish.settimeout(0.2)
                    rubbish.recv(4096)
            case 3 | 4:
                reply = server.post("/v1/completions", prompt=prompt, **fields)
                texts[i] = reply.json()["choices"][0]["text"]
            case _:
                chunks = events_of(server.post("/v1/chat/completions", stream=True, **body))
                texts[i] = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1])

    threads = [threading.Thread(target=client, args=(i,)) for i in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    complete = [i for i in range(64) if i % 8 not in (1, 2)]
    assert texts == {i: alone(words[i % 4], asked(i)).text for i in complete}
    until = time.monotonic() + 30
    while not (cancelled.idle and server.service.active == 0) and time.monotonic() < until:
        time.sleep(0.01)
    assert cancelled.idle and server.service.active == 0, "what nobody waits for goes on"


@pytest.mark.slow
def test_clients_that_keep_a_server_waiting(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request beyond all room is refused before its body is read; a connection without one is closed."""
    monkeypatch.setattr(server.service, "active", 6 + 64 + ROOM)
    with Raw(server) as large:
        large.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
        reply = large.until(b"overloaded")
    assert reply.startswith(b"HTTP/1.1 503") and b"overloaded" in reply
    monkeypatch.setattr(serve_server, "BODY_S", 0.1)
    with Raw(server) as silent:
        silent.sendall(b"POST /v1/compl")
        assert silent.recv(1) == b""
    with Raw(server) as dribbling:
        dribbling.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        reply = dribbling.until(b"}")
        dribbling.sendall(b"GET /hea")
        while part := dribbling.recv(4096):
            reply += part
    assert reply.startswith(b"HTTP/1.1 200")


HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.slow
def test_connections_are_kept_for_their_next_request(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the last one was refused before its body came, as gateways send it; but not too many."""
    monkeypatch.setattr(serve_server, "BODY_S", 0.1)
    with Raw(server) as idle, monkeypatch.context() as patch:
        patch.setattr(server.service, "active", 6 + 64 + ROOM)
        idle.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n")
        assert b"HTTP/1.1 503" in idle.until(b"overloaded")
        for rest in (b"late", b""):
            idle.sendall(rest)
            time.sleep(0.5)
            idle.sendall(HEALTH)
            assert idle.until(b'"ready"').count(b"HTTP/1.1 200") == 1
    with Raw(server) as silent:  # the rest of a request that is answered
        silent.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n")
        assert b"HTTP/1.1 200" in silent.until(b"}")
        assert silent.recv(1) == b""
    assert serve_server.IDLE_S > 600, "Google's load balancers keep them for so long"
    monkeypatch.setattr(serve_server, "MOST_IDLE", 2)
    with contextlib.ExitStack() as stack:
        several = [stack.enter_context(Raw(server)) for _ in range(3)]
        for each in several:
            each.sendall(HEALTH)
            each.until(b"}")
        assert several[0].recv(1) == b""
        for each in several[1:]:
            each.sendall(HEALTH)
            assert b"HTTP/1.1 200" in each.until(b"}")
    monkeypatch.setattr(serve_server, "IDLE_S", 0.2)
    with Raw(server) as idle:
        idle.sendall(HEALTH)
        idle.until(b"}")
        assert idle.recv(1) == b""


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_has_the_answer_cancelled(
    server: Served, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    begun, has_left, stops = threading.Event(), threading.Event(), list[Stop]()
    decode_chunk, end = Compiled.decode_chunk, PendingAnswer.end

    def slow(self: Compiled, *args: Any) -> Any:
        begun.set()
        assert has_left.wait(60)
        return decode_chunk(self, *args)

    def noted(self: PendingAnswer, trace: Any) -> None:
        end(self, trace)
        stops.append(Stop(trace.stop))

    monkeypatch.setattr(Compiled, "decode_chunk", slow)
    monkeypatch.setattr(PendingAnswer, "end", noted)
    with Raw(server) as leaves:
        leaves.ask("/v1/chat/completions", messages=SAID, stream=stream, **asked(4))  # more than a chunk
        assert begun.wait(60)
    session, until = server.service.decoder.session, time.monotonic() + 30
    while not all(answer.cancelled for answer in session._all()) and time.monotonic() < until:
        time.sleep(0.001)
    has_left.set()
    while not (stops and server.service.active == 0) and time.monotonic() < until:
        time.sleep(0.001)
    assert stops == [Stop.CANCELLED] and server.service.active == 0


def test_a_stream_that_has_nothing_to_send_shows_that_it_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while there are events of which nothing can be sent yet."""
    monkeypatch.setattr(serve_app, "PING_S", 0.1)
    sent = list[bytes]()

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))

    async def events(quiet: float, count: int) -> Any:
        for _ in range(count):
            await asyncio.sleep(quiet)
            yield Event("text", branch=2, text="x")
        yield Event("done", result=types.SimpleNamespace(stop_reason="end"))  # type: ignore[arg-type]

    reply = types.SimpleNamespace(begin=list, end=list, add=lambda *_: [], failed=None)
    endpoint = Endpoint(None, "/", "p", None, None)  # type: ignore[arg-type]
    for quiet, count in ((0.02, 40), (0.8, 1)):
        answers = types.SimpleNamespace(submitted=lambda: ready([events(quiet, count)]))  # noqa: B023
        sent.clear()
        asyncio.run(endpoint._stream(answers, reply, _Out(send, {}), Record("/", "id", 0.0)))  # type: ignore[arg-type]
        assert sent[:1] == [b""] and sent[-1] == b"" and len(sent) > 4
        assert set(sent[1:-1]) == {sse.PING}


async def ready(value: Any) -> Any:
    return value


@pytest.mark.slow
def test_errors_are_openais(server: Served) -> None:
    chat = "/v1/chat/completions"
    cases = [
        (requests.post(server.url + chat, data=b"{"), 400, "invalid_json", None),
        (requests.post(server.url + chat, data=b"[" * 100_000), 400, "invalid_json", None),
        (requests.post(server.url + chat, data=b"5"), 400, "invalid_json", None),
        (requests.post(server.url + chat, data=b" " * (2**20 + 1)), 413, "request_too_large", None),
        (server.post(chat, messages=SAID, model="gpt-5"), 404, "model_not_found", "model"),
        (
            server.post(chat, messages=[{"role": "user", "content": "the " * 500}]),
            400,
            "context_length_exceeded",
            "messages",
        ),
        (
            server.post(chat, messages=[{"role": "user", "content": "cut \ud83d"}]),
            400,
            "invalid_value",
            "messages",
        ),
        (
            server.post(chat, messages=[{"role": "assistant", "content": "a"}]),
            400,
            "invalid_value",
            "messages",
        ),
        (server.post("/v1/completions", prompt="the " * 500), 400, "context_length_exceeded", "prompt"),
        (server.post("/v1/completions", prompt="a", logprobs=1), 400, "unsupported_value", "logprobs"),
        (server.post("/v1/responses", input="the " * 500), 400, "context_length_exceeded", "input"),
        (server.post(chat, messages=SAID, n=100), 400, "invalid_value", "n"),
        (server.post("/v1/completions", prompt=[""] * 100), 400, "invalid_value", "prompt"),
        (requests.get(server.url + chat), 405, "method_not_allowed", None),
        (requests.get(server.url + "/v1/nothing"), 404, "not_found", None),
        (requests.get(server.url + "/v1/models/gpt"), 404, "model_not_found", "model"),
        (
            requests.post(server.url + chat, json={}, headers={"Origin": "http://elsewhere"}),
            403,
            "foreign_origin",
            None,
        ),
    ]
    for reply, status, code, param in cases:
        error = reply.json()["error"]
        assert (reply.status_code, error["code"], error["param"]) == (status, code, param), reply.text
        assert error["message"] and "\n" not in error["message"] and error["type"] == "invalid_request_error"
    named = requests.post(server.url + chat, json={}, headers={"X-Request-Id": "mine-1"})
    assert named.headers["x-request-id"] == "mine-1"
    forged = requests.post(server.url + chat, json={}, headers={"X-Request-Id": "a b"})
    assert forged.headers["x-request-id"].startswith("req_")


@pytest.mark.slow
def test_keys_rates_and_a_full_queue() -> None:
    with served(queue=0, keys=("one", "two"), rate=23) as server:
        chat = f"{server.url}/v1/chat/completions"
        for key in ("", "three"):
            refused = requests.post(chat, json={"messages": SAID}, headers={"Authorization": f"Bearer {key}"})
            assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
        assert requests.get(f"{server.url}/v1/models").status_code == 401
        assert requests.get(f"{server.url}/health").status_code == 200
        statuses = list[int]()

        def ask(number: int) -> None:
            body, forged = {"messages": SAID, "n": 3, **asked(1)}, {"X-Forwarded-For": f"10.0.0.{number}"}
            header = {"Authorization": "bearer two"} | forged
            statuses.append(requests.post(chat, json=body, headers=header, timeout=60).status_code)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert statuses.count(429) == 4, "three had no key, and 20 are left"
        assert statuses.count(503) >= 1 and statuses.count(200) >= 2, "six rows, three for each"
        assert len(statuses) == statuses.count(200) + statuses.count(429) + statuses.count(503)
    with served(rate=1, proxies=("127.0.0.1",)) as server:
        clients = [{"X-Forwarded-For": f"10.0.0.{number}"} for number in (1, 2, 1)]
        replies = [requests.get(f"{server.url}/v1/models", headers=each) for each in clients]
        assert [reply.status_code for reply in replies] == [200, 200, 429]


# ------------------------------------------------------------------------------------- how it is watched and ends


@pytest.mark.slow
def test_health_metrics_and_the_page(server: Served) -> None:
    server.post("/v1/completions", prompt="the", **asked(1))
    assert requests.get(f"{server.url}/ready").json()["status"] == "ready"
    (model,) = requests.get(f"{server.url}/v1/models").json()["data"]
    assert requests.get(f"{server.url}/v1/models/{model['id']}").json() == model
    text = requests.get(f"{server.url}/metrics").text
    values = dict(re.findall(r"^(\w+(?:\{.*\})?) (\S+)$", text, re.MULTILINE))
    assert float(values['pasta_requests_total{endpoint="/v1/completions",status="200"}']) >= 1
    assert float(values["pasta_output_tokens_total"]) > 0 and values["pasta_rows"] == "6"
    buckets = [
        int(v) for name, v in values.items() if 'request_seconds_bucket{endpoint="/v1/completions"' in name
    ]
    assert buckets == sorted(buckets) and buckets[-1] >= 1
    names = {re.match(r"\w+", name)[0] for name in values}  # type: ignore[index]
    assert all(
        re.search(rf"^# TYPE {re.sub('_(bucket|sum|count)$', '', name)} ", text, re.MULTILINE)
        for name in names
    )
    page = requests.get(server.url)
    assert "'unsafe-inline'" not in page.headers["content-security-policy"]
    assert not re.search(r"(?:src|href|url\()[=\"'(]*https?:", page.text), "it needs no other host"
    assert '<output id="at" for="step" aria-live="off">' in page.text, "the slider says it already"
    demo = inspect.getsource(demo_command)
    for name, field in (("temperature", "temperature"), ("min_p", "min-p")):
        [value] = re.findall(rf'<input id="{field}" [^>]* value="([\d.]+)">', page.text)
        assert re.search(rf'"{name}", {value},', demo), "the page draws as the demo does"
        assert f'{name}: Number($("{field}").value)' in page.text


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_can_be_read(scheme: str) -> None:
    """Text and the parts of controls and charts stand out, and every control has a label."""
    text, _ = page()
    colours = dict[str, str]()
    for block in re.findall(r":root \{(.*?)\}", text, re.DOTALL)[: 1 + (scheme == "dark")]:
        colours |= dict(re.findall(r"--([\w-]+): (#\w{6});", block))
    for paper in ("paper", "panel"):
        for ink, least in {"ink": 4.5, "quiet": 4.5, "bad": 4.5, "accent": 3, "line": 3}.items():
            assert contrast(colours[ink], colours[paper]) >= least, (ink, paper)
        for hue in range(8):
            assert contrast(colours[f"hue-{hue}"], colours[paper]) >= 3, (hue, paper)
    assert contrast(colours["on-accent"], colours["accent"]) >= 4.5
    for control in re.findall(r"<(?:input|textarea)\b[^>]*>", text):
        named = re.search(r'\bid="([\w-]+)"', control)
        assert "aria-label=" in control or (named and f'for="{named[1]}"' in text), control


def test_the_log_is_for_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what uvicorn says of a client that sends rubbish."""
    shown = io.StringIO()
    for name in ("", "pasta_jax"):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [logging.StreamHandler(shown)])
    log_for_programs()
    logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
    assert json.loads(shown.getvalue())["message"] == "Invalid HTTP request received."


@pytest.mark.slow
def test_the_end_loses_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pasta_jax")
    replies = dict[int, requests.Response]()
    with served(drain_delay_s=0.2) as server:

        def ask(i: int) -> None:
            body = {"messages": SAID, "stream": i % 2 == 0, **asked(i)}
            replies[i] = server.post("/v1/chat/completions", **body)

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(12)]
        for thread in threads:
            thread.start()
        while server.service.active < 12 and not replies:
            time.sleep(0.001)
        server.service.drain()
        ready = requests.get(f"{server.url}/ready")
        assert ready.status_code == 503 and ready.json()["status"] == "draining"
        for thread in threads:
            thread.join()
    assert [replies[i].status_code for i in range(12)] == [200] * 12
    for i in range(12):
        text = alone("rivers", asked(i)).text
        if i % 2:
            assert replies[i].json()["choices"][0]["message"]["content"] == text
        else:
            chunks = events_of(replies[i])
            assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1]) == text
    with pytest.raises(requests.ConnectionError):
        server.post("/v1/chat/completions", messages=SAID)
    fields = [record.__dict__["fields"] for record in caplog.records if "fields" in record.__dict__]
    assert len(fields) == 12 and "rivers" not in json.dumps(fields)
    assert {each["status"] for each in fields} == {200}


@pytest.mark.slow
def test_a_third_signal_postpones_nothing() -> None:
    own = Decoder(chatty_model(), compiled=decoder().compiled)
    service = Service(own, Settings(model=MODEL, end_s=0.05))
    service.active = 1
    for _ in range(2):
        service.drain()
    time.sleep(0.06)
    service.drain()
    assert service.drained


@pytest.mark.slow
def test_what_clients_see_of_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first bytes its status, after them the last event of the stream; then the server goes on."""
    body = asked(4) | {"max_output_tokens": 60}

    def breaks(*_: Any) -> Any:
        raise MemoryError("no memory")

    with served() as server, monkeypatch.context() as patch:
        patch.setattr(Compiled, "decode_chunk", breaks)
        whole = server.post("/v1/chat/completions", messages=SAID, **body)
        chat = events_of(server.post("/v1/chat/completions", messages=SAID, stream=True, **body))
        items = events_of(server.post("/v1/responses", input="rivers", stream=True, **body))
        patch.undo()
        reply = server.post("/v1/completions", prompt="rivers", **asked(4))
        assert reply.json()["choices"][0]["text"] == alone("rivers", asked(4)).text
    assert (whole.status_code, whole.json()["error"]["code"]) == (500, "server_error")
    assert chat[-1]["error"] == whole.json()["error"] and "no memory" not in whole.text
    assert items[-1]["type"] == "response.failed" and items[-1]["response"]["error"]["code"] == "server_error"


@pytest.mark.slow
def test_a_second_signal_breaks_answers_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an error: a stream's last event, a whole reply's status."""
    decodes, may_go_on, decode_chunk = threading.Event(), threading.Event(), Compiled.decode_chunk

    def slow(self: Compiled, *args: Any) -> Any:
        decodes.set()
        may_go_on.wait(60)
        return decode_chunk(self, *args)

    monkeypatch.setattr(Compiled, "decode_chunk", slow)
    replies = dict[bool, requests.Response]()
    with served() as server:

        def ask(stream: bool) -> None:
            body = asked(4) | {"messages": SAID, "stream": stream}  # 42 steps, more than a chunk
            replies[stream] = server.post("/v1/chat/completions", **body)

        threads = [threading.Thread(target=ask, args=(stream,)) for stream in (True, False)]
        for thread in threads:
            thread.start()
        session, until = server.service.decoder.session, time.monotonic() + 30
        while not (decodes.is_set() and len(session._all()) == 2) and time.monotonic() < until:
            time.sleep(0.001)
        for _ in range(2):
            server.server.handle_exit(signal.SIGTERM, None)
        while not all(answer.cancelled for answer in session._all()) and time.monotonic() < until:
            time.sleep(0.001)
        may_go_on.set()
        for thread in threads:
            thread.join(60)
    assert (replies[False].status_code, replies[False].json()["error"]["code"]) == (503, "shutting_down")
    assert events_of(replies[True])[-1]["error"]["code"] == "shutting_down"


@pytest.mark.slow
def test_a_reply_that_nobody_takes_is_given_up(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection is closed, though its next request waits for the reply before it."""
    monkeypatch.setattr(serve_server, "BODY_S", 0.2)
    monkeypatch.setattr(serve_server, "STALLED_S", 0.2)
    with Raw(server) as silent:
        silent.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 1000)  # more replies than buffers hold
        connections, until = server.server.server_state.connections, time.monotonic() + 30
        while not connections and time.monotonic() < until:
            time.sleep(0.001)
        while connections and time.monotonic() < until:
            time.sleep(0.01)
        assert not connections


WARMING_UP = """if True:
    import gc, os, signal, sys, time
    from pasta_jax.serve import __main__ as verb

    def end(*_):
        os.kill(os.getpid(), signal.NAME)
        for _ in range(100):
            pass

    def decoder(values):
        gc.callbacks.append(end)  # as jax has one: an exception in it is lost
        gc.collect()
        time.sleep(60)

    verb._decoder = decoder
    sys.argv = ["pasta_jax.serve", "--ckpt=W", "--port=0"]
    verb.command()
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_server_that_is_not_ready_ends_at_once(name: str) -> None:
    """By a handler of its own: the first process of a container has no other."""
    done = python("-c", WARMING_UP.replace("NAME", name), seconds=30)
    assert (done.returncode, done.stdout) == (128 + signal.Signals[name], ""), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("signals", "end_s"), [(1, 0.2), (2, 1000.0)])
def test_a_client_that_never_reads_does_not_hold_the_end(signals: int, end_s: float) -> None:
    """It is given up a while after the signal; after the second, at once."""
    with served(end_s=end_s) as server:
        silent = Raw(server)
        silent.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 1000)  # more replies than buffers hold
        time.sleep(0.5)
        connections = server.server.server_state.connections
        assert connections
        for _ in range(signals):
            server.server.handle_exit(signal.SIGTERM, None)
        until = time.monotonic() + 30
        while connections and time.monotonic() < until:
            time.sleep(0.01)
        assert not connections
    silent.close()
