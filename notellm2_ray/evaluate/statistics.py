"""Tests of significance: would other training seeds, other query notes or other users give the same answer?

All randomness comes from the seeds given, so the same scores give the same intervals and p-values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from notellm2_ray.core.run import stream_seed

LEVEL = 0.05  # the papers': two-sided tests with p < 0.05
RESAMPLES, FEWEST_RESAMPLES = 1000, 200
PERMUTATIONS = 5000
_CHUNK_BYTES = 32 << 20
_WEIGHT_BYTES = 256 << 20


def mean_and_deviation(values: Sequence[float] | np.ndarray) -> tuple[float, float | None]:
    """Mean, and the sample standard deviation (n - 1), which is None for fewer than two values."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


# --- over seeds, and over query notes


class Comparison(NamedTuple):
    """One method against another on one figure. A p-value is None if its test is not possible."""

    difference: float  # mean over seeds of the first method minus that of the second
    p_seeds: float | None  # two-sided t-test over seeds
    seeds_test: str  # which t-test it was, or why there is none
    p_queries: float | None  # two-sided exact sign test over query notes

    @property
    def deciding(self) -> str:
        """Which test decides: "seeds" if there are enough of them, as in the paper, or else "queries"."""
        return "seeds" if self.p_seeds is not None else "queries"

    @property
    def significant(self) -> bool:
        """Whether the deciding test rejects "no difference" at 5%."""
        p = self.p_seeds if self.p_seeds is not None else self.p_queries
        return p is not None and p < LEVEL


def compare(
    hits: np.ndarray,
    other_hits: np.ndarray,
    query_groups: np.ndarray,
    *,
    fixed: bool = False,
    other_fixed: bool = False,
) -> Comparison:
    """Compare two methods by the pairs that each finds.

    Args:
        hits: (S, Q) bool or float, per seed and pair: whether the target is among the first k.
        other_hits: (S', Q) the same for the other method, on the same pairs.
        query_groups: (Q,) int: pairs with the same number share their query note and count as one observation.
        fixed: the method is deterministic (BM25), so its one figure stands for every seed.
        other_fixed: the other method is.

    Returns:
        The difference of the means and both p-values, not corrected for the number of comparisons.
    """
    means, other_means = hits.mean(axis=1), other_hits.mean(axis=1)
    p_seeds, name = seeds_test(means, other_means, fixed=fixed, other_fixed=other_fixed)
    p_queries = sign_test(hits.mean(axis=0), other_hits.mean(axis=0), query_groups)
    return Comparison(float(means.mean() - other_means.mean()), p_seeds, name, p_queries)


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


def sign_test(hits: np.ndarray, other_hits: np.ndarray, query_groups: np.ndarray) -> float | None:
    """Two-sided exact sign test over query notes; with one seed and one pair per query it is McNemar's exact test.

    Args:
        hits: (Q,) share of the seeds in which each pair was found.
        other_hits: (Q,) the same for the other method.
        query_groups: (Q,) int, equal for pairs of one query note.

    Returns:
        p, or None if there are no pairs. Queries on which both methods do equally well are left out.
    """
    from scipy import stats

    if not len(hits):
        return None
    _, group = np.unique(query_groups, return_inverse=True)
    gain = np.bincount(group, weights=np.asarray(hits, dtype=float) - np.asarray(other_hits, dtype=float))
    wins, losses = int((gain > 1e-12).sum()), int((gain < -1e-12).sum())
    if wins + losses == 0:
        return 1.0
    return float(stats.binomtest(wins, wins + losses).pvalue)


# --- over users


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


def permutation_tests(
    differences: np.ndarray, user_groups: np.ndarray, seed: int, num_permutations: int = PERMUTATIONS
) -> np.ndarray:
    """Two-sided paired permutation tests over users: the two methods' names are swapped at random for each user.

    Args:
        differences: (E, T) a figure of one method minus that of the other, per example, for each of T tests.
        user_groups: (E,) int, the user of each example; all examples of a user are swapped together.

    Returns:
        (T,) p, at least 1 / (permutations + 1); NaN if there are no examples.
    """
    num_tests = differences.shape[1]
    if not len(differences):
        return np.full(num_tests, np.nan)
    _, user = np.unique(user_groups, return_inverse=True)
    gains = np.zeros((int(user.max()) + 1, num_tests))
    np.add.at(gains, user, differences)
    # Swapping every user gives the observed sum with the other sign; rounding must not make it count as less extreme.
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
