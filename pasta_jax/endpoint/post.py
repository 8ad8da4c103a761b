"""One request to a chat endpoint: what it answered, or what went wrong and whether to ask again."""

from __future__ import annotations

import dataclasses
import datetime
import email.utils
import re
from typing import Any

import requests

from pasta_jax.endpoint.cost import Usage
from pasta_jax.files import BROKEN

SECRET = 8
"""Characters of the shortest key that is taken for a secret; servers of one's own get `x` or `EMPTY`."""

FATAL = (300, 301, 302, 303, 305, 307, 308, 401, 402, 404, 405)
"""Statuses that every other request would get too."""

AGAIN = (408, 409, 425, 429)
"""Statuses below 500 after which the same request may succeed."""

_THOUGHT = re.compile(r"\A\s*<think>.*?</think>\s*", re.DOTALL)
_SPENT = re.compile(r"insufficient_quota|exceeded your current quota|insufficient balance", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Reply:
    """What the endpoint answered.

    Attributes:
      text: the reply, "" if there is none.
      finish: why it ended, as the endpoint calls it: "stop", "length".
      first: the likeliest first tokens with their log-probabilities, if these were asked for and given.
      usage: tokens of the request and of the reply; None if the endpoint does not count them.
    """

    text: str
    finish: str = ""
    first: tuple[tuple[str, float], ...] = ()
    usage: Usage | None = None

    @property
    def said(self) -> str:
        """The text without the reasoning that some models put before it."""
        return _THOUGHT.sub("", self.text, count=1)


class EndpointError(ValueError):
    """The endpoint does not answer, or not this user, or the budget is used up. Other requests would fail too."""


class RequestError(ValueError):
    """The endpoint does not answer this request; others it may.

    Attributes:
      is_refusal: it would refuse the request again, as one that a content filter stops or that is too long.
      field: of the request, which is what it refuses, if it names one.
    """

    def __init__(self, reason: str, *, is_refusal: bool = False, field: str = ""):
        super().__init__(reason)
        self.is_refusal, self.field = is_refusal, field

    def may_refuse(self, field: str) -> bool:
        """Whether it names this field of the request, if only in its message."""
        return self.field == field if self.field else field in str(self)


class AskAgain(Exception):
    """The same request may succeed later.

    Attributes:
      reason: what happened, in a few words.
      after: seconds to wait, if the endpoint said how long.
      is_charged: the request may be charged although its reply is of no use.
    """

    def __init__(self, reason: str, *, after: float | None = None, is_charged: bool = False):
        super().__init__(reason)
        self.reason, self.after, self.is_charged = reason, after, is_charged


class Unanswered(AskAgain):
    """Nobody listens at the address."""


class Key:
    """A secret that is sent in the header and shown nowhere. "" is none."""

    def __init__(self, key: str, variable: str):
        """`variable`: of the environment, for messages."""
        self._key, self.variable = key.strip(), variable
        if not re.fullmatch(r"[!-~]*", self._key):
            raise EndpointError(f"${variable} holds what cannot be a key. Set it to the key alone.")

    def __bool__(self) -> bool:
        return bool(self._key)

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """Authorizes a request. Without this `requests` would send what ~/.netrc has."""
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def redacted(self, text: str) -> str:
        """The text without the key, if a server echoes it."""
        return text.replace(self._key, "[key]") if len(self._key) >= SECRET else text


def post(session: requests.Session, url: str, body: dict[str, Any], key: Key, timeout: float) -> Reply:
    """Sends one request.

    Raises:
      AskAgain: it failed, and may succeed later.
      RequestError: the endpoint refuses it.
      EndpointError: the endpoint refuses every request.
    """
    try:
        answer = session.post(url, json=body, auth=key, timeout=timeout, allow_redirects=False)
    except requests.exceptions.SSLError as error:
        raise EndpointError(f"POST {url}: {_cause(error)}") from None
    except requests.exceptions.ReadTimeout:
        raise AskAgain(f"no answer in {timeout:g} s", is_charged=True) from None
    except requests.exceptions.ConnectTimeout:
        raise Unanswered(f"no connection in {timeout:g} s") from None
    except (requests.exceptions.ChunkedEncodingError, requests.exceptions.ContentDecodingError):
        raise AskAgain("the reply broke off", is_charged=True) from None
    except requests.exceptions.ConnectionError as error:
        if "Read timed out" in str(error):
            raise AskAgain(f"no answer in {timeout:g} s", is_charged=True) from None
        if "Connection aborted" in str(error):
            raise AskAgain("the connection broke off", is_charged=True) from None
        raise Unanswered(key.redacted(_cause(error))) from None
    except requests.exceptions.RequestException as error:
        raise EndpointError(f"POST {url}: {key.redacted(_cause(error))}") from None
    if answer.status_code == 200:
        return _read(answer, key)
    said = _message(answer, key)
    detail = f" ({said})" if said else ""
    problem = f"POST {url}: {answer.status_code}{detail}"
    if answer.status_code == 401:
        state = f"it refuses the key in ${key.variable}" if key else f"${key.variable} is not set"
        raise EndpointError(f"{problem} ({state})")
    if answer.status_code in FATAL or _SPENT.search(said):
        raise EndpointError(problem)
    if answer.status_code in AGAIN or answer.status_code >= 500:
        raise AskAgain(f"{answer.status_code}{detail}", after=_retry_after(answer.headers.get("Retry-After")))
    raise RequestError(f"{answer.status_code}{detail}", is_refusal=True, field=_field(answer))


def _read(answer: requests.Response, key: Key) -> Reply:
    """The reply in the body of an answer. Raises AskAgain if it is none."""
    try:
        fields = answer.json()
        choice = fields["choices"][0]
        content = choice["message"].get("content")
        if not isinstance(content, str | None):
            raise TypeError("no text")
        first: tuple[tuple[str, float], ...] = ()
        if (logprobs := choice.get("logprobs")) and logprobs.get("content"):
            first = tuple(
                (key.redacted(str(each["token"])), float(each["logprob"]))
                for each in logprobs["content"][0].get("top_logprobs") or ()
            )
        counted = fields.get("usage") or {}
        usage = None
        if counted.get("prompt_tokens") is not None:
            usage = Usage(int(counted["prompt_tokens"]), int(counted.get("completion_tokens") or 0))
        return Reply(key.redacted(content or ""), str(choice.get("finish_reason") or ""), first, usage)
    except (*BROKEN, AttributeError, IndexError):
        raise AskAgain("the reply is no chat completion in JSON", is_charged=True) from None


def _message(answer: requests.Response, key: Key) -> str:
    """What the endpoint says of an error, in one short line without the key."""
    text = key.redacted(answer.text)[:20_000]
    try:
        said = answer.json()
        while isinstance(said, dict):
            code = said.get("code")
            said = said.get("error") or said.get("message") or said.get("detail") or ""
            if isinstance(said, str) and isinstance(code, str) and code not in said:
                said = f"{code}: {said}"
        text = key.redacted(said if isinstance(said, str) else str(said))
    except (*BROKEN, AttributeError):
        if "<html" in text.lower():
            text = ""  # a page for browsers
    text = " ".join(text.split())
    return text if len(text) <= 200 else f"{text[:197]}..."


def _field(answer: requests.Response) -> str:
    """The field of the request that an error names, as OpenAI does; "" if it names none."""
    try:
        name = answer.json()["error"]["param"]
    except (*BROKEN, IndexError):
        return ""
    return name if isinstance(name, str) else ""


def _retry_after(value: str | None) -> float | None:
    """Seconds that a header Retry-After asks to wait: a number or a date.

    >>> _retry_after("3"), _retry_after("soon"), _retry_after("Thu, 01 Jan 1970 00:00:00 GMT")
    (3.0, None, 0.0)
    """
    if value is None:
        return None
    try:
        return min(max(0.0, float(value)), 1e6)
    except ValueError:
        pass
    try:
        at = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (at - datetime.datetime.now(at.tzinfo)).total_seconds())


def _cause(error: BaseException) -> str:
    """The innermost cause of an error of `requests`, in a few words.

    >>> _cause(ValueError("HTTPPool: Max retries (Caused by NewError('<obj>: [Errno 111] Connection refused'))"))
    'Connection refused'
    """
    text = " ".join(str(error).split())
    found = re.findall(r"\[Errno -?\d+\] ([^'\")\]]+)|certificate verify failed: ([^(]+)", text)
    if found:
        return "".join(found[-1]).strip()
    return text if len(text) <= 200 else f"{text[:197]}..."
