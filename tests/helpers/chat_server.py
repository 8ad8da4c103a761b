"""A chat endpoint on this machine that misbehaves as real ones do, and counts what it is asked.

What becomes of a request depends on its content and on how often it came, not on the order in which requests
arrive. Errors echo the key, and so does content that it alters.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import http.server
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from pasta_jax.endpoint.cache import key_of

KEY = "sk-test-0123456789abcdef"


@dataclasses.dataclass(frozen=True)
class Rates:
    """Shares of requests that go wrong."""

    busy: float = 0.10  # 429 with Retry-After
    error: float = 0.05  # 500
    hang: float = 0.05
    broken: float = 0.05  # no JSON
    altered: float = 0.05


FAULTLESS = Rates(0, 0, 0, 0, 0)

Body = dict[str, Any]
Answer = str | dict[str, Any]
"""Text, or a whole choice of a completion."""


@dataclasses.dataclass
class ChatServer:
    """Its address, and what it was asked."""

    url: str
    outcomes: dict[str, list[str]]
    """Of each request, by its name in the cache: "busy", "error", "hang", "broken", "altered" or "answered"."""
    busiest: int = 0
    """Requests that were answered at once."""

    @property
    def total(self) -> int:
        return sum(map(len, self.outcomes.values()))

    def counts(self) -> collections.Counter[str]:
        return collections.Counter(each for outcomes in [*self.outcomes.values()] for each in outcomes)

    def repeated(self) -> dict[str, list[str]]:
        """Requests that came again after they had been answered."""
        good = ("altered", "answered")
        return {
            name: outcomes
            for name, outcomes in self.outcomes.items()
            if any(each in good for each in outcomes[:-1])
        }


@contextlib.contextmanager
def chat_server(
    answer: Callable[[Body], Answer],
    rates: Rates = FAULTLESS,
    *,
    key: str = KEY,
    retry_after: str = "0.01",
    usage: bool = True,
    seconds: float = 0.0,
    seed: int = 0,
) -> Iterator[ChatServer]:
    """Serves until the block ends; what hangs is let go then.

    Args:
      answer: the model. It may raise `Status`.
      rates: of faults.
      key: without which nothing is answered; "" asks for none.
      retry_after: the header of 429.
      usage: whether tokens are counted.
      seconds: that an answer takes.
      seed: of the faults.
    """
    outcomes: dict[str, list[str]] = collections.defaultdict(list)
    mutex, end = threading.Lock(), threading.Event()
    under_way = 0

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _answer(self, body: Body) -> None:
            given = self.headers.get("Authorization", "nothing")
            if self.path != "/v1/chat/completions":
                return self._send(404, {"error": {"message": f"no such path: {self.path}"}})
            if key and given != f"Bearer {key}":
                return self._send(401, {"error": {"message": f"Incorrect API key provided: {given}"}})
            name = key_of([f"{server.url}/chat/completions", body])
            with mutex:
                draw = random.Random(f"{seed} {key_of(body)} {len(outcomes[name])}").random()
                fault = "answered"
                for kind, rate in dataclasses.asdict(rates).items():
                    if draw < rate:
                        fault = kind
                        break
                    draw -= rate
                outcomes[name].append(fault)
            if fault == "busy":
                return self._send(
                    429, {"error": {"message": f"Slow down, {given}"}}, {"Retry-After": retry_after}
                )
            if fault == "error":
                return self._send(500, {"error": {"message": f"crashed with {self.headers}"}})
            if fault == "hang":
                end.wait(60)
                self.close_connection = True
                return None
            nonlocal under_way
            with mutex:
                under_way += 1
                server.busiest = max(server.busiest, under_way)
            try:
                said = answer(body)
            except Status as status:
                outcomes[name][-1] = str(status.code)
                error = {"message": status.message, "param": status.param}
                return self._send(status.code, {"error": error}, status.headers)
            finally:
                time.sleep(seconds)
                with mutex:
                    under_way -= 1
            choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
            choice |= {"message": {"role": "assistant", "content": said}} if isinstance(said, str) else said
            if fault == "altered":
                text = choice["message"]["content"]
                choice["message"]["content"] = (
                    f"{text[: len(text) // 2]} {given} {text[len(text) // 2 + 1 :]}"
                )
            reply: dict[str, Any] = {"object": "chat.completion", "choices": [choice]}
            if usage:
                reply["usage"] = {"prompt_tokens": 100, "completion_tokens": 10}
            data = json.dumps(reply).encode()
            if fault == "broken":
                data = data[: len(data) // 2] + given.encode()
            self._send(200, data)
            return None

        def _send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            with contextlib.suppress(OSError):  # the client was killed
                self.send_response(status)
                for header, value in {
                    "Content-Type": "application/json",
                    "Content-Length": str(len(data)),
                    **(headers or {}),
                }.items():
                    self.send_header(header, value)
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, *_: object) -> None:
            pass  # a client that was killed

    with Server(("127.0.0.1", 0), Handler) as listening:
        server = ChatServer(f"http://127.0.0.1:{listening.server_address[1]}/v1", outcomes)
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            end.set()
            listening.shutdown()
            thread.join()


class Status(Exception):
    """An answer with another status than 200."""

    def __init__(
        self, code: int, message: str, headers: dict[str, str] | None = None, *, param: str | None = None
    ):
        super().__init__(code, message)
        self.code, self.message, self.headers, self.param = code, message, headers, param
