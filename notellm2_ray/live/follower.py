"""A replica's view of the live notes: it follows the table on disk and keeps an index of it in memory.

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

import pyarrow as pa

from notellm2_ray.core.errors import ConfigError, DataError, OutputError
from notellm2_ray.core.settings.retrieval import IndexSettings
from notellm2_ray.index.ann import AnnIndex
from notellm2_ray.live.current import current_table, upcoming
from notellm2_ray.live.following import Change, Following, applied, last_group
from notellm2_ray.live.index import LiveIndex
from notellm2_ray.live.rows import StoredCard, StoredNote, to_batch
from notellm2_ray.live.table import LiveTable, newest_if_gone

log = logging.getLogger(__name__)

_FAILING_SECONDS = 5.0


class StoreFollower:
    """Follows the live table, or the one that the pointer file CURRENT names, at a small distance.

    Every ``poll_seconds`` it asks for the newest version's number, which costs 0.1 ms, and reads only the files that
    came since. Compaction, clean-up and a restart of the writer do not disturb it. A table that NEXT names is loaded
    beside, in a thread, and followed as well; once CURRENT names it, it takes the old one's place as one, so answers
    never mix two models' vectors.

    Attributes:
        state: table, index and seq that belong together: take it once per request.
    """

    state: Following

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
        """Prepare; :meth:`start` loads.

        Args:
            directory: the serving directory, with CURRENT and the tables; or a table, which is followed alone.
            settings: of the index.
            on_change: called after every change, in the follower's thread; must be quick.
            poll_seconds: time between looks at the table.
            saved_index: directory of an :class:`AnnIndex`, used at the first load if it fits the table as it stands;
                one that is damaged is built anew.
            index_arguments: further arguments of :class:`LiveIndex`.
        """
        self._directory, self._settings, self._on_change = Path(directory), settings, on_change
        self._poll_seconds, self._arguments = poll_seconds, dict(index_arguments or {})
        self._saved_index = saved_index
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._loaded: Following | None = None  # by the loading thread, to be taken by the polling one
        self._loading: threading.Thread | None = None
        self._ahead: Following | None = None  # what is to be served next
        self._read_beside: LiveTable | None = None  # what is served, while it is not loaded yet
        self._counts: dict[str, Any] = {"polls": 0, "changes": 0, "reloads": 0, "errors": 0, "last_error": ""}
        self._delay = 0.0
        self._failing_since: float | None = None  # the first of the looks that failed one after the other
        self._load_wanted = False  # by the last look
        self._load_failure: tuple[float, str] | None = None  # when loads began to fail, and why the last did

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
        """Titles, pictures and the rest by id, in this order, read from disk; None where there is no such note."""
        return newest_if_gone(self.reading, lambda table: table.notes(note_ids))

    def cards(self, note_ids: Sequence[str]) -> dict[str, StoredCard]:
        """Notes by id as they are shown, read from disk; those that are not there are left out."""
        return newest_if_gone(self.reading, lambda table: table.cards(note_ids))

    @property
    def reading(self) -> LiveTable:
        """The table that notes are read from: the index's, or the one that is served, while it is not loaded yet."""
        state, target = self.state, self._target()
        if target == state.table.path:
            return state.table
        beside = self._read_beside
        if beside is None or beside.path != target or beside.newest_version != beside.version:
            beside = self._read_beside = LiveTable(target)
        return beside

    def freshness(self) -> dict[str, Any]:
        """JSON values: seq, version, seconds_since_commit of the newest group in the index, delay_seconds between its
        commit and its arrival here (clocks of both machines), polls, changes, reloads, errors.
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
        """Whether its thread still follows."""
        return all(thread.is_alive() for thread in self._threads)

    @property
    def problem(self) -> str | None:
        """Why the index has been standing still for more than five seconds; None while it follows."""
        latest, since, failure = time.monotonic() - _FAILING_SECONDS, self._failing_since, self._load_failure
        if since is not None and since <= latest:
            return f"the table cannot be followed: {self._counts['last_error']}"
        if failure is not None and failure[0] <= latest:
            return f"the table cannot be loaded anew: {failure[1]}"
        return None

    def wait_for(self, seq: int, timeout: float = 10.0) -> bool:
        """Wait until a commit group is in the index; whether it is."""
        until = time.monotonic() + timeout
        while self.state.seq < seq and time.monotonic() < until:
            time.sleep(0.002)
        return self.state.seq >= seq

    def poll(self) -> bool:
        """Look once, as the thread does every ``poll_seconds``; whether anything changed."""
        self._counts["polls"] += 1
        loaded, self._loaded = self._loaded, None
        if loaded is not None and loaded.table.path == self._target():
            return self._go_over(loaded)
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
            # Such as files that a clean-up removed: the next look sees a newer version. BaseException, because a panic
            # inside Lance is one (pyo3's PanicException), and without this thread the index would stand still for ever.
            except BaseException as error:
                self._failing_since = self._failing_since or time.monotonic()
                self._counts["errors"] += 1
                if self._counts["last_error"] != str(error):
                    log.warning("following %s: %s; it is tried again", self._directory, error)
                self._counts["last_error"] = str(error)

    def _look(self) -> bool:
        following, target = self._upcoming(), self._target()  # in this order: CURRENT takes NEXT's place
        table = self.state.table
        if target != table.path:
            if self._ahead is not None and self._ahead.table.path == target:
                ahead, self._ahead = self._ahead, None
                return self._go_over(ahead)
            self._load_beside(target)  # goes on following the old one meanwhile
        else:
            self._look_ahead(following)
        newest = table.newest_version
        if newest < table.version:  # the writer has set damaged versions aside: what was read of them is no more
            self._load_beside(target)
            return False
        return newest > table.version and self._follow(table.at(newest))

    def _look_ahead(self, following: Path | None) -> None:
        """Load and follow what is to be served next, if anything is."""
        ahead = self._ahead
        if following is None:
            self._ahead = None
        elif ahead is None or ahead.table.path != following:
            self._load_beside(following, needed=False)
        elif (newest := ahead.table.newest_version) != ahead.table.version:
            newer = applied(ahead, ahead.table.at(newest)) if newest > ahead.table.version else None
            self._ahead = None if newer is None else newer[0]  # None: it is loaded again

    def _go_over(self, loaded: Following) -> bool:
        """Serve what was loaded, as one."""
        self.state = loaded
        self._counts["reloads"] += 1
        self._tell(Change([], [], loaded.seq, reloaded=True))
        return True

    def _follow(self, table: LiveTable) -> bool:
        newer = applied(self.state, table)
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
        """Load a table in a thread; where it is ``needed``, a failure is this replica's problem."""
        self._load_wanted = self._load_wanted or needed
        # In this order: a load that ends between the two looks has left what it loaded, which the next poll takes.
        if (self._loading is not None and self._loading.is_alive()) or self._loaded is not None:
            return

        def load() -> None:
            try:
                self._loaded = self._load(target)
                self._load_failure = None
            except BaseException as error:  # a panic too, as above
                if needed:
                    since = time.monotonic() if self._load_failure is None else self._load_failure[0]
                    self._load_failure = (since, str(error))
                self._counts["errors"] += 1
                self._counts["last_error"] = str(error)
                log.warning("loading %s: %s; the index before it stays", target, error)
                self._stop.wait(1.0)

        self._loading = threading.Thread(target=load, name="follower's load")
        self._loading.start()

    def _load(self, path: Path) -> Following:
        table = LiveTable(path)
        parts = [pa.Table.from_batches([part]) for part in table.scan()]
        rows = pa.concat_tables(parts) if parts else table.dataset.schema.empty_table()
        batch = to_batch(rows, table.columns)
        index = LiveIndex(
            batch,
            self._settings,
            model_fingerprint=table.model_fingerprint,
            others=table.columns[1:],
            main=self._take_saved(table.model_fingerprint),
            **self._arguments,
        )
        seq, committed_at = last_group(rows) if len(rows) else (-1, 0.0)
        return Following(table, index, max(seq, table.purged_seq), committed_at, table.fragment_ids())

    def _take_saved(self, model_fingerprint: str) -> AnnIndex | None:
        """The saved index, if it is of the model: the first time, for later tables hold other notes."""
        directory, self._saved_index = self._saved_index, None
        if directory is None:
            return None
        try:
            saved = AnnIndex.load(directory)
        except (ConfigError, OutputError) as error:  # damaged, or made for a GPU that is not here
            log.warning("%s; the index is built anew", error)
            return None
        return saved if saved.model_fingerprint == model_fingerprint else None

    def _target(self) -> Path:
        return self._directory if self._directory.suffix == ".lance" else current_table(self._directory)

    def _upcoming(self) -> Path | None:
        try:
            following = None if self._directory.suffix == ".lance" else upcoming(self._directory)
        except DataError:  # the writer says so, and nothing is wrong with the table that is served
            following = None
        return None if following is None else following.table

    def _tell(self, change: Change) -> None:
        if self._on_change is not None:
            self._on_change(change)
