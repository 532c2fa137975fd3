"""A small workspace of recall, as its stages would leave it before any embedder: test pairs and notes."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from notellm2_ray.core import schema
from tests.support.ranking_workspace import save
from tests.support.tiny_models import save_llm

NOTES = [f"n{at}" for at in range(40)]
TARGETS = NOTES[30:]


def write(home: Path) -> Path:
    """The workspace, and the LLM whose tokens tell short notes from long ones; targets have the longest titles."""
    notes = [
        {"note_id": note, "title": "cat " * (9 if note in TARGETS else 1), "topics": [], "content": "",
         "created_at": None, "image": None}
        for note in NOTES
    ]  # fmt: skip
    save(home / "prepared" / "notes" / "part.parquet", notes, schema.NOTE_SCHEMA)
    pairs = [{"query_id": NOTES[at], "target_id": TARGETS[at % 10], "score": 1.0} for at in range(30)]
    save(home / "pairs" / "test.parquet", pairs, schema.PAIR_SCHEMA)
    ids = pa.schema([("note_id", pa.string())])
    save(home / "pairs" / "test_pool.parquet", [{"note_id": note} for note in NOTES], ids)
    counted = pa.schema([("note_id", pa.string()), ("train_clicks", pa.int64())])
    clicks = [{"note_id": note, "train_clicks": int(note in TARGETS)} for note in NOTES]
    save(home / "pairs" / "popularity.parquet", clicks, counted)
    (home / "pairs" / "statistics.json").write_text("{}")
    save_llm(home / "llm")
    return home
