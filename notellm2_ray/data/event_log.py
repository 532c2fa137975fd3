"""Reading the event log: planned with the statistics of its Parquet files, and packed user by user.

A unit of reading is some row groups with about a million events together. It becomes one Arrow file with one record
batch for each part of the users, and in it one row per user. The hash of a user's id decides the part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.schema import EVENT_SCHEMA, require_columns
from notellm2_ray.data.pairs.cooccurrence import Log

UNIT_EVENTS = 1 << 20
VIEW, CLICK = 1, 2  # bits of the packed actions

PACKED_SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.string()),
        pa.field("notes", pa.list_(pa.int32())),  # codes
        pa.field("times", pa.list_(pa.int64())),  # microseconds
        pa.field("actions", pa.list_(pa.uint8())),  # VIEW | CLICK
    ]
)


class RowGroup(NamedTuple):
    """A row group of an events file, with what its statistics say."""

    path: str
    number: int
    rows: int
    first: int | None  # earliest timestamp in microseconds; None: the file keeps no statistics
    last: int | None


class UnitCounts(NamedTuple):
    """What a unit holds within the window."""

    events: int
    actions: dict[str, int]  # events by action
    unknown: int  # events on notes outside the vocabulary
    clicked_notes: np.ndarray  # (C,) codes, distinct
    click_counts: np.ndarray  # (C,) click events on each


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
    found = []
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
            found.append(RowGroup(str(path), index, group.num_rows, first, last))
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


def pack_unit(
    unit: Sequence[RowGroup],
    vocabulary: pa.Array,
    *,
    start: int,
    end: int,
    view_actions: Sequence[str],
    click_actions: Sequence[str],
    partitions: int,
) -> tuple[list[pa.RecordBatch], UnitCounts]:
    """A unit's events in [start, end) on the notes of ``vocabulary``: a batch for each part of the users."""
    users, notes, times, actions = _read_columns(unit)
    inside = (times >= start) & (times < end)
    by_action = np.bincount(actions.indices.to_numpy()[inside], minlength=len(actions.dictionary))
    names = actions.dictionary.to_pylist()
    bits = np.array([(n in view_actions) * VIEW | (n in click_actions) * CLICK for n in names], np.uint8)
    codes = pc.index_in(notes.dictionary, vocabulary).fill_null(-1).to_numpy(zero_copy_only=False)
    codes, flags = codes[notes.indices.to_numpy()], bits[actions.indices.to_numpy()]
    known = inside & (codes >= 0)
    clicked, click_counts = np.unique(codes[known & (flags & CLICK > 0)], return_counts=True)
    kept = np.flatnonzero(known & (flags > 0))
    batches = _pack(users, codes[kept], times[kept], flags[kept], users.indices.to_numpy()[kept], partitions)
    counts = UnitCounts(
        int(inside.sum()),
        {name: int(count) for name, count in zip(names, by_action, strict=True) if count},
        int(inside.sum() - known.sum()),
        clicked,
        click_counts,
    )
    return batches, counts


def unpack(batches: Iterator[pa.RecordBatch]) -> Log:
    """The packed events of one part of the users, from all units."""
    table = pa.Table.from_batches(batches, schema=PACKED_SCHEMA).combine_chunks()
    if not table.num_rows:
        empty = np.zeros(0, np.int64)
        return Log(empty, empty, empty, empty.astype(bool), empty.astype(bool))
    users, notes, times, actions = (column.chunk(0) for column in table.columns)
    users = users.dictionary_encode().indices.to_numpy()
    flags = actions.flatten().to_numpy()
    return Log(
        np.repeat(users, notes.value_lengths().to_numpy()).astype(np.int64),
        notes.flatten().to_numpy().astype(np.int64),
        times.flatten().to_numpy(),
        flags & VIEW > 0,
        flags & CLICK > 0,
    )


def hash_strings(values: pa.Array, key: str) -> np.ndarray:
    """(N,) uint64 keyed hashes (SipHash), the same in every process; ``key`` must have 16 characters."""
    from pandas.util import hash_array

    return hash_array(np.asarray(values.to_pylist(), dtype=object), hash_key=key, categorize=False)


def _read_columns(
    unit: Sequence[RowGroup],
) -> tuple[pa.DictionaryArray, pa.DictionaryArray, np.ndarray, pa.DictionaryArray]:
    names = ["user_id", "note_id", "timestamp", "action"]
    encoded = ["user_id", "note_id", "action"]
    tables = []
    for group in unit:
        file = pq.ParquetFile(group.path, read_dictionary=encoded)
        tables.append(file.read_row_group(group.number, columns=names).select(names))
    table = pa.concat_tables(tables).unify_dictionaries().combine_chunks()
    columns = dict(zip(names, (column.chunk(0) for column in table.columns), strict=True))
    times = columns["timestamp"].cast(pa.timestamp("us", tz="UTC")).cast(pa.int64()).to_numpy()
    return columns["user_id"], columns["note_id"], times, columns["action"]


def _pack(
    users: pa.DictionaryArray,
    notes: np.ndarray,
    times: np.ndarray,
    flags: np.ndarray,
    codes: np.ndarray,
    partitions: int,
) -> list[pa.RecordBatch]:
    num_users = len(users.dictionary)
    part = np.zeros(num_users, np.int64)
    if partitions > 1:
        part = (hash_strings(users.dictionary, "notellm2-a-user-") % np.uint64(partitions)).astype(np.int64)
    keys = part[codes] * num_users + codes
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    starts = np.flatnonzero(np.diff(keys, prepend=-1))
    offsets = pa.array(np.append(starts, len(keys)), pa.int32())
    columns = [notes.astype(np.int32), times, flags]
    lists = [pa.ListArray.from_arrays(offsets, pa.array(column[order])) for column in columns]
    who = keys[starts] % num_users if num_users else keys[starts]
    batch = pa.record_batch([users.dictionary.take(pa.array(who)), *lists], schema=PACKED_SCHEMA)
    cuts = np.searchsorted(keys[starts], np.arange(partitions + 1) * num_users)
    return [batch.slice(a, b - a) for a, b in pairwise(cuts)]


def _micros(value) -> int:
    from datetime import UTC, datetime, timedelta

    value = value if value.tzinfo else value.replace(tzinfo=UTC)
    return (value - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
