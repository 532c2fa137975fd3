"""Default learning rates follow the size of the model, and settings win over them."""

import pytest

from notellm2_ray.core.settings.train import TrainSettings
from notellm2_ray.train.rates import rate_for, with_rates


def test_the_paper_s_rate_at_the_paper_s_size():
    assert rate_for(7_000_000_000) == 3e-6


def test_rates_fall_with_size_between_the_bounds():
    sizes = [1, 10**6, 10**7, 135_000_000, 10**9, 7 * 10**9, 7 * 10**10]
    rates = [rate_for(size) for size in sizes]
    assert rates == sorted(rates, reverse=True) and rates[0] == 5e-4


@pytest.mark.parametrize(("size", "fresh"), [(135_000_000, 1e-3), (10**6, 2e-3)])
def test_new_parts_get_ten_times_as_much_up_to_a_bound(size, fresh):
    settings = with_rates(TrainSettings(), size)
    assert settings.connector_learning_rate == pytest.approx(fresh)


def test_what_is_set_stays():
    assert with_rates(TrainSettings(learning_rate=1e-5), 10**6) == TrainSettings(learning_rate=1e-5)
    kept = with_rates(TrainSettings(connector_learning_rate=1e-4), 10**9)
    assert kept.connector_learning_rate == 1e-4 and kept.learning_rate == rate_for(10**9)
