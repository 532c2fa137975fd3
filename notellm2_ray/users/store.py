"""The durable store of users' events and preferences: one SQLite file.

Used as::

    users = UserStore("runs/world/serving/users.sqlite", rule=BlockRule(size=3))
    users.add_events([UserEvent("u1", "n7", now, "click")])
    for pending in users.pending(limit=64):
        users.save_preference(pending.user_id, pending.block, pending.fingerprint, summarise(pending))
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from notellm2_ray.core.errors import OutputError
from notellm2_ray.core.history_blocks import DEFAULT_RULE, BlockRule
from notellm2_ray.live.group_commit import GroupCommitter
from notellm2_ray.live.rows import now
from notellm2_ray.users import blocks as user_blocks
from notellm2_ray.users import exposures
from notellm2_ray.users.exposures import Exposure
from notellm2_ray.users.rows import (
    TABLES,
    PendingBlock,
    Status,
    SummarisedBlock,
    UserEvent,
    UserHistory,
    check_event,
    micros,
    moment,
)

Write = Callable[[sqlite3.Connection], Any]
_BUSY_SECONDS = 10.0


class UserStore:
    """Events, blocks, preferences and exposures of users.

    One thread gathers the writes of all threads and coroutines and commits them together; a write returns when it is on
    the disk (WAL, synchronous=FULL). Each reading thread has a connection of its own and never waits for a write. The
    file must lie on a local disk: SQLite's WAL does not work over a network.

    An event is kept once, by its id. :mod:`~notellm2_ray.users.blocks` says how events become blocks: a block with a
    preference never changes, and an event that arrives late joins the notes that wait for a preference.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        rule: BlockRule = DEFAULT_RULE,
        actions: Iterable[str] = ("click",),
        gather_seconds: float = 0.002,
    ):
        """Open or create the database.

        Args:
            path: the file.
            rule: where blocks end.
            actions: events that say a user liked a note.
            gather_seconds: how long the first write of a group waits for others.

        Raises:
            OutputError: the file cannot be opened, or is not such a database.
        """
        self.path = Path(path)
        self.rule, self.actions = rule, frozenset(actions)
        self._local = threading.local()
        self._readers: list[sqlite3.Connection] = []
        try:
            self._writer = connect(self.path)
            self._writer.executescript(TABLES)
            user_blocks.apply_rule(self._writer, self.rule)
        except sqlite3.Error as error:
            raise OutputError(f"{path} cannot be used as the users' database: {error}") from error
        self._committer: GroupCommitter[Write] = GroupCommitter(
            f"writer of {self.path.name}", self._commit, gather_seconds=gather_seconds
        )

    def submit(self, write: Write) -> Future[Any]:
        """Have the writer call a function of its connection; what the function does is committed as a whole or not."""
        return self._committer.submit(write)

    def submit_events(self, events: Iterable[UserEvent]) -> Future[list[Status]]:
        """As :meth:`add_events`; the future is done when the events are durable (``asyncio.wrap_future`` awaits it).

        Raises:
            DataError: an event is not valid; nothing of the call is written.
        """
        checked = [check_event(event) for event in events]

        def write(db: sqlite3.Connection) -> list[Status]:
            statuses = [user_blocks.add_event(db, event, self.actions) for event in checked]
            for user_id in {event.user_id for event in checked if event.action in self.actions}:
                user_blocks.note_waiting(db, user_id, self.rule)
            return statuses

        return self.submit(write)

    def add_events(self, events: Iterable[UserEvent]) -> list[Status]:
        """Keep events and wait until they are durable.

        Returns:
            For each event ``added``; ``duplicate`` if there was an event with that id; or ``late`` if it was added but
            is older than a note of a closed block.
        """
        return self.submit_events(events).result()

    def submit_preference(
        self, user_id: str, block: int, input_fingerprint: str, text: str
    ) -> Future[Literal["saved", "duplicate", "stale"]]:
        """As :meth:`save_preference`, without waiting."""
        at = micros(now())
        return self.submit(
            lambda db: user_blocks.save_preference(db, user_id, block, input_fingerprint, text, self.rule, at)
        )

    def save_preference(
        self, user_id: str, block: int, input_fingerprint: str, text: str
    ) -> Literal["saved", "duplicate", "stale"]:
        """Close a pending block with its preference, exactly once.

        Args:
            text: the preference; "" if it could not be made, as for a first block whose notes are all deleted.

        Returns:
            ``saved``; ``duplicate`` if there was a preference from the same inputs, which stays; or ``stale`` if the
            block has changed since or another one is due: call :meth:`pending` again.
        """
        return self.submit_preference(user_id, block, input_fingerprint, text).result()

    def pending(
        self, limit: int = 100, at: datetime | None = None, without: frozenset[str] | set[str] = frozenset()
    ) -> list[PendingBlock]:
        """Complete blocks without a preference, those with the oldest events first.

        At most one block per user, because each preference is made from the one before.

        Args:
            limit: blocks at most.
            at: the time at which sessions are judged to have ended; None: now.
            without: users to skip.
        """
        time, limit = micros(at or now()), limit + len(without)
        users = "SELECT user_id FROM waiting WHERE ready = 1 ORDER BY last_timestamp LIMIT ?"
        found = [row[0] for row in self._read(users, (limit,))]
        if self.rule.session_gap is not None and len(found) < limit:
            ended = "SELECT user_id FROM waiting WHERE ready = 0 AND last_timestamp < ? ORDER BY last_timestamp LIMIT ?"
            found += [row[0] for row in self._read(ended, (time - self.rule.session_gap, limit - len(found)))]
        found = [user_id for user_id in found if user_id not in without][: limit - len(without)]
        blocks = [user_blocks.pending_block(self._reader(), user_id, self.rule, time) for user_id in found]
        return [block for block in blocks if block is not None]

    def history(self, user_id: str) -> UserHistory:
        """A user's blocks with their preferences, and the notes that wait for one."""
        rows = self._read(
            "SELECT block, note_ids, preference, created_at FROM preferences WHERE user_id = ? ORDER BY block",
            (user_id,),
        )
        blocks = [SummarisedBlock(block, json.loads(notes), text, moment(at)) for block, notes, text, at in rows]
        waiting = user_blocks.waiting_notes(self._reader(), user_id)
        due = list(user_blocks.complete_blocks(waiting, self.rule, micros(now())))
        left = waiting[sum(map(len, due)) :]
        return UserHistory(user_id, blocks, due, [note.note_id for note in left])

    def preference(self, user_id: str) -> tuple[int, str] | None:
        """(block, text) of a user's newest preference."""
        newest = "SELECT block, preference FROM preferences WHERE user_id = ? ORDER BY block DESC LIMIT 1"
        rows = self._read(newest, (user_id,))
        return rows[0] if rows else None

    def liked(self, user_id: str, limit: int = 100) -> list[str]:
        """A user's last liked notes, newest first."""
        last = "SELECT note_id FROM sequence WHERE user_id = ? ORDER BY timestamp DESC, arrival DESC LIMIT ?"
        return [row[0] for row in self._read(last, (user_id, limit))]

    def seen(self, user_id: str, limit: int = 1000) -> list[str]:
        """Notes of a user's last events of any action, newest first, each once."""
        last = "SELECT note_id FROM events WHERE user_id = ? ORDER BY timestamp DESC, arrival DESC LIMIT ?"
        return list(dict.fromkeys(row[0] for row in self._read(last, (user_id, limit))))

    def seen_among(self, user_id: str, note_ids: Sequence[str]) -> set[str]:
        """The notes among these on which a user has an event of any action."""
        marks = ", ".join("?" for _ in note_ids)
        named = f"SELECT DISTINCT note_id FROM events WHERE user_id = ? AND note_id IN ({marks})"
        return {row[0] for row in self._read(named, (user_id, *note_ids))}

    def more_events(self, user_id: str, than: int) -> bool:
        """Whether a user has more than ``than`` events."""
        return bool(self._read("SELECT 1 FROM events WHERE user_id = ? LIMIT 1 OFFSET ?", (user_id, than)))

    def users(self, limit: int = 100) -> list[str]:
        """Users with liked notes, the first ``limit`` by id."""
        return [
            row[0] for row in self._read("SELECT DISTINCT user_id FROM sequence ORDER BY user_id LIMIT ?", (limit,))
        ]

    def popular(self, limit: int = 100) -> list[str]:
        """Notes by the number of users who liked them, descending, at the same number the last liked first.

        Reads the whole table: too slow for each request.
        """
        order = "count(*) DESC, max(timestamp) DESC, min(arrival)"
        most = f"SELECT note_id FROM sequence GROUP BY note_id ORDER BY {order} LIMIT ?"
        return [row[0] for row in self._read(most, (limit,))]

    def add_exposures(self, shown: Sequence[Exposure]) -> int:
        """As :meth:`submit_exposures`, but waits until they are durable."""
        return self.submit_exposures(shown).result()

    def submit_exposures(self, shown: Sequence[Exposure]) -> Future[int]:
        """Keep exposures, one per request and note; the future gives the number of new ones."""
        return self.submit(lambda db: exposures.add(db, shown))

    def info(self) -> dict[str, int]:
        """Counts of events, users, preferences and users who wait for one."""
        names = {"events": "events", "preferences": "preferences", "waiting": "waiting"}
        counts = {name: self._read(f"SELECT count(*) FROM {table}")[0][0] for name, table in names.items()}
        counts["users"] = self._read("SELECT count(DISTINCT user_id) FROM sequence")[0][0]
        return counts

    @property
    def alive(self) -> bool:
        """Whether its thread still runs."""
        return self._committer.alive

    def close(self) -> None:
        """Commit what was submitted and close the file."""
        self._committer.close()
        for connection in [*self._readers, self._writer]:
            connection.close()

    def __enter__(self) -> UserStore:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _commit(self, group: list[Write]) -> list[Any]:
        results: list[Any] = []
        try:
            self._writer.execute("BEGIN IMMEDIATE")
            for write in group:
                self._writer.execute("SAVEPOINT one")
                try:
                    results.append(write(self._writer))
                except sqlite3.OperationalError:  # a fault of the disk, not of this write: the whole group fails
                    raise
                except Exception as error:
                    self._writer.execute("ROLLBACK TO one")
                    results.append(error)
                self._writer.execute("RELEASE one")
            self._writer.execute("COMMIT")
        except sqlite3.Error as error:
            if self._writer.in_transaction:
                self._writer.execute("ROLLBACK")
            raise OutputError(f"{self.path} could not be written ({error}): nothing of this call was kept") from error
        return results

    def _reader(self) -> sqlite3.Connection:
        reader = getattr(self._local, "reader", None)
        if reader is None:
            reader = connect(self.path)
            reader.execute("PRAGMA query_only = ON")
            self._local.reader = reader
            self._readers.append(reader)
        return reader

    def _read(self, query: str, values: tuple = ()) -> list[tuple]:
        return self._reader().execute(query, values).fetchall()


def connect(path: Path) -> sqlite3.Connection:
    """A connection with the settings for durable writes; transactions are begun and ended explicitly."""
    connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    return connection
