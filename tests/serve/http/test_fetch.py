"""Fetching images by URL: only listed hosts and public addresses, also after redirects, within bounds."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.settings.serve import FetchSettings
from notellm2_ray.serve.http.fetch import ImageFetcher, check_addresses, check_url

SETTINGS = FetchSettings(hosts=("img.example.org", "*.cdn.example"), redirects=1, seconds=1)
PUBLIC = "93.184.216.34"


def fetch(url, answer, addresses=None, settings=SETTINGS, max_bytes=1000):
    """The result, and the requests made."""
    seen = []

    async def resolve(name, port):
        return (addresses or {}).get(name, [PUBLIC])

    async def reply(request):
        seen.append(request)
        result = answer(request)
        return await result if asyncio.iscoroutine(result) else result

    fetcher = ImageFetcher(settings, max_bytes, resolve, httpx.MockTransport(reply))
    return asyncio.run(fetcher.fetch(url)), seen


def test_the_connection_goes_to_the_address_that_was_checked():
    data, seen = fetch(
        "https://img.example.org/a.png?x=1", lambda _: httpx.Response(200, stream=httpx.ByteStream(b"image"))
    )
    assert data == b"image"
    assert seen[0].url.host == PUBLIC and seen[0].headers["host"] == "img.example.org"
    assert seen[0].extensions["sni_hostname"] == "img.example.org" and seen[0].url.query == b"x=1"


@pytest.mark.parametrize(
    "url",
    [
        "http://img.example.org/a.png",
        "https://other.example/a.png",
        "https://img.example.org.evil.example/a",
        "https://cdn.example/a",
        "https://evilcdn.example/a",
        "https://user:pass@img.example.org/a",
        "https://img.example.org:99999/a",
        "file:///etc/passwd",
        "https://[::1]/a",
        "https://img.example.org\\@evil.example/a",
        "https://img.example.org/a b",
        "gopher://img.example.org/",
        "",
    ],
)
def test_other_schemes_and_hosts_are_not_fetched(url):
    with pytest.raises(DataError, match="image_url"):
        fetch(url, lambda _: pytest.fail("it was asked"))


def test_a_wildcard_covers_subdomains():
    assert check_url("https://a.b.cdn.example/x", SETTINGS).hostname == "a.b.cdn.example"


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.0.0.1", "169.254.169.254", "::1", "fd00::1", "::ffff:127.0.0.1", "0.0.0.0", "224.0.0.1",
     "64:ff9b::7f00:1", "64:ff9b::808:808", "100.64.0.1", "fe80::1%eth0", "2002:7f00:1::", "192.168.0.1"],
)  # fmt: skip
def test_private_addresses_are_refused_even_beside_a_public_one(address):
    with pytest.raises(DataError, match="private"):
        check_addresses([PUBLIC, address])
    with pytest.raises(DataError):
        fetch("https://img.example.org/", lambda _: pytest.fail("it was asked"), {"img.example.org": [address]})


def test_redirects_are_checked_like_the_first_address():
    def to(location):
        return lambda request: httpx.Response(302, headers={"location": location})

    for location in ("https://evil.example/", "http://img.example.org/", "//169.254.169.254/", "file:///etc/passwd"):
        with pytest.raises(DataError):
            fetch("https://img.example.org/", to(location))
    with pytest.raises(DataError, match="redirects"):
        fetch("https://img.example.org/", to("/again"))
    with pytest.raises(DataError, match="private"):
        fetch("https://img.example.org/", to("https://x.cdn.example/"), {"x.cdn.example": ["10.0.0.1"]})


def test_size_and_time_are_bounded():
    with pytest.raises(DataError, match="more than"):
        fetch("https://img.example.org/", lambda _: httpx.Response(200, stream=httpx.ByteStream(b"a" * 1001)))

    async def slow(_=None):
        await asyncio.sleep(5)

    with pytest.raises(DataError, match="no answer"):
        fetch("https://img.example.org/", slow, settings=SETTINGS.model_copy(update={"seconds": 0.1}))
    with pytest.raises(DataError, match="404"):
        fetch("https://img.example.org/", lambda _: httpx.Response(404, content=b"inside"))
    with pytest.raises(DataError, match="resolve"):
        check_addresses([])


@pytest.mark.parametrize(
    "location", ["https://[", "https://img.example.org:x/", "//[::1", "https://img.example.org/\x01"]
)
def test_a_redirect_to_an_invalid_url_is_refused(location):
    with pytest.raises(DataError, match="image_url"):
        fetch("https://img.example.org/", lambda _: httpx.Response(302, headers={"location": location}))


def test_an_address_that_the_client_cannot_take_is_refused():
    with pytest.raises(DataError, match="image_url"):
        fetch("https://img.example.org/" + "a" * 70_000, lambda _: httpx.Response(404))
