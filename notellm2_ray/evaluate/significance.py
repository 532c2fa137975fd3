"""Is one method better than another, or was it luck: over seeds, and over query notes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.05  # the paper's: two-sided t-test with p < 0.05


class Comparison(NamedTuple):
    """One method against another on one figure. None where a test is not possible."""

    difference: float  # mean over seeds of the one minus that of the other
    p_seeds: float | None  # two-sided t-test over seeds
    seeds_test: str  # which t-test it was, or why there is none
    p_queries: float | None  # two-sided exact sign test over query notes

    @property
    def deciding(self) -> str:
        """Which of the two decides: "seeds" where there are enough of them, as in the paper, else "queries"."""
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
        other_hits: (S', Q) the same of the other method, on the same pairs.
        query_groups: (Q,) int: pairs with the same number share their query note, and count as one observation.
        fixed: the method has no randomness (BM25), so its one figure stands for every seed.
        other_fixed: the same of the other.

    Returns:
        The difference of the means and both p-values; not corrected for the number of comparisons made.
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
    """Two-sided t-test between one figure per seed of each of two methods.

    Welch's test (unequal variances): equal seeds share nothing between two models but the order of the batches. Where a
    method is fixed the others' figures are tested against it (one-sample test).

    Returns:
        p, or None where it is not defined (fewer than two seeds, or no spread at all), and the name of the test.
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
        other_hits: (Q,) the same of the other method.
        query_groups: (Q,) int, equal for pairs of one query note.

    Returns:
        p, or None where there are no pairs. Queries on which both do the same say nothing and are left out.
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


def mean_and_deviation(values: Sequence[float] | np.ndarray) -> tuple[float, float | None]:
    """Mean, and the sample standard deviation (n - 1) or None for fewer than two values."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None
