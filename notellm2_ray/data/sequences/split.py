"""The split of users: which users train, validate and test.

Both kinds of split come down to two bounds, so that any task can tell a user's side by itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.run import stream_seed
from notellm2_ray.core.settings import CandidateSettings
from notellm2_ray.data.arrays import mix
from notellm2_ray.data.sequences.histories import Histories

TRAIN, VALID, TEST = SIDES = ("train", "valid", "test")
UNTESTED = "untested"  # a test user beyond candidates.max_test_users


class UserSplit(NamedTuple):
    """The side of every user, which follows from the user's key or from the time of the last event."""

    by_time: bool
    seed: int
    bounds: tuple[int, int]  # where validation and test begin: microseconds by time, hashes by users
    sampled_to: int  # the largest hash of the test users that are tested

    def sides(self, keys: np.ndarray, last_times: np.ndarray) -> np.ndarray:
        """(U,) object array of TRAIN, VALID, TEST or UNTESTED.

        Args:
            keys: (U,) uint64, the users' keys.
            last_times: (U,) microseconds of each user's last event.
        """
        values = last_times if self.by_time else _hashes(keys, self.seed, "split")
        valid, test = values >= self.bounds[0], values >= self.bounds[1]
        sampled = _hashes(keys, self.seed, "tested") <= np.uint64(self.sampled_to)
        return np.select([test & sampled, test, valid], [TEST, UNTESTED, VALID], TRAIN).astype(object)

    def known_events(self, histories: Histories, min_events: int) -> np.ndarray:
        """(E,) bool: the events that may be counted in a popularity."""
        if self.by_time:
            return histories.times < self.bounds[0]
        known = np.ones(len(histories.notes), bool)
        last = histories.offsets[1:] - 1
        held_out = (self.sides(histories.keys, histories.times[last]) != TRAIN) & (histories.lengths >= min_events)
        known[last[held_out]] = False
        return known


def fit_split(parts: Iterable[tuple[np.ndarray, np.ndarray]], settings: CandidateSettings, seed: int) -> UserSplit:
    """The split of the users that have a target.

    By users, the shares are exact up to rounding. By time, the bounds are quantiles of the targets' times; a target at
    the time of a bound is on the later side.

    Args:
        parts: keys of these users, and the times of their last events in microseconds.

    Raises:
        DataError: too few users have a target, or a side has none.
    """
    by_time = settings.split_by == "time"
    values: list[np.ndarray] = []
    samples: list[np.ndarray] = []
    for keys, times in parts:
        values.append(times if by_time else _hashes(keys, seed, "split"))
        samples.append(_hashes(keys, seed, "tested"))
    ordered = np.sort(np.concatenate(values)) if values else np.zeros(0, np.int64)
    count = len(ordered)
    num_test = max(1, round(settings.test_share * count))
    num_valid = max(1, round(settings.validation_share * count))
    if num_test + num_valid >= count:
        raise DataError(
            f"only {count} users have a target (sequences.min_events events of sequences.positive_actions): too few "
            "for training, validation and test. Give a longer event log, or lower candidates.test_share"
        )
    bounds = ordered[[count - num_test - num_valid, count - num_test]]
    left = np.searchsorted(ordered, bounds)
    if left[0] == 0 or left[1] == left[0]:
        side = "training" if left[0] == 0 else "validation"
        raise DataError(
            f"candidates.split_by=time leaves no target for {side}: too many of {count} users' last events are at the "
            "same time. Use candidates.split_by=users, or other shares"
        )
    tests = np.concatenate(values) >= bounds[1]
    sampled = np.sort(np.concatenate(samples)[tests])[: settings.max_test_users or None]
    return UserSplit(by_time, seed, (int(bounds[0]), int(bounds[1])), int(sampled[-1]))


def _hashes(keys: np.ndarray, seed: int, stream: str) -> np.ndarray:
    return mix(keys ^ np.uint64(stream_seed(seed, "sequences", stream)))
