"""Making snapshots of a live index: of its first notes, and after each batch of changes."""

from __future__ import annotations

from typing import Any

import numpy as np

from notellm2_ray.index.ann import AnnIndex
from notellm2_ray.live.columns import NoteBatch, NoteColumns
from notellm2_ray.live.search import Snapshot, bitmap


def first_snapshot(rows: NoteColumns, main: AnnIndex | None) -> Snapshot:
    """The snapshot of columns that were just filled, with all rows in the main index."""
    row_of = {note_id: row for row, note_id in enumerate(rows.ids[: rows.count].tolist())}
    return _snapshot(rows, main, rows.count, np.ones(rows.count, dtype=bool), row_of)


def changed_snapshot(rows: NoteColumns, now: Snapshot, changes: NoteBatch) -> Snapshot:
    """The snapshot after a batch of changes; the notes that it writes are appended to ``rows``."""
    changes = changes.take(changes.last_of_each())
    replaced = [row for note_id in changes.ids if (row := now.row_of.get(note_id)) is not None]
    written = without_deletions(changes)
    where = rows.append(written)
    alive = np.concatenate([now.alive, np.ones(len(written.ids), dtype=bool)])
    alive[replaced] = False
    row_of = now.row_of
    after = _snapshot(rows, now.main, now.main_count, alive, row_of)
    # The rows are published before the snapshot: a search that finds a row beyond its own snapshot knows that a newer
    # snapshot follows. Deleted notes keep their dead row, so that a search that began earlier can still exclude them.
    row_of.update(zip(written.ids, range(where.start, where.stop), strict=True))  # type: ignore[attr-defined]
    return after


def without_deletions(batch: NoteBatch) -> NoteBatch:
    """The notes that a batch writes."""
    if batch.deleted is None or not batch.deleted.any():
        return batch
    return batch.take(np.flatnonzero(~batch.deleted))._replace(deleted=None)


def _snapshot(rows: NoteColumns, main: AnnIndex | None, main_count: int, alive: np.ndarray, row_of: Any) -> Snapshot:
    count = rows.count
    main_alive = int(np.count_nonzero(alive[:main_count]))
    return Snapshot(
        main=main,
        main_count=main_count,
        ids=rows.ids[:count],
        vectors=rows.vectors[:count],
        created_at=rows.created_at[:count],
        others={name: matrix[:count] for name, matrix in rows.others.items()},
        topics=rows.topics,
        alive=alive,
        num_alive=int(np.count_nonzero(alive)),
        main_alive=main_alive,
        main_selector=None if main_alive == main_count else bitmap(alive[:main_count]),
        row_of=row_of,
    )
