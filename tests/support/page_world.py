"""Material for the page's tests: users with preferences, hostile notes, and a browser tab that records problems."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq

from notellm2_ray.core.schema import BLOCK_SCHEMA, PREFERENCE_SCHEMA, SEQUENCE_SCHEMA
from tests.support import tiny_models
from tests.support.serving import START, World

FLAGS = [
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
ATTACK = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
LONG = "Donaudampfschifffahrtsgesellschaftskapitän" * 12
TASTE = "The user appears to have a preference for red cats. <b>Bold</b> houses, too."
HISTORY = {"reader": 7, "waiting": 3, "newcomer": 1, 'odd/"id"?&#': 2}  # notes of each user


class Scorer:
    """A ranker's engine that prefers earlier candidates."""

    async def score(self, preference: str | None, titles: Sequence[str], candidates: Sequence[Any]) -> list[float]:
        return [0.9 / (1 + row) for row, _ in enumerate(candidates)]


def save_users(base: Path, world: World) -> dict[str, Path]:
    """Sequences, blocks and preferences as the bulk jobs write them; arguments of ``World.spec``."""
    sequences, blocks, preferences = [], [], []
    for number, (user, length) in enumerate(HISTORY.items()):
        ids = [note.note_id for note in world.notes[number * 8 : number * 8 + length]]
        times = [START + timedelta(hours=row) for row in range(length)]
        sequences.append({"user_id": user, "note_ids": ids, "timestamps": times, "session_ids": [None] * length})
        for block in range(length // 3 if user == "reader" else 0):
            blocks.append({"user_id": user, "block": block, "note_ids": ids[3 * block : 3 * block + 3]})
            text = f"{TASTE} Block {block + 1}."
            row = {"user_id": user, "block": block, "preference": text, "prompt_tokens": 1, "generated_tokens": 1}
            preferences.append(row)
    (base / "sequences").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(sequences, SEQUENCE_SCHEMA), base / "sequences" / "sequences.parquet")
    pq.write_table(pa.Table.from_pylist(blocks, BLOCK_SCHEMA), base / "sequences" / "blocks.parquet")
    pq.write_table(pa.Table.from_pylist(preferences, PREFERENCE_SCHEMA), base / "preferences.parquet")
    return {"spec_sequences": base / "sequences", "spec_preferences": base}


def add_hostile_notes(http: httpx.Client) -> None:
    """Notes that a hostile user may write: markup, endless words, another writing direction, an odd id."""
    picture = base64.b64encode(tiny_models.picture(3)).decode()
    notes = [
        {"note_id": "attack", "title": ATTACK, "content": ATTACK, "topics": [ATTACK[:60], "red"], "image": picture},
        {"note_id": "long", "title": LONG, "content": LONG, "topics": [LONG[:150]], "image": picture},
        {"note_id": "rtl", "title": "\u202eقطة حمراء\u202e cat", "image": picture},
        {"note_id": 'a/b?c#d&e="f"', "title": "an odd id cat", "image": picture},
        {"note_id": "untitled", "title": "", "content": "no title and no picture"},
    ]
    done = http.put("/v1/notes", json={"notes": notes}).json()
    assert done["upserted"] == len(notes), done


def find_chromium() -> str | None:
    """This machine's Chromium."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def wait_until(page: Any, condition: str) -> None:
    """Wait until a JavaScript function returns true.

    Playwright's own ``wait_for_function`` polls inside the page, which the content security policy forbids.
    """
    for _ in range(200):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"never true: {condition}")


class Tab:
    """A page that records its requests and its errors.

    Attributes:
        page: Playwright's.
        requests: addresses of all requests.
        complaints: errors and warnings of the console, and exceptions.
        failures_expected: whether the console may say that a resource failed to load.
    """

    def __init__(self, context: Any, address: str) -> None:
        self.context, self.address = context, address
        self.page = context.new_page()
        self.page.set_default_timeout(20_000)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.failures_expected = False
        context.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda said: said.type in ("error", "warning") and self.complaints.append(said.text))

    def open(self, address: str = "", key: str | None = None) -> Any:
        """Load the page at an address after #, with a key stored in the tab."""
        if key is not None:
            self.page.add_init_script(
                f"if (!sessionStorage.getItem('notellm2-key')) sessionStorage.setItem('notellm2-key', '{key}')"
            )
        self.page.goto(f"{self.address}/{address}")
        self.settled()
        return self.page

    def settled(self) -> None:
        """Wait until no view is loading; the page notices a changed address only a moment later."""
        self.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        self.page.wait_for_selector("main[aria-busy=false] h1", state="attached")

    def check(self) -> None:
        """Assert that no request went to another host and that the console shows no error."""
        foreign = [one for one in self.requests if not one.startswith((self.address, f"blob:{self.address}"))]
        assert foreign == []
        allowed = "Failed to load resource" if self.failures_expected else "\0"
        assert [one for one in self.complaints if allowed not in one] == []

    def wide_elements(self) -> list[str]:
        """Elements that reach beyond the right edge of the window, except inside scrolling parts."""
        return self.page.evaluate(
            """() => [...document.querySelectorAll("body *")].filter((one) =>
                 one.getBoundingClientRect().right > document.documentElement.clientWidth + 1 &&
                 !one.closest(".history, .strip, .skip, .unseen")).map((one) => one.outerHTML.slice(0, 200))"""
        )
