"""Tests of significance: would other training seeds, other query notes or other users give the same answer?

All randomness comes from the seeds given, so the same scores give the same intervals and p-values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from notellm2_ray.core.run import stream_seed

LEVEL = 0.05  # the papers': two-sided tests with p < 0.05
RESAMPLES, FEWEST_RESAMPLES = 1000, 200
PERMUTATIONS = 5000
_NORMAL_UNITS = 10_000
_CHUNK_BYTES = 32 << 20
_WEIGHT_BYTES = 256 << 20


def mean_and_deviation(values: Sequence[float] | np.ndarray) -> tuple[float, float | None]:
    """Mean, and the sample standard deviation (n - 1), which is None for fewer than two values."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


# --- over seeds


def seeds_test(
    values: Sequence[float] | np.ndarray,
    others: Sequence[float] | np.ndarray,
    *,
    fixed: bool = False,
    other_fixed: bool = False,
) -> tuple[float | None, str]:
    """Two-sided t-test between the figures that two methods reach, one per seed.

    It is Welch's test (unequal variances), unpaired: two models of equal seeds share only the order of the batches. If
    one method is fixed, the figures of the other are tested against its one figure (one-sample test).

    Returns:
        p, or None if it is not defined (fewer than two seeds, or no spread at all), and the name of the test.
    """
    from scipy import stats

    if fixed and other_fixed:
        return None, "both methods are deterministic"
    if fixed or other_fixed:
        sample, constant = (others, values[0]) if fixed else (values, others[0])
        if len(sample) < 2 or np.ptp(sample) == 0:
            return None, "fewer than two different figures"
        return float(stats.ttest_1samp(sample, constant).pvalue), "one-sample t-test"
    if min(len(values), len(others)) < 2 or (np.ptp(values) == 0 and np.ptp(others) == 0):
        return None, "fewer than two seeds, or no spread"
    (mean, deviation), (other_mean, other_deviation) = mean_and_deviation(values), mean_and_deviation(others)
    test = stats.ttest_ind_from_stats(
        mean, deviation, len(values), other_mean, other_deviation, len(others), equal_var=False
    )
    return float(test.pvalue), "Welch's t-test"


# --- over users or query notes: the units, each with all its examples


def resampled_counts(num_users: int, num_resamples: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """For each bootstrap resample, (U,) how often each user is drawn: as many draws as users, with replacement."""
    for _ in range(num_resamples):
        yield np.bincount(rng.integers(num_users, size=num_users), minlength=num_users)


def resampled_weights(user_groups: np.ndarray, seed: int, num_resamples: int | None = None) -> np.ndarray:
    """How often each example counts in each bootstrap resample of the users.

    A user is drawn with all their examples. The same users and seed give the same resamples, so that two methods can be
    compared resample by resample.

    Args:
        user_groups: (E,) int, the user of each example, numbered from 0.
        num_resamples: B. None: 1,000, or fewer (at least 200) if the weights would take more than 256 MiB.

    Returns:
        (B, E) float64 weights.
    """
    num_examples = len(user_groups)
    if num_resamples is None:
        fitting = _WEIGHT_BYTES // (8 * max(num_examples, 1))
        num_resamples = min(RESAMPLES, max(FEWEST_RESAMPLES, fitting))
    num_users = int(user_groups.max()) + 1 if num_examples else 0
    rng = np.random.default_rng(stream_seed(seed, "bootstrap over users"))
    weights = np.empty((num_resamples, num_examples))
    for row, counts in zip(weights, resampled_counts(num_users, num_resamples, rng), strict=True):
        row[:] = counts[user_groups]
    return weights


def interval(values: np.ndarray, confidence: float) -> tuple[float, float] | None:
    """The percentile interval of bootstrap values; None if none of them is finite."""
    finite = np.asarray(values)[np.isfinite(values)]
    if not len(finite):
        return None
    low, high = np.quantile(finite, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def bootstrap_p(differences: np.ndarray) -> float | None:
    """Two-sided p-value of "no difference" from B bootstrap values of a difference, at least 2 / (B + 1).

    None if none of them is finite.
    """
    finite = np.asarray(differences)[np.isfinite(differences)]
    if not len(finite):
        return None
    tail = min(np.count_nonzero(finite <= 0), np.count_nonzero(finite >= 0))
    return float(min(1.0, 2 * (tail + 1) / (len(finite) + 1)))


def normal_p(difference: float, resampled: np.ndarray, num_units: int) -> float | None:
    """Two-sided p-value of "no difference" from a difference and its B bootstrap values, for a figure that is no sum.

    The difference over its bootstrap deviation is compared with Student's t of one degree of freedom less than there
    are units. Unlike :func:`bootstrap_p` it can be small enough to survive a correction for many comparisons.

    Returns:
        p; None if fewer than two values are finite.
    """
    from scipy import stats

    finite = np.asarray(resampled)[np.isfinite(resampled)]
    if len(finite) < 2:
        return None
    deviation = float(np.std(finite, ddof=1))
    if deviation < 1e-12:  # equal rows, or a single unit: nothing speaks for a difference
        return 1.0
    return float(2 * stats.t.sf(abs(difference) / deviation, max(num_units - 1, 1)))


def permutation_tests(
    differences: np.ndarray, groups: np.ndarray, seed: int, num_permutations: int = PERMUTATIONS
) -> np.ndarray:
    """Two-sided paired permutation tests over units: the two methods' names are swapped at random for each unit.

    Of more than 10,000 units, the sum over random swaps is normal to all digits that matter, and is taken as such.

    Args:
        differences: (E, T) a figure of one method minus that of the other, per example, for each of T tests.
        groups: (E,) int, the unit of each example; all examples of a unit are swapped together.

    Returns:
        (T,) p, at least 1 / (permutations + 1) unless normal; NaN if there are no examples.
    """
    from scipy import stats

    num_tests = differences.shape[1]
    if not len(differences):
        return np.full(num_tests, np.nan)
    _, unit = np.unique(groups, return_inverse=True)
    gains = np.stack([np.bincount(unit, weights=column) for column in differences.T], axis=1)
    if len(gains) > _NORMAL_UNITS:
        spread = np.sqrt((gains**2).sum(axis=0))
        return 2 * stats.norm.sf(np.abs(gains.sum(axis=0)) / np.maximum(spread, 1e-300))
    gains = gains[np.lexsort(gains.T)]  # the same p in whatever order the units come
    # Swapping every unit gives the observed sum with the other sign; rounding must not make it count as less extreme.
    observed = np.abs(gains.sum(axis=0)) * (1 - 1e-12) - 1e-12
    rng = np.random.default_rng(stream_seed(seed, "permutations over users"))
    extreme, done = np.zeros(num_tests), 0
    step = max(1, _CHUNK_BYTES // (8 * max(gains.shape)))
    while done < num_permutations:
        count = min(step, num_permutations - done)
        signs = rng.integers(2, size=(count, len(gains)), dtype=np.int8) * 2.0 - 1.0
        extreme += np.count_nonzero(np.abs(signs @ gains) >= observed, axis=0)
        done += count
    return (extreme + 1) / (num_permutations + 1)
