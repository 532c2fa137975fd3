"""Sections of a report, and how they are written: as ``index.html`` and as ``report.md``."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.run import write_atomically
from notellm2_ray.evaluate.plots import THEMES
from notellm2_ray.evaluate.tables import Table, escape_markdown

THUMBNAIL_SIDE = 144
JPEG_QUALITY = 74


@dataclass(frozen=True)
class Section:
    """A section of a report. A report with more in its sections has a subclass and a template for it."""

    title: str
    text: str = ""
    tables: Sequence[Table] = ()
    folded: Sequence[tuple[str, Table]] = ()  # title and table, shown on a click
    plots: Sequence[Path] = ()  # light PNGs; the dark ones lie beside them
    listing: str = ""

    @property
    def anchor(self) -> str:
        return self.title.lower().replace(" ", "-")

    @property
    def empty(self) -> bool:
        """Whether it has nothing to show and is left out."""
        return not (self.tables or self.plots or self.listing)

    def markdown(self) -> list[str]:
        """Its paragraphs in Markdown."""
        lines = [f"## {self.title}", *([self.text] if self.text else [])]
        lines += [table.markdown() for table in self.tables]
        lines += [f"![{path.stem.replace('_', ' ')}]({path.name})" for path in self.plots]
        for name, table in self.folded:
            lines += [f"### {name}", table.markdown()]
        lines += self.more_markdown()
        return lines + (["\n".join(f"    {line}" for line in self.listing.splitlines())] if self.listing else [])

    def more_markdown(self) -> list[str]:
        """Paragraphs for what a subclass adds; they stand before the listing."""
        return []


def write_pages(output: Path, page: str, title: str, lead: str, sections: Sequence[Section]) -> None:
    """Write ``index.html`` and ``report.md``, leaving out empty sections.

    Args:
        output: an existing directory, which the plots lie in.
        page: Jinja template, assembled from :mod:`notellm2_ray.evaluate.templates`.
        title: heading of both.
        lead: text below the heading, or empty.
    """
    shown = [section for section in sections if not section.empty]
    write_atomically(output / "index.html", _render(page, title, lead, shown))
    lines = [f"# {title}", *([escape_markdown(lead)] if lead else [])]
    lines += [line for section in shown for line in section.markdown()]
    write_atomically(output / "report.md", "\n\n".join(lines) + "\n")


def _render(page: str, title: str, lead: str, sections: Sequence[Section]) -> str:
    """The page with every value escaped; plots become pictures inside it."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    parts = [
        {**vars(section), "anchor": section.anchor, "plots": list(map(_plot, section.plots))} for section in sections
    ]
    return environment.from_string(page).render(title=title, lead=lead, sections=parts)


def _plot(path: Path) -> dict[str, str]:
    dark = path.with_name(f"{path.stem}{THEMES[1].suffix}.png")
    light_uri, dark_uri = (_data_uri(file.read_bytes(), "image/png") for file in (path, dark))
    return {"light": light_uri, "dark": dark_uri, "alt": path.stem.replace("_", " ")}


def thumbnail(image: bytes | None) -> tuple[str, str]:
    """An image as a small JPEG ``data:`` URI and "", or "" and the reason why there is none."""
    from notellm2_ray.core.images import decode_image

    if image is None:
        return "", "no image"
    try:
        small = decode_image(image, min_side=THUMBNAIL_SIDE)
    except DataError as error:
        return "", f"image unreadable: {error}"
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    buffer = io.BytesIO()
    small.convert("RGB").save(buffer, "JPEG", quality=JPEG_QUALITY)
    return _data_uri(buffer.getvalue(), "image/jpeg"), ""


def with_thumbnail(note: Mapping[str, Any]) -> dict[str, Any]:
    """A note with ``thumbnail`` and ``why_blank`` (see :func:`thumbnail`) in place of its ``image``."""
    uri, why = thumbnail(note["image"])
    return {**{key: value for key, value in note.items() if key != "image"}, "thumbnail": uri, "why_blank": why}


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
