from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pytest

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.schema import NOTE_SCHEMA, PAIR_SCHEMA
from notellm2_ray.core.settings import SplitSettings
from notellm2_ray.data.arrays import mix
from notellm2_ray.data.pairs.split import DAY, split_notes, split_pairs

START = datetime(2024, 1, 1, tzinfo=UTC)
SPAN = (int(START.timestamp() * 1e6), int(START.timestamp() * 1e6) + 10 * DAY)


def notes(days: list[float | None]) -> pa.Table:
    created = [None if day is None else START + timedelta(days=day) for day in days]
    ids = [f"n{number}" for number in range(len(days))]
    times = pa.array(created, NOTE_SCHEMA.field("created_at").type)
    return pa.table({"note_id": ids, "created_at": times, "key": mix(np.arange(len(ids), dtype=np.uint64))})


def test_by_time_the_last_part_of_the_log_is_for_testing():
    split = split_notes(notes([8, -300, 6.9, 7]), SPAN, SplitSettings(test_share=0.3), window_days=5, seed=1)
    assert split.notes.to_pylist() == ["n0", "n1", "n2", "n3"]
    assert split.is_test.tolist() == [True, False, False, True]
    assert split.boundary == SPAN[0] + 7 * DAY
    assert split.train_window == (SPAN[0] + 2 * DAY, split.boundary)
    assert split.test_window == (split.boundary, SPAN[1] + 1)


def test_by_time_without_creation_times_names_the_count_and_the_remedy():
    with pytest.raises(DataError, match=r"2 of 3 notes have no created_at \(note 'n0'.*split\.by=notes"):
        split_notes(notes([None, 1, None]), SPAN, SplitSettings(), window_days=None, seed=1)


def test_by_notes_holds_out_a_seeded_share_independent_of_other_notes():
    settings = SplitSettings(by="notes", test_share=0.25)
    some, all_ = notes([None] * 1000), notes([None] * 4000)
    split = split_notes(all_, SPAN, settings, window_days=None, seed=1)
    assert split.is_test.mean() == pytest.approx(0.25, abs=0.03)
    assert split.train_window == split.test_window == (SPAN[0], SPAN[1] + 1)
    held_out = set(split.notes.filter(pa.array(split.is_test)).to_pylist())
    fewer = split_notes(some, SPAN, settings, window_days=None, seed=1)
    assert set(fewer.notes.filter(pa.array(fewer.is_test)).to_pylist()) == held_out & set(fewer.notes.to_pylist())
    other = split_notes(all_, SPAN, settings, window_days=None, seed=2)
    assert not np.array_equal(other.is_test, split.is_test)


@pytest.mark.parametrize(("share", "side"), [(0.0, "test"), (1.0, "training")])
def test_a_side_without_notes_is_an_error(share, side):
    with pytest.raises(DataError, match=f"leaves no {side} note"):
        split_notes(notes([1.0] * 9), SPAN, SplitSettings(by="notes", test_share=share), window_days=None, seed=1)


def pairs(count: int) -> pa.Table:
    return pa.table([[f"q{i}" for i in range(count)], ["t"] * count, [1.0] * count], schema=PAIR_SCHEMA)


def test_validation_is_an_exact_seeded_share_of_the_training_pairs():
    train, valid = split_pairs(pairs(200), 0.1, seed=3)
    assert (train.num_rows, valid.num_rows) == (180, 20)
    assert sorted(train["query_id"].to_pylist() + valid["query_id"].to_pylist()) == sorted(f"q{i}" for i in range(200))
    assert split_pairs(pairs(200), 0.1, seed=3)[1] == valid
    assert split_pairs(pairs(200), 0.1, seed=4)[1] != valid
    assert split_pairs(pairs(3), 0.1, seed=3)[1].num_rows == 1
    assert split_pairs(pairs(3), 0.0, seed=3)[1].num_rows == 0
    with pytest.raises(DataError, match=r"split\.valid_share=0\.9"):
        split_pairs(pairs(1), 0.9, seed=3)
