"""The tables of the users' database, and the values that are written and read."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal, NamedTuple

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.run import fingerprint

Status = Literal["added", "duplicate", "late"]

TABLES = """
CREATE TABLE IF NOT EXISTS events (
    arrival INTEGER PRIMARY KEY AUTOINCREMENT,
    event_id TEXT NOT NULL UNIQUE,
    user_id TEXT NOT NULL,
    note_id TEXT NOT NULL,
    timestamp INTEGER NOT NULL,  -- microseconds since 1970
    action TEXT NOT NULL,
    session_id TEXT,
    request_id TEXT
);
CREATE INDEX IF NOT EXISTS events_of_user ON events (user_id, timestamp, arrival);
CREATE INDEX IF NOT EXISTS events_of_user_and_note ON events (user_id, note_id);
CREATE TABLE IF NOT EXISTS sequence (  -- each note that a user liked, once, at the first event that says so
    user_id TEXT NOT NULL,
    note_id TEXT NOT NULL,
    timestamp INTEGER NOT NULL,
    arrival INTEGER NOT NULL,
    session_id TEXT,
    block INTEGER,  -- null until the preference of its block is written
    PRIMARY KEY (user_id, note_id)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS sequence_of_user ON sequence (user_id, block, timestamp, arrival);
CREATE TABLE IF NOT EXISTS preferences (
    user_id TEXT NOT NULL,
    block INTEGER NOT NULL,
    note_ids TEXT NOT NULL,  -- JSON
    fingerprint TEXT NOT NULL,  -- of the preference's inputs
    preference TEXT NOT NULL,
    last_timestamp INTEGER NOT NULL,  -- latest event of this block and all earlier ones
    created_at INTEGER NOT NULL,
    PRIMARY KEY (user_id, block)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS waiting (  -- users with liked notes in no closed block
    user_id TEXT PRIMARY KEY,
    ready INTEGER NOT NULL,  -- 1: the first block of these notes is complete
    last_timestamp INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS block_rule (  -- one row: the rule by which waiting.ready was set
    size INTEGER NOT NULL,
    session_gap INTEGER  -- microseconds; null: by size alone
);
CREATE INDEX IF NOT EXISTS waiting_by_time ON waiting (ready, last_timestamp);
CREATE TABLE IF NOT EXISTS exposures (
    request_id TEXT NOT NULL,
    note_id TEXT NOT NULL,
    position INTEGER NOT NULL,
    user_id TEXT NOT NULL,
    experiment TEXT NOT NULL,
    arm TEXT NOT NULL,
    timestamp INTEGER NOT NULL,
    PRIMARY KEY (request_id, note_id)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS exposures_by_arm ON exposures (experiment, timestamp);
CREATE INDEX IF NOT EXISTS events_of_request ON events (request_id, note_id) WHERE request_id IS NOT NULL;
"""


class UserEvent(NamedTuple):
    """An action of a user on a note."""

    user_id: str
    note_id: str
    timestamp: datetime  # with a time zone
    action: str
    session_id: str | None = None
    event_id: str | None = None  # None: derived from user, note, timestamp and action
    request_id: str | None = None  # of the recommendation that showed the note

    def key(self) -> str:
        """The id by which an event is kept only once."""
        if self.event_id is not None:
            return self.event_id
        return fingerprint("event", self.user_id, self.note_id, micros(self.timestamp), self.action)


class PendingBlock(NamedTuple):
    """A block whose preference is to be written next: its user's first block without one."""

    user_id: str
    block: int
    note_ids: list[str]  # oldest first
    previous: str | None  # the preference of the block before; None for the first block
    fingerprint: str  # of the fields above; returned with the preference


class SummarisedBlock(NamedTuple):
    """A closed block and its preference."""

    block: int
    note_ids: list[str]
    preference: str
    created_at: datetime


class UserHistory(NamedTuple):
    """A user's liked notes in blocks: closed ones, complete ones, and the last, which may still grow."""

    user_id: str
    blocks: list[SummarisedBlock]
    due: list[list[str]]  # note ids of complete blocks whose preference is not written yet
    open_block: list[str]  # note ids, oldest first

    @property
    def waiting(self) -> list[str]:
        """The liked notes in no closed block, oldest first."""
        return [note_id for block in (*self.due, self.open_block) for note_id in block]


def check_event(event: UserEvent) -> UserEvent:
    """The event, if it is valid.

    Raises:
        DataError: an id or action is not a non-empty string, or the time has no zone.
    """
    for name in ("user_id", "note_id", "action"):
        value = getattr(event, name)
        if not isinstance(value, str) or not value:
            raise DataError(f"an event needs a {name}, a non-empty string; got {value!r}")
    for name in ("session_id", "event_id", "request_id"):
        value = getattr(event, name)
        if value is not None and (not isinstance(value, str) or not value):
            raise DataError(
                f"event of user {event.user_id!r}: {name} must be a non-empty string or null, not {value!r}"
            )
    if not isinstance(event.timestamp, datetime) or event.timestamp.tzinfo is None:
        raise DataError(f"event of user {event.user_id!r}: timestamp {event.timestamp!r} needs a time zone")
    return event


def micros(when: datetime) -> int:
    """Microseconds since 1970."""
    delta = when.astimezone(UTC) - _EPOCH
    return (delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds


def moment(microseconds: int) -> datetime:
    """The inverse of :func:`micros`."""
    from datetime import timedelta

    return _EPOCH + timedelta(microseconds=microseconds)


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
