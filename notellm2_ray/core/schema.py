"""The tables that stages exchange, and the note as the model sees it.

Ids are strings everywhere. A prepared note carries its image as encoded bytes, never as pixels, so that a block of
notes can be sent to any machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pyarrow as pa

from notellm2_ray.core.errors import DataError

NOTE_SCHEMA = pa.schema(
    [
        pa.field("note_id", pa.string(), nullable=False),
        pa.field("title", pa.string(), nullable=False),
        pa.field("topics", pa.list_(pa.string()), nullable=False),
        pa.field("content", pa.string(), nullable=False),
        pa.field("image", pa.binary()),  # encoded bytes; null for a note without image
        pa.field("created_at", pa.timestamp("us", tz="UTC")),  # null where the source does not say
    ]
)

EVENT_SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("note_id", pa.string(), nullable=False),
        pa.field("timestamp", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("action", pa.string(), nullable=False),  # "view", "click", or the platform's own words
        pa.field("session_id", pa.string()),
    ]
)

PAIR_SCHEMA = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("target_id", pa.string(), nullable=False),
        pa.field("score", pa.float64(), nullable=False),  # Eq. 2's s_{query -> target}
    ]
)

NEGATIVES = "negatives"  # a further column of pairs, list<string>: ids of notes that are not related to the query

QUARANTINE_SCHEMA = pa.schema(
    [
        pa.field("table", pa.string(), nullable=False),  # "notes" or "events"
        pa.field("source", pa.string(), nullable=False),  # file, and row where the reader knows it
        pa.field("key", pa.string()),  # the row's id, if it could be read
        pa.field("reason", pa.string(), nullable=False),
    ]
)


_TIME = pa.timestamp("us", tz="UTC")

# The recommender's tables. Rows of one user are ordered by time.
SEQUENCE_SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("note_ids", pa.list_(pa.string()), nullable=False),  # each once, at its first positive event
        pa.field("timestamps", pa.list_(_TIME), nullable=False),
        pa.field("session_ids", pa.list_(pa.string()), nullable=False),  # null where the source does not say
    ]
)

BLOCK_SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("block", pa.int32(), nullable=False),  # 0, 1, ... without gaps
        pa.field("note_ids", pa.list_(pa.string()), nullable=False),
    ]
)

EXAMPLE_SCHEMA = pa.schema(
    [
        pa.field("example_id", pa.string(), nullable=False),  # user_id/number of the target in the user's sequence
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("block", pa.int32(), nullable=False),  # the user's last block before the target; -1: no history
        pa.field("history_ids", pa.list_(pa.string()), nullable=False),  # all notes of blocks 0 to `block`
        pa.field("target_id", pa.string(), nullable=False),
        pa.field("timestamp", _TIME, nullable=False),  # of the target
    ]
)

CANDIDATE_SCHEMA = pa.schema(
    [
        pa.field("example_id", pa.string(), nullable=False),
        pa.field("note_id", pa.string(), nullable=False),
        pa.field("label", pa.int8(), nullable=False),  # 1: the target, 0: a negative; in seeded random order
    ]
)

SUMMARY_SCHEMA = pa.schema(
    [
        pa.field("note_id", pa.string(), nullable=False),
        pa.field("summary", pa.string(), nullable=False),
        pa.field("prompt_tokens", pa.int32(), nullable=False),
        pa.field("generated_tokens", pa.int32(), nullable=False),
    ]
)

PREFERENCE_SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("block", pa.int32(), nullable=False),  # the taste after this block
        pa.field("preference", pa.string(), nullable=False),
        pa.field("prompt_tokens", pa.int32(), nullable=False),
        pa.field("generated_tokens", pa.int32(), nullable=False),
    ]
)

SCORE_SCHEMA = pa.schema(
    [
        pa.field("example_id", pa.string(), nullable=False),
        pa.field("note_id", pa.string(), nullable=False),
        pa.field("label", pa.int8(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),  # P(yes) / (P(yes) + P(no)), or any number of a baseline
    ]
)


class Note(NamedTuple):
    """One note, as input of the model's preprocessing."""

    note_id: str
    title: str = ""
    topics: tuple[str, ...] = ()
    content: str = ""
    image: bytes | None = None  # encoded


def iter_notes(table: pa.Table | pa.RecordBatch) -> Iterator[Note]:
    """Rows of a prepared notes table as :class:`Note`; other columns are ignored."""
    columns = [table.column(name) for name in Note._fields]
    for note_id, title, topics, content, image in zip(*columns, strict=True):
        yield Note(note_id.as_py(), title.as_py(), tuple(topics.as_py() or ()), content.as_py(), image.as_py())


def require_columns(
    schema: pa.Schema, needed: pa.Schema, where: str, remedy: str = "run the stage that writes it again"
) -> None:
    """Check that ``schema`` has all columns of ``needed``.

    Raises:
        DataError: naming ``where``, the missing columns and the remedy.
    """
    missing = [name for name in needed.names if name not in schema.names]
    if missing:
        raise DataError(f"{where}: missing column(s) {', '.join(missing)}; it has {', '.join(schema.names)}: {remedy}")
