"""How a user's liked notes become blocks, in the database.

A block is closed once its preference is written, and never changes afterwards. A user's other liked notes wait: they
stand in order of time, then of arrival, and are cut into blocks by the :class:`BlockRule` each time they are looked at.
An event that arrives late therefore joins the waiting notes, even where its time lies within a closed block; and a
preference is refused if the block that it was made from has changed since.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Iterator, Sequence

from notellm2_ray.core.history_blocks import BlockRule, LikedNote, cut_history
from notellm2_ray.core.run import fingerprint
from notellm2_ray.users.rows import PendingBlock, Status, UserEvent, micros

_END_OF_TIME = 2**62  # microseconds: by then every session is over


def add_event(db: sqlite3.Connection, event: UserEvent, actions: Collection[str]) -> Status:
    """Keep an event once; ``late`` if it is older than a note of a closed block.

    Args:
        actions: events that say a user liked a note.
    """
    time = micros(event.timestamp)
    added = db.execute(
        "INSERT OR IGNORE INTO events (event_id, user_id, note_id, timestamp, action, session_id, request_id) "
        "VALUES (?, ?, ?, ?, ?, ?, ?)",
        (event.key(), event.user_id, event.note_id, time, event.action, event.session_id, event.request_id),
    )
    if not added.rowcount:
        return "duplicate"
    if event.action not in actions:
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
    """Record whether a user has a complete block, after something changed."""
    waiting = waiting_notes(db, user_id)
    if not waiting:
        db.execute("DELETE FROM waiting WHERE user_id = ?", (user_id,))
        return
    ready = next(complete_blocks(waiting, rule), None) is not None
    db.execute(
        "INSERT OR REPLACE INTO waiting (user_id, ready, last_timestamp) VALUES (?, ?, ?)",
        (user_id, int(ready), waiting[-1].time),
    )


def apply_rule(db: sqlite3.Connection, rule: BlockRule) -> None:
    """Look anew for complete blocks, if the database was last used with another rule or does not say which."""
    if db.execute("SELECT size, session_gap FROM block_rule").fetchall() == [tuple(rule)]:
        return
    db.execute("BEGIN IMMEDIATE")
    for (user_id,) in db.execute("SELECT user_id FROM waiting").fetchall():
        note_waiting(db, user_id, rule)
    keep_rule(db, rule)
    db.execute("COMMIT")


def keep_rule(db: sqlite3.Connection, rule: BlockRule) -> None:
    """Record the rule by which the table ``waiting`` was filled."""
    db.execute("DELETE FROM block_rule")
    db.execute("INSERT INTO block_rule (size, session_gap) VALUES (?, ?)", rule)


def pending_block(db: sqlite3.Connection, user_id: str, rule: BlockRule, now: int) -> PendingBlock | None:
    """The user's first block without a preference, if it is complete at ``now`` (microseconds)."""
    notes = next(complete_blocks(waiting_notes(db, user_id), rule, now), None)
    if notes is None:
        return None
    closed = _last_closed(db, user_id)
    block, previous, before = (0, None, "") if closed is None else (closed[0] + 1, closed[1], closed[3])
    return PendingBlock(user_id, block, notes, previous, fingerprint("block", user_id, block, notes, before))


def complete_blocks(waiting: Sequence[LikedNote], rule: BlockRule, now: int | None = None) -> Iterator[list[str]]:
    """The note ids of each block that later events do not extend; at most the last block is not complete.

    Args:
        now: microseconds; a session whose last event is longer ago than the gap has ended. None: the last session
            goes on.
    """
    left = len(waiting)
    for block in cut_history(waiting, rule):
        left -= len(block)
        if left or len(block) == rule.size or (now is not None and rule.is_pause(block[-1].time, now)):
            yield [note.note_id for note in block]


def save_preference(
    db: sqlite3.Connection, user_id: str, block: int, input_fingerprint: str, text: str, rule: BlockRule, now: int
) -> str:
    """Close a block with its preference: ``saved``, ``duplicate`` or, if the block has changed since, ``stale``."""
    there = "SELECT fingerprint FROM preferences WHERE user_id = ? AND block = ?"
    known = db.execute(there, (user_id, block)).fetchone()
    if known is not None:
        return "duplicate" if known[0] == input_fingerprint else "stale"
    # Whether the block is complete by the clock does not matter here: the fingerprint says which notes were summarised.
    pending = pending_block(db, user_id, rule, _END_OF_TIME)
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


def waiting_notes(db: sqlite3.Connection, user_id: str) -> list[LikedNote]:
    """The liked notes in no closed block, in order."""
    rows = db.execute(
        "SELECT note_id, timestamp, session_id FROM sequence WHERE user_id = ? AND block IS NULL "
        "ORDER BY timestamp, arrival",
        (user_id,),
    )
    return [LikedNote(*row) for row in rows]


def _last_closed(db: sqlite3.Connection, user_id: str) -> tuple[int, str, int, str] | None:
    """(block, preference, last timestamp, fingerprint) of a user's newest closed block."""
    return db.execute(
        "SELECT block, preference, last_timestamp, fingerprint FROM preferences WHERE user_id = ? "
        "ORDER BY block DESC LIMIT 1",
        (user_id,),
    ).fetchone()
