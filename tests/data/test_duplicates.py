"""Of several rows of a note one is kept: the newest, or the last."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given
from hypothesis import strategies as st

from notellm2_ray.data.duplicates import EARLIER, OLDER, Versions, drop_rows
from notellm2_ray.data.validate import hash_ids
from notellm2_ray.data.writer import RollingWriter

ROW = st.tuples(st.sampled_from("abcd"), st.none() | st.integers(1, 3))


@given(st.lists(st.lists(ROW, max_size=6), max_size=5))
def test_the_newest_row_is_kept_and_the_last_where_times_do_not_tell(blocks):
    versions, seen, rows = Versions(), set(), []
    for block in blocks:
        ids, times = [one for one, _ in block], pa.array([time for _, time in block], pa.timestamp("us"))
        new = np.array([one not in seen and one not in ids[:place] for place, one in enumerate(ids)], bool)
        versions.add(hash_ids(pa.array(ids, pa.string())), new, pa.chunked_array([times]))
        seen |= set(ids)
        rows += block
    kept = {}
    for row, (one, time) in enumerate(rows):
        if one not in kept or (time or 0) >= (rows[kept[one]][1] or 0):
            kept[one] = row
    found = versions.superseded()
    assert list(found) == [row for row, (one, _) in enumerate(rows) if kept[one] != row]
    for row, reason in found.items():
        one, time = rows[row]
        assert reason == (OLDER if (time or 0) < (rows[kept[one]][1] or 0) else EARLIER)


def test_rows_are_dropped_from_their_files(tmp_path):
    schema = pa.schema([("x", pa.int64())])
    with RollingWriter(tmp_path / "x", "part", schema, rows_per_file=4, row_group=3) as writer:
        writer.write(pa.table({"x": list(range(10))}))
    drop_rows(writer, np.array([0, 5, 9]))
    assert pq.read_table(tmp_path / "x")["x"].to_pylist() == [1, 2, 3, 4, 6, 7, 8]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["x"]
    assert len(list((tmp_path / "x").iterdir())) == 2
