"""Which event of a user is foretold, and which users train, validate and test.

Both kinds of split come down to two bounds, so that any task can tell a user's side by itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.run import stream_seed
from notellm2_ray.core.schema import CANDIDATE_SCHEMA, EXAMPLE_SCHEMA
from notellm2_ray.core.settings import CandidateSettings
from notellm2_ray.data.event_log import hash_strings
from notellm2_ray.data.sequences.histories import Histories, offsets_of

TRAIN, VALID, TEST = SIDES = ("train", "valid", "test")
UNTESTED = "untested"  # a test user beyond candidates.max_test_users
PUBLISHED_NOTES = 6  # of each user, the most popular ones (the published notebook)


class TargetSplit(NamedTuple):
    """Who is on which side. A user belongs to one side, by the key or by the time of the last event."""

    by_time: bool
    seed: int
    bounds: tuple[int, int]  # by time: the first microsecond of validation, of test; by users: the keys from which
    sampled_to: int  # largest key of the test users that are tested

    def sides(self, users: pa.Array, last_times: np.ndarray) -> np.ndarray:
        """(U,) object array of TRAIN, VALID, TEST or UNTESTED.

        Args:
            last_times: (U,) microseconds of each user's last event.
        """
        values = last_times if self.by_time else _keys(users, self.seed, "split")
        valid, test = values >= self.bounds[0], values >= self.bounds[1]
        sampled = _keys(users, self.seed, "tested") <= np.uint64(self.sampled_to)
        return np.select([test & sampled, test, valid], [TEST, UNTESTED, VALID], TRAIN).astype(object)

    def known_events(self, histories: Histories, min_events: int) -> np.ndarray:
        """(E,) bool: the events that may count in a popularity."""
        if self.by_time:
            return histories.times < self.bounds[0]
        known = np.ones(len(histories.notes), bool)
        last = histories.offsets[1:] - 1
        held_out = (self.sides(histories.users, histories.times[last]) != TRAIN) & (histories.lengths >= min_events)
        known[last[held_out]] = False
        return known


def fit_split(parts: Iterable[tuple[pa.Array, np.ndarray]], settings: CandidateSettings, seed: int) -> TargetSplit:
    """The split of the users that have a target.

    By users, the shares are exact up to rounding. By time, the bounds are quantiles of the targets' times; targets at
    the very moment of a bound are on its later side.

    Args:
        parts: ids of such users, and the times of their last events in microseconds.

    Raises:
        DataError: nobody has a target, or a side is left without any user.
    """
    by_time = settings.split_by == "time"
    values: list[np.ndarray] = []
    samples: list[np.ndarray] = []
    for users, times in parts:
        values.append(times if by_time else _keys(users, seed, "split"))
        samples.append(_keys(users, seed, "tested"))
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
            f"candidates.split_by=time leaves no target for {side}: of {count} users' last events too many are at the "
            "same moment. Use candidates.split_by=users, or other shares"
        )
    tests = np.concatenate(values) >= bounds[1]
    sampled = np.sort(np.concatenate(samples)[tests])[: settings.max_test_users or None]
    return TargetSplit(by_time, seed, (int(bounds[0]), int(bounds[1])), int(sampled[-1]))


class Examples(NamedTuple):
    """Targets within some histories: the history of an example is everything before its target."""

    users: np.ndarray  # (X,) int64
    positions: np.ndarray  # (X,) int64, of the target in the user's sequence
    blocks: np.ndarray  # (X,) int64, the block that ends just before the target; -1: nothing is before it

    def targets(self, histories: Histories) -> np.ndarray:
        """(X,) int64, the targets' places in the histories' flat arrays."""
        return histories.offsets[self.users] + self.positions


def last_targets(histories: Histories, numbers: np.ndarray, wanted: np.ndarray) -> Examples:
    """Each wanted user's last event. ``numbers``: (E,) blocks of all events; ``wanted``: (U,) bool."""
    users = np.flatnonzero(wanted)
    return _examples(histories, numbers, users, histories.lengths[users] - 1)


def block_targets(histories: Histories, numbers: np.ndarray, wanted: np.ndarray) -> Examples:
    """For each wanted user the first event after every block that is over, and the last event, in time's order."""
    positions = histories.positions
    last = positions == np.repeat(histories.lengths - 1, histories.lengths)
    begins = (positions > 0) & (np.diff(numbers, prepend=0) != 0)
    found = np.flatnonzero((begins | last) & np.repeat(wanted, histories.lengths))
    return _examples(histories, numbers, histories.owners[found], positions[found])


def published_histories(histories: Histories, clicks: np.ndarray) -> Histories:
    """The published construction: of each user the 6 most popular notes, put in time's order again; the last of them
    is the target. Among equally popular notes the earlier are taken.

    It leaks: a target is popular because it was chosen for it, while negatives are drawn uniformly, and the
    popularity that chooses counts the very targets. Popularity alone then reaches an AUC of .80 on MicroLens-50k.

    Args:
        clicks: (number of notes,) users of each note, targets and all.
    """
    owners, positions = histories.owners, histories.positions
    order = np.lexsort((positions, -clicks[histories.notes], owners))
    kept = np.zeros(len(order), bool)
    kept[order] = positions < PUBLISHED_NOTES  # the n-th row of a user in this order is its n-th most popular
    return histories.filter(kept)


def example_table(histories: Histories, examples: Examples, vocabulary: pa.Array) -> pa.Table:
    """EXAMPLE_SCHEMA, a row per example."""
    starts = histories.offsets[examples.users]
    offsets = offsets_of(examples.positions)
    inside = np.arange(offsets[-1]) - np.repeat(offsets[:-1], examples.positions)
    history = histories.notes[np.repeat(starts, examples.positions) + inside]
    targets = examples.targets(histories)
    times = pa.array(histories.times[targets], pa.int64()).cast(EXAMPLE_SCHEMA.field("timestamp").type)
    columns = [
        example_ids(histories, examples),
        histories.users.take(pa.array(examples.users)),
        pa.array(examples.blocks, pa.int32()),
        pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), vocabulary.take(pa.array(history))),
        vocabulary.take(pa.array(histories.notes[targets])),
        times,
    ]
    return pa.table(columns, schema=EXAMPLE_SCHEMA)


def example_ids(histories: Histories, examples: Examples) -> pa.Array:
    """(X,) ids: user_id/number of the target in the user's sequence."""
    users = histories.users.take(pa.array(examples.users)).to_pylist()
    numbers = examples.positions.tolist()
    return pa.array([f"{user}/{number}" for user, number in zip(users, numbers, strict=True)], pa.string())


def candidate_table(
    ids: pa.Array, targets: np.ndarray, negatives: np.ndarray, order_by: np.ndarray, vocabulary: pa.Array
) -> pa.Table:
    """CANDIDATE_SCHEMA, the candidates of an example side by side, in the order of its keys.

    Args:
        targets: (X,) note codes.
        negatives: (X, K) note codes.
        order_by: (X, K + 1) keys.
    """
    notes = np.column_stack([targets, negatives])
    labels = np.zeros(notes.shape, np.int8)
    labels[:, :1] = 1
    order = np.argsort(order_by, axis=1, kind="stable")
    notes, labels = np.take_along_axis(notes, order, 1), np.take_along_axis(labels, order, 1)
    owners = np.repeat(np.arange(len(targets)), notes.shape[1])
    columns = [ids.take(pa.array(owners)), vocabulary.take(pa.array(notes.ravel())), pa.array(labels.ravel())]
    return pa.table(columns, schema=CANDIDATE_SCHEMA)


def _examples(histories: Histories, numbers: np.ndarray, users: np.ndarray, positions: np.ndarray) -> Examples:
    before = histories.offsets[users] + positions - 1
    blocks = np.where(positions > 0, numbers[np.maximum(before, 0)], -1) if len(users) else positions
    return Examples(users, positions, blocks)


def _keys(users: pa.Array, seed: int, stream: str) -> np.ndarray:
    return hash_strings(users, f"{stream_seed(seed, 'sequences', stream):016x}")
