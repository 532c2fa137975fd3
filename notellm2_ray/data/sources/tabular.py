"""A platform's own tables as a source: Parquet, JSON lines or CSV, with a map of column names."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator

from notellm2_ray.core.config import Frozen
from notellm2_ray.core.errors import DataError
from notellm2_ray.core.settings.sources import Source, SourceSettings, Version
from notellm2_ray.core.times import Unit
from notellm2_ray.data.columns import json_times, topic_lists
from notellm2_ray.data.pictures import PICTURE, json_pictures
from notellm2_ray.data.rows import raw_events, raw_notes
from notellm2_ray.data.sources import SourceTables
from notellm2_ray.data.sources.files import TableFile, dataset, list_files, table_version
from notellm2_ray.data.sources.formats import Converters, column_names, read_batches

NOTE_BATCH = 512  # small, because a Parquet file may hold the images themselves
EVENT_BATCH = 50_000

_NOTE_COLUMNS = ("note_id", "title", "topics", "content", "image", "created_at")
_EVENT_COLUMNS = ("user_id", "note_id", "timestamp", "action", "session_id")
_ENCODED = ("title", "topics", "content", "image")


class ColumnMap(Frozen):
    """Names of a table's columns; the defaults are ours. An optional column that is missing is read as empty."""

    note_id: str = "note_id"
    title: str = "title"
    topics: str = "topics"
    content: str = "content"
    image: str = "image"
    created_at: str = "created_at"
    user_id: str = "user_id"
    timestamp: str = "timestamp"
    action: str = "action"
    session_id: str = "session_id"


class TabularSettings(SourceSettings):
    """Your own tables: Parquet, JSONL or CSV files of notes and of events."""

    kind: Literal["tabular"]
    notes: str = Field(description="file, directory or glob of the notes table")
    events: str = Field(description="file, directory or glob of the events table")
    format: Literal["auto", "parquet", "jsonl", "csv"] = Field("auto", description="auto goes by the file's ending")
    columns: ColumnMap = Field(ColumnMap(), description="our column name to yours")
    image_root: Path | None = Field(
        None, description="folder that relative image paths start from; null: the folder of the notes file"
    )
    topic_separator: str | None = Field(
        None,
        description="splits topics that are given as one string; null: the first of | ; , and their like that the "
        "string holds; a list written as JSON or Python is always read as a list",
    )
    time_unit: Unit = Field(
        "auto",
        description="unit of numeric times: s, ms, us or ns since 1970, or date (YYYYMMDD); auto: told by their size",
    )
    time_zone: str | None = Field(
        None, description="zone of dates and of times without one, as in Asia/Shanghai; null: UTC"
    )
    default_action: str = Field("click", description="action of events in a table without an action column")

    @field_validator("time_zone")
    @classmethod
    def _known_zone(cls, value: str | None) -> str | None:
        try:
            return None if value is None else ZoneInfo(value).key
        except (ZoneInfoNotFoundError, ValueError, OSError):
            raise ValueError(f"there is no time zone {value!r}: give one as in Asia/Shanghai or UTC") from None


def tabular_tables(settings: TabularSettings, seed: int = 0) -> SourceTables:
    """The notes and the events of two tables.

    Raises:
        DataError: no file matches, a file cannot be read, or a column is missing that is required or was named.
    """
    if settings.image_root is not None:  # absolute: Ray's workers may run in another directory
        settings = settings.model_copy(update={"image_root": Path(os.path.abspath(settings.image_root))})
    notes = list_files(settings.notes, settings.format, "source.notes")
    events = list_files(settings.events, settings.format, "source.events")
    for file in notes:
        _check_columns(file, settings.columns, _NOTE_COLUMNS, required=("note_id",), any_of=_ENCODED)
    for file in events:
        _check_columns(file, settings.columns, _EVENT_COLUMNS, required=("user_id", "note_id", "timestamp"))
    return SourceTables(
        notes=dataset(notes, partial(_read_notes, settings)), events=dataset(events, partial(_read_events, settings))
    )


def _check_columns(
    file: TableFile, columns: ColumnMap, ours: Sequence[str], required: Sequence[str], any_of: Sequence[str] = ()
) -> None:
    present = column_names(file)
    if not present and file.format == "jsonl":
        return  # no line is an object: each is reported with its row, and an empty file as an empty pool
    shown = ", ".join(present) or "none"
    for name in ours:
        theirs = getattr(columns, name)
        # A column that was named in the settings is required: otherwise its setting would be ignored.
        if theirs not in present and (name in required or theirs != name):
            raise DataError(
                f"{file.path}: missing column {theirs!r}; its columns are {shown}. "
                f"Set source.columns.{name} to the one that holds the {name}"
            )
    if any_of and not any(getattr(columns, name) in present for name in any_of):
        raise DataError(
            f"{file.path}: has none of the columns {', '.join(any_of)}, so its notes have neither text nor image; its "
            f"columns are {shown}. Set source.columns.title (or .content, .topics, .image) to the one that holds it"
        )


def _read_notes(settings: TabularSettings, file: TableFile) -> Iterator[pa.Table]:
    names = settings.columns
    topics = partial(topic_lists, separator=settings.topic_separator)
    wanted = [getattr(names, name) for name in _NOTE_COLUMNS]
    converters: Converters = {names.topics: topics, names.created_at: json_times, names.image: json_pictures}
    for raw in read_batches(file, wanted, NOTE_BATCH, converters):
        rows = raw_notes(
            _renamed(raw, names, _NOTE_COLUMNS),
            unit=settings.time_unit,
            zone=settings.time_zone,
            separator=settings.topic_separator,
        )
        image = _absolute(rows["image"], settings.image_root or Path(file.path).parent)
        yield rows.set_column(rows.column_names.index("image"), "image", image)


def _read_events(settings: TabularSettings, file: TableFile) -> Iterator[pa.Table]:
    names = settings.columns
    wanted = [getattr(names, name) for name in _EVENT_COLUMNS]
    has_action = names.action in column_names(file)
    for raw in read_batches(file, wanted, EVENT_BATCH, {names.timestamp: json_times}):
        rows = raw_events(_renamed(raw, names, _EVENT_COLUMNS), unit=settings.time_unit, zone=settings.time_zone)
        if not has_action:
            action = rows["action"].fill_null(settings.default_action)
            rows = rows.set_column(rows.column_names.index("action"), "action", action)
        yield rows


def _renamed(raw: pa.Table, names: ColumnMap, ours: Sequence[str]) -> pa.Table:
    columns = {name: raw.column(getattr(names, name)) for name in ours if getattr(names, name) in raw.column_names}
    return pa.table({**columns, "_source": raw["_source"], "_error": raw["_error"]})


def _absolute(pictures: pa.ChunkedArray, root: Path) -> pa.Array:
    """Pictures with relative paths made absolute from ``root``; URIs and blanks stay as they are."""
    pictures = pictures.combine_chunks()
    base = os.path.abspath(root)
    paths = [
        value if not value or not value.strip() or "://" in value or value.startswith(("file:", "data:"))
        else os.path.join(base, value)
        for value in pc.struct_field(pictures, "path").to_pylist()
    ]  # fmt: skip
    fields = [pc.struct_field(pictures, "bytes"), pa.array(paths, pa.string())]
    return pa.StructArray.from_arrays(fields, fields=list(PICTURE), mask=pictures.is_null())


def tabular_versions(settings: TabularSettings) -> dict[str, Version]:
    """The files of both tables."""
    return {
        "source.notes": table_version(settings.notes, settings.format, "source.notes"),
        "source.events": table_version(settings.events, settings.format, "source.events"),
    }


SOURCE = Source(settings=TabularSettings, read=tabular_tables, versions=tabular_versions)
