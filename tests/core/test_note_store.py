from __future__ import annotations

import pickle

import pyarrow as pa
import pytest

from notellm2_ray.core import note_store
from notellm2_ray.core.errors import DataError
from notellm2_ray.core.note_store import NoteStore
from notellm2_ray.core.schema import NOTE_SCHEMA, Note

NOTES = [
    Note("a", "title", ("t1", "t2"), "content", b"\x89PNG..."),
    Note("笔记", "标题", (), "", None),
    Note("c", "", ("t",), "x" * 1000, b""),
    Note("d"),
]


def batch(notes: list[Note]) -> pa.RecordBatch:
    rows = [{**note._asdict(), "topics": list(note.topics), "created_at": None} for note in notes]
    return pa.RecordBatch.from_pylist(rows, schema=NOTE_SCHEMA)


def test_what_is_written_is_read_back_by_id_in_any_order(tmp_path, monkeypatch):
    monkeypatch.setattr(note_store, "_ROWS_PER_BATCH", 2)
    count = NoteStore.write(tmp_path / "notes.arrow", [batch(NOTES[:3]), batch(NOTES[3:])])
    store = NoteStore(tmp_path / "notes.arrow")
    assert count == len(store) == 4
    assert store.ids == [note.note_id for note in NOTES]
    assert store.get(["d", "a", "c", "笔记", "a"]) == [NOTES[3], NOTES[0], NOTES[2], NOTES[1], NOTES[0]]
    assert "a" in store
    assert "b" not in store
    copy = pickle.loads(pickle.dumps(NoteStore(tmp_path / "notes.arrow", "train-ranker")))
    assert (copy.get(["c"]), copy.stage) == ([NOTES[2]], "train-ranker")


def test_an_empty_store_is_a_store(tmp_path):
    assert NoteStore.write(tmp_path / "notes.arrow", []) == 0
    assert NoteStore(tmp_path / "notes.arrow").get([]) == []


def test_an_unknown_id_is_named(tmp_path):
    NoteStore.write(tmp_path / "notes.arrow", [batch(NOTES)])
    with pytest.raises(DataError, match="'nowhere' is not among the 4 notes"):
        NoteStore(tmp_path / "notes.arrow").get(["a", "nowhere"])


@pytest.mark.parametrize("batches", [[NOTES, NOTES[1:2]], [NOTES + NOTES[1:2]]])
def test_a_repeated_note_is_refused_and_no_file_is_left(tmp_path, batches):
    with pytest.raises(DataError, match="'笔记' is there twice"):
        NoteStore.write(tmp_path / "notes.arrow", map(batch, batches))
    assert not list(tmp_path.iterdir())


def test_missing_and_damaged_files_say_what_to_run(tmp_path):
    with pytest.raises(DataError, match="run mine-pairs first"):
        NoteStore(tmp_path / "notes.arrow")
    (tmp_path / "notes.arrow").write_bytes(b"not an Arrow file at all")
    with pytest.raises(DataError, match="delete .* and run mine-pairs again"):
        NoteStore(tmp_path / "notes.arrow")


def test_another_stage_s_store_names_that_stage(tmp_path):
    with pytest.raises(DataError, match="run train-ranker first"):
        NoteStore(tmp_path / "notes.arrow", "train-ranker")
    NoteStore.write(tmp_path / "notes.arrow", [batch(NOTES)])
    with pytest.raises(DataError, match="same run of train-ranker"):
        NoteStore(tmp_path / "notes.arrow", "train-ranker").get(["nowhere"])
