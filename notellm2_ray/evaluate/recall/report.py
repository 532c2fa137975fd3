"""The report of an evaluation: ``index.html`` (one file, pictures inside), ``report.md`` and the plots as PNG."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.run import write_atomically
from notellm2_ray.evaluate.recall import plots, tables
from notellm2_ray.evaluate.recall.page import PAGE
from notellm2_ray.evaluate.recall.tables import Table, escape_markdown

TITLE = "Recall report"
THUMBNAIL_SIDE = 144
JPEG_QUALITY = 74


@dataclass(frozen=True)
class Section:
    """A part of the report."""

    title: str
    text: str = ""
    tables: Sequence[Table] = ()
    folded: Sequence[tuple[str, Table]] = ()  # shown on a click
    plots: Sequence[Path] = ()
    samples: Sequence[tuple[str, list[dict[str, Any]]]] = ()  # method, its samples
    listing: str = ""

    @property
    def anchor(self) -> str:
        return self.title.lower().replace(" ", "-")

    @property
    def empty(self) -> bool:
        return not (self.tables or self.plots or self.samples or self.listing)


def write_report(
    output: Path,
    *,
    results: Mapping[str, Any],
    statistics: Mapping[str, Any],
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
    samples: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    index_info: Mapping[str, Any],
) -> None:
    """Write ``index.html``, ``report.md`` and the plots into an existing directory.

    All text of notes and settings is escaped; the page has no script and fetches nothing.

    Args:
        output: the directory.
        results: of :func:`notellm2_ray.evaluate.recall.results.evaluate`.
        statistics: Table 1: part ("train", "test") to its figures.
        histories: run name to its logged training steps, each with ``step``, ``loss`` and, now and then, a validation
            recall; empty where nothing was trained.
        samples: of :func:`notellm2_ray.evaluate.recall.samples.sample_neighbors`, one method after another.
        settings: the resolved settings.
        index_info: ``AnnIndex.info``, or several by name.
    """
    output = Path(output)
    sections = [
        _recall(results),
        _curves(results, output),
        _inputs(results),
        _significance(results),
        Section("Dataset", tables=[tables.statistics_table(statistics)] if statistics else []),
        _training(histories, output),
        Section("Index", tables=[tables.statistics_table(index_info)] if index_info else []),
        _neighbors(samples),
        Section("Settings", listing=yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)),
    ]
    sections = [section for section in sections if not section.empty]
    lead = f"{results['pairs']['all']:,} test pairs over a pool of {results['pool_notes']:,} notes."
    write_atomically(output / "index.html", render(PAGE, TITLE, lead, sections))
    write_atomically(output / "report.md", _markdown(sections, lead))


def thumbnail(image: bytes | None) -> tuple[str, str]:
    """An image as a small JPEG ``data:`` URI, or ``""`` and why there is none."""
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


def _recall(results: Mapping[str, Any]) -> Section:
    folded = [("Mean reciprocal rank, times 100", tables.mrr_table(results))]
    if any(results["pairs"][name] for name in tables.LONG_STRATA):
        folded.insert(0, ("Long notes", tables.recall_table(results, tables.LONG_STRATA)))
    return Section("Recall", tables=[tables.recall_table(results)], folded=folded)


def _inputs(results: Mapping[str, Any]) -> Section:
    table = tables.recall_table(results, inputs=True)
    text = "Each embedder tested with both modalities, with the image alone and with the text alone."
    return Section("Recall by input", text, [table] if table.rows else [])


def _curves(results: Mapping[str, Any], output: Path) -> Section:
    drawn = [plots.recall_curves(results, output, stratum) for stratum in ("all", "short_query")]
    return Section("Recall curves", "Baselines are dashed.", plots=[path for path in drawn if path])


def _training(histories: Mapping[str, Sequence[Mapping[str, Any]]], output: Path) -> Section:
    drawn = [plots.history_curves(histories, output, figure) for figure in ("loss", "recall")]
    return Section("Training", plots=[path for path in drawn if path])


def _significance(results: Mapping[str, Any]) -> Section:
    roles = ("best baseline", "reference")
    by_role = {role: tables.significance_table(results, role, ("all", "short_query")) for role in roles}
    shown = [table for table in by_role.values() if table.rows]
    if not shown:
        return Section("Significance")
    more = {f"Against the {role}, all strata": role for role, table in by_role.items() if table.rows}
    everything = [
        (name, tables.significance_table(results, role, tuple(results["pairs"]))) for name, role in more.items()
    ]
    return Section("Significance", tables=shown, folded=everything)


def _neighbors(samples: Sequence[Mapping[str, Any]]) -> Section:
    drawn = [
        {
            "method": sample["method"],
            "query": _with_thumbnail(sample["query"]),
            "neighbors": [_with_thumbnail(note) for note in sample["neighbors"]],
        }
        for sample in samples
    ]
    by_method = [(method, list(group)) for method, group in groupby(drawn, key=lambda sample: sample["method"])]
    text = "The query comes first, then its nearest notes with rank and cosine; a true target is marked wherever it is."
    return Section("Neighbours", text, samples=by_method)


def _with_thumbnail(note: Mapping[str, Any]) -> dict[str, Any]:
    uri, why = thumbnail(note["image"])
    return {**{key: value for key, value in note.items() if key != "image"}, "thumbnail": uri, "why_blank": why}


def render(page: str, title: str, lead: str, sections: Sequence[Section]) -> str:
    """A page of the report with every value escaped; plots become pictures inside it."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    parts = [
        {**vars(section), "anchor": section.anchor, "plots": list(map(_plot, section.plots))} for section in sections
    ]
    return environment.from_string(page).render(title=title, lead=lead, sections=parts)


def _plot(path: Path) -> dict[str, str]:
    dark = path.with_name(f"{path.stem}{plots.THEMES[1].suffix}.png")
    light_uri, dark_uri = (_data_uri(file.read_bytes(), "image/png") for file in (path, dark))
    return {"light": light_uri, "dark": dark_uri, "alt": path.stem.replace("_", " ")}


def _markdown(sections: Sequence[Section], lead: str) -> str:
    lines = [f"# {TITLE}", lead]
    for section in sections:
        lines += section_markdown(section)
        for method, samples in section.samples:
            lines.append(f"### {escape_markdown(method)}")
            lines += [_sample_markdown(sample) for sample in samples]
        lines += listing_markdown(section)
    return "\n\n".join(lines) + "\n"


def section_markdown(section: Section) -> list[str]:
    """Title, text, tables and plots of a section as Markdown paragraphs."""
    lines = [f"## {section.title}", *([section.text] if section.text else [])]
    lines += [table.markdown() for table in section.tables]
    lines += [f"![{path.stem.replace('_', ' ')}]({path.name})" for path in section.plots]
    for name, table in section.folded:
        lines += [f"### {name}", table.markdown()]
    return lines


def listing_markdown(section: Section) -> list[str]:
    """The listing of a section as an indented block, if it has one."""
    return ["\n".join(f"    {line}" for line in section.listing.splitlines())] if section.listing else []


def _sample_markdown(sample: Mapping[str, Any]) -> str:
    query = sample["query"]
    lines = [f"**{escape_markdown(query['title'])}** ({escape_markdown(query['note_id'])})", ""]
    for note in sample["neighbors"]:
        mark = " **← target**" if note["is_target"] else ""
        lines.append(f"- {note['rank']}: {escape_markdown(note['title'])} ({note['score']:.3f}){mark}")
    return "\n".join(lines)


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
