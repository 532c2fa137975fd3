"""The tests of significance, on numbers worked out by hand and against other tests."""

import numpy as np
import pytest
from scipy import stats

from notellm2_ray.evaluate.statistics import (
    bootstrap_p,
    interval,
    mean_and_deviation,
    normal_p,
    permutation_tests,
    resampled_weights,
    seeds_test,
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


def test_the_p_of_a_permutation_does_not_depend_on_the_order_of_units_and_is_normal_for_many():
    gains = np.random.default_rng(4).normal(0.02, 1.0, size=(12_000, 2))
    units = np.arange(12_000)
    shuffled = np.random.default_rng(5).permutation(600)
    few = permutation_tests(gains[:600], units[:600], seed=1)
    assert permutation_tests(gains[:600][shuffled], units[:600], seed=1) == pytest.approx(few, abs=1e-12)
    expected = [stats.ttest_1samp(column, 0).pvalue for column in gains.T]
    assert permutation_tests(gains, units, seed=1) == pytest.approx(expected, abs=0.001)


def test_the_bootstrap_of_a_figure_agrees_with_the_t_test_of_its_mean():
    gains = np.random.default_rng(8).normal(0.2, 1.0, size=80)
    weights = resampled_weights(np.arange(80), seed=1, num_resamples=4000)
    means = weights @ gains / weights.sum(axis=1)
    assert normal_p(gains.mean(), means, 80) == pytest.approx(stats.ttest_1samp(gains, 0).pvalue, rel=0.2)
    assert normal_p(0.0, np.zeros(9), 80) == 1.0
    assert normal_p(0.1, np.array([np.nan, 0.1]), 80) is None


def test_the_bootstrap_p_is_never_nothing():
    assert bootstrap_p(np.ones(999)) == pytest.approx(2 / 1000)
    assert bootstrap_p(np.zeros(10)) == 1.0
    assert bootstrap_p(np.array([])) is None
