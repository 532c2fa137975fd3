"""Exact ranks against a plain sort of the full matrix, ties and all."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from notellm2_ray.core.errors import DataError
from notellm2_ray.evaluate.recall import metrics


def twin(scores: np.ndarray, query_row: int, target_row: int) -> int:
    """Sort all others by score; among equals the target comes last."""
    others = [row for row in range(len(scores)) if row != query_row]
    order = sorted(others, key=lambda row: (-scores[row], row == target_row))
    return order.index(target_row) + 1


@st.composite
def tasks(draw):
    """Small whole-number vectors: many exact ties, and float32 products without rounding."""
    notes, dim, pairs = draw(st.integers(2, 12)), draw(st.integers(1, 3)), draw(st.integers(1, 9))
    values = st.lists(st.integers(-2, 2), min_size=dim, max_size=dim)
    pool = np.array(draw(st.lists(values, min_size=notes, max_size=notes)), dtype=np.float32)
    queries = np.array(draw(st.lists(values, min_size=pairs, max_size=pairs)), dtype=np.float32)
    targets = np.array(draw(st.lists(st.integers(0, notes - 1), min_size=pairs, max_size=pairs)))
    rows = np.array([draw(st.integers(-1, notes - 1).filter(lambda row, t=t: row != t)) for t in targets])
    return queries, pool, rows, targets


@settings(max_examples=150, deadline=None)
@given(task=tasks(), block_rows=st.integers(1, 4))
def test_ranks_equal_the_full_sort_in_blocks_of_any_size(task, block_rows):
    queries, pool, rows, targets = task
    ranks = metrics.target_ranks(queries, pool, rows, targets, block_bytes=4 * len(pool) * block_rows)
    scores = queries.astype(float) @ pool.T.astype(float)
    assert ranks.tolist() == [twin(*each) for each in zip(scores, rows, targets, strict=True)]


@settings(max_examples=50, deadline=None)
@given(task=tasks(), values=st.lists(st.integers(0, 3), min_size=12, max_size=12))
def test_ranks_by_note_are_those_under_one_score_for_all_queries(task, values):
    _, pool, rows, targets = task
    scores = np.array(values[: len(pool)])
    ranks = metrics.ranks_by_note(scores, rows, targets)
    assert ranks.tolist() == [twin(scores, row, target) for row, target in zip(rows, targets, strict=True)]


def test_a_collapsed_model_gets_the_worst_rank_in_spite_of_rounding():
    rng = np.random.default_rng(0)
    pool = np.tile(rng.normal(size=64), (1000, 1)) + rng.normal(size=(1000, 64)) * 1e-7
    pool = (pool / np.linalg.norm(pool, axis=1, keepdims=True)).astype(np.float32)
    rows, targets = np.arange(50), np.arange(50) + 100
    assert (metrics.target_ranks(pool[rows], pool, rows, targets) == 999).all()


def test_large_blocks_agree_with_a_float64_sort_of_random_vectors():
    rng = np.random.default_rng(1)
    pool = rng.normal(size=(700, 64)).astype(np.float32)
    pool /= np.linalg.norm(pool, axis=1, keepdims=True)
    rows, targets = np.arange(200), np.arange(200) + 300
    scores = pool[rows].astype(float) @ pool.T.astype(float)
    expected = [twin(*each) for each in zip(scores, rows, targets, strict=True)]
    off = np.abs(metrics.target_ranks(pool[rows], pool, rows, targets) - expected)
    assert off.max() <= 1  # two cosines nearer than the tie tolerance
    assert (off == 0).mean() > 0.98


def test_recall_counts_the_cutoff_itself_and_empty_strata_are_nan():
    ranks = np.array([1, 10, 11, 100])
    assert metrics.recall_at(ranks, [1, 10, 100]) == {1: 0.25, 10: 0.5, 100: 1.0}
    assert np.isnan(metrics.recall_at(ranks[:0], [1])[1])
    assert metrics.mean_reciprocal_rank(np.array([1, 4])) == pytest.approx(0.625)


def test_random_ranks_agree_with_the_expected_recall_and_their_seed():
    rows = np.arange(20_000) % 51 - 1
    ranks = metrics.random_ranks(51, rows, seed=3)
    expected = metrics.chance_at(51, rows, [10, 50, 51])
    assert metrics.recall_at(ranks, [10])[10] == pytest.approx(expected[10], abs=0.01)
    assert expected[51] == 1.0 == metrics.recall_at(ranks, [51])[51]
    assert ranks[rows >= 0].max() == 50
    assert (ranks == metrics.random_ranks(51, rows, seed=3)).all()
    assert (ranks != metrics.random_ranks(51, rows, seed=4)).any()


def test_nan_empty_pools_and_a_query_that_is_its_own_target_are_refused():
    pool = np.eye(3, dtype=np.float32)
    row, target = np.array([0]), np.array([1])
    broken = pool.copy()
    broken[2, 0] = np.nan
    with pytest.raises(DataError, match="NaN"):
        metrics.target_ranks(pool[:1], broken, row, target)
    with pytest.raises(DataError, match="pool is empty"):
        metrics.target_ranks(pool[:1], pool[:0], row, target)
    with pytest.raises(DataError, match="its own target"):
        metrics.target_ranks(pool[:1], pool, row, row)
