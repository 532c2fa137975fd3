"""The tests of significance, on numbers worked out by hand and against other tests."""

import numpy as np
import pytest
from scipy import stats

from notellm2_ray.evaluate.statistics import (
    bootstrap_p,
    compare,
    interval,
    mean_and_deviation,
    permutation_tests,
    resampled_weights,
    seeds_test,
    sign_test,
)


def test_welch_on_three_seeds_each():
    # means 2 and 5, variances 1 and 1: t = -3 / sqrt(2/3), 4 degrees of freedom
    p, name = seeds_test([1, 2, 3], [4, 5, 6])
    assert p == pytest.approx(0.02131, abs=1e-4)
    assert name == "Welch's t-test"
    assert seeds_test([4, 5, 6], [1, 2, 3])[0] == pytest.approx(p)


def test_a_deterministic_method_is_a_constant_and_one_seed_has_no_t_test():
    # t = (2 - 5) / (1 / sqrt(3)) = -5.196, 2 degrees of freedom
    assert seeds_test([1, 2, 3], [5], other_fixed=True)[0] == pytest.approx(0.0351, abs=1e-3)
    assert seeds_test([5], [1, 2, 3], fixed=True)[0] == pytest.approx(0.0351, abs=1e-3)
    assert seeds_test([1], [2])[0] is None
    assert seeds_test([1, 1], [2, 2])[0] is None  # no spread: t is not defined
    assert seeds_test([1], [2], fixed=True, other_fixed=True)[0] is None


def test_one_seed_is_mcnemars_exact_test():
    hits, others = np.array([1] * 9 + [0] * 1 + [1] * 90), np.array([0] * 9 + [1] * 1 + [1] * 90)
    # 9 wins, 1 loss: 2 * (C(10,0) + C(10,1)) / 2^10
    assert sign_test(hits, others, np.arange(100)) == pytest.approx(22 / 1024)
    assert sign_test(hits, hits, np.arange(100)) == 1.0
    assert sign_test(hits[:0], others[:0], np.arange(0)) is None


def test_pairs_of_one_query_are_one_observation():
    hits, others = np.ones(10), np.zeros(10)
    assert sign_test(hits, others, np.arange(10)) == pytest.approx(2 / 1024)
    assert sign_test(hits, others, np.zeros(10, dtype=int)) == 1.0  # one win of one


def test_seeds_decide_where_there_are_enough_of_them_and_queries_elsewhere():
    better = np.stack([np.arange(100) < n for n in (60, 62, 64)])
    worse = np.stack([np.arange(100) < n for n in (30, 32, 34)])
    several = compare(better, worse, np.arange(100))
    assert several.difference == pytest.approx(0.3)
    assert (several.deciding, several.significant) == ("seeds", True)
    single = compare(better[:1], worse[:1], np.arange(100))
    assert (single.p_seeds, single.deciding, single.significant) == (None, "queries", True)
    assert not compare(better[:1], better[:1], np.arange(100)).significant


def test_deviation_is_the_samples():
    assert mean_and_deviation([1, 2, 3]) == (2.0, 1.0)
    assert mean_and_deviation([4]) == (4.0, None)


def test_users_are_resampled_as_a_whole():
    users = np.array([0, 0, 1, 2, 2, 2])
    weights = resampled_weights(users, seed=3, num_resamples=200)
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, 3] == weights[:, 5]).all()
    drawn = weights[:, 0] + weights[:, 2] + weights[:, 3]
    assert (drawn == 3).all()
    assert weights.mean(axis=0) == pytest.approx(np.ones(6), abs=0.2)


def test_the_interval_of_a_mean_is_about_the_normal_one():
    values = np.random.default_rng(1).normal(size=400)
    weights = resampled_weights(np.arange(400), seed=1)
    low, high = interval(weights @ values / weights.sum(axis=1), 0.95)
    half = 1.96 * values.std(ddof=1) / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)
    assert interval(np.array([np.nan]), 0.95) is None


def test_permutations_agree_with_the_t_test_and_count_users_once():
    gains = np.random.default_rng(4).normal(0.15, 1.0, size=200)
    (p,) = permutation_tests(gains[:, None], np.arange(200), seed=1)
    assert p == pytest.approx(stats.ttest_1samp(gains, 0).pvalue, abs=0.02)
    # ten wins of one user are one observation: half of the swaps are as extreme on each side
    same, many = (
        permutation_tests(np.ones((10, 2)), np.zeros(10, dtype=int), 1),
        permutation_tests(np.ones((10, 1)), np.arange(10), 1),
    )
    assert same.tolist() == [1.0, 1.0]
    assert many[0] == pytest.approx(2 / 1024, abs=0.002)
    assert permutation_tests(np.zeros((5, 1)), np.arange(5), 1)[0] == 1.0


def test_the_bootstrap_p_is_never_nothing():
    assert bootstrap_p(np.ones(999)) == pytest.approx(2 / 1000)
    assert bootstrap_p(np.zeros(10)) == 1.0
    assert bootstrap_p(np.array([])) is None
