"""An example that gives its answer away is found."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from notellm2_ray.core.errors import DataError
from notellm2_ray.data.sequences.leaks import check_candidates, check_examples


def changed(table: pa.Table, row: int, **values) -> pa.Table:
    rows = table.to_pylist()
    rows[row] |= values
    return pa.Table.from_pylist(rows, schema=table.schema)


def test_leaks_are_seen(written):
    examples, candidates, sequences = (
        pq.read_table(written / f"{name}.parquet") for name in ("test", "candidates/uniform", "sequences")
    )
    check_examples(examples, sequences)
    check_candidates(examples, candidates, sequences, 5)
    first = examples.slice(0, 1).to_pylist()[0]
    with pytest.raises(DataError, match=rf"leak: example '{first['example_id']}', its target is in its own history"):
        check_examples(changed(examples, 0, history_ids=[*first["history_ids"][1:], first["target_id"]]))
    with pytest.raises(DataError, match="its history is not everything before its target"):
        check_examples(changed(examples, 0, history_ids=first["history_ids"][1:]), sequences)
    with pytest.raises(DataError, match="another target"):
        check_examples(examples, sequences)
        check_candidates(changed(examples, 0, target_id="n000"), candidates, sequences, 5)
    labels = candidates["label"].to_pylist()
    negative = labels.index(0)
    with pytest.raises(DataError, match="a negative is a note that its user liked"):
        liked = first["history_ids"][0]
        check_candidates(examples, changed(candidates, negative, note_id=liked), sequences, 5)
    with pytest.raises(DataError, match="a candidate is there twice"):
        other = candidates["note_id"][labels.index(0, negative + 1)].as_py()
        check_candidates(examples, changed(candidates, negative, note_id=other), sequences, 5)
