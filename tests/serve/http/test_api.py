"""Routes of a gateway replica, called in this process: headers for browsers, and ids that look like paths."""

from __future__ import annotations

import asyncio

import httpx
import numpy as np
import pytest

from notellm2_ray.core.images import decode_image
from notellm2_ray.core.settings.serve import LimitSettings, ServeSettings
from notellm2_ray.live.rows import StoredCard, StoredNote
from notellm2_ray.serve.figures import Figures
from notellm2_ray.serve.http.api import build_api
from notellm2_ray.serve.http.checks import Images
from tests.support.encoded_pictures import LOSSLESS

PICTURE = b"\x89PNG of "


class Gateway:
    """A stand-in that can read notes; every note has a picture that names it."""

    def __init__(self, *note_ids):
        self.held, self.figures, self.keys = set(note_ids), Figures("test"), None
        self.settings, self.limits = ServeSettings(), LimitSettings()
        self.images = Images(self.limits)

    async def cards(self, note_ids):
        return {one: StoredCard(one, "", (), "", True, None) for one in note_ids if one in self.held}

    async def notes(self, note_ids):
        stored = {one: StoredNote(one, "", (), "", PICTURE + one.encode(), None, 0) for one in self.held}
        return [stored.get(one) for one in note_ids]


def ask(gateway, method, path, **arguments):
    async def run():
        transport = httpx.ASGITransport(build_api(gateway))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.request(method, path, **arguments)

    return asyncio.run(run())


@pytest.mark.parametrize("path", ["/", "/ui/index.html", "/ui/main.js"])
def test_the_page_forbids_frames_and_foreign_scripts_at_each_of_its_addresses(path):
    answer = ask(Gateway(), "GET", path)
    assert answer.status_code == 200
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    assert (answer.headers["x-frame-options"], answer.headers["x-content-type-options"]) == ("DENY", "nosniff")


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_bodies_that_a_foreign_page_can_send_without_preflight_are_refused(kind):
    headers = {} if kind is None else {"content-type": kind}
    answer = ask(Gateway("n1"), "POST", "/v1/notes/delete", content=b'{"note_ids": ["n1"]}', headers=headers)
    assert answer.status_code == 422 and answer.json()["error"]["type"] == "invalid_request"


@pytest.mark.parametrize(
    ("held", "path", "found"),
    [
        (["a", "a/image"], "/v1/notes/a", "a"),
        (["a", "a/image"], "/v1/notes/a/image", PICTURE + b"a"),
        (["a", "a/image"], "/v1/notes/a%2Fimage", "a/image"),
        (["a", "a/image"], "/v1/notes/a%2fimage/image", PICTURE + b"a/image"),
        (["a/image"], "/v1/notes/a/image", "a/image"),
        (["a"], "/v1/notes/a%2Fimage", None),
        (["b"], "/v1/notes/a/image", None),
        (["b/c"], "/v1/notes/b/c", "b/c"),
    ],
)
def test_a_note_whose_id_ends_in_slash_image_can_be_read(held, path, found):
    answer = ask(Gateway(*held), "GET", path)
    if found is None:
        assert answer.status_code == 404 and answer.json()["error"]["type"] == "not_found"
    elif isinstance(found, bytes):
        assert answer.content == found and answer.headers["content-type"] == "image/png"
    else:
        assert answer.json()["note_id"] == found and answer.json()["has_image"]


@pytest.mark.parametrize("stored", ["TIFF turned 6", "RGBA TIFF", "PNG"])
def test_browsers_get_a_picture_that_they_show(stored):
    kind, shown = asyncio.run(Images(LimitSettings()).for_browser(LOSSLESS[stored]))[::-1]
    assert kind == ("image/png" if stored == "PNG" else "image/jpeg")
    difference = np.abs(np.asarray(decode_image(shown), int) - np.asarray(decode_image(LOSSLESS["PNG"]), int))
    assert difference.mean() < 3
