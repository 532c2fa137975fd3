"""A short summary of prepared tables, which tells a person whether they were read as they are meant."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.image_formats import content_type
from notellm2_ray.core.images import decode_image
from notellm2_ray.core.prompts import Slot, shown_texts
from notellm2_ray.core.schema import Note, iter_notes
from notellm2_ray.core.scripts import script_of
from notellm2_ray.core.settings.model import ModelSettings

_SAMPLES = 3
_TEXTS = ("title", "topics", "content")
_ENOUGH = 300  # characters that tell a text's script


class Reading(NamedTuple):
    """What a pass over the texts of the prepared notes finds."""

    notes: int
    missing: Counter[str]  # part -> notes without it
    scripts: Counter[str]  # script -> notes
    long_topics: int  # topics that the prompt leaves out for their length
    notes_with_long_topics: int
    created: tuple[datetime, datetime] | None  # first and last


def read_texts(notes: Path, model: ModelSettings) -> Reading:
    """Go over all prepared notes, without their images."""
    missing: Counter[str] = Counter()
    scripts: Counter[str] = Counter()
    count = long = with_long = 0
    times: list[datetime] = []
    for table in _tables(notes, [*_TEXTS, "created_at"]):
        count += table.num_rows
        for title, topics, content in zip(*(table[name].to_pylist() for name in _TEXTS), strict=True):
            for name, value in zip(_TEXTS, (title.strip(), topics, content.strip()), strict=True):
                missing[name] += not value
            scripts[script_of(f"{title[:_ENOUGH]} {' '.join(topics)[:_ENOUGH]} {content[:_ENOUGH]}")] += 1
            too_long = sum(len(topic) > model.max_topic_length for topic in topics)
            long += too_long
            with_long += too_long > 0
        missing["created_at"] += table["created_at"].null_count
        times += _span(table["created_at"])
    created = (min(times), max(times)) if times else None
    return Reading(count, missing, scripts, long, with_long, created)


def describe(prepared: Path, counts: Mapping[str, Any], reading: Reading, model: ModelSettings) -> str:
    """The summary as some twenty lines of text.

    Args:
        prepared: the finished output directory.
        counts: of :func:`notellm2_ray.data.prepare.prepare`.
        model: the settings that say how much of a note the embedder reads.
    """
    invented = counts.get("times") == "invented"  # the source knows only the order of events
    events = "in order, without times" if invented else _between(_event_times(prepared / "events"))
    bad = counts["quarantined_notes"] + counts["quarantined_events"]
    lines = [
        f"{counts['notes']:,} notes, {counts['events']:,} events of {counts['users']:,} users, "
        f"{bad:,} rows in quarantine{_reasons(counts['reasons'])}",
        f"notes without: {_shares(reading, counts)}",
        f"languages by script: {_listed(reading.scripts, reading.notes)}",
        f"notes created: {_between(reading.created)}; events: {events}",
    ]
    if reading.long_topics:
        lines.append(
            f"{reading.long_topics:,} topics of {reading.notes_with_long_topics:,} notes have more than "
            f"model.max_topic_length={model.max_topic_length} characters, so the embedder does not read them"
        )
    lines.append(f"{min(_SAMPLES, reading.notes)} notes as the embedder reads them:")
    for number, (note, created) in enumerate(_samples(prepared / "notes", reading.notes), start=1):
        lines += _shown(number, note, created, model)
    return "\n".join(lines)


def _tables(directory: Path, columns: list[str]) -> Iterator[pa.Table]:
    for path in sorted(directory.glob("*.parquet")):
        file = pq.ParquetFile(path)
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, columns=columns)


def _span(times: pa.ChunkedArray) -> list[datetime]:
    """First and last of some times; nothing if there are none."""
    ends = pc.min_max(times).as_py()
    return [] if ends["min"] is None else [ends["min"], ends["max"]]


def _event_times(events: Path) -> tuple[datetime, datetime] | None:
    times = [time for table in _tables(events, ["timestamp"]) for time in _span(table["timestamp"])]
    return (min(times), max(times)) if times else None


def _reasons(reasons: Mapping[str, int]) -> str:
    shown = [f"{count:,} x {reason}" for reason, count in list(reasons.items())[:5]]
    return f" ({'; '.join(shown)}{'; ...' if len(reasons) > 5 else ''})" if shown else ""


def _shares(reading: Reading, counts: Mapping[str, Any]) -> str:
    missing = {**reading.missing, "image": reading.notes - counts["notes_with_image"]}
    notes = max(1, reading.notes)
    return ", ".join(f"{name} {missing[name] / notes:.1%}" for name in (*_TEXTS, "image", "created_at"))


def _listed(found: Counter[str], notes: int) -> str:
    return ", ".join(f"{name} {count / max(1, notes):.1%}" for name, count in found.most_common(6))


def _between(times: tuple[datetime, datetime] | None) -> str:
    if times is None:
        return "not known"
    first, last = times
    days = (last - first).total_seconds() / 86_400
    return f"{first:%Y-%m-%d %H:%M} to {last:%Y-%m-%d %H:%M} UTC ({days:,.1f} days)"


def _samples(notes: Path, count: int) -> Iterator[tuple[Note, datetime | None]]:
    """The first, the middle and the last note."""
    wanted = sorted({0, count // 2, count - 1})[:_SAMPLES] if count else []
    start = 0
    for path in sorted(notes.glob("*.parquet")):
        file = pq.ParquetFile(path)
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            for row in (row - start for row in wanted if start <= row < start + rows):
                table = file.read_row_group(group).slice(row, 1)
                yield next(iter_notes(table)), table["created_at"][0].as_py()
            start += rows


def _shown(number: int, note: Note, created: datetime | None, model: ModelSettings) -> list[str]:
    texts = shown_texts(note, model)
    time = f", created {created:%Y-%m-%d %H:%M} UTC" if created else ""
    lines = [f"  {number}. {_printable(note.note_id)}: {_picture(note.image)}{time}"]
    return lines + [f"     {slot.value}: {_printable(texts[slot])}" for slot in (Slot.TITLE, Slot.TOPICS, Slot.CONTENT)]


def _picture(image: bytes | None) -> str:
    if image is None:
        return "no image"
    try:
        width, height = decode_image(image).size
    except DataError as error:
        return f"unreadable image ({error})"
    return f"image {width} x {height} ({content_type(image)})"


def _printable(text: str) -> str:
    """A text with control characters and marks of direction escaped, so that a terminal shows it as it is."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
