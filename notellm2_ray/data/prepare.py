"""From a source's raw rows to the two prepared tables; rows that cannot be used go to quarantine with a reason.

Workers read, convert and check the rows (:mod:`notellm2_ray.data.validate`). This process takes their blocks in the
source's order, finds duplicates and writes. It holds a 64-bit hash of every id and one row group, never all rows.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.progress import Progress
from notellm2_ray.core.schema import EVENT_SCHEMA, NOTE_SCHEMA, QUARANTINE_SCHEMA
from notellm2_ray.core.settings.data import PrepareSettings
from notellm2_ray.data.duplicates import Versions, drop_rows, numbered_tables
from notellm2_ray.data.key_sets import KeySet, NoteIds
from notellm2_ray.data.keys import write_note_keys
from notellm2_ray.data.log_times import LogTimes
from notellm2_ray.data.rows import FATAL, category
from notellm2_ray.data.validate import check_events, check_notes, hash_ids, without_form
from notellm2_ray.data.writer import RollingWriter

if TYPE_CHECKING:
    import ray.data

    from notellm2_ray.data.sources import SourceTables

_NOTES_PER_TASK = 512  # images read and decoded by one task
_NOTES_PER_GROUP = 256  # some 50 MB of ordinary photographs
_QUARANTINE_ROWS_PER_FILE = 1_000_000
# Of every written note, in the same order: needed if another row with its id comes later.
_ORIGINS = pa.schema(
    [*(pa.field(name, pa.string()) for name in ("_source", "_key", "_dropped")), pa.field("has_image", pa.bool_())]
)


def prepare(tables: SourceTables, settings: PrepareSettings, output: Path) -> dict[str, Any]:
    """Write ``notes/``, ``events/``, ``quarantine/`` and note_keys.parquet below ``output``; Ray must be connected.

    Every raw row ends in exactly one place. Where several usable notes have one id, the newest by ``created_at`` is
    kept, or the last in the source's order where that does not tell. The same input gives the same files. A run starts
    from nothing: files of a stopped run are removed.

    Returns:
        counts: notes, events, users, notes_with_image, quarantined_notes, quarantined_events, dropped_images (notes
        kept without their unusable image; the quarantine lists them), alike_notes (notes that have the content and the
        times of events of another), the facts of :class:`LogTimes`, and reasons (category -> rows of both tables).

    Raises:
        DataError: a table has no usable row or too many bad ones (the message counts the reasons and gives an example
            of each), a file cannot be read to its end, or all events lie within a minute.
        OSError: ``output`` cannot be written.
    """
    for name in ("notes", "notes-kept", "origins", "events", "quarantine"):
        shutil.rmtree(output / name, ignore_errors=True)
    ids, times = NoteIds(KeySet(), KeySet(), KeySet()), LogTimes(tables.invented_times)
    notes = _prepare_notes(tables.notes, settings, output, ids, times)
    events, num_users = _prepare_events(tables.events, settings, output, ids, times)
    facts, alike = times.finish(), write_note_keys(output)
    return {
        "notes": notes.kept,
        "events": events.kept,
        "users": num_users,
        "notes_with_image": notes.with_image,
        "quarantined_notes": notes.bad,
        "quarantined_events": events.bad,
        "dropped_images": notes.dropped,
        "alike_notes": alike,
        **facts,
        "reasons": dict((notes.reasons + events.reasons).most_common()),
    }


class Intake:
    """The counts of one table, its quarantine, and its progress in the log."""

    def __init__(self, table: str, quarantine: RollingWriter) -> None:
        self.table, self.quarantine = table, quarantine
        self.kept = self.bad = self.dropped = self.with_image = 0
        self.reasons: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self._progress = Progress("prepare", f"raw {table}")

    def add(self, good: int, bad: pa.Table) -> None:
        """Count ``good`` rows, and put the rows with a ``_reason`` into quarantine.

        Raises:
            DataError: a reason says that the rest of the file could not be read.
        """
        self.kept += good
        self._reject(bad)
        self._progress.add(good + bad.num_rows, f"{self.bad:,} quarantined")

    def take_back(self, bad: pa.Table) -> None:
        """Put rows with a ``_reason`` into quarantine that were counted as good; ``has_image`` says which had one."""
        self.kept -= bad.num_rows
        self.with_image -= pc.sum(bad["has_image"]).as_py() or 0
        self._reject(bad)
        self._progress.add(0, f"{self.bad:,} quarantined")

    def _reject(self, bad: pa.Table) -> None:
        self.bad += bad.num_rows
        self._write(bad, bad["_reason"])
        found = zip(bad["_reason"].to_pylist(), bad["_source"].to_pylist(), bad["_key"].to_pylist(), strict=True)
        for reason, source, key in found:
            kind = category(reason)
            self.reasons[kind] += 1
            self.examples.setdefault(kind, f"{source} (key {key!r}){reason[len(kind) :]}")
            if kind == FATAL:
                detail = reason.partition(": ")[2]
                raise DataError(f"{detail}. Correct or remove the file and run the same command again")

    def record_dropped_images(self, rows: pa.Table) -> None:
        """Record in the quarantine the notes that are kept without their unusable image."""
        self.dropped += rows.num_rows
        self._write(rows, rows["_dropped"])

    def _write(self, rows: pa.Table, reasons: pa.ChunkedArray) -> None:
        table = pa.array([self.table] * rows.num_rows, pa.string())
        columns = {"table": table, "source": rows["_source"], "key": rows["_key"], "reason": reasons}
        self.quarantine.write(pa.table(columns))

    def finish(self, max_bad_share: float) -> None:
        """Log the final counts and check the share of bad rows.

        Raises:
            DataError: it is empty, or too much of it is bad.
        """
        rows = self.kept + self.bad
        if not rows:
            raise DataError(f"empty pool: the source's {self.table} table has no rows")
        self._progress.finish()
        if self.bad > max_bad_share * rows:
            raise DataError(
                f"{self.table}: {self.bad:,} of {rows:,} rows ({self.bad / rows:.1%}) are unusable, more than the "
                f"{max_bad_share:.1%} that prepare.max_bad_share allows:\n{self._listing()}\nAll of them are in "
                f"{self.quarantine.directory}. Correct the source, or raise prepare.max_bad_share"
            )
        if not self.kept:
            raise DataError(
                f"empty pool: none of the {rows:,} rows of the {self.table} table is usable:\n{self._listing()}"
            )

    def _listing(self) -> str:
        return "\n".join(f"  {n:,} x {kind}, as in {self.examples[kind]}" for kind, n in self.reasons.most_common())


def _prepare_notes(
    dataset: ray.data.Dataset, settings: PrepareSettings, output: Path, ids: NoteIds, times: LogTimes
) -> Intake:
    # Many small tasks, so that the images of one large file are decoded on all CPUs. Another num_cpus than the reader's
    # keeps Ray from fusing the two steps into the reader's single task.
    checked = dataset.repartition(target_num_rows_per_block=_NOTES_PER_TASK).map_batches(
        partial(check_notes, settings=settings), batch_format="pyarrow", batch_size=None, num_cpus=0.75
    )
    rolling = RollingWriter(
        output / "notes", "part", NOTE_SCHEMA, rows_per_file=settings.rows_per_file, row_group=_NOTES_PER_GROUP
    )
    origins = RollingWriter(output / "origins", "part", _ORIGINS, rows_per_file=_QUARANTINE_ROWS_PER_FILE)
    versions = Versions()
    with _quarantine(output, "notes") as quarantine:
        intake = Intake("notes", quarantine)
        with rolling as writer, origins:
            for block in _in_order(checked):
                good = block.filter(pc.is_null(block["_reason"]))
                bad = block.filter(pc.is_valid(block["_reason"]))
                ids.rejected.add(hash_ids(bad["note_id"]))
                hashes = hash_ids(good["note_id"])
                versions.add(hashes, ids.kept.add(hashes), good["created_at"])
                ids.alike.add(hash_ids(without_form(good["note_id"])))
                writer.write(good)
                times.add_notes(good)
                origins.write(good.append_column("has_image", pc.is_valid(good["image"])))
                intake.with_image += good.num_rows - good["image"].null_count
                intake.add(good.num_rows, bad)
        _settle(rolling, origins.directory, versions.superseded(), intake)
    intake.finish(settings.max_bad_share)
    return intake


def _settle(written: RollingWriter, origins: Path, superseded: dict[int, str], intake: Intake) -> None:
    """Take back the written rows that another row supersedes, and record the dropped images of the others."""
    if superseded:
        drop_rows(written, np.fromiter(superseded, np.int64, len(superseded)))
    for start, rows in numbered_tables(origins):
        reasons = pa.array([superseded.get(row) for row in range(start, start + rows.num_rows)], pa.string())
        rows = rows.append_column("_reason", reasons)
        intake.take_back(rows.filter(pc.is_valid(reasons)))
        intake.record_dropped_images(rows.filter(pc.and_(pc.is_null(reasons), pc.is_valid(rows["_dropped"]))))
    shutil.rmtree(origins)


def _prepare_events(
    dataset: ray.data.Dataset, settings: PrepareSettings, output: Path, ids: NoteIds, times: LogTimes
) -> tuple[Intake, int]:
    import ray

    hashes = ray.put(tuple(keys.ascending() for keys in ids))
    checked = dataset.map_batches(
        lambda table: check_events(table, *ray.get(hashes)), batch_format="pyarrow", batch_size=None
    )
    users = KeySet()
    rolling = RollingWriter(output / "events", "part", EVENT_SCHEMA, rows_per_file=settings.rows_per_file)
    with rolling as writer, _quarantine(output, "events") as quarantine:
        intake = Intake("events", quarantine)
        for block in _in_order(checked):
            good = block.filter(pc.is_null(block["_reason"]))
            users.add(np.unique(hash_ids(good["user_id"])))
            writer.write(good)
            times.add_events(good)
            intake.add(good.num_rows, block.filter(pc.is_valid(block["_reason"])))
    intake.finish(settings.max_bad_share)
    return intake, len(users)


def _quarantine(output: Path, table: str) -> RollingWriter:
    return RollingWriter(
        output / "quarantine", table, QUARANTINE_SCHEMA, rows_per_file=_QUARANTINE_ROWS_PER_FILE, row_group=1024
    )


def _in_order(dataset: ray.data.Dataset) -> Iterator[pa.Table]:
    """A dataset's blocks in the source's order."""
    dataset.context.execution_options.preserve_order = True
    yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow")
