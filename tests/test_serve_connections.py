"""The server's connections: whatever clients do, all others have their answers, and nothing is lost at its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import signal
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

from pasta_jax.decoding.compiled import Compiled
from pasta_jax.decoding.engine import Decoder
from pasta_jax.decoding.pending import PendingAnswer
from pasta_jax.decoding.state import Stop
from pasta_jax.decoding.streaming import Event
from pasta_jax.serve import app as serve_app
from pasta_jax.serve import server as serve_server
from pasta_jax.serve import sse
from pasta_jax.serve.app import ROOM, Endpoint, Record, Service, Settings, _Out, merged
from pasta_jax.simulate import Replica, StepTimes
from tests import load as loads
from tests.helpers.chatty import chatty_model, decoder
from tests.helpers.commands import python
from tests.helpers.served import MODEL, SAID, Raw, Served, alone, asked, events_of, served


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served() as running:
        yield running


# ---------------------------------------------------------------------------------------- clients of every kind


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
    monkeypatch.setattr(serve_server, "BODY_S", 0.5)
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
    monkeypatch.setattr(serve_server, "BODY_S", 0.5)
    with Raw(server) as idle, monkeypatch.context() as patch:
        patch.setattr(server.service, "active", 6 + 64 + ROOM)
        idle.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n")
        assert b"HTTP/1.1 503" in idle.until(b"overloaded")
        for rest in (b"late", b""):
            idle.sendall(rest)
            time.sleep(1.0)
            idle.sendall(HEALTH)
            assert idle.until(b'"ready"').count(b"HTTP/1.1 200") == 1
    with Raw(server) as silent:  # the rest of a request that is answered
        silent.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n")
        assert b"HTTP/1.1 200" in silent.until(b"}")
        assert silent.recv(1) == b""
    assert serve_server.IDLE_S > 600, "Google's load balancers keep them for so long"
    monkeypatch.setattr(serve_server, "MOST_IDLE", 2)
    with contextlib.ExitStack() as stack:
        several = list[Raw]()
        for _ in range(3):
            several.append(stack.enter_context(Raw(server)))
            several[-1].sendall(HEALTH)
            several[-1].until(b"}")
            time.sleep(0.01)  # clocks of event loops may count milliseconds
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


@pytest.mark.parametrize("turns", range(10))
def test_who_leaves_in_the_middle_of_an_event(turns: int) -> None:
    """`wait_for` of Python 3.11 forgets that it was cancelled, if what it waits for is there in the same moment."""

    async def is_cancelled() -> bool:
        comes = asyncio.Event()

        async def events() -> Any:
            await comes.wait()
            yield Event("text", text="x")
            await asyncio.Event().wait()

        async def follow() -> None:
            async for _ in merged([events()], lambda: 60.0):
                pass

        following = asyncio.create_task(follow())
        for _ in range(5):
            await asyncio.sleep(0)
        comes.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        following.cancel()
        await asyncio.wait([following], timeout=1)
        return following.cancelled()

    assert asyncio.run(is_cancelled())


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


# ---------------------------------------------------------------------------------------------------- how it ends


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
