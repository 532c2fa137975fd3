"""How a user's liked notes become blocks, in the database.

A block whose preference was written is closed for good. All other notes of the user stand in time's order (then in
order of arrival) and are cut into blocks anew at every look: after ``block_size`` notes, or where a pause was longer
than ``session_gap``. So an event that arrives late joins the notes that are not summarised yet, whatever its time
says, and a preference that was made from a block that has changed since is refused.
"""

from __future__ import annotations

import itertools
import json
import sqlite3
from typing import NamedTuple

from notellm2_ray.core.run import fingerprint
from notellm2_ray.users.rows import PendingBlock, Status, UserEvent, micros


class BlockRule(NamedTuple):
    """Where blocks end."""

    actions: frozenset[str]  # that say a user liked a note
    size: int
    session_gap: int | None  # microseconds; None: by size alone


def add_event(db: sqlite3.Connection, event: UserEvent, rule: BlockRule) -> Status:
    """Keep an event once; ``late`` where it is older than a note of a closed block."""
    time = micros(event.timestamp)
    added = db.execute(
        "INSERT OR IGNORE INTO events (event_id, user_id, note_id, timestamp, action, session_id, request_id) "
        "VALUES (?, ?, ?, ?, ?, ?, ?)",
        (event.key(), event.user_id, event.note_id, time, event.action, event.session_id, event.request_id),
    )
    if not added.rowcount:
        return "duplicate"
    if event.action not in rule.actions:
        return "added"
    db.execute(
        "INSERT INTO sequence (user_id, note_id, timestamp, arrival, session_id) VALUES (?, ?, ?, ?, ?) "
        "ON CONFLICT (user_id, note_id) DO UPDATE SET timestamp = excluded.timestamp, arrival = excluded.arrival, "
        "session_id = excluded.session_id WHERE sequence.block IS NULL AND excluded.timestamp < sequence.timestamp",
        (event.user_id, event.note_id, time, added.lastrowid, event.session_id),
    )
    closed = _last_closed(db, event.user_id)
    return "late" if closed is not None and time < closed[2] else "added"


def note_waiting(db: sqlite3.Connection, user_id: str, rule: BlockRule) -> None:
    """Write down whether a user has a complete block, after something changed."""
    waiting = _waiting(db, user_id)
    if not waiting:
        db.execute("DELETE FROM waiting WHERE user_id = ?", (user_id,))
        return
    ready = _first_block(waiting, rule, None) is not None
    db.execute(
        "INSERT OR REPLACE INTO waiting (user_id, ready, last_timestamp) VALUES (?, ?, ?)",
        (user_id, int(ready), waiting[-1][1]),
    )


def apply_rule(db: sqlite3.Connection, rule: BlockRule) -> None:
    """Judge anew who has a complete block, if a database was kept by another rule (or by one that it does not say)."""
    if db.execute("SELECT size, session_gap FROM block_rule").fetchall() == [(rule.size, rule.session_gap)]:
        return
    db.execute("BEGIN IMMEDIATE")
    for (user_id,) in db.execute("SELECT user_id FROM waiting").fetchall():
        note_waiting(db, user_id, rule)
    keep_rule(db, rule)
    db.execute("COMMIT")


def keep_rule(db: sqlite3.Connection, rule: BlockRule) -> None:
    """Write down by which rule ``waiting`` was filled."""
    db.execute("DELETE FROM block_rule")
    db.execute("INSERT INTO block_rule (size, session_gap) VALUES (?, ?)", (rule.size, rule.session_gap))


def pending_block(db: sqlite3.Connection, user_id: str, rule: BlockRule, now: int | None) -> PendingBlock | None:
    """The user's first block without a preference, if it is complete.

    Args:
        now: microseconds; a session whose last event is longer ago than the gap has ended. None: no session ends.
    """
    notes = _first_block(_waiting(db, user_id), rule, now)
    if notes is None:
        return None
    closed = _last_closed(db, user_id)
    block, previous, before = (0, None, "") if closed is None else (closed[0] + 1, closed[1], closed[3])
    return PendingBlock(user_id, block, notes, previous, fingerprint("block", user_id, block, notes, before))


def save_preference(
    db: sqlite3.Connection, user_id: str, block: int, input_fingerprint: str, text: str, rule: BlockRule, now: int
) -> str:
    """Close a block with its preference: ``saved``, ``duplicate`` or, if it has changed meanwhile, ``stale``."""
    there = "SELECT fingerprint FROM preferences WHERE user_id = ? AND block = ?"
    known = db.execute(there, (user_id, block)).fetchone()
    if known is not None:
        return "duplicate" if known[0] == input_fingerprint else "stale"
    # Complete or not by the clock does not matter here: the fingerprint says which notes were summarised.
    pending = pending_block(db, user_id, rule, 2**62)
    if pending is None or (pending.block, pending.fingerprint) != (block, input_fingerprint):
        return "stale"
    close_block(db, pending, text, now)
    note_waiting(db, user_id, rule)
    return "saved"


def close_block(db: sqlite3.Connection, block: PendingBlock, text: str, now: int) -> None:
    """Write a preference and put its notes into its block."""
    marks = ", ".join("?" for _ in block.note_ids)
    db.execute(
        f"UPDATE sequence SET block = ? WHERE user_id = ? AND note_id IN ({marks})",
        (block.block, block.user_id, *block.note_ids),
    )
    newest = "SELECT max(timestamp) FROM sequence WHERE user_id = ? AND block IS NOT NULL"
    last = db.execute(newest, (block.user_id,)).fetchone()[0]
    db.execute(
        "INSERT INTO preferences (user_id, block, note_ids, fingerprint, preference, last_timestamp, created_at) "
        "VALUES (?, ?, ?, ?, ?, ?, ?)",
        (block.user_id, block.block, json.dumps(block.note_ids), block.fingerprint, text, last, now),
    )


def _first_block(waiting: list[tuple[str, int, str | None]], rule: BlockRule, now: int | None) -> list[str] | None:
    """Notes of the first block among the waiting ones, None while it may still grow."""
    if not waiting:
        return None
    notes = [waiting[0][0]]
    for (_, before, session), (note_id, after, next_session) in itertools.pairwise(waiting):
        if len(notes) == rule.size or _ends(before, session, after, next_session, rule):
            return notes
        notes.append(note_id)
    over = rule.session_gap is not None and now is not None and now - waiting[-1][1] > rule.session_gap
    return notes if len(notes) == rule.size or over else None


def _ends(before: int, session: str | None, after: int, next_session: str | None, rule: BlockRule) -> bool:
    """Whether a session ends between two notes."""
    if rule.session_gap is None:
        return False
    if session is not None and next_session is not None:
        return session != next_session
    return after - before > rule.session_gap


def _waiting(db: sqlite3.Connection, user_id: str) -> list[tuple[str, int, str | None]]:
    """(note, timestamp, session) of the notes in no block, in order."""
    return db.execute(
        "SELECT note_id, timestamp, session_id FROM sequence WHERE user_id = ? AND block IS NULL "
        "ORDER BY timestamp, arrival",
        (user_id,),
    ).fetchall()


def _last_closed(db: sqlite3.Connection, user_id: str) -> tuple[int, str, int, str] | None:
    """(block, preference, last timestamp, fingerprint) of a user's newest closed block."""
    return db.execute(
        "SELECT block, preference, last_timestamp, fingerprint FROM preferences WHERE user_id = ? "
        "ORDER BY block DESC LIMIT 1",
        (user_id,),
    ).fetchone()
