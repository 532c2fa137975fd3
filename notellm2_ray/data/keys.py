"""An order of the notes that depends neither on their names nor on the order of rows.

Many choices need some order of equal things: which of two related notes with the same score is kept, which notes are
held out, which negatives are drawn. A note's name must not decide them: names often follow time, so that a model would
gain from them, and the same log under other names would give other results. Here every note has a 64-bit key, and
notes are numbered in the order of their keys.

A key is a hash of what the note holds: title, topics, content, image and creation time. Notes that are alike in all of
it are told apart by the times of their events. Those that are alike in that too stand in the order of the table.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from notellm2_ray.core.schema import NOTE_SCHEMA, require_columns
from notellm2_ray.data.arrays import GOLDEN, hash_strings, mix
from notellm2_ray.data.event_log import parquet_files

NOTE_KEY_SCHEMA = pa.schema(
    [pa.field("note_id", pa.string(), nullable=False), pa.field("key", pa.uint64(), nullable=False)]
)
MANY_TIES = 0.05  # a larger share of ties is a warning: the order in them is not known
_FILE = "note_keys.parquet"
_CONTENT = ("title", "topics", "content", "image", "created_at")
_ID_KEY = "notellm2-a-note-"
_NOTES_AT_ONCE = 256  # so that few images are in memory
_EVENTS_AT_ONCE = 1 << 18
log = logging.getLogger("notellm2_ray")


def write_note_keys(prepared: Path) -> int:
    """Write the keys of the prepared notes beside them; the number of notes that only the table's order tells apart."""
    table, alike = _note_keys(prepared)
    pq.write_table(table, prepared / _FILE)
    return alike


def read_notes(prepared: Path) -> pa.Table:
    """All prepared notes in the order of their keys: note_id, created_at and key.

    Raises:
        DataError: there are no notes, or they lack a column.
    """
    notes = ds.dataset([str(path) for path in parquet_files(prepared / "notes")], format="parquet")
    require_columns(notes.schema, NOTE_SCHEMA, str(prepared / "notes"))
    path = prepared / _FILE  # missing where another program, or an older version of this one, wrote the notes
    keys = pq.read_table(path) if path.is_file() else _note_keys(prepared)[0]
    created = notes.to_table(columns=["note_id", "created_at"])
    rows = pc.index_in(keys["note_id"].combine_chunks(), created["note_id"].combine_chunks())
    return created.take(rows).append_column("key", keys["key"]).combine_chunks()


def report_ties(what: str, tied: int, total: int) -> None:
    """Log how many of ``total`` are tied: a warning above 5%."""
    share = tied / max(total, 1)
    level = logging.WARNING if share > MANY_TIES else logging.INFO
    log.log(level, "%s: %s of %s (%.1f%%)", what, f"{tied:,}", f"{total:,}", 100 * share)


def _note_keys(prepared: Path) -> tuple[pa.Table, int]:
    """NOTE_KEY_SCHEMA in the order of the keys, and the number of notes that only the table's order tells apart."""
    files = [str(path) for path in parquet_files(prepared / "notes")]
    columns = ["note_id", *_CONTENT]
    batches = ds.dataset(files, format="parquet").to_batches(
        columns=columns, batch_size=_NOTES_AT_ONCE, batch_readahead=1, fragment_readahead=1
    )
    ids, contents = [], []
    for batch in batches:
        ids.append(batch.column("note_id"))
        contents.append(_content_keys(batch))
    names = pa.chunked_array(ids, pa.string()).combine_chunks()
    keys = np.concatenate([np.empty(0, np.uint64), *contents])
    _, same, counts = np.unique(keys, return_inverse=True, return_counts=True)
    alike = counts[same] > 1
    if alike.any():
        keys[alike] = _with_times(keys[alike], names.filter(pa.array(alike)), parquet_files(prepared / "events"))
    order = np.argsort(keys, kind="stable")
    keys, again = keys[order], np.diff(keys[order], prepend=keys[:1] - np.uint64(1)) == 0
    number = np.arange(len(keys)) - np.maximum.accumulate(np.where(again, 0, np.arange(len(keys))))
    keys = np.where(again, mix(keys + GOLDEN * number.astype(np.uint64)), keys)
    last = np.argsort(keys, kind="stable")
    table = pa.table([names.take(pa.array(order[last])), pa.array(keys[last])], schema=NOTE_KEY_SCHEMA)
    return table, int(again.sum())


def _content_keys(notes: pa.RecordBatch) -> np.ndarray:
    """(N,) uint64, a hash of what each note holds."""
    columns = [notes.column(name).to_pylist() for name in _CONTENT[:-1]]
    columns.append(notes.column("created_at").cast(pa.timestamp("us", "UTC")).cast(pa.int64()).to_pylist())
    return np.array([_digest(values) for values in zip(*columns, strict=True)], np.uint64)


def _digest(values: Iterable[Any]) -> int:
    digest = blake2b(digest_size=8)
    for value in values:
        data = value if isinstance(value, bytes) else repr(value).encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return int.from_bytes(digest.digest(), "big")


def _with_times(keys: np.ndarray, names: pa.Array, events: Iterable[Path]) -> np.ndarray:
    """The keys of alike notes (N,), mixed with the least and the greatest hash of their events' times.

    An event that is there twice changes neither.
    """
    hashes = hash_strings(names, _ID_KEY)
    order = np.argsort(hashes)
    least, most = np.full(len(keys), np.iinfo(np.uint64).max), np.zeros(len(keys), np.uint64)
    files = ds.dataset([str(path) for path in events], format="parquet")
    for batch in files.to_batches(columns=["note_id", "timestamp"], batch_size=_EVENTS_AT_ONCE):
        encoded = batch.column("note_id").dictionary_encode()
        wanted = hash_strings(encoded.dictionary, _ID_KEY)
        place = order[np.minimum(np.searchsorted(hashes[order], wanted), len(order) - 1)]
        place = np.where(hashes[place] == wanted, place, -1)[encoded.indices.to_numpy()]
        times = mix(
            batch.column("timestamp").cast(pa.timestamp("us", "UTC")).cast(pa.int64()).to_numpy().view(np.uint64)
        )
        known = place >= 0
        np.minimum.at(least, place[known], times[known])
        np.maximum.at(most, place[known], times[known])
    return mix(keys ^ mix(least + GOLDEN * most))
