"""Too few notes to draw negatives from: a few examples are set aside, many stop the stage."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.settings import CandidateSettings
from notellm2_ray.data.sequences.shortages import check_negatives
from tests.support.sequences import make, make_log, prepare, read


def test_too_few_notes_name_the_numbers_and_the_knobs(tmp_path):
    with pytest.raises(DataError, match=r"fewer than candidates\.num_negatives=500 notes .*lower candidates\.num_neg"):
        make(tmp_path, make_log(), num_negatives=500)


def test_a_few_examples_without_enough_notes_are_set_aside_with_the_reason(tmp_path):
    rows = [(u, n, h + 100) for u, n, h in make_log(users=300, notes=40)]
    rows += [("early", "n000", 1.0), ("early", "n001", 2.0)]
    born = {f"n{n:03}": 50.0 for n in range(2, 40)}
    prepared = prepare(tmp_path / "a", rows, born=born)
    output = make(tmp_path, rows, prepared=prepared, protocols=("uniform",), test_share=0.5)
    quarantined = pq.read_table(output / "quarantine").to_pylist()
    assert [(row["table"], row["key"]) for row in quarantined] == [("examples", "early/1")]
    assert quarantined[0]["reason"].startswith("too few notes: 0 notes")
    examples = {row["example_id"] for name in ("train", "valid", "test") for row in read(output, name)}
    assert "early/1" not in examples


def test_the_side_that_is_short_shows_an_example_of_its_own():
    counts = [
        {"train_all": 9, "train_set_aside": 9, "train_set_aside_example": "u/1 has 0"}
        | {"valid_all": 9, "valid_set_aside": 9, "valid_set_aside_example": "v/1 has 3"}
    ]
    with pytest.raises(DataError, match=r"9 of 9 train examples .*\(u/1 has 0\)"):
        check_negatives(counts, CandidateSettings())
    with pytest.raises(DataError, match="notes without created_at can be negatives only with null"):
        check_negatives(counts, CandidateSettings(max_negative_age_days=3))


def test_short_examples_are_kept_by_side(tmp_path):
    rows = [(f"u{user}", f"n{note}", float(note)) for user in range(20) for note in (user % 4, 4)]
    enough = make(tmp_path / "enough", rows, protocols=("uniform",), num_negatives=3)
    with pytest.raises(DataError, match="of 14 train examples have fewer") as caught:
        make(tmp_path / "short", rows, protocols=("uniform",), num_negatives=4, num_train_negatives=4)
    shown = str(caught.value).partition("(")[2].partition(" has 3)")[0]
    assert shown in {row["example_id"] for row in read(enough, "train")}
