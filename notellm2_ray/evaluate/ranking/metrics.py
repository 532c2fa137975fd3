"""How well scores put each target above its own negatives: ranks, AUC, HR, MRR and NDCG.

Rows are candidates; ``groups`` gives the example of each row, numbered from 0. Every example has one target (label
true) and at least one negative. A negative that scores as high as the target counts as above it in a rank, and as half
a win in an AUC.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from notellm2_ray.core.errors import DataError


def check_groups(groups: np.ndarray, labels: np.ndarray, num_examples: int) -> None:
    """Raise :class:`DataError` unless each example has exactly one target and at least one negative."""
    targets = np.bincount(groups[labels], minlength=num_examples)
    negatives = np.bincount(groups[~labels], minlength=num_examples)
    wrong = np.flatnonzero((targets != 1) | (negatives < 1))
    if len(wrong):
        first = wrong[0]
        raise DataError(
            f"{len(wrong)} of {num_examples} examples do not have one target and some negatives; the example at "
            f"{first} has {targets[first]} targets and {negatives[first]} negatives: run the sequences stage again"
        )


def target_ranks(groups: np.ndarray, labels: np.ndarray, scores: np.ndarray, num_examples: int) -> np.ndarray:
    """Rank of each example's target among its candidates.

    Args:
        groups: (R,) int, the example of each row.
        labels: (R,) bool, true for targets.
        scores: (R,) float; may be infinite, but not NaN.
        num_examples: E.

    Returns:
        (E,) int64: 1 + the number of negatives that score at least as high as the target.
    """
    own = _target_scores(groups, labels, scores, num_examples)
    above = ~labels & (scores >= own[groups])
    return 1 + np.bincount(groups[above], minlength=num_examples)


def example_auc(groups: np.ndarray, labels: np.ndarray, scores: np.ndarray, num_examples: int) -> np.ndarray:
    """(E,) share of each example's negatives that score below its target; a tie counts half."""
    own = _target_scores(groups, labels, scores, num_examples)
    won = np.where(scores < own[groups], 1.0, np.where(scores == own[groups], 0.5, 0.0))
    num_negatives = np.bincount(groups[~labels], minlength=num_examples)
    return np.bincount(groups[~labels], weights=won[~labels], minlength=num_examples) / num_negatives


def hit_at(ranks: np.ndarray, k: int) -> np.ndarray:
    """(E,) 1 where the target is among the first k (HR@k, which is Recall@k with one target)."""
    return (ranks <= k).astype(np.float64)


def reciprocal_rank_at(ranks: np.ndarray, k: int) -> np.ndarray:
    """(E,) 1 / rank where the target is among the first k, else 0 (MRR@k)."""
    return np.where(ranks <= k, 1.0 / ranks, 0.0)


def ndcg_at(ranks: np.ndarray, k: int) -> np.ndarray:
    """(E,) 1 / log2(rank + 1) where the target is among the first k, else 0 (NDCG@k with one relevant note)."""
    return np.where(ranks <= k, 1.0 / np.log2(ranks + 1.0), 0.0)


def main_figures(cutoffs: Sequence[int]) -> list[str]:
    """The paper's figures, at k = 5 if that was measured, with the AUC per user and NDCG."""
    k = 5 if 5 in cutoffs else cutoffs[0]
    return ["auc", "auc_norm", "user_auc", f"hr@{k}", f"mrr@{k}", f"ndcg@{k}"]


def example_figures(
    groups: np.ndarray, labels: np.ndarray, scores: np.ndarray, num_examples: int, cutoffs: Sequence[int]
) -> dict[str, np.ndarray]:
    """All figures but the pooled AUC: name to (E,) float64, one value per example, whose mean is the figure."""
    ranks = target_ranks(groups, labels, scores, num_examples)
    found = {"user_auc": example_auc(groups, labels, scores, num_examples)}
    for name, at in (("hr", hit_at), ("mrr", reciprocal_rank_at), ("ndcg", ndcg_at)):
        found |= {f"{name}@{k}": at(ranks, k) for k in cutoffs}
    return found


def normalised(groups: np.ndarray, scores: np.ndarray, num_examples: int) -> np.ndarray:
    """(R,) scores less the mean of their example's candidates, over the deviation of these.

    What a sequential model gives one user's candidates is not meant to be compared with what it gives another's. An
    area over all users at once needs that; these scores can be compared. Where all candidates of an example score the
    same, they get 0. Infinite scores, of candidates that were not scored, stay so.
    """
    finite = np.isfinite(scores)
    at, values = groups[finite], scores[finite].astype(np.float64)
    count = np.maximum(np.bincount(at, minlength=num_examples), 1)
    values = values - (np.bincount(at, weights=values, minlength=num_examples) / count)[at]
    deviation = np.sqrt(np.bincount(at, weights=values**2, minlength=num_examples) / count)[at]
    alike = deviation <= 1e-9 * np.abs(scores[finite])  # rounding alone
    found = scores.astype(np.float64)
    found[finite] = np.where(alike, 0.0, values / np.where(alike, 1.0, deviation))
    return found


class PooledAuc:
    """The area under the ROC curve over all rows at once, as the paper and its published code report it.

    It is the share of all (target, negative) pairs, across users too, in which the target scores higher; a tie counts
    half. So it also measures whether scores of different users are comparable. The scores are sorted once; then the
    area can be computed for many weightings of the examples, as a bootstrap needs.
    """

    def __init__(self, groups: np.ndarray, labels: np.ndarray, scores: np.ndarray) -> None:
        """Take the (R,) int example, (R,) bool label and (R,) float score of each row."""
        values, codes = np.unique(scores, return_inverse=True)
        self._num_values = len(values)
        self._target_groups, self._target_codes = groups[labels], codes[labels]
        self._negative_groups, self._negative_codes = groups[~labels], codes[~labels]

    def __call__(self, weights: np.ndarray | None = None) -> float:
        """The area with each row weighted like its example; NaN if all targets or all negatives have the weight 0.

        Args:
            weights: (E,) float, how often each example counts; None: once each.
        """
        if weights is None:
            negative: np.ndarray = np.bincount(self._negative_codes, minlength=self._num_values).astype(np.float64)
            target = np.ones(len(self._target_codes))
        else:
            negative = np.bincount(
                self._negative_codes, weights=weights[self._negative_groups], minlength=self._num_values
            )
            target = weights[self._target_groups]
        below = np.cumsum(negative) - 0.5 * negative  # the lower ones and half of the equal ones
        pairs = target.sum() * negative.sum()
        return float(target @ below[self._target_codes] / pairs) if pairs else float("nan")


def _target_scores(groups: np.ndarray, labels: np.ndarray, scores: np.ndarray, num_examples: int) -> np.ndarray:
    own = np.empty(num_examples, dtype=scores.dtype)
    own[groups[labels]] = scores[labels]
    return own
