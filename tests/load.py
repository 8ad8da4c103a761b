"""A load on a server of this machine, for a while: python -m tests.load --url=http://127.0.0.1:8000 [--pid=PID].

First a steady one: --clients streams at a time, --requests in all; it says how long they took, and with the --pid
of the server how its memory grew. Then one of every kind: 64 clients at once, some of which read slowly, leave, or
send rubbish. Status 1 if a client that should have an answer lacks it, if equal requests got different texts, or if
the server compiled anything.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import pathlib
import resource
import statistics
import sys
import time
import urllib.parse
import urllib.request
from typing import Any

PROMPTS = (
    "List the capital and currency of Norway, Peru and Japan.",
    "Give the symbol of Bromine.",
    "Write about Iron and Neon: symbol and group.",
    "List the capital and year of Ohio and Iowa.",
)
RUBBISH = (
    b"\x16\x03\x01\x02\x00\x01\x00",
    b"GET\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\n\r\n{",
    b"\x00" * 4096,
)


class Load:
    """Requests to one server, the texts that came back, and what went wrong."""

    def __init__(self, url: str, max_tokens: int):
        self.host, self.max_tokens = urllib.parse.urlsplit(url), max_tokens
        assert self.host.hostname in ("127.0.0.1", "localhost", "::1"), "only servers of this machine"
        self.texts = collections.defaultdict[int, set[str]](set)
        self.faults: list[str] = []

    async def opened(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self.host.hostname, self.host.port)

    async def ask(self, number: int, *, pause: float = 0.0, leave: bool = False) -> float:
        """Streams an answer, and returns the seconds that it took."""
        start = time.perf_counter()
        reader, writer = await self.opened()
        kind = number % (4 * len(PROMPTS))
        body = json.dumps(
            {
                "messages": [{"role": "user", "content": PROMPTS[kind % len(PROMPTS)]}],
                **dict(stream=True, seed=kind, temperature=1.0, max_tokens=self.max_tokens),
            }
        ).encode()
        # HTTP 1.0: the reply is not cut into chunks, and ends with the connection.
        head = f"POST /v1/chat/completions HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        data = b""
        while part := await reader.read(256 if pause else 65536):
            data += part
            if leave:
                break
            await asyncio.sleep(pause)
        writer.close()
        if not leave:
            self.note(kind, data)
        return time.perf_counter() - start

    def note(self, kind: int, data: bytes) -> None:
        if not data.endswith(b"data: [DONE]\n\n"):
            self.faults.append(f"an answer is not whole: {data[-200:]!r}")
            return
        chunks = [json.loads(line[6:]) for line in data.decode().split("\n") if line.startswith("data: {")]
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        self.texts[kind].add(text)
        if len(self.texts[kind]) > 1:
            self.faults.append(f"request {kind} has two answers: {sorted(self.texts[kind])}")

    async def steady(self, requests: int, clients: int, pid: int | None) -> list[float]:
        numbers, seconds = iter(range(requests)), list[float]()

        async def client() -> None:
            for number in numbers:
                seconds.append(await self.ask(number))
                if pid and len(seconds) in (requests // 4, requests // 2, 3 * requests // 4, requests):
                    print(f"  after {len(seconds):,} requests: {resident(pid) / 2**20:.1f} MiB", flush=True)

        await asyncio.gather(*(client() for _ in range(clients)))
        return seconds

    async def of_every_kind(self, clients: int = 64) -> None:
        async def rubbish(number: int) -> None:
            with contextlib.suppress(OSError, TimeoutError):
                reader, writer = await self.opened()
                writer.write(RUBBISH[number % len(RUBBISH)])
                await asyncio.wait_for(reader.read(), 1.0)
                writer.close()

        async def client(number: int) -> None:
            match number % 8:
                case 0:
                    await self.ask(number, pause=0.02)
                case 1:
                    await self.ask(number, leave=True)
                case 2:
                    await rubbish(number)
                case _:
                    await self.ask(number)

        await asyncio.gather(*map(client, range(clients)))

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"{self.host.geturl()}/metrics") as reply:
            lines = reply.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.split(" ")[0].partition("{")[0] == name)


def resident(pid: int) -> int:
    """Bytes of a process in memory (Linux)."""
    return int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.load", description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--pid", type=int, help="of the server")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--max_tokens", type=int, default=96)
    given: Any = parser.parse_args()
    load = Load(given.url, given.max_tokens)
    start = time.perf_counter()
    seconds = asyncio.run(load.steady(given.requests, given.clients, given.pid))
    rate = len(seconds) / (time.perf_counter() - start)
    median, high = statistics.median(seconds), statistics.quantiles(seconds, n=20)[-1]
    print(
        f"steady: {len(seconds):,} requests of {given.clients} clients, {rate:.1f} a second; "
        f"median {median:.3f} s, 95th percentile {high:.3f} s, {high / median:.2f} times the median; "
        f"longest {max(seconds):.3f} s"
    )
    asyncio.run(load.of_every_kind())
    compiled = load.metric("pasta_compilations_total")
    print(f"of every kind: done; {compiled:.0f} programs were compiled since the server's start")
    faults = [*dict.fromkeys(load.faults), *["the server compiled while it served"] * bool(compiled)]
    print(*faults or ["no faults"], sep="\n")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
