"""What a client is told when a request fails: OpenAI's error object, with its status."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class ApiError(Exception):
    """A request that is not answered.

    Attributes:
      status: of HTTP.
      message: what is wrong, and what to do.
      code: a word for programs, as OpenAI's clients know it.
      param: the field of the request that is wrong, if it is one.
      headers: of the reply.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The object that the client's library reads."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {"message": self.message, "type": kind, "param": self.param, "code": self.code},
        }


def wrong(param: str | None, message: str, code: str = "invalid_value") -> ApiError:
    """The error for a field of a request."""
    return ApiError(400, message, code, param=param)


def busy(message: str, code: str = "overloaded") -> ApiError:
    """The error for a request that may be sent again a moment later; clients of OpenAI do so by themselves."""
    return ApiError(503, message, code, headers={"Retry-After": "1"})
