"""A load on a server of this machine, for a while: python -m tests.load --url=http://127.0.0.1:8000 [--pid=PID].

First a steady one: --clients streams at a time, --requests in all; it says how long they took, and with the --pid
of the server how its memory grew. Then one of every kind: 64 clients at once, some of which read slowly, leave, or
send rubbish. Status 1 if a client that should have an answer lacks it, if equal requests got different texts, or if
the server compiled anything.

    python -m tests.load --rate=0.2,0.4 --requests=100 --rows=8 --step_ms=1:58,4:70,8:84

With --rate the requests come at random instead, so many a second on average, and a simulation of the same requests
(`pasta_jax.simulate`, which has the other flags) is held against what they took. How long a prefill takes is
measured first, by answers of one token.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import resource
import statistics
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Sequence
from typing import Any

import numpy as np

from pasta_jax.simulate import Replica, Run, StepTimes, simulate
from pasta_jax.terminal import markdown_table

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


PATIENCE_S = 600.0
"""An answer that is not whole by then is lost."""


class Load:
    """Requests to one server, the texts that came back, and what went wrong."""

    def __init__(self, url: str, max_tokens: int, prompts: Sequence[str] = PROMPTS):
        self.host, self.max_tokens, self.prompts = urllib.parse.urlsplit(url), max_tokens, prompts
        assert self.host.hostname in ("127.0.0.1", "localhost", "::1"), "only servers of this machine"
        key = os.environ.get("PASTA_API_KEY", "").partition(",")[0].strip()
        self.fields = f"Host: {self.host.netloc}\r\n" + f"Authorization: Bearer {key}\r\n" * bool(key)
        self.texts = collections.defaultdict[int, set[str]](set)
        self.widths: dict[int, np.ndarray] = {}  # of the answers, by the kind of request
        self.faults: list[str] = []

    def kind(self, number: int) -> int:
        """Requests of one kind are equal: each prompt comes with four seeds."""
        return number % (4 * len(self.prompts))

    async def opened(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self.host.hostname, self.host.port)

    async def ask(self, number: int, *, pause: float = 0.0, leave: bool = False) -> float:
        """Streams an answer, and returns the seconds that it took: NaN if it did not come whole."""
        start = time.perf_counter()
        reader, writer = await self.opened()
        kind = self.kind(number)
        body = json.dumps(
            {
                "messages": [{"role": "user", "content": self.prompts[kind % len(self.prompts)]}],
                # Among the unlikeliest tokens rounding would decide which one is drawn.
                **dict(stream=True, seed=kind, temperature=1.0, min_p=0.05, max_tokens=self.max_tokens),
                "stream_options": {"include_branches": True, "include_usage": True},
            }
        ).encode()
        # HTTP 1.0: the reply is not cut into chunks, and ends with the connection.
        head = f"POST /v1/chat/completions HTTP/1.0\r\n{self.fields}Content-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        data = b""
        try:
            async with asyncio.timeout(PATIENCE_S):
                while part := await reader.read(256 if pause else 65536):
                    data += part
                    if leave:
                        break
                    await asyncio.sleep(pause)
        except TimeoutError:
            self.faults.append(f"request {kind} has no whole answer after {PATIENCE_S:g} s")
            return math.nan
        finally:
            writer.close()
        whole = not leave and self.note(kind, data)
        return time.perf_counter() - start if whole else math.nan

    def note(self, kind: int, data: bytes) -> bool:
        """Keeps an answer, or what is wrong with it; whether it is whole."""
        if not data.endswith(b"data: [DONE]\n\n"):
            self.faults.append(f"an answer is not whole: {data[-200:]!r}")
            return False
        chunks = [json.loads(line[6:]) for line in data.decode().split("\n") if line.startswith("data: {")]
        text = "".join(each["delta"].get("content", "") for chunk in chunks for each in chunk["choices"])
        told = [event for chunk in chunks for event in chunk.get("pasta", ()) if event["kind"] == "done"]
        self.widths[kind] = widths_of(told[-1], chunks[-1]["usage"]["completion_tokens"])
        self.texts[kind].add(text)
        if len(self.texts[kind]) > 1:
            self.faults.append(f"request {kind} has two answers: {sorted(self.texts[kind])}")
        return True

    async def steady(self, requests: int, clients: int, pid: int | None) -> list[float]:
        numbers, seconds = iter(range(requests)), list[float]()

        async def client() -> None:
            for number in numbers:
                seconds.append(await self.ask(number))
                if pid and len(seconds) in (requests // 4, requests // 2, 3 * requests // 4, requests):
                    print(f"  after {len(seconds):,} requests: {resident(pid) / 2**20:.1f} MiB", flush=True)

        await asyncio.gather(*(client() for _ in range(clients)))
        return seconds

    async def at_random(self, rate: float, requests: int, seed: int) -> Arrivals:
        """Requests that come independently of each other (a Poisson process), so many a second on average."""
        due = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, requests))
        start, arrived, seconds = time.perf_counter(), np.zeros(requests), np.zeros(requests)

        async def client(number: int) -> None:
            await asyncio.sleep(max(0.0, start + due[number] - time.perf_counter()))
            arrived[number] = time.perf_counter() - start
            seconds[number] = await self.ask(number)

        await asyncio.gather(*map(client, range(requests)))
        (whole,) = np.nonzero(np.isfinite(seconds))
        widths = [self.widths[self.kind(int(number))] for number in whole]
        return Arrivals(arrived[whole], seconds[whole], widths)

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


@dataclasses.dataclass(frozen=True)
class Arrivals:
    """Requests of a server, in the order in which they came.

    Attributes:
      arrived: float64 [n]: seconds.
      latency: float64 [n]: seconds from arrival to the complete answer.
      answers: n answers, each the threads that each of its steps feeds: int64 [steps].
    """

    arrived: np.ndarray
    latency: np.ndarray
    answers: list[np.ndarray]

    def simulated(self, replica: Replica) -> Run:
        """What the simulation says of the same requests."""
        return simulate(replica, self.arrived, self.answers)


def widths_of(told: dict[str, Any], tokens: int) -> np.ndarray:
    """The threads that each step of an answer fed: int64 [steps], in all as many as its tokens.

    Args:
      told: the answer's event "done", which has the steps of each branch. Main has the steps of no branch, and of
        its other tokens each the earliest step.
      tokens: of the answer, tags included.
    """
    widths = np.zeros(told["steps"], np.int64)
    for branch in told["branches"]:
        widths[max(0, branch["start_step"] - 1) : branch["end_step"]] += 1
    main = widths == 0
    others = max(0, tokens - int(widths.sum()) - int(main.sum()))
    return widths + (main | (np.cumsum(~main) <= others))


def held_against(rates: Sequence[float], measured: Sequence[Arrivals], replica: Replica) -> str:
    """A table: how long answers took, and how long the simulation says."""
    rows = []
    for rate, arrivals in zip(rates, measured, strict=True):
        simulated = arrivals.simulated(replica).latency
        cells = [f"{rate:g}"]
        for share in (0.5, 0.95):
            took, said = np.quantile(arrivals.latency, share), np.quantile(simulated, share)
            cells += [f"{took:.3g}", f"{said:.3g}", f"{said / took:.2f}"]
        rows.append(cells)
    names = [f"{name}{what}" for name in ("median", "95 %") for what in (", s", " simulated", ": ratio")]
    return markdown_table(["requests/s", *names], rows)


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
    parser.add_argument("--prompts", help="a file with a prompt a line")
    parser.add_argument("--rate", help="requests a second, with commas, that come at random")
    parser.add_argument("--seed", type=int, default=0, help="of their arrival")
    parser.add_argument("--rows", type=int, default=8, help="of the server")
    parser.add_argument(
        "--step_ms", help="LANES:MS,LANES:MS: the lanes of a row, and the time of the server's step"
    )
    given: Any = parser.parse_args()
    if given.rate and not given.step_ms:
        parser.error("--rate is held against a simulation, which needs --step_ms.")
    prompts = pathlib.Path(given.prompts).read_text("utf-8").splitlines() if given.prompts else PROMPTS
    load = Load(given.url, given.max_tokens, prompts)
    try:
        load.metric("pasta_compilations_total")
    except OSError:
        parser.error(f"--url={given.url}: no server answers there. Start python -m pasta_jax.serve first.")
    if given.rate:
        return random_load(load, given)
    start = time.perf_counter()
    seconds = asyncio.run(load.steady(given.requests, given.clients, given.pid))
    rate = len(seconds) / (time.perf_counter() - start)
    median, high, longest = np.nanquantile(seconds, [0.5, 0.95, 1.0])
    print(
        f"steady: {len(seconds):,} requests of {given.clients} clients, {rate:.1f} a second; "
        f"median {median:.3f} s, 95th percentile {high:.3f} s, {high / median:.2f} times the median; "
        f"longest {longest:.3f} s"
    )
    asyncio.run(load.of_every_kind())
    compiled = load.metric("pasta_compilations_total")
    print(f"of every kind: done; {compiled:.0f} programs were compiled since the server's start")
    return outcome(load)


def random_load(load: Load, given: Any) -> int:
    """Sends requests that come at random, and holds the simulation against them. Status 1 with faults."""
    rates = [float(rate) for rate in given.rate.split(",")]
    times = StepTimes.read(given.step_ms)
    one = Load(given.url, 1, load.prompts)
    prefill_s = statistics.median(asyncio.run(one.steady(4 * len(load.prompts), 1, None))) - times.seconds[0]
    if one.faults:
        return outcome(one)
    print(f"a prefill takes {1000 * prefill_s:.1f} ms")
    replica = Replica(given.rows, times, max(0.0, prefill_s))
    measured = [asyncio.run(load.at_random(rate, given.requests, given.seed)) for rate in rates]
    if all(len(arrivals.latency) for arrivals in measured):
        print(held_against(rates, measured, replica))
    return outcome(load)


def outcome(load: Load) -> int:
    """Prints what went wrong; status 1 if anything did."""
    compiled = load.metric("pasta_compilations_total")
    faults = [*dict.fromkeys(load.faults), *["the server compiled while it served"] * bool(compiled)]
    print(*faults or ["no faults"], sep="\n")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
