"""Cutting notes tables into blocks: every row once, the same every time, and bad tables named."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.schema import Note
from notellm2_ray.infer.blocks import _ranges, list_files, plan_blocks, read_block, read_ids
from tests.support.tiny_models import write_notes


def notes(count: int, prefix: str = "n") -> list[Note]:
    return [Note(f"{prefix}{i}", f"title {i}", ("a", "b"), "text", b"img" if i % 2 else None) for i in range(count)]


def plan(path: Path, rows: int, made_by: str = "model", only: pa.Array | None = None):
    return plan_blocks(list_files(path), rows, made_by, only)


@given(st.lists(st.integers(0, 40), max_size=12), st.integers(1, 25))
def test_ranges_hold_every_row_once_and_follow_small_row_groups(groups: list[int], block_rows: int) -> None:
    ranges = list(_ranges(groups, block_rows))
    assert [row for start, rows in ranges for row in range(start, start + rows)] == list(range(sum(groups)))
    assert all(0 < rows <= block_rows for _, rows in ranges)
    borders = {sum(groups[:i]) for i in range(len(groups) + 1)}
    # a row group that fits into a block is not cut, except to fill up what a larger one before it left
    if all(group <= block_rows for group in groups):
        assert all(start in borders for start, _ in ranges)


@pytest.mark.parametrize(("group_size", "block_rows"), [(7, 20), (50, 20), (1000, 33), (10, 10), (3, 1)])
def test_blocks_read_back_the_table_in_order(tmp_path: Path, group_size: int, block_rows: int) -> None:
    write_notes(tmp_path / "notes" / "a.parquet", notes(110), group_size)
    write_notes(tmp_path / "notes" / "b.parquet", notes(30, "m"), group_size)
    made = plan(tmp_path / "notes", block_rows)
    assert [note for block in made.blocks for note in read_block(block)] == notes(110) + notes(30, "m")
    assert made.notes == 140


def test_only_ids_leaves_out_other_notes_and_whole_blocks(tmp_path: Path) -> None:
    path = write_notes(tmp_path / "a.parquet", notes(100), 10)
    only = pa.array(["n3", "n77", "elsewhere"])
    made = plan(path, 10, only=only)
    assert (len(made.blocks), made.notes, made.unknown_ids) == (2, 2, ("elsewhere",))
    chosen = frozenset(only.to_pylist())
    assert [note.note_id for block in made.blocks for note in read_block(block, chosen)] == ["n3", "n77"]
    with pytest.raises(DataError, match="none of the 1 ids"):
        plan(path, 10, only=pa.array(["elsewhere"]))


def test_block_ids_are_stable_and_change_with_what_made_them(tmp_path: Path) -> None:
    path = write_notes(tmp_path / "a.parquet", notes(50), 10)
    first = plan(path, 10)
    assert plan(path, 10) == first
    assert len({block.part_id for block in first.blocks}) == 5
    others = [plan(path, 10, "another model"), plan(path, 20)]
    write_notes(path, notes(51)[1:], 10)
    others.append(plan(path, 10))
    for other in others:
        assert not {block.part_id for block in first.blocks} & {block.part_id for block in other.blocks}


def test_directory_glob_and_file_are_read_alike(tmp_path: Path) -> None:
    path = write_notes(tmp_path / "notes" / "a.parquet", notes(5))
    (tmp_path / "notes" / "_temporary.parquet").write_bytes(b"not ours")
    (tmp_path / "notes" / "manifest.json").write_text("{}")
    for place in (path, tmp_path / "notes", tmp_path / "notes" / "a*.parquet"):
        assert [file.path for file in list_files(place)] == [str(path)]


def test_larger_types_of_other_writers_are_taken(tmp_path: Path) -> None:
    path = write_notes(tmp_path / "a.parquet", notes(5))
    table = pq.read_table(path)
    large = {"note_id": pa.large_string(), "content": pa.large_string(), "image": pa.large_binary()}
    schema = pa.schema([field.with_type(large.get(field.name, field.type)) for field in table.schema])
    pq.write_table(table.cast(schema).append_column("extra", pa.array(range(5))).drop(["created_at"]), path)
    assert read_block(plan(path, 10).blocks[0]) == notes(5)


def test_repeated_ids_are_named_with_their_files(tmp_path: Path) -> None:
    write_notes(tmp_path / "n" / "a.parquet", notes(20))
    write_notes(tmp_path / "n" / "b.parquet", notes(2))
    with pytest.raises(DataError, match=r"2 note_id.*'n0' in a.parquet, b.parquet"):
        plan(tmp_path / "n", 10)


def test_unfit_tables_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        list_files(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no Parquet file"):
        list_files(tmp_path / "empty")
    path = write_notes(tmp_path / "n" / "a.parquet", notes(3))
    table = pq.read_table(path)
    pq.write_table(table.slice(0, 0), path)
    with pytest.raises(DataError, match="no notes"):
        plan(path, 10)
    pq.write_table(table.drop(["topics"]), path)
    with pytest.raises(DataError, match=r"a.parquet: missing column\(s\) topics"):
        list_files(path)
    pq.write_table(table.set_column(2, "topics", pa.array([1, 2, 3])), path)
    with pytest.raises(DataError, match="column topics is int64"):
        list_files(path)
    pq.write_table(table.set_column(0, "note_id", pa.array(["n1", None, "n2"])), path)
    with pytest.raises(DataError, match="1 row.* no note_id"):
        plan(path, 10)
    path.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match="not a readable Parquet"):
        list_files(path)


def test_a_file_that_shrank_after_planning_is_noticed(tmp_path: Path) -> None:
    path = write_notes(tmp_path / "a.parquet", notes(20))
    block = plan(path, 20).blocks[0]
    write_notes(path, notes(10))
    with pytest.raises(DataError, match="has changed"):
        read_block(block)
    path.unlink()
    with pytest.raises(DataError, match=r"a\.parquet"):
        read_block(block)


def test_files_of_ids(tmp_path: Path) -> None:
    pq.write_table(pa.table({"note_id": ["b", "a", "b"]}), tmp_path / "ids.parquet")
    assert read_ids(tmp_path / "ids.parquet").to_pylist() == ["b", "a"]
    pq.write_table(pa.table({"id": ["b"]}), tmp_path / "ids.parquet")
    with pytest.raises(DataError, match="note_id"):
        read_ids(tmp_path / "ids.parquet")
    with pytest.raises(DataError, match="cannot be read"):
        read_ids(tmp_path / "absent.parquet")
