"""Click logs as prepared tables, and the recommender's tables made of them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from notellm2_ray.core.schema import EVENT_SCHEMA, NOTE_SCHEMA
from notellm2_ray.core.settings import CandidateSettings, SequenceSettings
from notellm2_ray.data.sequences.make import make_sequences

START = datetime(2024, 3, 1, tzinfo=UTC)
ALL = ("uniform", "popular", "published")
Row = tuple[str, str, float]  # user, note, hour


def make_log(users=60, notes=120, seed=3) -> list[Row]:
    """Users with 1 to 20 clicks on notes of skewed popularity, no two of a user's at one time."""
    rng = np.random.default_rng(seed)
    return [
        (f"u{user}", f"n{int(notes * rng.random() ** 2):03}", float(hour))
        for user in range(users)
        for hour in rng.choice(500, size=rng.integers(1, 20), replace=False)
    ]


def prepare(
    directory: Path,
    rows: list[Row],
    notes: list[str] | None = None,
    born: dict[str, float] | None = None,
    files: int = 2,
) -> Path:
    ids = sorted({note for _, note, _ in rows}) if notes is None else notes
    hours = born or {}
    table = [
        {"note_id": note, "title": f"about {note}", "topics": [], "content": "", "image": None}
        | {"created_at": START + timedelta(hours=hours[note]) if note in hours else None}
        for note in ids
    ]
    events = [
        {"user_id": u, "note_id": n, "timestamp": START + timedelta(hours=h), "action": "click", "session_id": None}
        for u, n, h in rows
    ]
    for name, values, schema in (("notes", table, NOTE_SCHEMA), ("events", events, EVENT_SCHEMA)):
        (directory / name).mkdir(parents=True)
        for part in range(files):
            path = directory / name / f"{part}.parquet"
            pq.write_table(pa.Table.from_pylist(values[part::files], schema=schema), path, row_group_size=100)
    return directory


def make(directory: Path, rows: list[Row], *, seed=7, partitions=0, knobs=None, prepared=None, **candidates):
    prepared = prepared or prepare(directory / "prepared", rows)
    (output := directory / "sequences").mkdir(parents=True)
    knobs = SequenceSettings(**(knobs or {}))
    wanted = CandidateSettings(**({"num_negatives": 5, "protocols": ALL} | candidates))
    make_sequences(prepared, output, knobs, wanted, seed, partitions=partitions)
    return output


def read(output: Path, name: str) -> list[dict]:
    return pq.read_table(output / f"{name}.parquet").to_pylist()


def likes(rows: list[Row]) -> dict[str, list[tuple[float, str]]]:
    first: dict[str, dict[str, float]] = {}
    for user, note, hour in rows:
        notes = first.setdefault(user, {})
        notes[note] = min(hour, notes.get(note, hour))
    return {user: sorted((hour, note) for note, hour in notes.items()) for user, notes in first.items()}


def of_examples(candidates: list[dict]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for row in candidates:
        assert found.setdefault(row["example_id"], {}).setdefault(row["note_id"], row["label"]) == row["label"]
    return found
