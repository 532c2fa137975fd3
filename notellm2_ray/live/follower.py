"""Follows the live table on disk and keeps an index of it in memory: a replica's view of the notes.

Used as::

    follower = StoreFollower("runs/world/serving", settings.index).start()
    follower.index.search(vector, k=100)
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.settings.retrieval import IndexSettings
from notellm2_ray.live.current import current_table, upcoming
from notellm2_ray.live.index import LiveIndex
from notellm2_ray.live.indexed_table import Change, IndexedTable, advanced, load
from notellm2_ray.live.rows import StoredCard, StoredNote
from notellm2_ray.live.table import LiveTable, newest_if_gone

log = logging.getLogger(__name__)

_FAILING_SECONDS = 5.0


class StoreFollower:
    """Follows the table that CURRENT names.

    Every ``poll_seconds`` it asks for the number of the newest version, which takes 0.1 ms, and reads only the files
    that were added since. Compaction, clean-up and a restart of the writer do not disturb it. The table that NEXT names
    is loaded in a thread and followed as well. When CURRENT names that table, it replaces the old one in one step, so
    that no answer mixes the vectors of two models.

    Attributes:
        state: a table, its index and seq: read it once per request, so that the three belong together.
    """

    state: IndexedTable

    def __init__(
        self,
        directory: str | Path,
        settings: IndexSettings,
        *,
        on_change: Callable[[Change], None] | None = None,
        poll_seconds: float = 0.05,
        saved_index: str | Path | None = None,
        index_arguments: Mapping[str, Any] | None = None,
    ):
        """Prepare; :meth:`start` loads the table.

        Args:
            directory: the serving directory, with CURRENT and the tables; or a single table to follow.
            settings: of the index.
            on_change: called after every change, in the follower's thread; must be quick.
            poll_seconds: time between two polls of the table.
            saved_index: directory of an :class:`AnnIndex`, used at the first load if it fits the table; otherwise, or
                if it is damaged, the index is built.
            index_arguments: further arguments of :class:`LiveIndex`.
        """
        self._directory, self._settings, self._on_change = Path(directory), settings, on_change
        self._poll_seconds, self._arguments = poll_seconds, dict(index_arguments or {})
        self._saved_index = saved_index
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._loaded: IndexedTable | None = None  # left by the loading thread for the next poll
        self._loading: threading.Thread | None = None
        self._ahead: IndexedTable | None = None  # the table that NEXT names
        self._served_unindexed: LiveTable | None = None  # the table that CURRENT names, while it is not loaded yet
        self._counts: dict[str, Any] = {"polls": 0, "changes": 0, "reloads": 0, "errors": 0, "last_error": ""}
        self._delay = 0.0
        self._failing_since: float | None = None  # when the current run of failed polls began
        self._load_wanted = False  # by the last poll
        self._load_failure: tuple[float, str] | None = None  # when loads began to fail, and the last failure's reason

    def start(self) -> StoreFollower:
        """Load the table and follow it from a thread.

        Raises:
            DataError: there is no table.
        """
        self.state = self._load(self._target())
        thread = threading.Thread(target=self._run, name="follower", daemon=True)
        thread.start()
        self._threads.append(thread)
        return self

    @property
    def index(self) -> LiveIndex:
        """The index as it is now."""
        return self.state.index

    def notes(self, note_ids: Sequence[str]) -> list[StoredNote | None]:
        """Whole notes by id, in this order, read from disk; None for an unknown note."""
        return newest_if_gone(self.reading, lambda table: table.notes(note_ids))

    def cards(self, note_ids: Sequence[str]) -> dict[str, StoredCard]:
        """Cards by note id, read from disk; unknown notes are left out."""
        return newest_if_gone(self.reading, lambda table: table.cards(note_ids))

    @property
    def reading(self) -> LiveTable:
        """The table to read notes from: the one that CURRENT names, even while it is not indexed here yet."""
        state, target = self.state, self._target()
        if target == state.table.path:
            return state.table
        table = self._served_unindexed
        if table is None or table.path != target or table.newest_version != table.version:
            table = self._served_unindexed = LiveTable(target)
        return table

    def freshness(self) -> dict[str, Any]:
        """JSON values: seq, version and seconds_since_commit of the newest commit group in the index; delay_seconds
        from its commit to its arrival here (by the clocks of two machines); counts of polls, changes, reloads, errors.
        """
        state = self.state
        return {
            "seq": state.seq,
            "version": state.table.version,
            "model_fingerprint": state.table.model_fingerprint,
            "notes": len(state.index),
            "ahead": self._ahead.table.path.name if self._ahead is not None else None,
            "seconds_since_commit": round(time.time() - state.committed_at, 3),
            "delay_seconds": round(self._delay, 4),
            **self._counts,
        }

    @property
    def alive(self) -> bool:
        """Whether its thread still runs."""
        return all(thread.is_alive() for thread in self._threads)

    @property
    def problem(self) -> str | None:
        """Why the index has not been updated for more than five seconds; None while updates work."""
        latest, since, failure = time.monotonic() - _FAILING_SECONDS, self._failing_since, self._load_failure
        if since is not None and since <= latest:
            return f"the table cannot be followed: {self._counts['last_error']}"
        if failure is not None and failure[0] <= latest:
            return f"the table cannot be loaded anew: {failure[1]}"
        return None

    def wait_for(self, seq: int, timeout: float = 10.0) -> bool:
        """Wait until a commit group is in the index; false if it is not there in time."""
        until = time.monotonic() + timeout
        while self.state.seq < seq and time.monotonic() < until:
            time.sleep(0.002)
        return self.state.seq >= seq

    def poll(self) -> bool:
        """Look for changes once, as the thread does every ``poll_seconds``; whether there were any."""
        self._counts["polls"] += 1
        loaded, self._loaded = self._loaded, None
        if loaded is not None and loaded.table.path == self._target():
            return self._switch_to(loaded)
        if loaded is not None:
            self._ahead = loaded
        self._load_wanted = False
        changed = self._look()
        if not self._load_wanted:
            self._load_failure = None
        return changed

    def close(self) -> None:
        """Stop following."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._poll_seconds):
            try:
                self.poll()
                self._failing_since = None
            # For example files that a clean-up removed: the next poll sees a newer version. BaseException, because a
            # panic inside Lance is one (pyo3's PanicException), and without this thread the index would never change.
            except BaseException as error:
                self._failing_since = self._failing_since or time.monotonic()
                self._counts["errors"] += 1
                if self._counts["last_error"] != str(error):
                    log.warning("%s cannot be followed: %s; trying again", self._directory, error)
                self._counts["last_error"] = str(error)

    def _look(self) -> bool:
        next_table, target = self._upcoming(), self._target()  # NEXT first: a switch writes CURRENT, then removes NEXT
        table = self.state.table
        if target != table.path:
            if self._ahead is not None and self._ahead.table.path == target:
                ahead, self._ahead = self._ahead, None
                return self._switch_to(ahead)
            self._load_beside(target)  # the old table is followed meanwhile
        else:
            self._look_ahead(next_table)
        newest = table.newest_version
        if newest < table.version:  # the writer has set damaged versions aside, which were read here
            self._load_beside(target)
            return False
        return newest > table.version and self._follow(table.at(newest))

    def _look_ahead(self, next_table: Path | None) -> None:
        """Load and follow the table that is to be served next, if there is one."""
        ahead = self._ahead
        if next_table is None:
            self._ahead = None
        elif ahead is None or ahead.table.path != next_table:
            self._load_beside(next_table, needed=False)
        elif (newest := ahead.table.newest_version) != ahead.table.version:
            newer = advanced(ahead, ahead.table.at(newest)) if newest > ahead.table.version else None
            self._ahead = None if newer is None else newer[0]  # None: the next poll loads it again

    def _switch_to(self, loaded: IndexedTable) -> bool:
        """Serve from a loaded table from now on."""
        self.state = loaded
        self._counts["reloads"] += 1
        self._tell(Change([], [], loaded.seq, reloaded=True))
        return True

    def _follow(self, table: LiveTable) -> bool:
        newer = advanced(self.state, table)
        if newer is None:
            self._load_beside(table.path)
            return False
        self.state, change = newer
        if change is None:
            return False
        self._delay = time.time() - self.state.committed_at
        self._counts["changes"] += len(change.written) + len(change.deleted)
        self._tell(change)
        return True

    def _load_beside(self, target: Path, *, needed: bool = True) -> None:
        """Load a table in a thread; if it is ``needed``, a lasting failure is reported by :attr:`problem`."""
        self._load_wanted = self._load_wanted or needed
        # In this order: a load that ends between the two checks has set _loaded, which the next poll takes.
        if (self._loading is not None and self._loading.is_alive()) or self._loaded is not None:
            return

        def load() -> None:
            try:
                self._loaded = self._load(target)
                self._load_failure = None
            except BaseException as error:  # also a panic, see _run
                if needed:
                    since = time.monotonic() if self._load_failure is None else self._load_failure[0]
                    self._load_failure = (since, str(error))
                self._counts["errors"] += 1
                self._counts["last_error"] = str(error)
                log.warning("%s cannot be loaded: %s; the old index stays in use", target, error)
                self._stop.wait(1.0)

        self._loading = threading.Thread(target=load, name="follower's load")
        self._loading.start()

    def _load(self, path: Path) -> IndexedTable:
        saved, self._saved_index = self._saved_index, None  # for the first load only: later tables hold other notes
        return load(LiveTable(path), self._settings, saved, **self._arguments)

    def _target(self) -> Path:
        return self._directory if self._directory.suffix == ".lance" else current_table(self._directory)

    def _upcoming(self) -> Path | None:
        try:
            next_table = None if self._directory.suffix == ".lance" else upcoming(self._directory)
        except DataError:  # NEXT is damaged: the writer reports it, and the served table is fine
            next_table = None
        return None if next_table is None else next_table.table

    def _tell(self, change: Change) -> None:
        if self._on_change is not None:
            self._on_change(change)
