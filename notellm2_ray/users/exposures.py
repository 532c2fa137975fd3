"""Exposures: the notes that experiments showed to users, and the clicks on them."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Sequence
from datetime import datetime
from typing import NamedTuple

import numpy as np

from notellm2_ray.users.rows import micros


class Exposure(NamedTuple):
    """A note that an answer showed to a user."""

    request_id: str
    user_id: str
    note_id: str
    position: int  # in the answer, from 0
    experiment: str
    arm: str
    timestamp: datetime


class ArmClicks(NamedTuple):
    """Exposures and clicks of one arm of an experiment, by user."""

    arm: str
    requests: int
    shown: np.ndarray  # (U,) exposures of each user
    clicked: np.ndarray  # (U,) exposures that were clicked


def add(db: sqlite3.Connection, exposures: Sequence[Exposure]) -> int:
    """Keep exposures, one per request and note; the number of new ones."""
    rows = [(*one[:1], one.note_id, one.position, one.user_id, *one[4:6], micros(one.timestamp)) for one in exposures]
    before = db.total_changes
    db.executemany(
        "INSERT OR IGNORE INTO exposures (request_id, note_id, position, user_id, experiment, arm, timestamp) "
        "VALUES (?, ?, ?, ?, ?, ?, ?)",
        rows,
    )
    return db.total_changes - before


def clicks_by_arm(
    db: sqlite3.Connection, experiment: str, actions: Collection[str], since: int | None = None
) -> list[ArmClicks]:
    """The arms of an experiment, in order of name.

    An exposure counts as clicked if its user has an event with one of the ``actions`` that names the same note and
    request, no matter whether the event or the exposure was written first.

    Args:
        since: microseconds since 1970; earlier exposures are left out.
    """
    marks = ", ".join("?" for _ in actions)
    rows = db.execute(
        "SELECT arm, user_id, count(DISTINCT request_id), count(*), sum(EXISTS ("
        "SELECT 1 FROM events c WHERE c.request_id = e.request_id AND c.note_id = e.note_id "
        f"AND c.user_id = e.user_id AND c.action IN ({marks}))) FROM exposures e "
        "WHERE experiment = ? AND timestamp >= ? GROUP BY arm, user_id",
        (*actions, experiment, -(2**62) if since is None else since),
    ).fetchall()
    arms: list[ArmClicks] = []
    for arm in sorted({row[0] for row in rows}):
        # In order of the numbers, not of the users' ids, which must not decide what a bootstrap draws.
        requests, shown, clicked = np.array(sorted(row[2:] for row in rows if row[0] == arm), dtype=np.int64).T
        arms.append(ArmClicks(arm, int(requests.sum()), shown, clicked))
    return arms
