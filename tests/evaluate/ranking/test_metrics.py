"""Ranking figures against plain twins, and against scikit-learn and ir-measures."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from notellm2_ray.core.errors import DataError
from notellm2_ray.evaluate.ranking.metrics import (
    PooledAuc,
    check_groups,
    example_auc,
    example_figures,
    ndcg_at,
    normalised,
    target_ranks,
)

CUTOFFS = (1, 3, 5)


@st.composite
def candidate_lists(draw):
    """Examples of one target and some negatives, scores from few values so that there are ties."""
    sizes = draw(st.lists(st.integers(2, 7), min_size=1, max_size=6))
    groups = np.repeat(np.arange(len(sizes)), sizes)
    labels = np.zeros(len(groups), dtype=bool)
    for start, size in zip(np.cumsum([0, *sizes[:-1]]), sizes, strict=True):
        labels[start + draw(st.integers(0, size - 1))] = True
    values = st.sampled_from([-np.inf, 0.0, 0.25, 0.5, 1.0, np.inf])
    scores = np.array(draw(st.lists(values, min_size=len(groups), max_size=len(groups))))
    order = np.array(draw(st.permutations(range(len(groups)))))
    return groups[order], labels[order], scores[order], len(sizes)


@settings(max_examples=60, deadline=None)
@given(candidate_lists())
def test_ranks_and_example_auc_are_those_of_a_loop(case):
    groups, labels, scores, num = case
    ranks, areas = target_ranks(*case), example_auc(*case)
    for example in range(num):
        mine = scores[(groups == example) & labels][0]
        others = scores[(groups == example) & ~labels]
        assert ranks[example] == 1 + sum(other >= mine for other in others)
        assert areas[example] == pytest.approx(np.mean([(mine > o) + 0.5 * (mine == o) for o in others]))


@settings(max_examples=60, deadline=None)
@given(candidate_lists(), st.integers(0, 3))
def test_pooled_auc_is_the_share_of_pairs_won_and_a_weight_is_a_repetition(case, seed):
    groups, labels, scores, num = case
    area = PooledAuc(groups, labels, scores)
    won = [(t > n) + 0.5 * (t == n) for t in scores[labels] for n in scores[~labels]]
    assert area() == pytest.approx(np.mean(won))
    weights = np.random.default_rng(seed).integers(1, 4, size=num)
    times = weights[groups]
    repeated = PooledAuc(np.repeat(groups, times), np.repeat(labels, times), np.repeat(scores, times))
    assert area(weights.astype(float)) == pytest.approx(repeated())
    assert np.isnan(area(np.zeros(num)))


def _random_case(num=40, size=21):
    rng = np.random.default_rng(7)
    groups = np.repeat(np.arange(num), size)
    labels = np.tile(np.arange(size) == 0, num)
    return groups, labels, rng.normal(size=len(groups)) + labels, num  # no ties


def test_figures_are_those_of_ir_measures():
    measures = pytest.importorskip("ir_measures")
    groups, labels, scores, _ = case = _random_case()
    rows = list(zip(groups, labels, scores, strict=True))
    qrels = [measures.Qrel(str(g), str(at), int(label)) for at, (g, label, _) in enumerate(rows)]
    run = [measures.ScoredDoc(str(g), str(at), float(score)) for at, (g, _, score) in enumerate(rows)]
    found = {name: values.mean() for name, values in example_figures(*case, CUTOFFS).items()}
    for k in CUTOFFS:
        wanted = [measures.R @ k, measures.RR @ k, measures.nDCG @ k]
        theirs = measures.calc_aggregate(wanted, qrels, run)
        assert [found[f"{name}@{k}"] for name in ("hr", "mrr", "ndcg")] == pytest.approx([theirs[w] for w in wanted])


def test_areas_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    groups, labels, scores, num = case = _random_case()
    scores = scores.round(1)  # with ties
    assert PooledAuc(groups, labels, scores)() == pytest.approx(metrics.roc_auc_score(labels, scores))
    mine = groups == 3
    area = example_auc(groups, labels, scores, num)[3]
    assert area == pytest.approx(metrics.roc_auc_score(labels[mine], scores[mine]))
    assert case[3] == num


def test_equal_scores_everywhere_are_the_worst_rank_and_half_an_area():
    groups, labels, _, num = _random_case(num=3)
    same = np.zeros(len(groups))
    assert target_ranks(groups, labels, same, num).tolist() == [21, 21, 21]
    assert example_auc(groups, labels, same, num).tolist() == [0.5] * 3
    assert PooledAuc(groups, labels, same)() == 0.5


def test_ndcg_of_the_first_second_and_none():
    assert ndcg_at(np.array([1, 2, 6]), 5) == pytest.approx([1, 1 / np.log2(3), 0])


@pytest.mark.parametrize("labels", [[1, 1, 0], [0, 0, 0], [1]])
def test_an_example_needs_one_target_and_a_negative(labels):
    with pytest.raises(DataError, match="one target and some negatives"):
        check_groups(np.zeros(len(labels), dtype=int), np.array(labels, dtype=bool), 1)


def test_normalised_scores_can_be_compared_between_users():
    groups, labels = np.repeat([0, 1], 3), np.array([True, False, False] * 2)
    scores = np.array([3.0, 1.0, 2.0, 103.0, 101.0, 102.0])  # one user's scores are another's plus 100
    assert PooledAuc(groups, labels, scores)() < 1.0
    assert PooledAuc(groups, labels, normalised(groups, scores, 2))() == 1.0
    z = np.array([1.2247449, -1.2247449, 0.0])
    assert normalised(groups, scores, 2) == pytest.approx(np.concatenate([z, z]))
    equal = normalised(groups, np.array([0.1, 0.1, 0.1, -np.inf, 1.0, 3.0]), 2)
    assert equal.tolist() == [0.0, 0.0, 0.0, -np.inf, -1.0, 1.0]
