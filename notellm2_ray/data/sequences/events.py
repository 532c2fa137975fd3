"""From the event log to every user's history of liked notes.

Hashing brings a user's positive events together: those of a unit of reading go into one record batch for each part of
the users, and a part is a range of hashes. From then on users are in the order of (hash of the id, id), which depends
neither on the number of parts nor on the order of the events in the files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from notellm2_ray.core.schema import EVENT_SCHEMA, QUARANTINE_SCHEMA
from notellm2_ray.data.arrays import hash_strings, offsets_of
from notellm2_ray.data.event_log import RowGroup
from notellm2_ray.data.sequences.histories import Histories
from notellm2_ray.data.validate import UNKNOWN_NOTE

USER_KEY = "notellm2-a-user-"
_TIME = pa.timestamp("us", tz="UTC")

POSITIVE_EVENT_SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.string()),
        pa.field("note", pa.int32()),  # code: position in the ascending list of note ids
        pa.field("time", pa.int64()),  # microseconds
        pa.field("session_id", pa.string()),
    ]
)


def positive_events(
    unit: Sequence[RowGroup], vocabulary: pa.Array, actions: Sequence[str], partitions: int
) -> tuple[list[pa.RecordBatch], pa.Table, dict[str, int]]:
    """The positive events of a unit of reading.

    Args:
        vocabulary: all note ids, ascending.
        actions: the positive ones.

    Returns:
        POSITIVE_EVENT_SCHEMA batches, one for each part of the users; QUARANTINE_SCHEMA rows of positive events on
        unknown notes; and the number of events by action.
    """
    events = pa.concat_tables([_read(group, number) for number, group in enumerate(unit)])
    seen = {row["values"]: row["counts"] for row in pc.value_counts(events["action"]).to_pylist()}
    liked = events.filter(pc.is_in(events["action"], pa.array(list(actions), pa.string()))).combine_chunks()
    codes = pc.index_in(liked["note_id"], vocabulary).combine_chunks()
    unknown = liked.filter(pc.is_null(codes))
    known = liked.filter(pc.is_valid(codes)).combine_chunks()
    columns = [
        _flat(known["user_id"]),
        codes.drop_null(),
        _flat(known["timestamp"].cast(_TIME).cast(pa.int64())),
        _flat(known["session_id"]),
    ]
    rows = pa.record_batch(columns, schema=POSITIVE_EVENT_SCHEMA)
    part = part_of(columns[0], partitions)
    order = np.argsort(part, kind="stable")
    cuts = np.searchsorted(part[order], np.arange(partitions + 1))
    rows = rows.take(pa.array(order))
    batches = [rows.slice(cuts[p], cuts[p + 1] - cuts[p]) for p in range(partitions)]
    return batches, _quarantined(unknown, unit), seen


def part_of(users: pa.Array, partitions: int) -> np.ndarray:
    """(N,) int64, the part of each user: the range that the hash of the id is in."""
    if partitions == 1:
        return np.zeros(len(users), np.int64)
    encoded = users.dictionary_encode()
    high = hash_strings(encoded.dictionary, USER_KEY) >> np.uint64(32)
    part = (high * np.uint64(partitions) >> np.uint64(32)).astype(np.int64)
    return part[encoded.indices.to_numpy()]


def build_histories(batches: Iterable[pa.RecordBatch]) -> Histories:
    """The histories of one part of the users, from its batches of all units: each note at its first positive event."""
    table = pa.Table.from_batches(batches, schema=POSITIVE_EVENT_SCHEMA).combine_chunks()
    users = _flat(table["user_id"]).dictionary_encode()
    order_of_users = np.lexsort((_ranks(users.dictionary), hash_strings(users.dictionary, USER_KEY)))
    place = np.empty(len(order_of_users), np.int64)
    place[order_of_users] = np.arange(len(order_of_users))
    who, notes, times = place[users.indices.to_numpy()], table["note"].to_numpy(), table["time"].to_numpy()
    sessions = _flat(table["session_id"])

    # The session breaks the last ties, so that nothing depends on the order of rows in the files.
    order = np.lexsort((_ranks(sessions), times, notes, who))
    again = (who[order][1:] == who[order][:-1]) & (notes[order][1:] == notes[order][:-1])
    first = order[np.append(True, ~again)[: len(order)]]
    first = first[np.lexsort((notes[first], times[first], who[first]))]
    return Histories(
        users.dictionary.take(pa.array(order_of_users)),
        offsets_of(np.bincount(who[first], minlength=len(order_of_users))),
        notes[first],
        times[first],
        sessions.take(pa.array(first)),
    )


def _read(group: RowGroup, number: int) -> pa.Table:
    file = pq.ParquetFile(group.path)
    names = [name for name in EVENT_SCHEMA.names if name in file.schema_arrow.names]
    table = file.read_row_group(group.number, columns=names)
    if "session_id" not in names:
        table = table.append_column("session_id", pa.nulls(table.num_rows, pa.string()))
    table = table.select(EVENT_SCHEMA.names).cast(EVENT_SCHEMA)
    table = table.append_column("row", pa.array(np.arange(table.num_rows)))
    return table.append_column("group", pa.array(np.full(table.num_rows, number)))


def _quarantined(events: pa.Table, unit: Sequence[RowGroup]) -> pa.Table:
    groups = (unit[number] for number in events["group"].to_pylist())
    rows = [
        {
            "table": "events",
            "source": f"{group.path}: row group {group.number}, row {row}",
            "key": user,
            "reason": f"{UNKNOWN_NOTE}: {note!r} is not among the prepared notes",
        }
        for group, row, user, note in zip(
            groups, events["row"].to_pylist(), events["user_id"].to_pylist(), events["note_id"].to_pylist(), strict=True
        )
    ]
    return pa.Table.from_pylist(rows, schema=QUARANTINE_SCHEMA)


def _flat(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)


def _ranks(values: pa.Array) -> np.ndarray:
    """(N,) int64, the rank of each value among the distinct ones, from 1; 0 for null."""
    encoded = values.dictionary_encode()
    order = pc.sort_indices(encoded.dictionary).to_numpy()
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(1, len(order) + 1)
    codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    return np.append(rank, 0)[codes]
