"""A server in a thread of the test, with a small random model, and a client that can misbehave."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import requests

from pasta_jax import Decoder, SamplingParams
from pasta_jax.decoding.results import DecodeResult, result
from pasta_jax.serve.app import Service, Settings
from pasta_jax.serve.server import Server, bound
from tests.helpers.chatty import WORDS, chatty_model, decoder, ids

MODEL = "chatty"

SAID = [{"role": "user", "content": "rivers"}]


class Served:
    """A running server, its service, and its address."""

    def __init__(self, server: Server, service: Service, port: int):
        self.server, self.service = server, service
        self.port, self.url = port, f"http://127.0.0.1:{port}"

    def post(self, path: str, **body: Any) -> requests.Response:
        return requests.post(f"{self.url}{path}", json=body, timeout=60)


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


@contextlib.contextmanager
def served(own: Decoder | None = None, *, queue: int | None = 64, **settings: Any) -> Iterator[Served]:
    """Serves until the block ends, and then until all is answered; with a decoder of its own, or that of chatty."""
    own = own or Decoder(chatty_model(), compiled=decoder().compiled, chunk=16, queue=queue)
    service = Service(own, Settings(**{"model": MODEL, "max_new_tokens": 60, **settings}))
    with bound("127.0.0.1", 0) as listening:
        ready = threading.Event()
        server = Server(service, lambda url: ready.set())
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            assert ready.wait(60)
            yield Served(server, service, listening.getsockname()[1])
        finally:
            service.drain()
            thread.join(60)
            assert not thread.is_alive(), "the server does not end"


def asked(number: int, **changes: Any) -> dict[str, Any]:
    """The fields of a request that has many threads, and a text of its own."""
    return dict(seed=number, temperature=1.0, open_bias=3.5, max_tokens=60) | changes


def alone(prompt: str, fields: dict[str, Any]) -> DecodeResult:
    """What the model answers to nobody else."""
    stop = tuple(fields.get("stop", ()))
    sampling = SamplingParams(
        max_new_tokens=fields["max_tokens"],
        seed=fields["seed"],
        temperature=fields["temperature"],
        min_p=fields.get("min_p", 0.0),
        open_bias=fields["open_bias"],
        stop=stop,
    )
    (trace,), _ = decoder(rows=1).decode([ids(prompt)], [sampling])
    return result(WORDS, trace, stop=stop)


def events_of(response: requests.Response) -> list[Any]:
    """The data of a stream's events; None for [DONE]."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n") if line.startswith("data: ")]
    return [None if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]
