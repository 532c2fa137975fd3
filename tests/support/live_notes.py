"""Notes with small vectors for the tests of the live table."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from notellm2_ray.core.schema import NOTE_SCHEMA
from notellm2_ray.live.creation import create_table
from notellm2_ray.live.rows import LiveNote, live_schema

DIM = 8
MODEL = "model-1"


def unit(rows: int, seed: int = 0, dim: int = DIM) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(rows, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def note(note_id: str, value: int = 0, **fields) -> LiveNote:
    """A note whose title and vector say which version it is."""
    return LiveNote(note_id, unit(1, seed=value)[0], title=str(value), **fields)


def make_table(path, count: int = 20, model: str = MODEL, seed: int = 0, columns=("embedding",), **arguments) -> None:
    """A table of notes n0, n1, ... with title 0."""
    vectors = unit(count, seed=seed)
    flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), DIM)
    rows = {
        "note_id": pa.array([f"n{row}" for row in range(count)]),
        "title": pa.array(["0"] * count),
        "topics": pa.array([["food"] if row % 2 else ["art", "food"] for row in range(count)]),
        "content": pa.array([""] * count),
        "image": pa.array([b"image"] * count),
        "created_at": pa.array([None] * count, NOTE_SCHEMA.field("created_at").type),
    }
    batch = pa.RecordBatch.from_pydict(rows | dict.fromkeys(columns, flat))
    parts = [batch.slice(start, 7) for start in range(0, count, 7)]
    create_table(path, parts, live_schema(DIM, columns, model_fingerprint=model), **arguments)
