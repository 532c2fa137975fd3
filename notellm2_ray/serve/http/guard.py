"""What stands before the API: keys, host names, admission and the body's limits, all before anything is parsed.

Plain ASGI, because a request passes it in some ten microseconds; Starlette's own middleware classes cost a task each.
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
OPEN_FILES = ("/", "/favicon.ico")  # the page itself; what it shows needs a key
WRITES = {("PUT", "/v1/notes"), ("POST", "/v1/notes/delete"), ("POST", "/v1/events")}
# A string (possessive: an open one is taken to the end, once), a bracket or a comma.
_TOKENS = re.compile(rb'"(?:[^"\\]|\\.)*+"?|[\[{\]},]', re.DOTALL)
_MAX_TOKENS = 500_000
_SMALL = 65_536


class Guard:
    """ASGI middleware around the API.

    Args:
        app: what it guards.
        limits: of bodies.
        max_in_hand: requests in hand at once; one more is refused at once with 429 and Retry-After.
        keys: None where no key is needed, which is on loopback alone.
        figures: what to count in.
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
        except Exception:  # any: the outermost layer, where a fault becomes a typed answer and a trace in the log
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
            # Without keys the service is this machine's alone. A web page elsewhere may have its own name resolve to
            # 127.0.0.1, but its requests still carry that name.
            host = headers.get(b"host", b"").decode("latin-1")
            if not _is_local(host):
                raise errors.ForbiddenError("without API keys only this machine's own names are answered")
            return
        if path in OPEN or path in OPEN_FILES or path.startswith("/ui/"):
            return
        key = self.keys.verify(_presented(headers))
        if key is None:
            raise errors.UnauthorizedError("a valid API key is needed: Authorization: Bearer KEY")
        needed = "write" if (scope["method"], path.rstrip("/")) in WRITES else "read"
        if needed not in key.scopes:
            raise errors.ForbiddenError(f"this key lacks the scope {needed!r}")

    async def _read(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """The whole body, counted in ``body_bytes``; refused as soon as it is known to be too long."""
        limits = self.limits
        declared = headers.get(b"content-length", b"0")
        # Longer digits than any real size: int() of thousands of them raises.
        if not declared.isdigit() or len(declared) > 15:
            raise errors.MalformedError("content-length is no number")
        if int(declared) > limits.body_bytes:
            raise errors.TooLargeError(f"the body has {int(declared):,} bytes, the limit is {limits.body_bytes:,}")
        if self.body_bytes + int(declared) > limits.bodies_bytes:
            raise errors.OverloadedError("too many bytes are in hand: try again soon")
        parts: list[bytes] = []
        mine = 0
        try:
            async with asyncio.timeout(limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise errors.MalformedError("the connection ended before the body did")
                    part = message.get("body", b"")
                    mine += len(part)
                    self.body_bytes += len(part)
                    parts.append(part)
                    if mine > limits.body_bytes:
                        raise errors.TooLargeError(f"the body has more than {limits.body_bytes:,} bytes")
                    if self.body_bytes > limits.bodies_bytes:
                        raise errors.OverloadedError("too many bytes are in hand: try again soon")
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            self.body_bytes -= mine
            raise errors.SlowBodyError(f"the body took longer than {limits.body_seconds:g} s to arrive") from None
        except BaseException:
            self.body_bytes -= mine
            raise


class _Replay:
    """A body that was read already, and then the connection's own end."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self.body: bytes | None = body
        self.receive = receive

    async def __call__(self) -> Message:
        if self.body is not None:
            body, self.body = self.body, None
            return {"type": "http.request", "body": body, "more_body": False}
        return await self.receive()


class _Answer:
    """Sends on, and remembers the status and whether an answer has begun."""

    def __init__(self, send: Send) -> None:
        self.send, self.status = send, 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self.send(message)

    async def refuse(self, error: errors.ApiError) -> None:
        if self.status:  # an answer has begun: the connection can only be cut, which the server does
            return
        body = error.body()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        headers += [(name.encode(), value.encode()) for name, value in error.headers.items()]
        await self({"type": "http.response.start", "status": error.status, "headers": headers})
        await self({"type": "http.response.body", "body": body})


def check_json(body: bytes, most: int) -> None:
    """Refuse JSON nested deeper than ``most``, of more than half a million tokens, or not in UTF-8.

    Python's parser recurses, and pydantic's errors grow with the depth; 32 MB of ``[],`` become a gigabyte of lists.
    What is checked costs at most a tenth of a second, whatever the body is.

    Raises:
        InvalidError: it is too deep or too long.
        MalformedError: it holds a NUL byte.
    """
    # Python's parser also reads UTF-16 and UTF-32, whose brackets are not found below; NUL is in no valid UTF-8 JSON.
    if b"\0" in body:
        raise errors.MalformedError("JSON in UTF-8 is needed")
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
    """The route's template, as /v1/notes/{note_id}: no ids in logs or metrics."""
    route = scope.get("route")
    return getattr(route, "path", None) or ("/ui" if scope["path"].startswith("/ui/") else "other")
