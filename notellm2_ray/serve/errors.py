"""Errors of the API: each has an HTTP status and is answered as ``{"error": {"type", "message", "param"}}``."""

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
        kind: the machine's word for it (``type`` in the answer).
        param: the field of the request that is to blame, or None.
        headers: further response headers.
    """

    status = 500
    kind = "internal"
    headers: ClassVar[Mapping[str, str]] = {}

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message, param)  # both, so that it pickles
        self.message, self.param = message, param

    def body(self) -> bytes:
        """The answer's JSON."""
        return error_body(self.kind, self.message, self.param)

    def http(self) -> str:
        """The whole answer, for a proxy that gives it in our place."""
        body = self.body().decode()
        fields = {"content-type": "application/json", "content-length": str(len(body.encode())), **self.headers}
        lines = [f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}", *(f"{k}: {v}" for k, v in fields.items())]
        return "\r\n".join([*lines, "", body])


class InvalidError(ApiError):
    """The request is understood and wrong."""

    status, kind = 422, "invalid_request"


class MalformedError(ApiError):
    """The body is no JSON, or of another content type."""

    status, kind = 400, "malformed_request"


class TooLargeError(ApiError):
    """More bytes, notes or pixels than the limits allow."""

    status, kind = 413, "too_large"


class SlowBodyError(ApiError):
    """The body took too long to arrive."""

    status, kind = 408, "timeout"


class UnauthorizedError(ApiError):
    """No key, or one that is not known."""

    status, kind = 401, "unauthorized"
    headers: ClassVar[Mapping[str, str]] = {"www-authenticate": "Bearer"}


class ForbiddenError(ApiError):
    """A key without the scope that the endpoint needs, or a foreign host name on loopback."""

    status, kind = 403, "forbidden"


class NotFoundError(ApiError):
    """No such note, user or path."""

    status, kind = 404, "not_found"


class OverloadedError(ApiError):
    """The queues are full: come again."""

    status, kind = 429, "overloaded"
    headers: ClassVar[Mapping[str, str]] = {"retry-after": str(RETRY_SECONDS)}


class UnavailableError(ApiError):
    """A part of the service is not there yet, or for the moment."""

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
    """JSON of an error; lone surrogates of a hostile request become escapes."""
    return json.dumps({"error": {"type": kind, "message": message, "param": param}}).encode()


def explain_validation(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """Message and parameter of pydantic's list of errors; the caller's values are not repeated (or logged)."""
    lines = []
    for error in errors[:5]:
        place = ".".join(str(part) for part in error["loc"] if part != "body")[:200]
        lines.append(f"{place}: {error['msg']}" if place else str(error["msg"]))
    more = f" (and {len(errors) - 5} more)" if len(errors) > 5 else ""
    first = ".".join(str(part) for part in errors[0]["loc"] if part != "body")[:200] if errors else ""
    return "; ".join(lines)[:1000] + more, first or None
