"""Rows of the live table as Arrow: notes with their vectors, and tombstones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.schema import NOTE_SCHEMA
from notellm2_ray.index.table import DIM_KEY, MODEL_KEY, embedding_columns
from notellm2_ray.index.vectors import check_unit
from notellm2_ray.live.columns import NO_TIME, NoteBatch

_TIME = pa.timestamp("us", tz="UTC")
FOLLOWED = ("note_id", "topics", "created_at", "seq", "deleted", "committed_at")  # what an index reads, and the vectors


class LiveNote(NamedTuple):
    """A note to be written, with its unit vectors by one model."""

    note_id: str
    embedding: np.ndarray  # (D,)
    title: str = ""
    topics: Sequence[str] = ()
    content: str = ""
    image: bytes | None = None  # encoded
    created_at: datetime | None = None  # with a time zone
    others: Mapping[str, np.ndarray | None] = {}  # further vector columns like embedding_image


class StoredNote(NamedTuple):
    """A note as read from the table."""

    note_id: str
    title: str
    topics: tuple[str, ...]
    content: str
    image: bytes | None
    created_at: datetime | None
    seq: int


class StoredCard(NamedTuple):
    """A note as a page shows it: whether it has an image, but not the image."""

    note_id: str
    title: str
    topics: tuple[str, ...]
    content: str
    has_image: bool
    created_at: datetime | None


def live_schema(dim: int, columns: Sequence[str] = ("embedding",), *, model_fingerprint: str) -> pa.Schema:
    """The live table's schema: the note's columns, ``columns`` of vectors, seq, deleted, committed_at."""
    fields = [pa.field(field.name, field.type) for field in NOTE_SCHEMA]
    fields += [pa.field(name, pa.list_(pa.float32(), dim)) for name in columns]  # null in a tombstone
    fields += [
        pa.field("seq", pa.int64()),  # number of the commit group that wrote the row
        pa.field("deleted", pa.bool_()),
        pa.field("committed_at", _TIME),  # when that group was written, by the writer's clock
    ]
    return pa.schema(fields, metadata={MODEL_KEY: model_fingerprint.encode(), DIM_KEY: str(dim).encode()})


def check_note(note: LiveNote, dim: int, columns: Sequence[str]) -> LiveNote:
    """The note with float32 vectors.

    Raises:
        DataError: the note has no id, a vector of another length or not of unit length, a vector for an unknown column,
            or a time without a zone.
    """
    if not isinstance(note.note_id, str) or not note.note_id:
        raise DataError(f"a note needs an id, a non-empty string; got {note.note_id!r}")
    if note.created_at is not None and note.created_at.tzinfo is None:
        raise DataError(f"note {note.note_id!r}: created_at {note.created_at} needs a time zone, like ...+00:00")
    unknown = set(note.others) - set(columns)
    if unknown:
        raise DataError(f"note {note.note_id!r}: the table has no column {', '.join(sorted(unknown))}")
    others = {
        name: _vector(note.note_id, name, vector, dim) for name, vector in note.others.items() if vector is not None
    }
    return note._replace(embedding=_vector(note.note_id, "embedding", note.embedding, dim), others=others)


def to_table(changes: Mapping[str, LiveNote | None], schema: pa.Schema, seq: int, committed_at: datetime) -> pa.Table:
    """Arrow rows of changes by note id: the note, or a tombstone for None."""
    dim = int(schema.metadata[DIM_KEY])
    notes = [note if note is not None else LiveNote(note_id, np.empty(0)) for note_id, note in changes.items()]
    gone = np.array([note is None for note in changes.values()])
    columns: dict[str, Any] = {
        name: pa.array([getattr(note, name) for note in notes], schema.field(name).type)
        for name in ("note_id", "title", "content", "image", "created_at")
    }
    columns["topics"] = pa.array([list(note.topics) for note in notes], schema.field("topics").type)
    for name in embedding_columns(schema):
        vectors = [note.embedding if name == "embedding" else note.others.get(name) for note in notes]
        columns[name] = _vectors(vectors, gone, dim)
    columns["seq"] = pa.array(np.full(len(notes), seq, dtype=np.int64))
    columns["deleted"] = pa.array(gone)
    columns["committed_at"] = pa.array([committed_at] * len(notes), _TIME)
    return pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)


def to_batch(table: pa.Table | pa.RecordBatch, columns: Sequence[str]) -> NoteBatch:
    """Rows of the table (:data:`FOLLOWED` and the vector ``columns``) as changes of a live index."""
    topics = [tuple(names or ()) for names in table.column("topics").to_pylist()]
    created = table.column("created_at").cast(pa.int64()).fill_null(NO_TIME)
    matrices = {name: _matrix(table.column(name)) for name in columns}
    return NoteBatch(
        table.column("note_id").to_pylist(),
        matrices.pop("embedding"),
        table.column("deleted").to_numpy(zero_copy_only=False)
        if isinstance(table, pa.RecordBatch)
        else table.column("deleted").to_numpy(),
        topics,
        created.to_numpy(),
        matrices,
    )


def to_notes(table: pa.Table) -> dict[str, StoredNote]:
    """Notes by id; tombstones are left out."""
    return {
        row["note_id"]: StoredNote(
            row["note_id"],
            row["title"],
            tuple(row["topics"]),
            row["content"],
            row["image"],
            row["created_at"],
            row["seq"],
        )
        for row in table.to_pylist()
        if not row["deleted"]
    }


def to_cards(table: pa.Table) -> dict[str, StoredCard]:
    """Cards by note id; tombstones are left out."""
    return {
        row["note_id"]: StoredCard(
            row["note_id"], row["title"], tuple(row["topics"]), row["content"], row["has_image"], row["created_at"]
        )
        for row in table.to_pylist()
        if not row["deleted"]
    }


def now() -> datetime:
    """The present time, by the writer's clock."""
    return datetime.now(UTC)


def _vector(note_id: str, column: str, vector: Any, dim: int) -> np.ndarray:
    vector = np.asarray(vector, dtype=np.float32)
    if vector.shape != (dim,):
        raise DataError(f"note {note_id!r}: {column} has the shape {vector.shape}; the table's vectors have ({dim},)")
    check_unit(vector[None], [note_id], column)
    return vector


def _vectors(vectors: Sequence[np.ndarray | None], gone: np.ndarray, dim: int) -> pa.FixedSizeListArray:
    matrix = np.zeros((len(vectors), dim), dtype=np.float32)
    missing = gone.copy()
    for row, vector in enumerate(vectors):
        if vector is None:
            missing[row] = True
        elif not gone[row]:
            matrix[row] = vector
    kind = pa.list_(pa.float32(), dim)
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.ravel()), type=kind, mask=pa.array(missing))


def _matrix(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """(N, D) float32, NaN for rows without a vector."""
    whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(whole, pa.ChunkedArray):  # pyarrow's result for a column without chunks
        return np.empty((0, column.type.list_size), dtype=np.float32)
    dim = whole.type.list_size
    matrix = np.full((len(whole), dim), np.nan, dtype=np.float32)
    valid = whole.is_valid().to_numpy(zero_copy_only=False)
    matrix[valid] = whole.drop_null().flatten().to_numpy(zero_copy_only=False).reshape(-1, dim)
    return matrix
