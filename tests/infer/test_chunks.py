"""Cutting notes tables into chunks: every row once, the same every time, and bad tables named."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.schema import Note
from notellm2_ray.infer.chunks import _ranges, list_note_files, plan_chunks, read_chunk, read_ids
from tests.support.tiny_models import write_notes


def notes(count: int, prefix: str = "n") -> list[Note]:
    return [Note(f"{prefix}{i}", f"title {i}", ("a", "b"), "text", b"img" if i % 2 else None) for i in range(count)]


def plan(path: Path, rows: int, made_by: str = "model", only: pa.Array | None = None):
    return plan_chunks(list_note_files(path), rows, made_by, only)


@given(st.lists(st.integers(0, 40), max_size=12), st.integers(1, 25))
def test_ranges_hold_every_row_once_and_follow_small_row_groups(groups: list[int], chunk_rows: int) -> None:
    ranges = list(_ranges(groups, chunk_rows))
    assert [row for start, rows in ranges for row in range(start, start + rows)] == list(range(sum(groups)))
    assert all(0 < rows <= chunk_rows for _, rows in ranges)
    borders = {sum(groups[:i]) for i in range(len(groups) + 1)}
    # a row group that fits into a chunk is not cut, except to fill up what a larger one before it left
    if all(group <= chunk_rows for group in groups):
        assert all(start in borders for start, _ in ranges)


@pytest.mark.parametrize(("group_size", "chunk_rows"), [(7, 20), (50, 20), (1000, 33), (10, 10), (3, 1)])
def test_chunks_read_back_the_table_in_order(tmp_path: Path, group_size: int, chunk_rows: int) -> None:
    write_notes(tmp_path / "notes" / "a.parquet", notes(110), group_size)
    write_notes(tmp_path / "notes" / "b.parquet", notes(30, "m"), group_size)
    made = plan(tmp_path / "notes", chunk_rows)
    assert [note for chunk in made.chunks for note in read_chunk(chunk)] == notes(110) + notes(30, "m")
    assert made.notes == 140


def test_only_ids_leaves_out_other_notes_and_whole_chunks(tmp_path: Path) -> None:
    path = write_notes(tmp_path / "a.parquet", notes(100), 10)
    only = pa.array(["n3", "n77", "elsewhere"])
    made = plan(path, 10, only=only)
    assert (len(made.chunks), made.notes, made.unknown_ids) == (2, 2, ("elsewhere",))
    chosen = frozenset(only.to_pylist())
    assert [note.note_id for chunk in made.chunks for note in read_chunk(chunk, chosen)] == ["n3", "n77"]
    with pytest.raises(DataError, match="none of the 1 requested ids"):
        plan(path, 10, only=pa.array(["elsewhere"]))


def test_chunk_ids_are_stable_and_change_with_what_made_them(tmp_path: Path) -> None:
    path = write_notes(tmp_path / "a.parquet", notes(50), 10)
    first = plan(path, 10)
    assert plan(path, 10) == first
    assert len({chunk.part_id for chunk in first.chunks}) == 5
    others = [plan(path, 10, "another model"), plan(path, 20)]
    write_notes(path, notes(51)[1:], 10)
    others.append(plan(path, 10))
    for other in others:
        assert not {chunk.part_id for chunk in first.chunks} & {chunk.part_id for chunk in other.chunks}


def test_directory_glob_and_file_are_read_alike(tmp_path: Path) -> None:
    path = write_notes(tmp_path / "notes" / "a.parquet", notes(5))
    (tmp_path / "notes" / "_temporary.parquet").write_bytes(b"not ours")
    (tmp_path / "notes" / "manifest.json").write_text("{}")
    for place in (path, tmp_path / "notes", tmp_path / "notes" / "a*.parquet"):
        assert [file.path for file in list_note_files(place)] == [str(path)]


def test_larger_types_of_other_writers_are_taken(tmp_path: Path) -> None:
    path = write_notes(tmp_path / "a.parquet", notes(5))
    table = pq.read_table(path)
    large = {"note_id": pa.large_string(), "content": pa.large_string(), "image": pa.large_binary()}
    schema = pa.schema([field.with_type(large.get(field.name, field.type)) for field in table.schema])
    pq.write_table(table.cast(schema).append_column("extra", pa.array(range(5))).drop(["created_at"]), path)
    assert read_chunk(plan(path, 10).chunks[0]) == notes(5)


def test_repeated_ids_are_named_with_their_files(tmp_path: Path) -> None:
    write_notes(tmp_path / "n" / "a.parquet", notes(20))
    write_notes(tmp_path / "n" / "b.parquet", notes(2))
    with pytest.raises(DataError, match=r"2 note_id.*'n0' in a.parquet, b.parquet"):
        plan(tmp_path / "n", 10)


def test_unfit_tables_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        list_note_files(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no Parquet file"):
        list_note_files(tmp_path / "empty")
    path = write_notes(tmp_path / "n" / "a.parquet", notes(3))
    table = pq.read_table(path)
    pq.write_table(table.slice(0, 0), path)
    with pytest.raises(DataError, match="there are no notes"):
        plan(path, 10)
    pq.write_table(table.drop(["topics"]), path)
    with pytest.raises(DataError, match=r"a.parquet: missing column\(s\) topics"):
        list_note_files(path)
    pq.write_table(table.set_column(2, "topics", pa.array([1, 2, 3])), path)
    with pytest.raises(DataError, match="column topics is of type int64"):
        list_note_files(path)
    pq.write_table(table.set_column(0, "note_id", pa.array(["n1", None, "n2"])), path)
    with pytest.raises(DataError, match="1 row.* no note_id"):
        plan(path, 10)
    path.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match="not a readable Parquet"):
        list_note_files(path)


def test_a_file_that_shrank_after_planning_is_noticed(tmp_path: Path) -> None:
    path = write_notes(tmp_path / "a.parquet", notes(20))
    chunk = plan(path, 20).chunks[0]
    write_notes(path, notes(10))
    with pytest.raises(DataError, match="became shorter"):
        read_chunk(chunk)
    path.unlink()
    with pytest.raises(DataError, match=r"a\.parquet"):
        read_chunk(chunk)


def test_files_of_ids(tmp_path: Path) -> None:
    pq.write_table(pa.table({"note_id": ["b", "a", "b"]}), tmp_path / "ids.parquet")
    assert read_ids(tmp_path / "ids.parquet").to_pylist() == ["b", "a"]
    pq.write_table(pa.table({"id": ["b"]}), tmp_path / "ids.parquet")
    with pytest.raises(DataError, match="note_id"):
        read_ids(tmp_path / "ids.parquet")
    with pytest.raises(DataError, match="cannot be read"):
        read_ids(tmp_path / "absent.parquet")
