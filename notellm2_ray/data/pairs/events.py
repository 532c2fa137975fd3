"""Views and clicks of a unit of reading, packed user by user.

A unit becomes one Arrow file with one record batch for each part of the users, and in it one row per user. The hash of
a user's id decides the part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from notellm2_ray.data.arrays import hash_strings
from notellm2_ray.data.event_log import RowGroup
from notellm2_ray.data.pairs.cooccurrence import Log

VIEW, CLICK = 1, 2  # bits of the packed actions

PACKED_SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.string()),
        pa.field("notes", pa.list_(pa.int32())),  # codes
        pa.field("times", pa.list_(pa.int64())),  # microseconds
        pa.field("actions", pa.list_(pa.uint8())),  # VIEW | CLICK
    ]
)


class UnitCounts(NamedTuple):
    """What a unit holds within the window."""

    events: int
    actions: dict[str, int]  # events by action
    unknown: int  # events on notes outside the vocabulary


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
    kept = np.flatnonzero(known & (flags > 0))
    batches = _pack(users, codes[kept], times[kept], flags[kept], users.indices.to_numpy()[kept], partitions)
    counts = UnitCounts(
        int(inside.sum()),
        {name: int(count) for name, count in zip(names, by_action, strict=True) if count},
        int(inside.sum() - known.sum()),
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
