"""Would other users give the same figure: bootstrap intervals over users, and paired tests over users.

All randomness comes from the seed given, so the same scores give the same intervals.
"""

from __future__ import annotations

import numpy as np

from notellm2_ray.core.run import stream_seed

RESAMPLES, FEWEST_RESAMPLES = 1000, 200
PERMUTATIONS = 5000
_CHUNK_BYTES = 32 << 20
_WEIGHT_BYTES = 256 << 20


def resampled_weights(user_groups: np.ndarray, seed: int, num_resamples: int | None = None) -> np.ndarray:
    """How often each example counts in each bootstrap resample of the users.

    Users are drawn with replacement; all examples of a user come together. The same users and seed give the same
    resamples, so that two methods can be compared resample by resample.

    Args:
        user_groups: (E,) int, the user of each example, numbered from 0.
        num_resamples: B; None: 1,000, fewer (at least 200) where the weights would take more than 256 MiB.

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
    for row in weights:
        row[:] = np.bincount(rng.integers(num_users, size=num_users), minlength=num_users)[user_groups]
    return weights


def interval(values: np.ndarray, confidence: float) -> tuple[float, float] | None:
    """The percentile interval of bootstrap values; None where there are none that are finite."""
    finite = np.asarray(values)[np.isfinite(values)]
    if not len(finite):
        return None
    low, high = np.quantile(finite, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def bootstrap_p(differences: np.ndarray) -> float | None:
    """Two-sided p of "no difference" from the bootstrap values of a difference, never below 1 / (B + 1)."""
    finite = np.asarray(differences)[np.isfinite(differences)]
    if not len(finite):
        return None
    tail = min(np.count_nonzero(finite <= 0), np.count_nonzero(finite >= 0))
    return float(min(1.0, 2 * (tail + 1) / (len(finite) + 1)))


def permutation_tests(
    differences: np.ndarray, user_groups: np.ndarray, seed: int, num_permutations: int = PERMUTATIONS
) -> np.ndarray:
    """Two-sided paired permutation tests over users: were the two methods' names swapped at random for each user?

    Args:
        differences: (E, T) a figure of one method minus that of the other, per example, for each of T tests.
        user_groups: (E,) int, the user of each example; a user is swapped as a whole.

    Returns:
        (T,) p, never below 1 / (permutations + 1); NaN where there are no examples.
    """
    num_tests = differences.shape[1]
    if not len(differences):
        return np.full(num_tests, np.nan)
    _, user = np.unique(user_groups, return_inverse=True)
    gains = np.zeros((int(user.max()) + 1, num_tests))
    np.add.at(gains, user, differences)
    # The permuted sum of a swap of all is as far from 0 as ours: rounding must not make it nearer.
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
