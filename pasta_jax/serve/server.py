"""The server process: a port that opens when all is ready, and an end that loses nothing."""

from __future__ import annotations

import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from pasta_jax.serve.app import Service, application


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


class Server(uvicorn.Server):
    """Serves until it is told to end and everything is answered.

    Until then it goes on to listen: a request that comes too late is refused in words, not by a broken connection.

    Args:
      service: what it serves.
      started: called with its address when requests are taken.
    """

    def __init__(self, service: Service, started: Callable[[str], object]):
        options = dict(
            log_config=None, log_level="warning", access_log=False, server_header=False, lifespan="on"
        )
        super().__init__(uvicorn.Config(application(service), **options))  # type: ignore[arg-type]
        self._service, self._tell = service, started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        assert sockets is not None
        host, port = sockets[0].getsockname()[:2]
        self._tell(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.drain()

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._service.drained
