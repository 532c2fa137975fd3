"""The first live table, made of the bulk jobs' outputs: prepared notes and the embedding table."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.schema import NOTE_SCHEMA, require_columns
from notellm2_ray.index.table import read_vectors, table_info
from notellm2_ray.live.creation import create_table
from notellm2_ray.live.rows import live_schema

log = logging.getLogger(__name__)

_ROWS_PER_BATCH = 1024


class Seeded(NamedTuple):
    """Counts of a new table."""

    notes: int
    without_vector: int  # prepared notes that the bulk job quarantined or did not embed
    without_note: int  # vectors without a prepared note
    model_fingerprint: str


def seed_from_bulk(notes: str | Path, embeddings: str | Path, path: str | Path, *, seq: int = 0) -> Seeded:
    """Build a live table from prepared notes and their bulk embeddings.

    Notes and their images are streamed; the vectors are held in memory, as they are in every replica's index.

    Args:
        notes: Parquet file or directory, of ``NOTE_SCHEMA``.
        embeddings: Lance table of embed-notes, with any of its vector columns.
        path: of the new live table.
        seq: number of the commit group that its rows belong to.

    Raises:
        DataError: no note has a vector, a note appears twice, or a source is missing.
        OutputError: there is a live table already.
    """
    info = table_info(embeddings)
    vectors = {column: read_vectors(embeddings, column) for column in info.columns}
    row_of = {note_id: row for row, note_id in enumerate(vectors[info.columns[0]][0])}
    matrices = {column: matrix for column, (_, matrix) in vectors.items()}
    source = pads.dataset(str(notes), format="parquet")
    require_columns(source.schema, NOTE_SCHEMA, str(notes))
    schema = live_schema(info.embedding_dim, info.columns, model_fingerprint=info.model_fingerprint)
    counts = {"read": 0}
    written = create_table(path, _joined(source, row_of, matrices, counts), schema, seq=seq)
    if not written:
        raise DataError(f"no note of {notes} has a vector in {embeddings}: were they embedded from other notes?")
    seeded = Seeded(written, counts["read"] - written, len(row_of) - written, info.model_fingerprint)
    log.info("%s: seeded with %d note(s); %d without a vector were left out", path, seeded.notes, seeded.without_vector)
    return seeded


def _joined(
    source: Any, row_of: dict[str, int], matrices: dict[str, np.ndarray], counts: dict[str, int]
) -> Iterator[pa.RecordBatch]:
    """Notes with their vectors; notes without one are left out."""
    for batch in source.to_batches(columns=NOTE_SCHEMA.names, batch_size=_ROWS_PER_BATCH, batch_readahead=2):
        counts["read"] += batch.num_rows
        rows = [row_of.get(note_id, -1) for note_id in batch.column("note_id").to_pylist()]
        found = np.array(rows, dtype=np.int64)
        kept = np.flatnonzero(found >= 0)
        if not len(kept):
            continue
        notes = batch.take(pa.array(kept))
        columns = {name: notes.column(name) for name in NOTE_SCHEMA.names}
        for name, matrix in matrices.items():
            flat = pa.array(matrix[found[kept]].ravel(), pa.float32())
            columns[name] = pa.FixedSizeListArray.from_arrays(flat, matrix.shape[1])
        yield pa.RecordBatch.from_pydict(columns)
