"""The guard in front of the API: keys, host names, admission and limits of the body, before anything is parsed.

It is plain ASGI and takes about ten microseconds per request; Starlette's middleware classes would each need a task.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import logging
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from notellm2_ray.core.settings.serve import LimitSettings
from notellm2_ray.serve import errors
from notellm2_ray.serve.figures import Figures
from notellm2_ray.serve.keys import KeyRing

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

log = logging.getLogger("notellm2_ray.serve")

OPEN = ("/v1/health", "/v1/ready")  # for load balancers, which carry no key
OPEN_FILES = ("/", "/favicon.ico")  # the page itself, without data; its requests need a key
WRITES = {("PUT", "/v1/notes"), ("POST", "/v1/notes/delete"), ("POST", "/v1/events")}
# A string, a bracket or a comma. The quantifier is possessive, so that an unterminated string is scanned only once.
_TOKENS = re.compile(rb'"(?:[^"\\]|\\.)*+"?|[\[{\]},]', re.DOTALL)
_MAX_TOKENS = 500_000
_SMALL = 65_536


class Guard:
    """ASGI middleware around the API.

    Args:
        app: the guarded application.
        limits: of bodies.
        max_in_hand: requests in hand at once; further ones are refused immediately with 429 and Retry-After.
        keys: None if no key is needed, which is only the case on loopback.
        figures: count the requests.
    """

    def __init__(
        self, app: Any, limits: LimitSettings, max_in_hand: int, keys: KeyRing | None, figures: Figures
    ) -> None:
        self.app, self.limits, self.max_in_hand, self.keys, self.figures = app, limits, max_in_hand, keys, figures
        self.in_hand = 0
        self.body_bytes = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, self.in_hand = time.perf_counter(), self.in_hand + 1
        answer = _Answer(send)
        try:
            await self._guarded(scope, receive, answer)
        except errors.ApiError as error:
            self.figures.refused(error.kind)
            await answer.refuse(error)
        except Exception:  # any kind: the outermost layer answers with an error of the API and logs the traceback
            log.exception("%s %s failed", scope["method"], _route(scope))
            await answer.refuse(errors.ApiError("the service failed on this request; its log says why"))
        finally:
            self.in_hand -= 1
            self.figures.answered(_route(scope), answer.status, time.perf_counter() - started)

    async def _guarded(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        headers = {name: value for name, value in scope["headers"]}
        self._check_caller(scope, headers)
        if self.in_hand > self.max_in_hand and scope["path"] not in OPEN:
            raise errors.OverloadedError(f"{self.max_in_hand} requests are in hand already: try again soon")
        if scope["method"] in ("GET", "HEAD", "OPTIONS") and headers.get(b"content-length", b"0") == b"0":
            await self.app(scope, receive, send)
            return
        body = await self._read(headers, receive)
        try:
            check_json(body, self.limits.json_depth)
            await self.app(scope, _Replay(body, receive), send)
        finally:
            self.body_bytes -= len(body)

    def _check_caller(self, scope: MutableMapping[str, Any], headers: dict[bytes, bytes]) -> None:
        path = scope["path"]
        if self.keys is None:
            # Without keys only this machine may use the service. A foreign web page can make its own host name resolve
            # to 127.0.0.1 (DNS rebinding), but its requests still carry that name.
            host = headers.get(b"host", b"").decode("latin-1")
            if not _is_local(host):
                raise errors.ForbiddenError("without API keys the service only answers requests to localhost")
            return
        if path in OPEN or path in OPEN_FILES or path.startswith("/ui/"):
            return
        key = self.keys.verify(_presented(headers))
        if key is None:
            raise errors.UnauthorizedError("a valid API key is needed: Authorization: Bearer KEY")
        needed = "write" if (scope["method"], path.rstrip("/")) in WRITES else "read"
        if needed not in key.scopes:
            raise errors.ForbiddenError(f"this API key lacks the scope {needed!r}")

    async def _read(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """The whole body, which is counted in ``body_bytes``; refused as soon as it is too long."""
        limits = self.limits
        declared = headers.get(b"content-length", b"0")
        # At most 15 digits: int() raises for thousands of digits.
        if not declared.isdigit() or len(declared) > 15:
            raise errors.MalformedError("content-length is not a number")
        if int(declared) > limits.body_bytes:
            raise errors.TooLargeError(f"the body has {int(declared):,} bytes, the limit is {limits.body_bytes:,}")
        if self.body_bytes + int(declared) > limits.bodies_bytes:
            raise errors.OverloadedError("the bodies in hand have too many bytes: try again soon")
        parts: list[bytes] = []
        mine = 0
        try:
            async with asyncio.timeout(limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise errors.MalformedError("the connection ended before the whole body had arrived")
                    part = message.get("body", b"")
                    mine += len(part)
                    self.body_bytes += len(part)
                    parts.append(part)
                    if mine > limits.body_bytes:
                        raise errors.TooLargeError(f"the body has more than {limits.body_bytes:,} bytes")
                    if self.body_bytes > limits.bodies_bytes:
                        raise errors.OverloadedError("the bodies in hand have too many bytes: try again soon")
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            self.body_bytes -= mine
            raise errors.SlowBodyError(f"the body took longer than {limits.body_seconds:g} s to arrive") from None
        except BaseException:
            self.body_bytes -= mine
            raise


class _Replay:
    """Receives a body that was read already, then the connection's other messages."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self.body: bytes | None = body
        self.receive = receive

    async def __call__(self) -> Message:
        if self.body is not None:
            body, self.body = self.body, None
            return {"type": "http.request", "body": body, "more_body": False}
        return await self.receive()


class _Answer:
    """Sends messages and records the status, which is 0 until an answer has begun."""

    def __init__(self, send: Send) -> None:
        self.send, self.status = send, 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self.send(message)

    async def refuse(self, error: errors.ApiError) -> None:
        if self.status:  # an answer has begun: the server can only cut the connection
            return
        body = error.body()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        headers += [(name.encode(), value.encode()) for name, value in error.headers.items()]
        await self({"type": "http.response.start", "status": error.status, "headers": headers})
        await self({"type": "http.response.body", "body": body})


def check_json(body: bytes, most: int) -> None:
    """Refuse JSON that is nested deeper than ``most``, has more than half a million tokens, or is not UTF-8.

    Python's parser recurses, pydantic's errors grow with the depth, and 32 MB of ``[],`` become a gigabyte of lists.
    The check takes at most a tenth of a second for any body.

    Raises:
        InvalidError: it is nested too deeply or has too many tokens.
        MalformedError: it contains a NUL byte.
    """
    # Python's parser also reads UTF-16 and UTF-32, where the search below would miss brackets. They contain NUL
    # bytes, which valid JSON in UTF-8 does not.
    if b"\0" in body:
        raise errors.MalformedError("the JSON must be in UTF-8")
    if len(body) < _SMALL and body.count(b"[") + body.count(b"{") <= most:
        return
    depth = 0
    for number, match in enumerate(_TOKENS.finditer(body)):
        found = match.group()
        if found in (b"[", b"{"):
            depth += 1
            if depth > most:
                raise errors.InvalidError(f"the JSON is nested more than {most} deep")
        elif found in (b"]", b"}"):
            depth -= 1
        if number > _MAX_TOKENS:
            raise errors.InvalidError(f"the JSON has more than {_MAX_TOKENS:,} tokens")


def _presented(headers: dict[bytes, bytes]) -> str:
    kind, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
    return key.strip() if kind.lower() == "bearer" else headers.get(b"x-api-key", b"").decode("latin-1")


@functools.lru_cache(maxsize=256)
def _is_local(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _route(scope: MutableMapping[str, Any]) -> str:
    """The route's template, like /v1/notes/{note_id}, so that no ids get into logs or metrics."""
    route = scope.get("route")
    return getattr(route, "path", None) or ("/ui" if scope["path"].startswith("/ui/") else "other")
