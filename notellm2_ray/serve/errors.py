"""Errors of the API. Each has an HTTP status and the body ``{"error": {"type", "message", "param", "code"}}``.

That is OpenAI's shape, which its clients read; ``code`` is always null.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, ClassVar

RETRY_SECONDS = 1


class ApiError(Exception):
    """Base: 500, ``internal``.

    Attributes:
        status: HTTP status.
        kind: ``type`` in the answer, for programs.
        param: the field of the request that is wrong, or None.
        headers: additional response headers.
    """

    status = 500
    kind = "internal"
    headers: ClassVar[Mapping[str, str]] = {}

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message, param)  # both arguments, so that it can be pickled
        self.message, self.param = message, param

    def body(self) -> bytes:
        """The answer's JSON."""
        return error_body(self.kind, self.message, self.param)

    def http(self) -> str:
        """The whole HTTP answer, for a proxy that sends it."""
        body = self.body().decode()
        fields = {"content-type": "application/json", "content-length": str(len(body.encode())), **self.headers}
        lines = [f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}", *(f"{k}: {v}" for k, v in fields.items())]
        return "\r\n".join([*lines, "", body])


class InvalidError(ApiError):
    """The request can be parsed, but its values are wrong."""

    status, kind = 422, "invalid_request"


class OpenAiError(ApiError):
    """A wrong value in a request of OpenAI's format, with the status and type that OpenAI's clients expect."""

    status, kind = 400, "invalid_request_error"


class MalformedError(ApiError):
    """The body is not JSON, or has another content type."""

    status, kind = 400, "malformed_request"


class TooLargeError(ApiError):
    """More bytes, notes or pixels than the limits allow."""

    status, kind = 413, "too_large"


class SlowBodyError(ApiError):
    """The body took too long to arrive."""

    status, kind = 408, "timeout"


class UnauthorizedError(ApiError):
    """No key, or an unknown one."""

    status, kind = 401, "unauthorized"
    headers: ClassVar[Mapping[str, str]] = {"www-authenticate": "Bearer"}


class ForbiddenError(ApiError):
    """A key without the scope that the endpoint needs, or a foreign host name on loopback."""

    status, kind = 403, "forbidden"


class NotFoundError(ApiError):
    """No such note, user or path."""

    status, kind = 404, "not_found"


class OverloadedError(ApiError):
    """The queues are full; the client should try again."""

    status, kind = 429, "overloaded"
    headers: ClassVar[Mapping[str, str]] = {"retry-after": str(RETRY_SECONDS)}


class UnavailableError(ApiError):
    """A part of the service is not available yet, or not at the moment."""

    status, kind = 503, "unavailable"
    headers: ClassVar[Mapping[str, str]] = {"retry-after": str(RETRY_SECONDS)}


class TookTooLongError(UnavailableError):
    """A part of the service did not answer in time."""


BY_STATUS: dict[int, str] = {
    400: "malformed_request",
    404: "not_found",
    405: "method_not_allowed",
    413: "too_large",
    415: "unsupported_media_type",
    422: "invalid_request",
}


def error_body(kind: str, message: str, param: str | None = None) -> bytes:
    """JSON of an error; lone surrogates from a hostile request are escaped."""
    return json.dumps({"error": {"type": kind, "message": message, "param": param, "code": None}}).encode()


def explain_validation(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """Message and parameter for pydantic's errors, without the caller's values, which must not be logged."""
    lines = []
    for error in errors[:5]:
        place = ".".join(str(part) for part in error["loc"] if part != "body")[:200]
        message = str(error["msg"]).removeprefix("Value error, ")
        lines.append(f"{place}: {message}" if place else message)
    more = f" (and {len(errors) - 5} more)" if len(errors) > 5 else ""
    first = ".".join(str(part) for part in errors[0]["loc"] if part != "body")[:200] if errors else ""
    return "; ".join(lines)[:1000] + more, first or None
