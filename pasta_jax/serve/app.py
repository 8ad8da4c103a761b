"""The application: endpoints over one decoder, what they refuse, and how they end.

One event loop takes requests and sends replies; the decoder works in a thread of its own. A client that reads
slowly holds up nobody; one that leaves, or reads nothing for a minute, has its answers cancelled.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import hashlib
import hmac
import logging
import math
import pathlib
import re
import secrets
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import jax
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from pasta_jax.decoding.engine import Decoder
from pasta_jax.decoding.fits import DoesNotFit
from pasta_jax.decoding.pending import PendingAnswer
from pasta_jax.decoding.results import DecodeResult
from pasta_jax.decoding.session import Closed, Load, QueueFull
from pasta_jax.decoding.streaming import Event
from pasta_jax.serve import sse
from pasta_jax.serve.asked import (
    Asked,
    Body,
    Defaults,
    asked_of_chat,
    asked_of_completions,
    asked_of_responses,
    parsed,
)
from pasta_jax.serve.completions import ChatCompletions, Completions
from pasta_jax.serve.errors import ApiError, busy, wrong
from pasta_jax.serve.metrics import CONTENT_TYPE, Metrics
from pasta_jax.serve.rates import Rates
from pasta_jax.serve.replies import Head, Reply, head
from pasta_jax.serve.responses import Responses

LOG = logging.getLogger("pasta_jax")

BODY_S = 30.0
"""For a client to send its request."""

ROOM = 64
"""Requests that may be read, refused or sent, beside as many as have a row or wait for one."""

STALLED_S = 60.0
"""A client that takes no byte for so long has left."""

PIECE = 2**16
"""Bytes of a whole reply that are sent at once."""

PING_S = 15.0
"""A stream that has sent no byte for so long sends a sign of life."""

COMPILATION = "/jax/core/compile/backend_compile_duration"
"""What jax says when it has compiled a program, or read it from the cache."""

LEFT = 499
"""In metrics and logs: the client left. It is no status of HTTP."""

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a server is told at its start.

    Attributes:
      model: the model's name.
      max_new_tokens: of an answer whose request does not say.
      keys: one of them must come with a request; none: all are answered.
      hosts: names under which it may be asked (the header Host); none: any.
      proxies: addresses and networks of proxies, which say in X-Forwarded-For who asks.
      most_bytes: of a request's body.
      rate: requests of one client in a minute; 0 is no limit.
      drain_delay_s: how long requests are still taken after the signal to end, while /ready says no.
      end_s: how long the end waits for clients that do not take the last bytes.
      log_prompts: whether the log has prompts and answers.
    """

    model: str
    max_new_tokens: int = 512
    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    proxies: tuple[str, ...] = ()
    most_bytes: int = 2**20
    rate: int = 0
    drain_delay_s: float = 0.0
    end_s: float = 10.0
    log_prompts: bool = False


class ClientLeft(Exception):
    """Nobody is there for the reply."""


@dataclasses.dataclass
class Record:
    """What the log says of a request."""

    endpoint: str
    id: str
    started: float
    status: int = LEFT
    code: str | None = None
    stream: bool = False
    first_text_s: float | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    branches: int = 0
    finish: tuple[str, ...] = ()


class Service:
    """A decoder, and all that requests to it share.

    Attributes:
      active: requests whose reply has not been sent in full.
      draining: no more requests are taken, or soon will be none.
    """

    def __init__(self, decoder: Decoder, settings: Settings):
        self.decoder, self.settings = decoder, settings
        self.metrics, self.rates = Metrics(), Rates(settings.rate)
        self.active = 0
        self._until = math.inf  # when requests are no longer taken
        self._forced = math.inf  # when those whose clients do not read are given up

    @property
    def draining(self) -> bool:
        return self._until < math.inf

    @property
    def forced(self) -> bool:
        """Whether the server was told to end twice."""
        return self._forced < math.inf

    @property
    def drained(self) -> bool:
        """Whether the server is to end, and nothing is left to be sent that is waited for."""
        now = time.monotonic()
        return now >= self._until and (not self.active or now >= self._forced)

    def drain(self) -> None:
        """Ends the server, which takes no more requests and answers those it has; twice: it breaks them off."""
        now = time.monotonic()
        if not self.draining:
            self._until = now + self.settings.drain_delay_s
        elif not self.forced:
            self._until, self._forced = now, now + self.settings.end_s
            threading.Thread(target=self.decoder.close, kwargs={"cancel": True}, daemon=True).start()

    def check_taking(self) -> None:
        """Raises ApiError once requests are no longer taken, and for one more than there is room for."""
        if time.monotonic() >= self._until:
            raise busy("This server is shutting down. Send the request to another.", "shutting_down")
        load = self.decoder.load
        if load.queue is not None and self.active > load.rows + load.queue + ROOM:
            raise busy("Too many requests are read and answered. Try again in a moment.")

    def check_client(self, request: Request) -> None:
        """Raises ApiError for a page of another host, for one that asks too often, and without one of the keys.

        Wrong keys count as requests: nobody tries many.
        """
        check_origin(request, self.settings.hosts)
        self.rates.check(request.client.host if request.client else "")
        if not self.settings.keys:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = key.strip().encode() if scheme.lower() == "bearer" else b""
        if not any(hmac.compare_digest(given, each.encode()) for each in self.settings.keys):
            problem = "The API key is wrong." if given else "An API key is missing."
            message = f"{problem} Send the header Authorization: Bearer KEY."
            raise ApiError(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


# ------------------------------------------------------------------------------------------------- the endpoints


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """An endpoint that decodes: how a request is read, and how the reply is written. An ASGI application."""

    service: Service
    path: str
    prefix: str
    read: Callable[[Body, Defaults], Asked]
    reply: Callable[[Head, Asked], Reply]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request, service = Request(scope, receive), self.service
        record = Record(self.path, request_id(request), time.perf_counter())
        out = _Out(send, {"x-request-id": record.id})
        service.active += 1
        try:
            await self._respond(request, out, record)
        except ApiError as error:
            record.status, record.code = error.status, error.code
            with contextlib.suppress(ClientLeft):
                await out.error(error)
        except ClientLeft:
            record.status = LEFT
        except Exception:
            LOG.exception("A request failed.")
            failure = ApiError(500, "The server failed; its log says why.", "server_error")
            record.status, record.code = failure.status, failure.code
            with contextlib.suppress(ClientLeft):
                await out.error(failure)
        finally:
            service.active -= 1
            self._note(record)

    async def _respond(self, request: Request, out: _Out, record: Record) -> None:
        service, settings = self.service, self.service.settings
        service.check_taking()
        service.check_client(request)
        body = parsed(await body_of(request, settings.most_bytes))
        asked = self.read(body, Defaults(settings.model, settings.max_new_tokens))
        check_count(asked, service.decoder.load)
        record.stream = asked.stream
        reply = self.reply(
            head(self.prefix, settings.model, service.decoder.model.tokenizer.vocabulary), asked
        )
        answers = _Answers(service.decoder, asked)
        try:
            if asked.stream:
                work = self._stream(answers, reply, out, record)
            else:
                work = self._whole(answers, reply, out)
            results = await unless_left(request.receive, work)
        finally:
            answers.leave()
        self._count(record, asked, results)
        if settings.log_prompts:
            texts = {"prompts": asked.prompts, "answers": [result.annotated for result in results]}
            LOG.info("Of request %s", record.id, extra={"fields": {"id": record.id, **texts}})

    async def _whole(self, answers: _Answers, reply: Reply, out: _Out) -> Sequence[DecodeResult]:
        results = [checked(await answer) for answer in await answers.submitted()]
        await out.json(await asyncio.to_thread(reply.whole, results))
        return results

    async def _stream(
        self, answers: _Answers, reply: Reply, out: _Out, record: Record
    ) -> Sequence[DecodeResult]:
        pending = await answers.submitted()
        await out.begin(
            "text/event-stream; charset=utf-8", **{"cache-control": "no-cache", "x-accel-buffering": "no"}
        )
        out.failed = reply.failed
        for part in reply.begin():
            await out.more(part)
        results = dict[int, DecodeResult]()
        async with contextlib.aclosing(merged(pending, out.due)) as events:
            async for choice, event in events:
                if event is None:
                    await out.more(sse.PING)
                    continue
                if event.result is not None:
                    results[choice] = checked(event.result)
                parts = [*reply.add(choice, event)]
                for part in parts:
                    await out.more(part)
                if parts and event.kind == "text" and record.first_text_s is None:
                    record.first_text_s = time.perf_counter() - record.started
        for part in reply.end():
            await out.more(part)
        await out.end()
        return [results[choice] for choice in sorted(results)]

    def _count(self, record: Record, asked: Asked, results: Sequence[DecodeResult]) -> None:
        count, stats = self.service.metrics.count, [result.stats for result in results]
        record.status = 200
        record.prompt_tokens = sum(each.prompt_tokens for each in stats[:: asked.n])
        record.output_tokens = sum(each.output_tokens for each in stats)
        record.branches = sum(len(result.branches) for result in results)
        record.finish = tuple(result.stop_reason for result in results)
        count("prompt_tokens", record.prompt_tokens)
        count("reused_tokens", sum(each.reused_tokens for each in stats[:: asked.n]))
        count("output_tokens", record.output_tokens)
        count("text_tokens", sum(each.text_tokens for each in stats))
        count("decode_steps", sum(each.decode_steps for each in stats))
        count("branches", record.branches)

    def _note(self, record: Record) -> None:
        """Counts a request, and writes it into the log."""
        metrics, seconds = self.service.metrics, time.perf_counter() - record.started
        metrics.count("requests", endpoint=self.path, status=str(record.status))
        if record.status == 200:
            metrics.time("request_seconds", seconds, endpoint=self.path)
            if record.first_text_s is not None:
                metrics.time("first_text_seconds", record.first_text_s, endpoint=self.path)
        fields = dataclasses.asdict(record) | {"seconds": round(seconds, 6)}
        del fields["started"]
        said = f"{record.endpoint} {record.status} in {seconds:.2f} s, {record.output_tokens} tokens"
        LOG.info("%s", said, extra={"fields": fields})


class _Answers:
    """The answers of one request. They are cancelled when the client leaves, wherever their submission is then."""

    def __init__(self, decoder: Decoder, asked: Asked):
        self._decoder, self._asked = decoder, asked
        self._all: list[PendingAnswer] = []
        self._left = False

    async def submitted(self) -> list[PendingAnswer]:
        """All of them. Raises ApiError."""
        try:
            return await asyncio.to_thread(self._submit)
        except QueueFull:
            raise busy("All rows are in use, and the queue is full. Try again in a moment.") from None
        except Closed:
            raise busy(
                "This server is shutting down. Send the request to another.", "shutting_down"
            ) from None
        except DoesNotFit as error:
            field = self._asked.field
            raise wrong(field, f"{error.problem} Shorten it.", "context_length_exceeded") from None
        except ValueError as error:
            raise wrong(self._asked.field, str(error)) from None

    def _submit(self) -> list[PendingAnswer]:
        for prompt, sampling in self._asked.requests:
            self._all.append(self._decoder.submit(prompt, sampling, tokens=self._asked.branches))
            if self._left:
                self._cancel()
        return self._all

    def leave(self) -> None:
        """Ends those that are not done. It does not wait for the decoder."""
        self._left = True
        if not all(answer.done for answer in self._all):
            asyncio.get_running_loop().run_in_executor(None, self._cancel)

    def _cancel(self) -> None:
        for answer in [*self._all]:
            answer.cancel()


def checked(result: DecodeResult) -> DecodeResult:
    """A result that is whole. Raises ApiError for one that the server broke off."""
    if result.stop_reason == "cancelled":
        raise busy("This server is shutting down, and broke off the answer.", "shutting_down")
    return result


async def merged(
    answers: Sequence[PendingAnswer], due: Callable[[], float]
) -> AsyncGenerator[tuple[int, Event | None], None]:
    """The events of several answers as they come, each with the answer's index.

    Args:
      answers: to follow.
      due: in how many seconds something is to be sent; if nothing happens before, the event is None.
    """
    queue = asyncio.Queue[tuple[int, Event | Exception]](1)

    async def follow(index: int, answer: PendingAnswer) -> None:
        try:
            async for event in answer:
                await queue.put((index, event))
        except Exception as error:
            await queue.put((index, error))

    tasks = [asyncio.create_task(follow(*pair)) for pair in enumerate(answers)]
    try:
        missing = len(tasks)
        while missing:
            try:
                async with asyncio.timeout(due()):
                    index, event = await queue.get()
            except TimeoutError:
                yield 0, None
                continue
            if isinstance(event, Exception):
                raise event
            yield index, event
            missing -= event.kind == "done"
    finally:
        for task in tasks:
            task.cancel()


# --------------------------------------------------------------------------------------------- requests and replies


def request_id(request: Request) -> str:
    """The client's own name for a request, if it can stand in a log; else a new one."""
    given = request.headers.get("x-request-id", "")
    return given if re.fullmatch(r"[\w.-]{1,64}", given, re.ASCII) else f"req_{secrets.token_hex(12)}"


def check_origin(request: Request, hosts: Sequence[str]) -> None:
    """Raises ApiError for a request that a page of another host made in the user's browser.

    Its owner may also have pointed the name of that host at this machine, so that to the browser both are the same.

    Args:
      hosts: the names that are this server's; none: any.
    """
    origin, host = request.headers.get("origin"), request.headers.get("host", "")
    if origin and origin.partition("://")[2] != host:
        raise ApiError(403, f"Pages of {origin[:80]} may not use this server.", "foreign_origin")
    if hosts and re.sub(r":\d*$", "", host).strip("[]").lower() not in hosts:
        message = f"Without an API key this server is only asked as {hosts[0]}, not as {host[:80]!r}."
        raise ApiError(403, message, "foreign_host")


def check_count(asked: Asked, load: Load) -> None:
    """Raises ApiError for more answers than the server takes at once, before anything is made for each of them."""
    if load.queue is not None and asked.count > (most := load.rows + load.queue):
        message = f"{asked.count} answers at once are more than this server takes, {most}."
        raise wrong("prompt" if len(asked.prompts) > most else "n", message)


async def body_of(request: Request, most: int) -> bytes:
    """The body of a request. Raises ApiError if it is larger than `most`, or does not come."""
    parts, size = list[bytes](), 0

    async def read() -> None:
        nonlocal size
        while True:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise ClientLeft
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > most:
                raise ApiError(413, f"The request has more than {most:,} bytes.", "request_too_large")
            if not message.get("more_body"):
                return

    try:
        async with asyncio.timeout(BODY_S):
            await read()
    except TimeoutError:
        raise ApiError(408, f"The request was not complete after {BODY_S:g} s.", "timeout") from None
    return b"".join(parts)


async def unless_left(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Awaits `work`, unless the client leaves first. Raises ClientLeft."""

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks: list[asyncio.Task[Any]] = [asyncio.create_task(work), asyncio.create_task(left())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise ClientLeft
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Out:
    """Sends one reply.

    Attributes:
      failed: the bytes that end a stream after an error.
    """

    def __init__(self, send: Send, headers: dict[str, str]):
        self._send, self._headers = send, headers
        self._begun = False
        self.failed: Callable[[ApiError], bytes] | None = None
        self._sent = time.monotonic()

    def due(self) -> float:
        """Seconds until a stream is to send a sign of life."""
        return self._sent + PING_S - time.monotonic()

    async def json(self, tree: Any) -> None:
        await self._reply(JSONResponse(tree, headers=self._headers))

    async def error(self, error: ApiError) -> None:
        """As a reply, or as the last event of a stream that has begun."""
        if not self._begun:
            await self._reply(
                JSONResponse(error.body, error.status, headers={**self._headers, **error.headers})
            )
        elif self.failed is not None:
            await self.more(self.failed(error))
            await self.end()

    async def begin(self, content_type: str, **headers: str) -> None:
        response = Response(None, 200, {**self._headers, **headers}, content_type)
        del response.headers["content-length"]
        await self._put({"type": "http.response.start", "status": 200, "headers": response.raw_headers})

    async def more(self, part: bytes) -> None:
        await self._put({"type": "http.response.body", "body": part, "more_body": True})

    async def end(self) -> None:
        await self._put({"type": "http.response.body", "body": b""})

    async def _reply(self, response: Response) -> None:
        start = {
            "type": "http.response.start",
            "status": response.status_code,
            "headers": response.raw_headers,
        }
        await self._put(start)
        body = bytes(response.body)
        for place in range(0, len(body), PIECE):  # in pieces, so that a client who takes none is noticed
            more = place + PIECE < len(body)
            await self._put(
                {"type": "http.response.body", "body": body[place : place + PIECE], "more_body": more}
            )

    async def _put(self, message: Message) -> None:
        self._begun = True
        try:
            async with asyncio.timeout(STALLED_S):
                await self._send(message)
        except (TimeoutError, OSError):
            raise ClientLeft from None
        self._sent = time.monotonic()


# ------------------------------------------------------------------------------------------------ the application


def page() -> tuple[str, str]:
    """The page, and the policy that lets a browser run its own code and nothing else."""
    text = (pathlib.Path(__file__).parent / "page.html").read_text(encoding="utf-8")

    def hashes(tag: str) -> str:
        inside = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(each.encode()).digest()).decode() for each in inside]
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    own = f"script-src {hashes('script')}; style-src {hashes('style')}"
    return (
        text,
        f"default-src 'none'; connect-src 'self'; img-src data:; {own}; base-uri 'none'; frame-ancestors 'none'",
    )


def application(service: Service) -> Starlette:
    """The endpoints of a service. While it runs, the decoder serves; at its end all answers are there."""
    decoder, settings = service.decoder, service.settings
    text, policy = page()
    started = int(time.time())

    async def show_page(request: Request) -> Response:
        return HTMLResponse(
            text, headers={"content-security-policy": policy, "x-content-type-options": "nosniff"}
        )

    async def models(request: Request) -> Response:
        service.check_client(request)
        model = {"id": settings.model, "object": "model", "created": started, "owned_by": "pasta_jax"}
        if (name := request.path_params.get("name")) is None:
            return JSONResponse({"object": "list", "data": [model]})
        if name != settings.model:
            raise ApiError(404, f"The model {name[:80]!r} is not here.", "model_not_found", param="model")
        return JSONResponse(model)

    async def health(request: Request) -> Response:
        load = decoder.load
        state = "draining" if service.draining else "ready" if load.serving else "broken"
        about = {"status": state, "rows": load.rows, "running": load.running, "waiting": load.waiting}
        works = state == "ready" if request.url.path == "/ready" else load.serving
        return JSONResponse(about, 200 if works else 503)

    async def metrics(request: Request) -> Response:
        return PlainTextResponse(
            service.metrics.text(decoder.load, draining=service.draining), media_type=CONTENT_TYPE
        )

    async def refused(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            what, code = {
                404: ("There is no such path", "not_found"),
                405: ("This path takes another method", "method_not_allowed"),
            }.get(error.status_code, (error.detail, "invalid_value"))
            message = f"{what}: {request.method} {request.url.path[:80]}."
            error = ApiError(error.status_code, message, code, headers=error.headers)
        assert isinstance(error, ApiError)
        return JSONResponse(error.body, error.status, headers=error.headers)

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == COMPILATION:
            service.metrics.count("compilations")

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        jax.monitoring.register_event_duration_secs_listener(listen)
        with contextlib.ExitStack() as stack:
            stack.callback(jax.monitoring.unregister_event_duration_listener, listen)
            await asyncio.to_thread(stack.enter_context, decoder.serving())
            yield
            await asyncio.to_thread(stack.close)

    endpoints = (
        Endpoint(service, "/v1/chat/completions", "chatcmpl", asked_of_chat, ChatCompletions),
        Endpoint(service, "/v1/completions", "cmpl", asked_of_completions, Completions),
        Endpoint(service, "/v1/responses", "resp", asked_of_responses, Responses),
    )
    return Starlette(
        routes=[
            *(Route(each.path, each, methods=["POST"]) for each in endpoints),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", models),
            Route("/health", health),
            Route("/ready", health),
            Route("/metrics", metrics),
            Route("/", show_page),
        ],
        exception_handlers={HTTPException: refused, ApiError: refused},
        lifespan=lifespan,
    )
