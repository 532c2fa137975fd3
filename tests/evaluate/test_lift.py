"""The lift of one arm over another: seen where there is one, with an interval that covers it as often as it says."""

from __future__ import annotations

import numpy as np
import pytest

from notellm2_ray.core.errors import DataError
from notellm2_ray.evaluate.lift import click_lift


def arm(users, rate, seed):
    rng = np.random.default_rng(seed)
    shown = rng.integers(5, 40, users)
    own = rng.beta(rate * 8, (1 - rate) * 8, users)  # users differ: exposures of one are alike
    return shown, rng.binomial(shown, own)


def test_a_real_lift_is_seen_and_none_is_not():
    better = click_lift(*arm(1500, 0.15, 1), *arm(1500, 0.10, 2))
    assert better.low > 0 and better.low < 0.5 < better.high + 0.2 and better.p_value < 0.01
    same = click_lift(*arm(1500, 0.1, 3), *arm(1500, 0.1, 4))
    assert same.low < 0 < same.high and same.p_value > 0.05


def test_the_interval_covers_the_truth_as_often_as_it_says():
    truth, covered = 0.2, 0
    for seed in range(60):
        found = click_lift(*arm(300, 0.12, 2 * seed), *arm(300, 0.10, 2 * seed + 1), resamples=300, seed=seed)
        covered += found.low <= truth <= found.high
    assert covered >= 52  # of 60 at 95%: fewer happens once in a thousand


def test_users_and_not_exposures_are_what_varies():
    shown, clicked = np.full(40, 100), np.repeat([0, 20], 20)  # each user always or never
    found = click_lift(shown, clicked, shown, clicked)
    over_exposures = 1.96 * np.sqrt(2 * 0.9 / 0.1 / 4000)
    assert np.log1p(found.high) > 3 * over_exposures


@pytest.mark.parametrize(
    ("shown", "clicked"), [([5], [1]), ([5, 0], [1, 0]), ([5, 5], [6, 0]), ([5, 5], [0, 0]), ([5, 5], [1])]
)
def test_arms_that_cannot_be_compared_are_refused(shown, clicked):
    good = (np.array([5, 5]), np.array([1, 2]))
    with pytest.raises(DataError):
        click_lift(np.array(shown), np.array(clicked), *good)
