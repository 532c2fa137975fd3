"""Which row of a note is kept where several usable ones have its id: the newest by ``created_at``, else the last."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from notellm2_ray.data.writer import RollingWriter

DUPLICATE = "duplicate note_id"
OLDER = f"{DUPLICATE}: the row with the newest created_at is kept"
EARLIER = f"{DUPLICATE}: the last row is kept, since created_at does not tell which is newer"
_NEVER = np.iinfo(np.int64).min  # a row without created_at is older than any with one


class Versions:
    """Hash and time of every written row, 16 bytes each."""

    def __init__(self) -> None:
        self._hashes: list[np.ndarray] = []
        self._times: list[np.ndarray] = []
        self._repeated: list[np.ndarray] = []

    def add(self, hashes: np.ndarray, new: np.ndarray, created_at: pa.ChunkedArray) -> None:
        """Add rows in the order in which they are written.

        Args:
            hashes: ``(N,)`` uint64, of the ids.
            new: ``(N,)`` bool, whether no row before had the id.
            created_at: ``(N,)`` times or null.
        """
        self._hashes.append(hashes)
        self._times.append(pc.fill_null(created_at.cast(pa.int64()), _NEVER).to_numpy())
        self._repeated.append(hashes[~new])

    def superseded(self) -> dict[int, str]:
        """The rows that another row of their id takes the place of: their numbers, ascending, each with a reason."""
        repeated = np.unique(np.concatenate([np.empty(0, np.uint64), *self._repeated]))
        if not len(repeated):
            return {}
        hashes, times = np.concatenate(self._hashes), np.concatenate(self._times)
        rows = np.flatnonzero(np.isin(hashes, repeated))
        rows = rows[np.lexsort((times[rows], hashes[rows]))]  # stable: of equal times, the last row comes last
        last = np.append(hashes[rows[1:]] != hashes[rows[:-1]], True)
        kept = rows[np.flatnonzero(last)[np.cumsum(last) - last]]  # for each row, the one of its id that is kept
        lost = sorted(zip(rows[~last].tolist(), kept[~last].tolist(), strict=True))
        return {row: OLDER if times[row] < times[winner] else EARLIER for row, winner in lost}


def drop_rows(written: RollingWriter, rows: np.ndarray) -> None:
    """Write the files of a finished writer again without some rows.

    Args:
        rows: ascending numbers of the rows to leave out, counted over all files.
    """
    directory = written.directory
    kept = directory.with_name(f"{directory.name}-kept")
    with RollingWriter(
        kept, written.prefix, written.schema, rows_per_file=written.rows_per_file, row_group=written.row_group
    ) as writer:
        for start, table in numbered_tables(directory):
            writer.write(table.filter(pa.array(~np.isin(np.arange(start, start + table.num_rows), rows))))
    shutil.rmtree(directory)
    kept.rename(directory)


def numbered_tables(directory: Path) -> Iterator[tuple[int, pa.Table]]:
    """The row groups of a writer's files, each with the number of its first row."""
    start = 0
    for path in sorted(directory.glob("*.parquet")):
        file = pq.ParquetFile(path)
        for group in range(file.num_row_groups):
            table = file.read_row_group(group)
            yield start, table
            start += table.num_rows
