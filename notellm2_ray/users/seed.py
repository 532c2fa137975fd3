"""The first users' database, made of the bulk jobs' outputs: sequences, blocks and preferences, or only events."""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from notellm2_ray.core.errors import DataError, OutputError
from notellm2_ray.core.history_blocks import DEFAULT_RULE, BlockRule
from notellm2_ray.live.durability import sync
from notellm2_ray.live.rows import now
from notellm2_ray.users import blocks as user_blocks
from notellm2_ray.users.rows import TABLES, PendingBlock, UserEvent, micros
from notellm2_ray.users.store import UserStore, connect

log = logging.getLogger("notellm2_ray.serve")

_ROWS_PER_BATCH = 1000
_EVENTS_PER_BATCH = 5000
_MAX_EVENTS = 2_000_000


class SeededUsers(NamedTuple):
    """Counts of a new database."""

    users: int
    events: int
    blocks: int  # with a preference


def seed_users(
    path: str | Path,
    sequences: str | Path,
    blocks: str | Path,
    preferences: str | Path,
    *,
    rule: BlockRule = DEFAULT_RULE,
    action: str = "click",
) -> SeededUsers:
    """Make a users' database from SEQUENCE_SCHEMA, BLOCK_SCHEMA and PREFERENCE_SCHEMA Parquet files.

    A user's blocks are closed up to the first one without a preference; all later notes wait. Events get the ids that
    :class:`UserEvent` derives, so that the same events sent again are duplicates.

    Args:
        rule: where later blocks end.
        action: of the sequences' events.

    Raises:
        DataError: a file is missing, or a block names a note that is not in its user's sequence.
        OutputError: there is a database already.
    """
    with _new_database(Path(path)) as temporary, closing(connect(temporary)) as db:
        return _fill(db, rule, action, Path(sequences), Path(blocks), Path(preferences))


def seed_events(
    path: str | Path, events: str | Path, *, rule: BlockRule = DEFAULT_RULE, actions: Iterable[str] = ("click",)
) -> int:
    """Make a users' database from prepared events; the number of events read.

    Without histories the first recommendations could not be personal. A log may be too long to read at the start,
    so reading stops after two million rows, with a warning.

    Args:
        events: Parquet file or directory.
        rule, actions: as of :class:`UserStore`.

    Raises:
        OutputError: there is a database already.
    """
    import pyarrow.dataset as pads

    kept = 0
    with _new_database(Path(path)) as temporary, UserStore(temporary, rule=rule, actions=actions) as store:
        for batch in pads.dataset(str(events), format="parquet").to_batches(batch_size=_EVENTS_PER_BATCH):
            rows = batch.select(["user_id", "note_id", "timestamp", "action", "session_id"]).to_pylist()
            store.add_events([UserEvent(**row) for row in rows])
            kept += len(rows)
            if kept >= _MAX_EVENTS:
                log.warning("%s: only the first %d events were read", events, kept)
                break
    return kept


@contextmanager
def _new_database(path: Path) -> Iterator[Path]:
    """A temporary path at which to fill a database, which is then moved to ``path``.

    A file at ``path`` is thus always complete, even after a kill: a service would take it for the real database.
    """
    if path.exists():
        raise OutputError(f"{path} is there already: remove it to seed it again")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.seeding")
    _remove(temporary)  # left by a killed seeding
    try:
        yield temporary
        with closing(connect(temporary)) as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            db.execute("PRAGMA journal_mode = DELETE")  # puts everything into the one file that is renamed
        sync([temporary])
        os.replace(temporary, path)
        sync([path.parent])
    finally:
        _remove(temporary)


def _fill(
    db: sqlite3.Connection, rule: BlockRule, action: str, sequences: Path, blocks: Path, preferences: Path
) -> SeededUsers:
    db.executescript(TABLES)
    db.execute("BEGIN")
    db.execute(
        "CREATE TEMP TABLE bulk (user_id TEXT, block INTEGER, notes TEXT, text TEXT, PRIMARY KEY (user_id, block))"
    )
    for row in _rows(blocks, ["user_id", "block", "note_ids"]):
        db.execute(
            "INSERT INTO bulk VALUES (?, ?, ?, NULL)", (row["user_id"], row["block"], "\0".join(row["note_ids"]))
        )
    for row in _rows(preferences, ["user_id", "block", "preference"]):
        key = (row["preference"], row["user_id"], row["block"])
        db.execute("UPDATE bulk SET text = ? WHERE user_id = ? AND block = ?", key)
    users, events, closed = 0, 0, 0
    for row in _rows(sequences, ["user_id", "note_ids", "timestamps", "session_ids"]):
        columns = (row["note_ids"], row["timestamps"], row["session_ids"])
        for note_id, timestamp, session_id in zip(*columns, strict=True):
            event = UserEvent(row["user_id"], note_id, timestamp, action, session_id)
            events += user_blocks.add_event(db, event, {action}) != "duplicate"
        closed += _close_blocks(db, row["user_id"], set(row["note_ids"]))
        user_blocks.note_waiting(db, row["user_id"], rule)
        users += 1
    user_blocks.keep_rule(db, rule)
    db.execute("COMMIT")
    return SeededUsers(users, events, closed)


def _close_blocks(db: sqlite3.Connection, user_id: str, held: set[str]) -> int:
    rows = db.execute("SELECT block, notes, text FROM bulk WHERE user_id = ? ORDER BY block", (user_id,)).fetchall()
    previous: str | None = None
    at = micros(now())
    for expected, (block, joined, text) in enumerate(rows):
        if block != expected or text is None:
            return expected
        notes = joined.split("\0")
        missing = set(notes) - held
        if missing:
            raise DataError(
                f"block {block} of user {user_id!r} has note {sorted(missing)[0]!r}, which is not in their sequence"
            )
        user_blocks.close_block(db, PendingBlock(user_id, block, notes, previous, f"bulk:{block}"), text, at)
        previous = text
    return len(rows)


def _rows(path: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    try:
        file = pq.ParquetFile(path)
    except FileNotFoundError:
        raise DataError(f"{path} is not there: run the stage that writes it first") from None
    for batch in file.iter_batches(batch_size=_ROWS_PER_BATCH, columns=columns):
        yield from batch.to_pylist()


def _remove(path: Path) -> None:
    for suffix in ("", "-wal", "-shm", "-journal"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
