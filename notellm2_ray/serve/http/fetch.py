"""Fetching images by URL: only from listed hosts and never from a private address, checked again at every redirect.

The host name is resolved here, all of its addresses are checked, and the connection goes to a checked address. A name
that resolves to another address a moment later therefore makes no difference.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterable
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.settings.serve import FetchSettings

Resolve = Callable[[str, int], Awaitable[list[str]]]
# NAT64 forwards these to the IPv4 address in the last 32 bits, which may be private.
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_REDIRECTS = (301, 302, 303, 307, 308)


class ImageFetcher:
    """Fetches images within the settings' bounds.

    Args:
        settings: hosts, time, redirects.
        max_bytes: of an image.
        resolve, transport: replace the network in tests.
    """

    def __init__(
        self, settings: FetchSettings, max_bytes: int, resolve: Resolve | None = None, transport: Any = None
    ) -> None:
        self.settings, self.max_bytes = settings, max_bytes
        self.resolve, self.transport = resolve or _resolve, transport

    async def fetch(self, url: str) -> bytes:
        """The bytes at ``url``.

        Raises:
            DataError: the image could not be fetched; says why, without the content of the answer.
        """
        try:
            async with asyncio.timeout(self.settings.seconds):
                return await self._follow(url)
        except TimeoutError:
            raise DataError(f"image_url: no answer within {self.settings.seconds:g} s") from None

    async def _follow(self, url: str) -> bytes:
        for _ in range(self.settings.redirects + 1):
            target = check_url(url, self.settings)
            found = await self._get(target)
            if isinstance(found, bytes):
                return found
            try:
                url = urljoin(url, found)
            except ValueError:
                raise DataError("image_url: the host redirects to an invalid URL") from None
        raise DataError(f"image_url: more than {self.settings.redirects} redirects")

    async def _get(self, target: SplitResult) -> bytes | str:
        """The body, or the URL of a redirect."""
        import httpx

        name = target.hostname or ""
        port = target.port or (443 if target.scheme == "https" else 80)
        address = check_addresses(await self.resolve(name, port))
        shown = f"[{address}]" if ":" in address else address
        path = (target.path or "/") + (f"?{target.query}" if target.query else "")
        # The certificate is checked against the name, but the connection goes to the checked address.
        options: dict[str, Any] = {"extensions": {"sni_hostname": name}, "headers": {"host": target.netloc}}
        try:
            request_url = httpx.URL(f"{target.scheme}://{shown}:{port}{path}")
            async with (
                httpx.AsyncClient(
                    transport=self.transport, follow_redirects=False, trust_env=False, timeout=self.settings.seconds
                ) as client,
                client.stream("GET", request_url, **options) as answer,
            ):
                if answer.status_code in _REDIRECTS:
                    return answer.headers.get("location", "")
                if answer.status_code != 200:
                    raise DataError(f"image_url: the host answered {answer.status_code}")
                return await self._body(answer)
        # ValueError: raised by httpx for a strange path or header.
        except (httpx.HTTPError, httpx.InvalidURL, ssl_error(), ValueError) as error:
            raise DataError(f"image_url: could not be fetched ({type(error).__name__})") from None

    async def _body(self, answer: Any) -> bytes:
        parts, size = [], 0
        # Raw, not decompressed: images are not sent compressed, except to exhaust memory.
        async for part in answer.aiter_raw():
            size += len(part)
            if size > self.max_bytes:
                raise DataError(f"image_url: more than {self.max_bytes:,} bytes")
            parts.append(part)
        return b"".join(parts)


def ssl_error() -> type[Exception]:
    """ssl.SSLError, which httpx sometimes does not wrap."""
    import ssl

    return ssl.SSLError


def check_url(url: str, settings: FetchSettings) -> SplitResult:
    """The parts of a URL that may be fetched.

    Raises:
        DataError: the scheme or the host is not allowed, or the URL contains a user name.
    """
    try:
        target = urlsplit(url)
        name, _ = target.hostname or "", target.port
    except ValueError:
        raise DataError("image_url: not a valid URL") from None
    if target.scheme not in (("https", "http") if settings.plain_http else ("https",)):
        raise DataError("image_url: only https URLs are fetched")
    if target.username or target.password:
        raise DataError("image_url: user names in URLs are not allowed")
    if not name.isascii() or any(c.isspace() or ord(c) < 33 for c in url):
        raise DataError("image_url: not a valid URL")
    if not any(_matches(name.lower().rstrip("."), host.lower()) for host in settings.hosts):
        raise DataError("image_url: this host is not among serve.fetch.hosts")
    return target


def _matches(name: str, host: str) -> bool:
    return name.endswith(host[1:]) and name != host[2:] if host.startswith("*.") else name == host


def check_addresses(addresses: Iterable[str]) -> str:
    """The first of a name's addresses, provided that all of them are public.

    Raises:
        DataError: an address is not public, or there is none.
    """
    addresses = list(addresses)
    if not addresses:
        raise DataError("image_url: the host name does not resolve")
    for text in addresses:
        address = ipaddress.ip_address(text.partition("%")[0])
        mapped = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None) or address
        if not (address.is_global and mapped.is_global) or mapped.is_multicast or address in _NAT64:
            raise DataError("image_url: the host resolves to a private address")
    return addresses[0]


async def _resolve(name: str, port: int) -> list[str]:
    try:
        found = await asyncio.get_running_loop().getaddrinfo(name, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return [str(entry[4][0]) for entry in found]
