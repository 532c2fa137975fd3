"""From the event log to every user's history of liked notes.

Hashing brings a user's positive events together: those of a unit of reading go into one record batch for each part of
the users, and a part is a range of hashes of the ids. Then every user gets a key, and users are in the order of their
keys from then on. A key is a hash of the first notes that the user liked and when. It depends neither on the user's id,
nor on the order of the events in the files, nor on later events.

Where a user liked several notes at one time, the order of rows decides if the table is a log, with each user's rows in
order of time (or newest first). Where it is not, that order may be of the notes' names, as in MovieLens, and a hash of
the two keys decides: the order of such events is not known.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from notellm2_ray.core.schema import EVENT_SCHEMA, QUARANTINE_SCHEMA
from notellm2_ray.data.arrays import GOLDEN, hash_strings, mix, offsets_of
from notellm2_ray.data.event_log import RowGroup
from notellm2_ray.data.sequences.histories import Histories
from notellm2_ray.data.validate import UNKNOWN_NOTE

USER_KEY = "notellm2-a-user-"
_TIME = pa.timestamp("us", tz="UTC")

POSITIVE_EVENT_SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.string()),
        pa.field("note", pa.int32()),  # code: position in the list of notes
        pa.field("time", pa.int64()),  # microseconds
        pa.field("session_id", pa.string()),
        pa.field("row", pa.int64()),  # in the log
    ]
)
GROUPED_SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.string()),
        pa.field("key", pa.uint64()),
        pa.field("notes", pa.list_(pa.int32())),  # each once
        pa.field("times", pa.list_(pa.int64())),
        pa.field("sessions", pa.list_(pa.string())),
        pa.field("rows", pa.list_(pa.int64())),
    ]
)
_KEY_EVENTS = 5  # of each user, the first: a user with more keeps the key, and so the side, while the log grows
_IN_ORDER = 0.99  # of neighbouring rows of a user: the others are events that were logged late


def positive_events(
    unit: Sequence[RowGroup], vocabulary: pa.Array, actions: Sequence[str], partitions: int
) -> tuple[list[pa.RecordBatch], pa.Table, dict[str, int]]:
    """The positive events of a unit of reading.

    Args:
        vocabulary: all note ids.
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
        _flat(known["log_row"]),
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
    return _range_of(hash_strings(encoded.dictionary, USER_KEY), partitions)[encoded.indices.to_numpy()]


def _range_of(hashes: np.ndarray, partitions: int) -> np.ndarray:
    return ((hashes >> np.uint64(32)) * np.uint64(partitions) >> np.uint64(32)).astype(np.int64)


def group_events(
    batches: Iterable[pa.RecordBatch], note_keys: np.ndarray, partitions: int
) -> tuple[list[pa.RecordBatch], np.ndarray]:
    """The events of one part of the users, user by user, each note at its first positive event.

    Args:
        batches: the part's POSITIVE_EVENT_SCHEMA batches of all units.
        note_keys: (number of notes,) uint64.

    Returns:
        GROUPED_SCHEMA batches, one for each range of user keys; and (2,) int64, how often a user's next row is later,
        and how often it is earlier.
    """
    table = pa.Table.from_batches(batches, schema=POSITIVE_EVENT_SCHEMA).combine_chunks()
    users = _flat(table["user_id"]).dictionary_encode()
    who, notes = users.indices.to_numpy(), table["note"].to_numpy()
    times, rows, sessions = table["time"].to_numpy(), table["row"].to_numpy(), _flat(table["session_id"])
    # Of events on one note at one time, the first that names a session.
    order = np.lexsort((rows, sessions.is_null().to_numpy(zero_copy_only=False), times, notes, who))
    first = order[_starts(who[order], notes[order])]
    first = first[np.lexsort((note_keys[notes[first]], times[first], who[first]))]
    lengths = np.bincount(who[first], minlength=len(users.dictionary))
    keys = _user_keys(lengths, times[first], note_keys[notes[first]], _KEY_EVENTS)
    by_row = first[np.lexsort((rows[first], who[first]))]
    steps = np.sign(np.diff(times[by_row]))[who[by_row][1:] == who[by_row][:-1]]
    offsets = pa.array(offsets_of(lengths), pa.int32())
    kept = table.select(["note", "time", "session_id", "row"]).take(pa.array(first))
    lists = [pa.ListArray.from_arrays(offsets, _flat(column)) for column in kept.columns]
    grouped = pa.record_batch([users.dictionary, pa.array(keys), *lists], schema=GROUPED_SCHEMA)
    ranges = _range_of(keys, partitions)
    batches = [grouped.filter(pa.array(ranges == number)) for number in range(partitions)]
    return batches, np.array([(steps > 0).sum(), (steps < 0).sum()])


def log_direction(steps: np.ndarray) -> int:
    """1 if each user's rows are in order of time, -1 if the newest are first, 0 if their order says nothing.

    Args:
        steps: (2,) the sum of what :func:`group_events` counts.
    """
    later, earlier = (share >= _IN_ORDER * max(steps.sum(), 1) for share in steps)
    return 1 if later else -1 if earlier else 0


def build_histories(batches: Iterable[pa.RecordBatch], note_keys: np.ndarray, direction: int) -> Histories:
    """The histories of the users in a range of keys.

    Args:
        batches: GROUPED_SCHEMA, of all parts.
        direction: see :func:`log_direction`.
    """
    table = pa.Table.from_batches(batches, schema=GROUPED_SCHEMA).combine_chunks()
    notes, times, sessions, rows = (_flat(table[name]) for name in ("notes", "times", "sessions", "rows"))
    lengths = notes.value_lengths().to_numpy()
    notes, times, rows = (column.flatten().to_numpy() for column in (notes, times, rows))
    users, keys = _flat(table["user_id"]), table["key"].to_numpy()
    keys, order = _told_apart(keys, lengths, times, note_keys[notes], rows)
    place = np.argsort(order)
    owners = np.repeat(np.arange(len(lengths)), lengths)
    ties = rows * direction if direction else mix(note_keys[notes] ^ mix(keys[owners]))
    events = np.lexsort((rows, ties, times, place[owners]))
    return Histories(
        users.take(pa.array(order)),
        keys[order],
        offsets_of(lengths[order]),
        notes[events],
        times[events],
        sessions.flatten().take(pa.array(events)),
    )


def _user_keys(lengths: np.ndarray, times: np.ndarray, note_keys: np.ndarray, most: int | None) -> np.ndarray:
    """(U,) uint64, a hash of the first ``most`` events of each user, which are sorted by user, time and note key."""
    owners = np.repeat(np.arange(len(lengths)), lengths)
    number = np.arange(len(times)) - np.repeat(offsets_of(lengths)[:-1], lengths)
    early = number < (len(times) if most is None else most)
    keys = np.zeros(len(lengths), np.uint64)
    events = mix(mix(times.view(np.uint64)) ^ (note_keys + GOLDEN * number.astype(np.uint64)))
    np.add.at(keys, owners[early], events[early])
    return mix(keys)


def _told_apart(
    keys: np.ndarray, lengths: np.ndarray, times: np.ndarray, note_keys: np.ndarray, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(U,) keys of which no two are equal, and (U,) the users in order.

    Users whose first events are alike are told apart by all of their events, and those who are alike in everything by
    the order of rows: which of them is which makes no difference but for their ids.
    """
    _, same, counts = np.unique(keys, return_inverse=True, return_counts=True)
    alike = counts[same] > 1
    whole = np.where(alike, mix(keys ^ _user_keys(lengths, times, note_keys, None)), keys)
    earliest = np.minimum.reduceat(rows, offsets_of(lengths)[:-1]) if len(rows) else rows
    order = np.lexsort((earliest, whole, keys))
    starts = np.flatnonzero(_starts(whole[order]))
    number = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
    apart = np.empty_like(whole)
    apart[order] = np.where(number > 0, mix(whole[order] + GOLDEN * number.astype(np.uint64)), whole[order])
    return apart, order


def _starts(*columns: np.ndarray) -> np.ndarray:
    """(E,) bool: whether a row differs from the one before in any column."""
    changed = np.ones(len(columns[0]), bool)
    changed[1:] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    return changed


def _read(group: RowGroup, number: int) -> pa.Table:
    file = pq.ParquetFile(group.path)
    names = [name for name in EVENT_SCHEMA.names if name in file.schema_arrow.names]
    table = file.read_row_group(group.number, columns=names)
    if "session_id" not in names:
        table = table.append_column("session_id", pa.nulls(table.num_rows, pa.string()))
    table = table.select(EVENT_SCHEMA.names).cast(EVENT_SCHEMA)
    table = table.append_column("row", pa.array(np.arange(table.num_rows)))
    table = table.append_column("log_row", pa.array(np.arange(table.num_rows) + group.before))
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
