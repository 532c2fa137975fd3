"""What the tests of the report's pages share: hostile text, pictures, and a check of the HTML."""

from __future__ import annotations

import io
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)> | `x` [a](http://evil.example) {{ 7*7 }}"


def picture(mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (300, 200), "red").save(buffer, "PNG")
    return buffer.getvalue()


class Tags(HTMLParser):
    """Every tag and attribute of a page, and the tags that were never closed."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_page(path: Path, allowed: tuple[str, ...]) -> str:
    """The page's HTML, after a check that it has no script and only references that begin with what is allowed."""
    html = path.read_text(encoding="utf-8")
    page = Tags()
    page.feed(html.replace("<br>", ""))
    assert not page.open
    assert not {"script", "b", "iframe", "link", "object"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    for name, value in page.attributes:
        if name in ("src", "srcset", "href"):
            assert value.startswith(allowed), value
    assert "prefers-color-scheme: dark" in html
    return html
