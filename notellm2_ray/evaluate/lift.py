"""Is one arm of an experiment clicked more than another: the lift of its click-through rate, with an interval."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from notellm2_ray.core.errors import DataError
from notellm2_ray.evaluate.statistics import bootstrap_p, interval, resampled_counts


class Lift(NamedTuple):
    """An arm compared with the base arm.

    Attributes:
        rate, base_rate: clicks over exposures of the arm and of the base arm.
        lift: rate / base_rate - 1.
        low, high: interval of the lift at the given confidence.
        p_value: two-sided, of "no difference".
        users, base_users: users who were shown anything.
    """

    rate: float
    base_rate: float
    lift: float
    low: float
    high: float
    p_value: float
    users: int
    base_users: int


def click_lift(
    shown: np.ndarray,
    clicked: np.ndarray,
    base_shown: np.ndarray,
    base_clicked: np.ndarray,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 42,
) -> Lift:
    """Lift of an arm over a base arm, tested by a bootstrap over users.

    Users were drawn into the arms, and exposures of one user are alike, so an interval over exposures would be far too
    narrow. A bootstrap, unlike a normal approximation, does not need many users.

    Args:
        shown: (U,) exposures of each user of the arm, all above 0.
        clicked: (U,) how many of them were clicked.
        base_shown, base_clicked: (V,) the same for the base arm.
        confidence: of the interval.
        resamples: bootstrap resamples of the users of each arm.
        seed: of the resampling.

    Raises:
        DataError: an arm has fewer than two users, was never clicked, or has more clicks than exposures.
    """
    rng = np.random.default_rng(seed)
    rate, rates = _rates("the arm", shown, clicked, resamples, rng)
    base, bases = _rates("the base arm", base_shown, base_clicked, resamples, rng)
    # Logarithms, since a ratio's own distribution is skewed; the bound keeps resamples without a click finite.
    logs = np.log(np.maximum(rates, 1e-12)) - np.log(np.maximum(bases, 1e-12))
    bounds, p_value = interval(logs, confidence), bootstrap_p(logs)
    assert bounds is not None and p_value is not None
    low, high = np.expm1(bounds)
    return Lift(rate, base, rate / base - 1, float(low), float(high), p_value, len(shown), len(base_shown))


def _rates(
    name: str, shown: np.ndarray, clicked: np.ndarray, resamples: int, rng: np.random.Generator
) -> tuple[float, np.ndarray]:
    """The click rate, and (resamples,) click rates of the users drawn in each resample."""
    shown, clicked = np.asarray(shown, np.float64), np.asarray(clicked, np.float64)
    if len(shown) < 2 or shown.shape != clicked.shape:
        raise DataError(f"{name} needs exposures and clicks of at least two users, got {len(shown)}")
    if (shown <= 0).any() or (clicked < 0).any() or (clicked > shown).any():
        raise DataError(f"{name}: every user needs an exposure, and no more clicks than exposures")
    if not clicked.sum():
        raise DataError(f"{name} was never clicked, so there is no rate to compare yet")
    counts = resampled_counts(len(shown), resamples, rng)
    rates = np.array([times @ clicked / (times @ shown) for times in counts])
    return float(clicked.sum() / shown.sum()), rates
