"""The event log as units of reading, planned with the statistics of its Parquet files.

A unit is some row groups with about a million events together.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.schema import EVENT_SCHEMA, require_columns

UNIT_EVENTS = 1 << 20


class RowGroup(NamedTuple):
    """A row group of an events file, with what its statistics say."""

    path: str
    number: int
    rows: int
    first: int | None  # earliest timestamp in microseconds; None: the file keeps no statistics
    last: int | None
    before: int = 0  # rows of the log before this group


def parquet_files(directory: Path) -> list[Path]:
    """The files of a prepared table, in the order of their names.

    Raises:
        DataError: there are none.
    """
    files = sorted(directory.glob("*.parquet"))
    if not files:
        raise DataError(f"{directory} holds no Parquet file: run prepare first")
    return files


def list_row_groups(files: Sequence[Path]) -> list[RowGroup]:
    """Every row group of the events files.

    Raises:
        DataError: a file is unreadable or lacks a column.
    """
    found: list[RowGroup] = []
    before = 0
    for path in files:
        try:
            metadata = pq.read_metadata(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{path} cannot be read as Parquet ({error}): run prepare again") from error
        schema = metadata.schema.to_arrow_schema()
        require_columns(schema, pa.schema([f for f in EVENT_SCHEMA if f.name != "session_id"]), str(path))
        column = metadata.schema.names.index("timestamp")
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            statistics = group.column(column).statistics
            known = statistics is not None and statistics.has_min_max
            first, last = (_micros(statistics.min), _micros(statistics.max)) if known else (None, None)
            found.append(RowGroup(str(path), index, group.num_rows, first, last, before))
            before += group.num_rows
    return [group for group in found if group.rows]


def log_span(groups: Sequence[RowGroup]) -> tuple[int, int]:
    """The times of the first and the last event, in microseconds since 1970.

    Raises:
        DataError: there are no events.
    """
    if not groups:
        raise DataError("the prepared events table is empty: pairs are mined from views and clicks, give an event log")
    ends: list[int] = []
    for group in groups:
        if group.first is not None and group.last is not None:
            ends += [group.first, group.last]
        else:
            times = pq.ParquetFile(group.path).read_row_group(group.number, columns=["timestamp"]).column(0)
            ends += [_micros(value.as_py()) for value in pc.min_max(times).values()]
    return min(ends), max(ends)


def plan_units(groups: Sequence[RowGroup], start: int, end: int) -> list[list[RowGroup]]:
    """Units of reading for the events in [start, end); row groups entirely outside are left out."""
    units: list[list[RowGroup]] = []
    rows = UNIT_EVENTS
    for group in groups:
        if group.first is not None and group.last is not None and (group.last < start or group.first >= end):
            continue
        if rows + group.rows > UNIT_EVENTS:
            units.append([])
            rows = 0
        units[-1].append(group)
        rows += group.rows
    return units


def _micros(value) -> int:
    from datetime import UTC, datetime, timedelta

    value = value if value.tzinfo else value.replace(tzinfo=UTC)
    return (value - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
