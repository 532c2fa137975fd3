"""Upkeep of a live table: joining small files, removing old tombstones and old versions."""

from __future__ import annotations

import logging
import threading
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from notellm2_ray.live import durability
from notellm2_ray.live.rows import now
from notellm2_ray.live.table import PURGED_KEY, LiveTable

if TYPE_CHECKING:
    from lance.optimize import CompactionOptions

log = logging.getLogger(__name__)

FRAGMENT_ROWS = 16_384  # a file of so many rows is rewritten only when a tenth of its rows is deleted
_JOINED_ROWS = 64  # files of fewer rows are joined each time
_DEAD_SHARE = 0.25  # of all rows, at which all files that may be joined are


class Upkeep:
    """When and how a table is compacted and cleaned.

    Files are joined in the writer's thread between two commit groups, so that no write can conflict: those of a few
    rows each time, and all that are not full, or lost a tenth of their rows, when that has made many files or many rows
    are dead. So a small table is not written anew for every few updates. Old versions are removed in another thread. A
    follower that still reads a removed version notices it and continues with the newest.
    """

    def __init__(
        self,
        *,
        fragment_rows: int = FRAGMENT_ROWS,
        small_files: int = 24,
        idle_small_files: int = 4,
        tombstone_horizon: timedelta = timedelta(hours=1),
        keep_versions: timedelta = timedelta(minutes=2),
        keep_crowded: timedelta = timedelta(seconds=1),
    ):
        """Set the thresholds.

        Args:
            fragment_rows: files with fewer rows are joined; at most the value used at the table's creation.
            small_files: number of added files at which they are joined, while there are writes ...
            idle_small_files: ... and while there are none.
            tombstone_horizon: older tombstones are removed; a follower that was away for longer loads the table anew.
            keep_versions: how long an old version stays readable ...
            keep_crowded: ... and how long if old versions take more than half the bytes of the newest: such a table is
                small, and read quickly.
        """
        self.fragment_rows, self.small_files, self.idle_small_files = fragment_rows, small_files, idle_small_files
        self.tombstone_horizon = tombstone_horizon
        self.keep_versions, self.keep_crowded = keep_versions, min(keep_crowded, keep_versions)
        self._settled = 0  # fragments after the last run
        self._cleaner: threading.Thread | None = None
        self._crowded = False  # whether old versions took many bytes at the last clean-up
        self._counts: dict[str, Any] = {"compactions": 0, "purged_tombstones": 0, "longest_pause_seconds": 0.0}

    def index(self, table: LiveTable) -> None:
        """Make the index of note ids if it is missing, as in a new table."""
        if not any(index.field_names == ["note_id"] for index in table.dataset.describe_indices()):
            before = durability.listing(table.path)
            table.dataset.create_scalar_index("note_id", "BTREE")
            durability.sync_new(table.path, before)
        self._settled = len(table.fragment_ids())

    def due(self, fragments: int, *, idle: bool) -> bool:
        """Whether enough small files were added."""
        return fragments - self._settled >= (self.idle_small_files if idle else self.small_files)

    def run(self, table: LiveTable, seq: int) -> None:
        """Compact and clean the newest version; only the writer's thread may call this.

        Args:
            table: the newest version.
            seq: of the last commit group.
        """
        if self._crowded:  # a busy machine may not come round to cleaning up: then writes wait, and not the disk
            self.wait()
        started, before = time.perf_counter(), durability.listing(table.path)
        purged = self._purge(table, seq)
        table.dataset.checkout_latest()
        self._join_files(table)
        table.dataset.optimize.optimize_indices()
        durability.sync_new(table.path, before)
        self._settled = len(LiveTable(table.path).fragment_ids())
        pause = time.perf_counter() - started
        self._counts["compactions"] += 1
        self._counts["purged_tombstones"] += purged
        self._counts["longest_pause_seconds"] = round(max(pause, self._counts["longest_pause_seconds"]), 3)
        self._clean(table)

    def wait(self) -> None:
        """Wait until a running removal of old versions is done."""
        if self._cleaner is not None:
            self._cleaner.join()

    def info(self) -> dict[str, Any]:
        """Counts as JSON values."""
        return dict(self._counts)

    def _join_files(self, table: LiveTable) -> None:
        """Join small files; the new ones are on the disk before a version refers to them."""
        from lance.optimize import Compaction

        dataset, before = table.dataset, durability.listing(table.path)
        plan = Compaction.plan(dataset, self._what_to_join(dataset))
        results = [task.execute(dataset) for task in plan.tasks]
        if results:
            durability.sync_new(table.path, before)
            Compaction.commit(dataset, results)

    def _what_to_join(self, dataset: Any) -> CompactionOptions:
        """Options of Lance's plan of a compaction."""
        files = [part.metadata for part in dataset.get_fragments()]
        dead, rows = sum(one.num_deletions for one in files), sum(one.physical_rows for one in files)
        joined = sum(_JOINED_ROWS <= one.physical_rows < self.fragment_rows for one in files)
        if dead >= _DEAD_SHARE * rows or joined > self.small_files or self.fragment_rows < _JOINED_ROWS:
            return {"target_rows_per_fragment": self.fragment_rows}
        return {"target_rows_per_fragment": _JOINED_ROWS, "materialize_deletions": False}

    def _purge(self, table: LiveTable, seq: int) -> int:
        """Remove old tombstones. First records up to which seq, so that a follower behind it loads the table anew."""
        import pyarrow.compute as pc

        limit = (now() - self.tombstone_horizon).isoformat(sep=" ")
        old = f"deleted AND committed_at < timestamp '{limit}'"
        tombstones = table.dataset.to_table(columns=["seq"], filter=old)
        if not len(tombstones):
            return 0
        purged = pc.max(tombstones["seq"]).as_py()
        table.dataset.update_config({PURGED_KEY: str(max(purged, table.purged_seq))})
        table.dataset.delete(f"deleted AND seq <= {purged}")
        log.info("%s: removed %d tombstone(s) up to seq %d of %d", table.path, len(tombstones), purged, seq)
        return len(tombstones)

    def _clean(self, table: LiveTable) -> None:
        if self._cleaner is not None and self._cleaner.is_alive():
            return
        dataset = LiveTable(table.path).dataset  # not shared with the writer's thread

        def clean() -> None:
            try:
                newest = durability.newest_bytes(dataset)
                self._crowded = durability.old_bytes(dataset, table.path) > newest / 2
                dataset.cleanup_old_versions(older_than=self.keep_crowded if self._crowded else self.keep_versions)
            except (OSError, RuntimeError, ValueError):  # what Lance raises
                log.exception("%s: old versions could not be removed; trying again later", table.path)

        self._cleaner = threading.Thread(target=clean, name="cleanup")
        self._cleaner.start()
