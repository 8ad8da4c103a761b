"""A client for chat endpoints that speak OpenAI's protocol: vLLM, SGLang, llama.cpp, Ollama, and most providers.

    with Endpoint("http://localhost:8000/v1", "qwen3", cache="replies") as endpoint:
        reply = endpoint.ask([{"role": "user", "content": "Name a river."}])
        for answer in endpoint.each(work, items):  # `work` asks as often as it likes
            ...

What succeeded is kept in the cache and never asked again: a run that was killed goes on where it was. What fails is
asked again, after the time that the endpoint names or one that doubles. The key comes from the environment, is sent
in the header, and appears nowhere else.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import os
import random
import threading
import time
import urllib.parse
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import requests

from pasta_jax.endpoint.cache import Cache, key_of
from pasta_jax.endpoint.cost import (
    BudgetError,
    Meter,
    Prices,
    Usage,
    estimated_input,
    estimated_tokens,
)
from pasta_jax.endpoint.post import AskAgain, EndpointError, Key, Reply, RequestError, Unanswered, post

LOG = logging.getLogger("pasta_jax")

Messages = Sequence[Mapping[str, str]]
Item = TypeVar("Item")
Done = TypeVar("Done")

KEY_VARIABLE = "OPENAI_API_KEY"

LOST = 5
"""Requests that fail one after another, each as often as it is sent, before the endpoint is put to the test."""

TEST = ({"role": "user", "content": "Reply with OK."},)
"""What is asked to learn whether an endpoint that refuses or fails at requests answers any at all."""

LONGEST_WAIT_S = 600.0
"""Between two attempts, however long the endpoint asks to wait."""

OPTIONAL = ("temperature", "logprobs", "top_logprobs", "max_tokens")
"""Fields that some endpoints or models refuse. They are left out from then on, with a line in the log."""

LOG_EVERY_S = 20.0


@dataclasses.dataclass(frozen=True)
class Planned:
    """A request for an estimate.

    Attributes:
      messages: of the request.
      output: about how many tokens its reply will have.
      follows: it depends on the reply to the one before, and is as good as sent if the cache has that.
      top_logprobs: as in `Endpoint.ask`.
    """

    messages: Messages
    output: int
    follows: bool = False
    top_logprobs: int = 0


class _Stop:
    """Ends the threads that work for one caller, and says why."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.fault: EndpointError | None = None


class Endpoint:
    """Asks one model; its methods may be called from several threads.

    Attributes:
      meter: what was sent, and what it cost.
      concurrency: how many requests are under way at once in `each`.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        key_variable: str = KEY_VARIABLE,
        concurrency: int = 8,
        timeout: float = 120.0,
        attempts: int = 8,
        backoff: float = 1.0,
        temperature: float = 0.0,
        prices: Prices = Prices(),
        budget_requests: int | None = None,
        budget_dollars: float | None = None,
        cache: str | os.PathLike[str] | None = None,
    ):
        """Sends nothing yet.

        Args:
          base_url: up to the version, as in https://api.openai.com/v1.
          model: as the endpoint calls it.
          key_variable: of the environment, which holds the key. Only the usual one may be unset.
          concurrency: requests under way at once.
          timeout: seconds without a word from the endpoint after which a request has failed.
          attempts: how often a request is sent until it has failed for good.
          backoff: seconds before the second attempt; they double with each, up to a minute.
          temperature: of sampling.
          prices: per million tokens, for the costs.
          budget_requests: the most requests, with those of earlier runs that the cache has.
          budget_dollars: the most dollars, with those of earlier runs that the cache has.
          cache: folder of replies to keep; by default they are kept until the end.

        Raises:
          EndpointError: an argument cannot be used.
          InUse: another process uses the cache.
        """
        parts = urllib.parse.urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
            raise EndpointError(
                "base_url must be like http://localhost:8000/v1: http or https, no query, no fragment."
            )
        if "@" in parts.netloc:
            raise EndpointError(f"base_url holds a name or a password. Put the key into ${key_variable}.")
        if not model:
            raise EndpointError("No model is named.")
        if key_variable != KEY_VARIABLE and not os.environ.get(key_variable):
            raise EndpointError(f"${key_variable} is not set, which should hold the key.")
        if budget_dollars is not None and not (prices.input or prices.output):
            raise EndpointError("A budget in dollars needs the prices of tokens.")
        base_url = base_url.rstrip("/").removesuffix("/chat/completions")
        self.url = f"{base_url}/chat/completions"
        self.model, self.concurrency = model, concurrency
        self._key = Key(os.environ.get(key_variable, ""), key_variable)
        self._timeout, self._attempts, self._backoff = timeout, attempts, backoff
        self._temperature, self._prices = temperature, prices
        self._cache = Cache(cache)
        self.meter = Meter(prices, requests=budget_requests, dollars=budget_dollars)
        self.meter.count(len(self._cache), self._cache.usage)
        self._refused: set[str] = set()  # of OPTIONAL
        self._under_way: dict[str, threading.Lock] = {}
        self._mutex = threading.Lock()
        self._stop = _Stop()
        self._is_heard = False  # whether the endpoint ever answered
        self._failed = 0  # requests that failed since one succeeded
        self._testing = threading.Lock()
        self._logged_at = float("-inf")
        self._local = threading.local()

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the cache for other processes."""
        self._cache.close()

    def ask(
        self,
        messages: Messages,
        *,
        expected: int = 256,
        max_tokens: int | None = None,
        top_logprobs: int = 0,
    ) -> Reply:
        """The reply to a conversation, from the cache if it was ever given.

        Args:
          messages: each {"role": ..., "content": ...}.
          expected: about how many tokens the reply will have, for the budget.
          max_tokens: the most that it may have.
          top_logprobs: how many of the likeliest first tokens to ask for.

        Raises:
          RequestError: there is no reply to this request.
          EndpointError: there will be none to others either.
        """
        body = self._body(messages, max_tokens, top_logprobs)
        name = key_of([self.url, body])
        with self._mutex:
            lock = self._under_way.setdefault(name, threading.Lock())
        with lock:  # two threads that ask the same get the same reply
            try:
                kept = self._cache.get(name)
                if kept is not None:
                    return _of_cache(kept)
                estimate = Usage(estimated_input(messages), expected)
                reply = self._answered(body, estimate)
                usage = reply.usage or Usage(estimate.input, estimated_tokens(reply.text))
                self._cache.put(
                    name,
                    {"text": reply.text, "finish": reply.finish, "first": reply.first, "usage": usage},
                )
                return reply
            finally:
                with self._mutex:
                    self._under_way.pop(name, None)

    def _body(
        self, messages: Messages, max_tokens: int | None = None, top_logprobs: int = 0
    ) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.model, "messages": [dict(each) for each in messages]}
        body["temperature"] = self._temperature
        if max_tokens is not None:
            body["max_tokens"] = max_tokens
        if top_logprobs:
            body |= {"logprobs": True, "top_logprobs": top_logprobs}
        return body

    def _answered(self, body: dict[str, Any], estimate: Usage) -> Reply:
        """Sends a request until it is answered or has failed for good. Then makes sure that others are answered."""
        try:
            return self._persisted(body, estimate, self._attempts)
        except RequestError as error:
            with self._mutex:
                self._failed += 1
            self._test(error)
            raise RequestError(f"the endpoint gave no answer: {error}", is_refusal=error.is_refusal) from None

    def _test(self, failure: RequestError) -> None:
        """After a refusal, or LOST other failures, asks what any model answers. EndpointError if it fails."""
        with self._testing:  # one thread asks; those that wait learn from it
            self._check_stop()
            failed = self._failed
            if failed < (1 if failure.is_refusal else LOST):
                return
            try:
                self._persisted(self._body(TEST), Usage(estimated_input(TEST), 8), self._attempts)
            except RequestError:
                so = (
                    "so failed a request" if failed == 1 else f"so failed {failed} requests one after another"
                )
                problem = f"POST {self.url}: {failure}; {so}, and the question {TEST[0]['content']!r} too"
                raise self._given_up(problem) from None

    def _persisted(self, body: dict[str, Any], estimate: Usage, attempts: int) -> Reply:
        """Sends a request until it is answered. Raises RequestError if it is refused, or fails so often."""
        last, left_out = "", set[str]()
        for attempt in range(attempts):
            wait = 0.0
            try:
                reply = self._sent(body, estimate)
            except RequestError as error:
                named = {name for name in OPTIONAL if name in body and error.may_refuse(name)}
                if not named:
                    raise
                named |= {"logprobs", "top_logprobs"} if "logprobs" in "".join(named) else set()
                body = {name: value for name, value in body.items() if name not in named}
                left_out |= named
                last = str(error)
                continue
            except AskAgain as error:
                if isinstance(error, Unanswered) and not self._is_heard:
                    problem = f"POST {self.url}: {error.reason}. Is the server running there?"
                    raise self._given_up(problem) from None
                last = error.reason
                wait = min(60.0, self._backoff * 2**attempt) * random.uniform(0.5, 1.0)
                wait = min(max(wait, error.after or 0.0), LONGEST_WAIT_S)
            else:
                self._is_heard, self._failed = True, 0
                self._leave_out(left_out, last)  # that was it, since it is answered without
                return reply
            if attempt + 1 < attempts:
                self._log_again(last, wait, attempt)
                if self._run.event.wait(wait):
                    break
        self._check_stop()
        raise RequestError(last if attempt == 0 else f"{last}, {attempt + 1} times")

    def _sent(self, body: dict[str, Any], estimate: Usage) -> Reply:
        """Sends a request once."""
        self._check_stop()
        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
        body = {name: value for name, value in body.items() if name not in self._refused}
        try:
            with self.meter.sending(estimate) as sent:
                try:
                    reply = post(self._local.session, self.url, body, self._key, self._timeout)
                except AskAgain as error:
                    sent.used = estimate if error.is_charged else None
                    self._is_heard |= not isinstance(error, Unanswered)
                    raise
                sent.used = reply.usage or Usage(estimate.input, estimated_tokens(reply.text))
                return reply
        except (BudgetError, EndpointError) as error:
            raise self._given_up(str(error)) from None

    def _leave_out(self, names: set[str], why: str) -> None:
        """Leaves fields that the endpoint refuses out of all requests."""
        with self._mutex:
            new = names - self._refused
            self._refused |= names
        if new:
            LOG.warning("%s is left out of requests: POST %s: %s", ", ".join(sorted(new)), self.url, why)

    @property
    def _run(self) -> _Stop:
        """The stop of the `each` that this thread works for, or of all others."""
        run: _Stop = getattr(self._local, "stop", self._stop)
        return run

    def _check_stop(self) -> None:
        if self._run.event.is_set():
            raise self._run.fault or EndpointError("The requests were stopped.")

    def _given_up(self, problem: str) -> EndpointError:
        """The error that ends the run; threads that wait end too."""
        problem += "" if problem.endswith((".", "?")) else "."
        run = self._run
        with self._mutex:
            run.fault = run.fault or EndpointError(problem)
        run.event.set()
        return run.fault

    def _log_again(self, reason: str, wait: float, attempt: int) -> None:
        """Says now and then that requests fail."""
        with self._mutex:
            if time.monotonic() - self._logged_at < LOG_EVERY_S or attempt < 2:
                return
            self._logged_at = time.monotonic()
        LOG.warning("POST %s: %s, %d times; again in %.0f s.", self.url, reason, attempt + 1, wait)

    def each(
        self, work: Callable[[Item], Done], items: Iterable[Item], *, in_order: bool = False
    ) -> Generator[Done]:
        """`work(item)` of each item, `concurrency` of them at once, as they come or in the order of the items.

        Items are taken as they are needed. If the endpoint has to be given up, what is done is yielded first.

        Raises:
          EndpointError: the endpoint does not answer any more.
        """
        stop = _Stop()

        def started(item: Item) -> Done:
            self._local.stop = stop
            return work(item)

        todo, has_more = iter(items), True
        under_way: list[concurrent.futures.Future[Done]] = []
        is_lost = False
        pool = concurrent.futures.ThreadPoolExecutor(self.concurrency)
        try:
            while True:
                while has_more and not is_lost and len(under_way) < 2 * self.concurrency:
                    try:
                        under_way.append(pool.submit(started, next(todo)))
                    except StopIteration:
                        has_more = False
                if not under_way:
                    break
                waited = under_way[:1] if in_order else under_way
                done, _ = concurrent.futures.wait(waited, return_when=concurrent.futures.FIRST_COMPLETED)
                under_way = [future for future in under_way if future not in done]
                for future in done:
                    try:
                        result = future.result()
                    except EndpointError:
                        is_lost = True
                    else:
                        if not (in_order and is_lost):
                            yield result
            if is_lost:
                raise stop.fault or EndpointError("The requests were stopped.")
        finally:
            stop.event.set()
            pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C need not wait for the endpoint

    def estimate(self, requests: Iterable[Planned], *, shown: int = 0) -> str:
        """What requests would be sent and cost, for people; sends nothing.

        Args:
          requests: all that would be sent.
          shown: how many of them to show in full.
        """
        parts: list[str] = []
        kept = sent = 0
        is_kept = False
        usage = Usage(0, 0)
        for planned in requests:
            if not (planned.follows and is_kept):
                body = self._body(planned.messages, top_logprobs=planned.top_logprobs)
                is_kept = key_of([self.url, body]) in self._cache
            if is_kept:
                kept += 1
                continue
            sent += 1
            tokens = Usage(estimated_input(planned.messages), planned.output)
            usage = Usage(usage.input + tokens.input, usage.output + tokens.output)
            if sent <= shown:
                parts.append(f"--- request {sent}: POST {self.url}, model {self.model}")
                parts += [f"[{each['role']}]\n{each['content']}" for each in planned.messages]
        cost = f", about ${self._prices.dollars(usage):.2f}" if self._prices != Prices() else ""
        parts.append(
            f"About {sent:,} requests would be sent, of {usage.input:,} tokens and replies of {usage.output:,}"
            f"{cost} (estimated). {kept:,} are in the cache. Nothing was sent."
        )
        return "\n".join(parts)


def _of_cache(fields: dict[str, Any]) -> Reply:
    first = tuple((str(token), float(logprob)) for token, logprob in fields["first"])
    return Reply(fields["text"], fields["finish"], first, Usage(*fields["usage"]))
