"""What experiments showed and what was clicked, and whether one arm does better than another."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Sequence
from datetime import datetime
from typing import NamedTuple

import numpy as np

from notellm2_ray.serve.user_rows import micros

_Z95 = 1.959964  # two-sided 95%


class Exposure(NamedTuple):
    """A note that an answer showed to a user."""

    request_id: str
    user_id: str
    note_id: str
    position: int  # in the answer, from 0
    experiment: str
    arm: str
    timestamp: datetime


class ArmStatistics(NamedTuple):
    """One arm of an experiment. Rates are clicked exposures over exposures; intervals are over users, at 95%."""

    arm: str
    users: int
    requests: int
    exposures: int
    clicks: int
    click_rate: float
    click_rate_error: float  # standard error
    lift: float | None  # of the rate over the first arm's; None for the first, or where its rate is 0
    lift_low: float | None
    lift_high: float | None


def add(db: sqlite3.Connection, exposures: Sequence[Exposure]) -> int:
    """Keep exposures once per request and note; how many were new."""
    rows = [(*one[:1], one.note_id, one.position, one.user_id, *one[4:6], micros(one.timestamp)) for one in exposures]
    before = db.total_changes
    db.executemany(
        "INSERT OR IGNORE INTO exposures (request_id, note_id, position, user_id, experiment, arm, timestamp) "
        "VALUES (?, ?, ?, ?, ?, ?, ?)",
        rows,
    )
    return db.total_changes - before


def statistics(
    db: sqlite3.Connection, experiment: str, since: int | None, actions: Collection[str]
) -> list[ArmStatistics]:
    """Each arm of an experiment, by name.

    A shown note counts as clicked once, if an event of one of the ``actions`` names it and the request, whichever of
    the two was written first. Users, not exposures, are what varies independently: the standard error of a rate is
    that of a ratio of two sums over users (delta method), and the lift's interval is that of the logarithm of a ratio
    of two such rates.
    """
    marks = ", ".join("?" for _ in actions)
    rows = db.execute(
        "SELECT arm, user_id, count(DISTINCT request_id), count(*), sum(EXISTS ("
        "SELECT 1 FROM events c WHERE c.request_id = e.request_id AND c.note_id = e.note_id "
        f"AND c.action IN ({marks}))) FROM exposures e "
        "WHERE experiment = ? AND timestamp >= ? GROUP BY arm, user_id",
        (*actions, experiment, -(2**62) if since is None else since),
    ).fetchall()
    arms: list[ArmStatistics] = []
    for arm in sorted({row[0] for row in rows}):
        requests, shown, clicked = np.array([row[2:] for row in rows if row[0] == arm], dtype=np.float64).T
        rate, error = _rate(shown, clicked)
        lift = _lift(rate, error, arms[0]) if arms else (None, None, None)
        counts = (len(shown), int(requests.sum()), int(shown.sum()), int(clicked.sum()))
        arms.append(ArmStatistics(arm, *counts, rate, error, *lift))
    return arms


def _rate(shown: np.ndarray, clicked: np.ndarray) -> tuple[float, float]:
    """Click rate over users and its standard error; infinite with a single user."""
    rate = float(clicked.sum() / shown.sum())
    count = len(shown)
    if count < 2:
        return rate, float("inf")
    spread = float(((clicked - rate * shown) ** 2).sum() / (count - 1))
    return rate, (spread / count) ** 0.5 / float(shown.mean())


def _lift(rate: float, error: float, base: ArmStatistics) -> tuple[float | None, float | None, float | None]:
    if not base.click_rate:
        return None, None, None
    lift = rate / base.click_rate - 1
    if not rate or not np.isfinite(error + base.click_rate_error):
        return lift, None, None
    width = _Z95 * ((error / rate) ** 2 + (base.click_rate_error / base.click_rate) ** 2) ** 0.5
    return lift, (1 + lift) * float(np.exp(-width)) - 1, (1 + lift) * float(np.exp(width)) - 1
