"""Whether one arm of an experiment is clicked more than another: lift of the click-through rate, with its interval."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from notellm2_ray.core.errors import DataError


class Lift(NamedTuple):
    """An arm against another.

    Attributes:
        rate, base_rate: clicks over exposures of either arm.
        lift: rate / base_rate - 1.
        low, high: bounds of its interval at the given confidence.
        p_value: two-sided, of no difference.
        users, base_users: that were shown anything.
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
    """Lift of one arm over a base arm, its interval by bootstrap over users.

    Users are what was drawn into the arms, and one user's exposures are alike; an interval over exposures would be far
    too narrow. A normal approximation would need many users; this does not.

    Args:
        shown: (U,) exposures of each user of the arm; all above 0.
        clicked: (U,) clicked ones among them.
        base_shown, base_clicked: (V,) the same of the base arm.
        confidence: of the interval.
        resamples: bootstrap samples of either arm's users.
        seed: of the resampling.

    Raises:
        DataError: an arm has fewer than two users, was never clicked, or has more clicks than exposures.
    """
    rng = np.random.default_rng(seed)
    rate, rates = _rates("the arm", shown, clicked, resamples, rng)
    base, bases = _rates("the base arm", base_shown, base_clicked, resamples, rng)
    # Of the logarithms: a ratio's own distribution is skewed, and a resample without a click would divide by zero.
    logs = np.log(np.maximum(rates, 1e-12)) - np.log(np.maximum(bases, 1e-12))
    low, high = np.quantile(logs, [(1 - confidence) / 2, (1 + confidence) / 2])
    beyond = min(np.mean(logs <= 0), np.mean(logs >= 0))
    p_value = min(1.0, 2 * max(float(beyond), 1 / resamples))
    return Lift(
        rate, base, rate / base - 1, float(np.expm1(low)), float(np.expm1(high)), p_value, len(shown), len(base_shown)
    )


def _rates(
    name: str, shown: np.ndarray, clicked: np.ndarray, resamples: int, rng: np.random.Generator
) -> tuple[float, np.ndarray]:
    """The click rate, and (resamples,) rates of users drawn with replacement."""
    shown, clicked = np.asarray(shown, np.float64), np.asarray(clicked, np.float64)
    if len(shown) < 2 or shown.shape != clicked.shape:
        raise DataError(f"{name} needs at least two users, with exposures and clicks of each; got {len(shown)}")
    if (shown <= 0).any() or (clicked < 0).any() or (clicked > shown).any():
        raise DataError(f"{name}: every user needs an exposure, and clicks between none and the exposures")
    if not clicked.sum():
        raise DataError(f"{name} was never clicked: there is no rate to compare yet")
    # How often each user is drawn: the same as drawing them, without a (resamples, users) table of indices.
    rates = np.empty(resamples)
    for row in range(resamples):
        times = np.bincount(rng.integers(0, len(shown), len(shown)), minlength=len(shown))
        rates[row] = times @ clicked / (times @ shown)
    return float(clicked.sum() / shown.sum()), rates
