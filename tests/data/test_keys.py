"""The notes' keys: what they depend on, and what they do not."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from notellm2_ray.core.schema import EVENT_SCHEMA, NOTE_SCHEMA
from notellm2_ray.data.keys import read_notes, write_note_keys

START = datetime(2024, 3, 1, tzinfo=UTC)


def write(directory: Path, notes: list[dict], clicks: list[tuple[str, float]]) -> Path:
    empty = {"title": "", "topics": [], "content": "", "image": None, "created_at": None}
    rows = [empty | note for note in notes]
    events = [
        {"user_id": "u", "note_id": note, "timestamp": START + timedelta(hours=hour), "action": "click"}
        for note, hour in clicks
    ]
    for name, values, schema in (("notes", rows, NOTE_SCHEMA), ("events", events, EVENT_SCHEMA)):
        (directory / name).mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(values, schema=schema), directory / name / "part.parquet")
    return directory


def keys(directory: Path) -> dict[str, int]:
    table = read_notes(directory)
    assert table["key"].to_pylist() == sorted(table["key"].to_pylist())
    return dict(zip(table["note_id"].to_pylist(), table["key"].to_pylist(), strict=True))


NOTES = [
    {"note_id": "a", "title": "one"},
    {"note_id": "b", "content": "one"},
    {"note_id": "c", "topics": ["one"]},
    {"note_id": "d", "topics": ["one", ""]},
    {"note_id": "e", "image": b"one"},
    {"note_id": "f", "title": "one", "created_at": START},
    {"note_id": "twin", "title": "same"},
    {"note_id": "other twin", "title": "same"},
]
CLICKS = [("twin", 1.0), ("twin", 7.0), ("other twin", 2.0), ("a", 3.0)]


def test_a_key_follows_from_what_a_note_holds_and_not_from_its_name_or_row(tmp_path):
    prepared = write(tmp_path / "one", NOTES, CLICKS)
    found = keys(prepared)
    assert len(set(found.values())) == len(NOTES)
    renamed = [note | {"note_id": f"x {note['note_id']}"} for note in NOTES[::-1]]
    clicks = [(f"x {note}", hour) for note, hour in CLICKS[::-1] + CLICKS[:2]]  # two of them delivered twice
    other = keys(write(tmp_path / "other", renamed, clicks))
    assert {name.removeprefix("x "): key for name, key in other.items()} == found
    assert write_note_keys(prepared) == 0
    assert keys(prepared) == found  # read now, no longer computed


def test_later_events_change_the_keys_of_alike_notes_only(tmp_path):
    before, after = (keys(write(tmp_path / str(n), NOTES, CLICKS + [("a", 9.0)] * n)) for n in (0, 1))
    assert before == after


def test_notes_that_nothing_tells_apart_are_counted(tmp_path):
    notes = [{"note_id": f"n{number}", "title": "spam"} for number in range(5)]
    assert write_note_keys(write(tmp_path, notes, [("n1", 1.0)])) == 3
    assert len(set(keys(tmp_path).values())) == 5
