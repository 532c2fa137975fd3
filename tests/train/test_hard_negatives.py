"""Which hard negatives a step has: drawn by seed, none twice, related ones known, and every rank equally many."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.schema import NEGATIVES, PAIR_SCHEMA
from notellm2_ray.models.embedder.losses import PADDING
from notellm2_ray.train.pairs import Pairs
from notellm2_ray.train.sampler import PairSampler

LISTS = [["x", "y", "z", "w"], ["d"], None, ["d", "x"], [], ["a", "y", "z"], ["v"], ["u", "v", "w"]]
ENDS = [("a", "b"), ("a", "c"), ("b", "d"), ("c", "e"), ("d", "e"), ("f", "g"), ("g", "h"), ("h", "a")]


def write(path: Path, lists=LISTS, ends=ENDS) -> Path:
    rows = [{"query_id": query, "target_id": target, "score": 1.0} for query, target in ends]
    table = pa.Table.from_pylist(rows, schema=PAIR_SCHEMA)
    if lists is not None:
        table = table.append_column(NEGATIVES, pa.array(lists, pa.list_(pa.string())))
    pq.write_table(table, path)
    return path


@pytest.fixture
def pairs(tmp_path) -> Pairs:
    return Pairs(write(tmp_path / "train.parquet"))


def test_a_batch_holds_negatives_of_its_pairs_and_padding_where_they_are_missing(pairs):
    sampler = PairSampler(pairs, 4, seed=3, hard_negatives=3)
    seen = {number: set() for number in range(8)}
    for step in range(40):
        batch = sampler[step]
        assert len(batch.note_ids) == len(batch.note_keys) == 4 * 2 + 4 * 3
        assert batch.negatives.num_notes == 12
        for place, row in enumerate(sampler.rows(step)):
            ids, keys = (part[8 + 3 * place : 11 + 3 * place] for part in (batch.note_ids, batch.note_keys))
            real = [note for note, key in zip(ids, keys, strict=True) if key != PADDING]
            assert len(real) == len(set(real)) == min(3, len(LISTS[row] or []))
            assert [pairs.note_ids[key] for key in keys if key != PADDING] == real
            assert {ids[at] for at in range(3) if keys[at] == PADDING} <= {ENDS[row][0]}
            seen[row] |= set(real)
    assert [seen[row] for row in range(8)] == [set(each or []) for each in LISTS]  # each is drawn in time


def test_draws_follow_from_seed_and_step_and_the_ranks_share_them(pairs):
    whole = PairSampler(pairs, 4, seed=3, hard_negatives=2)
    again, other = (PairSampler(pairs, 4, seed, hard_negatives=2) for seed in (3, 4))
    assert np.array_equal(whole[5].note_keys, again[5].note_keys)
    assert any(not np.array_equal(whole[step].note_keys[8:], other[step].note_keys[8:]) for step in range(4))
    ranks = [PairSampler(pairs, 4, 3, rank, 2, hard_negatives=2) for rank in range(2)]
    for step in range(4):
        parts = [rank[step] for rank in ranks]
        assert np.array_equal(np.concatenate([part.note_keys[4:] for part in parts]), whole[step].note_keys[8:])
        assert [part.negatives.num_notes for part in parts] == [4, 4]


@pytest.mark.parametrize("world_size", [1, 2])
def test_negatives_that_are_related_to_a_row_are_named(pairs, world_size):
    related = {frozenset(pair) for pair in ENDS}
    named = 0
    for step in range(20):
        ranks = [PairSampler(pairs, 4, 3, rank, world_size, hard_negatives=2)[step] for rank in range(world_size)]
        columns = [
            (note, key != PADDING and place >= 8 // world_size)
            for part in ranks
            for place, (note, key) in enumerate(zip(part.note_ids, part.note_keys, strict=True))
        ]
        for part in ranks:
            rows = part.note_ids[: 8 // world_size]
            expected = {
                (row, column)
                for row, own in enumerate(rows)
                for column, (note, hard) in enumerate(columns)
                if hard and frozenset((own, note)) in related
            }
            assert set(map(tuple, part.negatives.related.tolist())) == expected
            named += len(expected)
    assert named


def test_without_hard_negatives_a_batch_is_as_before(pairs, tmp_path):
    plain = Pairs(write(tmp_path / "plain.parquet", lists=None))
    listed, before = PairSampler(pairs, 4, 3)[1], PairSampler(plain, 4, 3)[1]
    assert listed.note_ids == before.note_ids
    assert np.array_equal(listed.note_keys, before.note_keys)
    assert listed.negatives is before.negatives is None


def test_missing_negatives_say_what_to_do(tmp_path):
    train = write(tmp_path / "train.parquet", lists=None)
    with pytest.raises(DataError, match=r"no training pair has any: run mine-negatives .*train.negatives_of"):
        PairSampler(Pairs(train), 4, 3, hard_negatives=1)
    with pytest.raises(DataError, match=r"mined.parquet does not exist: run mine-negatives first"):
        Pairs(train, tmp_path / "mined.parquet")
    other = write(tmp_path / "other.parquet", ends=ENDS[::-1])
    with pytest.raises(DataError, match=r"does not list the pairs of .*train.parquet: run mine-negatives again"):
        Pairs(train, other)
    assert len(Pairs(train, write(tmp_path / "mined.parquet")).negatives) == sum(len(each or []) for each in LISTS)
