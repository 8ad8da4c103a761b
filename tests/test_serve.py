"""The server's replies: an answer is the one that the request has alone, in the forms that clients expect."""

from __future__ import annotations

import dataclasses
import inspect
import io
import json
import logging
import math
import random
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import requests

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")


from pasta_jax.decoding.compiled import Compiled
from pasta_jax.decoding.streaming import Draft, Event
from pasta_jax.demo import __main__ as demo_command
from pasta_jax.serve import sse
from pasta_jax.serve.__main__ import log_for_programs
from pasta_jax.serve.app import (
    page,
)
from pasta_jax.serve.replies import LEAST_LOGPROB, text_logprobs
from pasta_jax.serve.responses import InOrder, Items
from tests.helpers.chatty import WORDS
from tests.helpers.contrast import contrast
from tests.helpers.served import MODEL, SAID, Served, alone, asked, events_of, served


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served() as running:
        yield running


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


# --------------------------------------------------------------------------------- errors, and how it is watched


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
