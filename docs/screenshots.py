"""Takes the README's pictures of the page from a running service, small enough for a repository.

    notellm2 serve --preset demo &
    python docs/screenshots.py --url http://127.0.0.1:8000 --query pruner

Needs Chromium and Playwright (the extra "dev").
"""

from __future__ import annotations

import argparse
import io
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
MOST_BYTES = 150_000
FLAGS = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip


class Shot(NamedTuple):
    """One picture: its name, the page's address after #, the window, and light or dark."""

    name: str
    address: str
    width: int = 1200
    height: int = 820
    scheme: str = "light"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--url", default="http://127.0.0.1:8000", help="of the service")
    options.add_argument("--out", type=Path, default=HERE / "images", help="folder of the pictures")
    options.add_argument("--key", default="", help="API key, where the service needs one")
    options.add_argument("--query", default="pruner", help="words to search for")
    options.add_argument("--user", help="whom to show; none: one of the service's sample, with the longest history")
    given = options.parse_args()
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        sys.exit("no Chromium here: apt-get install chromium")
    import httpx
    from playwright.sync_api import sync_playwright

    given.out.mkdir(parents=True, exist_ok=True)
    headers = {"authorization": f"Bearer {given.key}"} if given.key else {}
    with httpx.Client(base_url=given.url, headers=headers, timeout=30, trust_env=False) as http:
        shots = choose(http, given.query, given.user)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        for shot in shots:
            image = shrink(take(browser, shot, given.url, given.key))
            (given.out / f"{shot.name}.png").write_bytes(image)
            print(f"{given.out / shot.name}.png: {len(image):,} bytes")
        browser.close()


def choose(http: Any, query: str, user: str | None) -> list[Shot]:
    """The pictures, of things that this service has."""
    found = http.post("/v1/notes/search", json={"text": query, "limit": 20}).raise_for_status().json()["notes"]
    if not found:
        sys.exit(f"the service knows no note for {query!r}: give another --query")
    note = next((one for one in found if one["has_image"]), found[0])
    users = [user] if user else http.get("/v1/users", params={"limit": 100}).raise_for_status().json()["users"]
    lengths = {one: len(http.get(f"/v1/users/{one}").raise_for_status().json()["blocks"]) for one in users[:30]}
    shots = [
        Shot("search", f"#/search?q={query}"),
        Shot("neighbours", f"#/note?id={note['note_id']}"),
        Shot("dark", f"#/note?id={note['note_id']}", scheme="dark"),
        Shot("phone", f"#/note?id={note['note_id']}&k=10", 360, 1100),
    ]
    if lengths:
        shots.append(Shot("user", f"#/user?id={max(lengths, key=lambda one: lengths[one])}", height=1000))
    return shots


def take(browser: Any, shot: Shot, url: str, key: str) -> bytes:
    """A PNG of the page when its pictures are there."""
    context = browser.new_context(viewport={"width": shot.width, "height": shot.height}, color_scheme=shot.scheme)
    page = context.new_page()
    page.add_init_script(f"sessionStorage.setItem('notellm2-key', '{key}')")
    page.goto(f"{url}/{shot.address}")
    page.wait_for_selector("main[aria-busy=false] h1", state="attached")
    page.wait_for_load_state("networkidle")
    image = page.screenshot()
    context.close()
    return image


def shrink(image: bytes) -> bytes:
    """The picture in as many colours as fit into ``MOST_BYTES``."""
    from PIL import Image

    picture = Image.open(io.BytesIO(image)).convert("RGB")
    for colours in (256, 128, 64, 32):
        file = io.BytesIO()
        picture.quantize(colours, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
        if file.tell() <= MOST_BYTES:
            break
    return file.getvalue()


if __name__ == "__main__":
    main()
