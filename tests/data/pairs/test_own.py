"""Pairs of one's own in place of mined ones: split like them, checked, and with their negatives."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.note_store import NoteStore
from notellm2_ray.core.settings import PairSettings
from tests.data.pairs.test_mine import read, run

# Notes n000 to n101 are training notes, and n102 to n149 test notes.
PAIRS = [
    {"query_id": "n001", "target_id": "n002", "score": 0.5, "negatives": ["n050", "n140", "nobody"]},
    {"query_id": "n001", "target_id": "n003", "score": 2.0, "negatives": []},
    {"query_id": "n003", "target_id": "n001", "score": None, "negatives": None},
    {"query_id": "n003", "target_id": "n004", "score": 1.0, "negatives": ["n060", "n061"]},
    {"query_id": "n130", "target_id": "n131", "score": 1.0, "negatives": ["n001"]},
    {"query_id": "n001", "target_id": "n131", "score": 1.0, "negatives": []},  # joins the two sides
    {"query_id": "n001", "target_id": "n002", "score": 0.1, "negatives": []},  # is there again
    {"query_id": "n005", "target_id": "n005", "score": 1.0, "negatives": []},
    {"query_id": "n001", "target_id": "nobody", "score": 1.0, "negatives": []},
    {"query_id": None, "target_id": "n001", "score": 1.0, "negatives": []},
]


def written(path: Path, rows) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        lines = ["query_id,target_id,score,negatives"]
        for row in rows:
            cells = [row["query_id"] or "", row["target_id"], "" if row["score"] is None else row["score"]]
            lines.append(",".join(map(str, [*cells, "|".join(row["negatives"] or [])])))
        path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("name", ["pairs.parquet", "pairs.jsonl", "pairs.csv"])
def test_own_pairs_are_split_like_mined_ones_and_keep_their_negatives(tmp_path, name):
    knobs = PairSettings(table=str(written(tmp_path / name, PAIRS)))
    counts, output = run(tmp_path, knobs=knobs)
    mined_counts, mined = run(tmp_path / "mined")
    found = {(row["query_id"], row["target_id"]): row for row in read(output, "train", "valid")}
    assert {ends: (row["score"], row["negatives"]) for ends, row in found.items()} == {
        ("n001", "n002"): (0.5, ["n050"]),
        ("n001", "n003"): (2.0, []),
        ("n003", "n001"): (1.0, []),
        ("n003", "n004"): (1.0, ["n060", "n061"]),
    }
    assert read(output, "test") == [{"query_id": "n130", "target_id": "n131", "score": 1.0}]
    assert (counts["train_pairs"], counts["valid_pairs"], counts["test_pairs"]) == (3, 1, 1)
    assert counts["train_log"]["left_out"] == 4
    store = NoteStore(output / "train_notes.arrow")
    assert set(store.ids) == {"n001", "n002", "n003", "n004", "n050", "n060", "n061"}
    for same in ("popularity", "test_pool"):
        assert read(output, same) == read(mined, same)
    assert mined_counts["boundary"] == counts["boundary"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"query_id": "n001", "target": "n002"}], r"missing column\(s\) target_id; its columns are query_id, target"),
        ([{"query_id": "n001", "target_id": "n002"}], "none of its 1 usable pairs joins two test notes"),
        ([{"query_id": "n130", "target_id": "n131"}], "none of its 1 usable pairs joins two training notes"),
        ([{"query_id": "n001", "target_id": "n002", "score": "much"}], "a score is no number"),
    ],
)
def test_a_table_that_cannot_be_used_says_why(tmp_path, rows, said):
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "own.parquet")
    with pytest.raises(DataError, match=said):
        run(tmp_path, knobs=PairSettings(table=str(tmp_path / "own.parquet")))
    with pytest.raises(DataError, match=r"no such table file; set pairs.table"):
        run(tmp_path / "none", knobs=PairSettings(table=str(tmp_path / "none.parquet")))
