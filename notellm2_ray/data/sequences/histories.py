"""Users' histories as flat arrays, and the k-core of users and notes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from notellm2_ray.core.history_blocks import BlockRule, number_blocks
from notellm2_ray.data.arrays import offsets_of

HISTORY_SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.string()),
        pa.field("key", pa.uint64()),
        pa.field("notes", pa.list_(pa.int32())),
        pa.field("times", pa.list_(pa.int64())),
        pa.field("sessions", pa.list_(pa.string())),
    ]
)


class Histories(NamedTuple):
    """Users and the notes that each liked, every note once, by time.

    Users are in the order of their keys. :mod:`notellm2_ray.data.sequences.events` says what a key is, and in which
    order events of the same time stand. The events of user u are ``offsets[u]:offsets[u + 1]``.
    """

    users: pa.Array  # (U,) ids
    keys: np.ndarray  # (U,) uint64
    offsets: np.ndarray  # (U + 1,) int64
    notes: np.ndarray  # (E,) int32 codes
    times: np.ndarray  # (E,) int64 microseconds, ascending within a user
    sessions: pa.Array  # (E,) ids, null where the log has none

    @property
    def lengths(self) -> np.ndarray:
        """(U,) int64, events of each user."""
        return np.diff(self.offsets)

    @property
    def owners(self) -> np.ndarray:
        """(E,) int64, the user of each event."""
        return np.repeat(np.arange(len(self.users)), self.lengths)

    @property
    def positions(self) -> np.ndarray:
        """(E,) int64, each event's position in its user's sequence."""
        return np.arange(len(self.notes)) - np.repeat(self.offsets[:-1], self.lengths)

    @property
    def tied(self) -> np.ndarray:
        """(E,) bool: whether the user's event before this one has the same time."""
        same = np.zeros(len(self.times), bool)
        same[1:] = (self.times[1:] == self.times[:-1]) & (self.positions[1:] > 0)
        return same

    def block_numbers(self, rule: BlockRule) -> np.ndarray:
        """(E,) int64, the block of each event, 0, 1, ... within its user."""
        return number_blocks(self.offsets, self.times, self.sessions, rule)

    def filter(self, kept: np.ndarray) -> Histories:
        """Only the events where ``kept``, (E,) bool; users without any such event are left out."""
        lengths = np.bincount(self.owners[kept], minlength=len(self.users))
        some = lengths > 0
        mask = pa.array(kept)
        return Histories(
            self.users.filter(pa.array(some)),
            self.keys[some],
            offsets_of(lengths[some]),
            self.notes[kept],
            self.times[kept],
            self.sessions.filter(mask),
        )

    def last(self, count: int) -> Histories:
        """Each user's last ``count`` events."""
        return self.filter(np.repeat(self.lengths, self.lengths) - self.positions <= count)

    def to_batch(self) -> pa.RecordBatch:
        """One row per user, HISTORY_SCHEMA."""
        offsets = pa.array(self.offsets, pa.int32())
        values = (pa.array(self.notes, pa.int32()), pa.array(self.times, pa.int64()), self.sessions)
        lists = [pa.ListArray.from_arrays(offsets, column) for column in values]
        return pa.record_batch([self.users, pa.array(self.keys), *lists], schema=HISTORY_SCHEMA)

    @staticmethod
    def from_batch(batch: pa.RecordBatch) -> Histories:
        """The histories that :meth:`to_batch` wrote."""
        users, keys, notes, times, sessions = batch.columns
        offsets = notes.offsets.to_numpy().astype(np.int64)
        return Histories(
            users, keys.to_numpy(), offsets, notes.values.to_numpy(), times.values.to_numpy(), sessions.values
        )


def k_core(
    parts: Callable[[], Iterable[Histories]], num_notes: int, min_user_notes: int, min_note_users: int
) -> np.ndarray:
    """(num_notes,) bool: the notes of the k-core.

    It is the largest set of notes and users in which every user likes at least ``min_user_notes`` of the notes, and
    every note is liked by at least ``min_note_users`` of the users.

    Args:
        parts: gives all users' histories, each user in one part; it is called once a round.
    """
    in_core = np.ones(num_notes, bool)
    while True:
        counts = np.zeros(num_notes, np.int64)
        for part in parts():
            inside = in_core[part.notes]
            owners, notes = part.owners[inside], part.notes[inside]
            rich = np.bincount(owners, minlength=len(part.users)) >= min_user_notes
            counts += np.bincount(notes[rich[owners]], minlength=num_notes)
        left = in_core & (counts >= min_note_users)
        if (left == in_core).all():
            return in_core
        in_core = left


def within_core(histories: Histories, in_core: np.ndarray, min_user_notes: int) -> Histories:
    """The histories without the notes and users outside the core of :func:`k_core`."""
    inside = histories.filter(in_core[histories.notes])
    return inside.filter(np.repeat(inside.lengths >= min_user_notes, inside.lengths))
