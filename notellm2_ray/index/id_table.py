"""Semantic ids of all notes of an embedding table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from notellm2_ray.core.settings.retrieval import IdSettings
from notellm2_ray.index.semantic_ids import SemanticIds, content_keys, tell_apart
from notellm2_ray.index.table import iter_vectors, table_info, take_vectors

CODES_FILE = "codes.parquet"
ID_SCHEMA = pa.schema(
    [
        pa.field("note_id", pa.string(), nullable=False),
        pa.field("codes", pa.list_(pa.int32()), nullable=False),  # one a level, then the digit that tells notes apart
    ]
)


def write_ids(table: str | Path, output: Path, settings: IdSettings, seed: int) -> dict[str, Any]:
    """Learn codebooks on a sample of a table, and write the codes of all its notes.

    The table is read in batches, so memory holds the sample, and some 30 bytes and the id of each note. Codebooks and
    codes depend on the vectors alone, not on the notes' names or order; only notes with the same vector, whose codes
    are the same, have their last digits in the order of the table.

    Args:
        output: gets :data:`CODES_FILE` (:data:`ID_SCHEMA`) and the codebooks of :class:`SemanticIds`.

    Returns:
        notes, levels, codebook_size; ``collision_rate``: 1 - different codes / notes, without the last digit;
        ``largest_group``: most notes with the same codes; by level, ``reconstruction_error``: mean squared distance of
        a note's (unit) vector to what its codes so far stand for, and ``codes_used``.

    Raises:
        DataError: there is no table, or it has fewer notes than a codebook has centroids.
    """
    keys = np.concatenate([content_keys(vectors) for _, vectors in iter_vectors(table)])
    sample = np.argsort(keys, kind="stable")[: settings.train_notes]  # keys are random, so it is a random sample
    ids = SemanticIds.fit(
        take_vectors(table, sample),
        settings.levels,
        settings.codebook_size,
        iterations=settings.iterations,
        seed=seed,
        model_fingerprint=table_info(table).model_fingerprint,
    )
    names, codes, errors = [], np.empty((len(keys), ids.levels), np.int32), np.zeros(ids.levels)
    row = 0
    for note_ids, vectors in iter_vectors(table):
        rows = slice(row, row := row + len(vectors))
        codes[rows], squared = ids.encode_with_errors(vectors)
        errors += squared.sum(axis=0, dtype=np.float64)
        names.append(note_ids)
    ids.save(output)
    digits = tell_apart(codes, keys)
    written = np.column_stack([codes, digits]) if settings.tell_apart else codes
    _write(output / CODES_FILE, pa.chunked_array(names), written)
    return {
        "notes": len(codes),
        "levels": ids.levels,
        "codebook_size": ids.codebook_size,
        "collision_rate": float((digits > 0).mean()),
        "largest_group": int(digits.max()) + 1,
        "reconstruction_error": (errors / len(codes)).tolist(),
        "codes_used": [len(np.unique(codes[:, level])) for level in range(ids.levels)],
    }


def _write(path: Path, names: pa.ChunkedArray, codes: np.ndarray) -> None:
    ends = np.arange(0, codes.size + 1, codes.shape[1], dtype=np.int32)
    lists = pa.ListArray.from_arrays(pa.array(ends), pa.array(codes.ravel()))
    pq.write_table(pa.table([names, pa.chunked_array([lists])], schema=ID_SCHEMA), path)
