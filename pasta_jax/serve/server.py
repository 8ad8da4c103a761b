"""The server process: a port that opens when all is ready, and an end that loses nothing."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from types import FrameType

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from pasta_jax.serve.app import BODY_S, STALLED_S, Service, application


def bound(host: str, port: int) -> socket.socket:
    """A socket that has an address, and takes no connections yet. Raises OSError if the address is taken."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError:
        listening.close()
        raise
    return listening


IDLE_S = 620
"""A connection is kept after a reply. Google's load balancers keep theirs for 600 s and send a request by one that
is there still: who closes it sooner, loses requests."""

MOST_IDLE = 512
"""Idle connections that are kept. Of more, the one that has been idle longest is closed: each takes a file
descriptor, and a process may have only so many."""


class Connection(H11Protocol):
    """A client's connection. It is closed if no request comes by it, or if the client takes nothing.

    Uvicorn closes what is idle after a reply, unless a byte comes after it, and waits without end for the first
    request, for the rest of one that has begun, and for the client to take the last of a reply.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect(idle=False)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._idle != (idle := self._is_between_requests()):
            self._silence.cancel()
            self._expect(idle)

    def connection_lost(self, exc: Exception | None) -> None:
        self._silence.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._silence.cancel()
        self._expect(self._is_between_requests())

    def _is_between_requests(self) -> bool:
        """Whether the last request has come in full and is answered, and no byte of the next one has come."""
        answered = self.cycle is not None and self.cycle.response_complete
        return answered and self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]

    def _expect(self, idle: bool) -> None:
        """The client has some time from now for its next request, or for the rest of the one that has begun."""
        self._idle, self._until = idle, self.loop.time() + (IDLE_S if idle else BODY_S)
        self._watch(BODY_S, 0)
        if idle:
            kept = [each for each in self.connections if isinstance(each, Connection) and each._idle]
            if len(kept) > MOST_IDLE:
                min(kept, key=lambda each: each._until).transport.close()

    def _watch(self, seconds: float, unsent: int) -> None:
        self._silence = self.loop.call_later(seconds, self._close_if_silent, unsent)

    def _close_if_silent(self, before: int) -> None:
        """Looks again later, if a reply is on its way. `before` are the bytes that were unsent at the last look."""
        unsent = self.transport.get_write_buffer_size()
        if unsent and unsent == before:
            self.transport.abort()
        elif unsent or not (self.cycle is None or self.cycle.response_complete):
            self._watch(STALLED_S, unsent)
        elif (left := self._until - self.loop.time()) > 0:
            self._watch(left, 0)
        else:
            self.transport.close()


class Server(uvicorn.Server):
    """Serves until it is told to end and everything is answered.

    Until then it goes on to listen: a request that comes too late is refused in words, not by a broken connection.
    Then clients have some seconds to take what is still on its way to them, or none if it is told to end twice.

    Args:
      service: what it serves.
      started: called with its address when requests are taken.
    """

    def __init__(self, service: Service, started: Callable[[str], object]):
        options = dict(
            http=Connection,
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=IDLE_S,
            lifespan="on",
            forwarded_allow_ips=[*service.settings.proxies],
        )
        super().__init__(uvicorn.Config(application(service), **options))  # type: ignore[arg-type]
        self._service, self._tell = service, started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        assert sockets is not None
        host, port = sockets[0].getsockname()[:2]
        self._tell(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        breaks = asyncio.create_task(self._break_connections())
        await super().shutdown(sockets)  # it waits until all are closed
        breaks.cancel()

    async def _break_connections(self) -> None:
        """Those whose clients do not take what was sent to them."""
        until = time.monotonic() + self._service.settings.end_s
        while time.monotonic() < until and not self._service.forced:
            await asyncio.sleep(0.1)
        for connection in [*self.server_state.connections]:
            connection.transport.abort()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.drain()

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._service.drained
