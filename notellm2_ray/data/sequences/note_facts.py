"""What is known of every note when candidates are drawn: since when it exists, and how often it was clicked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from notellm2_ray.data.sequences.histories import Histories
from notellm2_ray.data.sequences.split import UserSplit

EVER = -(1 << 62)  # as a birth in microseconds: before everything


class NoteFacts(NamedTuple):
    """Facts about each note, by code; every array is (number of notes,)."""

    births: np.ndarray  # int64 microseconds: from then on the note may be a negative
    clicks: np.ndarray  # int64, users; held-out targets are not counted
    every_click: np.ndarray  # int64, users
    in_core: np.ndarray  # bool: may be a candidate

    def to_table(self) -> pa.Table:
        """A column for each array."""
        return pa.table({name: pa.array(column) for name, column in self._asdict().items()})

    @staticmethod
    def from_table(table: pa.Table) -> NoteFacts:
        """The facts that :meth:`to_table` wrote."""
        return NoteFacts(*(column.to_numpy() for column in table.columns))


def note_facts(
    parts: Iterable[Histories],
    split: UserSplit,
    *,
    min_events: int,
    created: np.ndarray,
    in_core: np.ndarray,
    existing_notes_only: bool,
) -> NoteFacts:
    """The facts about all notes.

    Args:
        parts: the histories of all users, each user in one part.
        min_events: events that a user needs to have a target.
        created: (number of notes,) int64 microseconds; EVER where it is not known.
        in_core: (number of notes,) bool, the notes of the k-core.
        existing_notes_only: whether a note can be a negative only after its creation.
    """
    clicks, every_click = np.zeros(len(in_core), np.int64), np.zeros(len(in_core), np.int64)
    first_liked = np.full(len(in_core), -EVER)
    for part in parts:
        known = split.known_events(part, min_events)
        clicks += np.bincount(part.notes[known], minlength=len(in_core))
        every_click += np.bincount(part.notes, minlength=len(in_core))
        np.minimum.at(first_liked, part.notes, part.times)
    births = np.full(len(in_core), EVER)
    if split.by_time:
        valid, test = split.bounds
        births = np.where(first_liked < valid, EVER, np.where(first_liked < test, valid, test))
    if existing_notes_only:
        births = np.where(created == EVER, births, created)
    return NoteFacts(births, clicks, every_click, in_core)
