"""A read-only store of notes in one memory-mapped Arrow file, for random access by id without loading it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.schema import NOTE_SCHEMA, Note, iter_notes, require_columns

_ROWS_PER_BATCH = 1024


class NoteStore:
    """Notes by id.

    Opening it reads the ids, about 100 bytes of memory a note. Texts and images stay on disk until they are needed, and
    all processes of the machine share them. It is pickled as its path.
    """

    def __init__(self, path: str | Path, stage: str = "mine-pairs") -> None:
        """Open a store.

        Args:
            stage: the stage that writes it, for messages.

        Raises:
            DataError: there is no store at ``path``, or it is damaged.
        """
        self.path, self.stage = Path(path), stage
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(self.path)))
            self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        except FileNotFoundError:
            raise DataError(f"{self.path} does not exist: run {stage} first") from None
        except pa.ArrowInvalid as error:
            raise DataError(
                f"{self.path} is damaged or not a note store ({error}): delete {self.path.parent} and run {stage} again"
            ) from error
        require_columns(reader.schema, NOTE_SCHEMA, str(self.path))
        self._ends = np.cumsum([batch.num_rows for batch in self._batches])
        ids = (note_id for batch in self._batches for note_id in batch.column("note_id").to_pylist())
        self._rows = {note_id: row for row, note_id in enumerate(ids)}

    @staticmethod
    def write(path: str | Path, batches: Iterable[pa.RecordBatch]) -> int:
        """Write batches of prepared notes (NOTE_SCHEMA; other columns are left out), and return their number.

        The file appears complete or not at all.

        Raises:
            DataError: a column is missing, or two notes have one id.
        """
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        seen: set[str] = set()
        try:
            with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, NOTE_SCHEMA) as writer:
                for batch in batches:
                    require_columns(batch.schema, NOTE_SCHEMA, "notes")
                    for note_id in batch.column("note_id").to_pylist():
                        if note_id in seen:
                            raise DataError(f"note {note_id!r} is there twice: ids must be unique; run prepare again")
                        seen.add(note_id)
                    table = pa.Table.from_batches([batch]).select(NOTE_SCHEMA.names).cast(NOTE_SCHEMA)
                    for part in table.to_batches(max_chunksize=_ROWS_PER_BATCH):
                        writer.write_batch(part)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return len(seen)

    def get(self, ids: Sequence[str]) -> list[Note]:
        """The notes with these ids, in this order.

        Raises:
            DataError: an id is not in the store.
        """
        return [self._note(note_id) for note_id in ids]

    def batches(self, ids: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """The notes with these ids, in this order, as record batches.

        Raises:
            DataError: an id is not in the store.
        """
        for start in range(0, len(ids), _ROWS_PER_BATCH):
            rows = [self._row(note_id) for note_id in ids[start : start + _ROWS_PER_BATCH]]
            yield from pa.Table.from_batches(rows).combine_chunks().to_batches()

    @property
    def ids(self) -> list[str]:
        """All ids, in the order of the file."""
        return list(self._rows)

    @property
    def ids_with_image(self) -> list[str]:
        """Ids of the notes that have an image, in the order of the file."""
        return [
            note_id
            for batch in self._batches
            for note_id in batch.column("note_id").filter(batch.column("image").is_valid()).to_pylist()
        ]

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, note_id: str) -> bool:
        return note_id in self._rows

    def __reduce__(self) -> tuple[type[NoteStore], tuple[Path, str]]:
        return NoteStore, (self.path, self.stage)

    def _note(self, note_id: str) -> Note:
        return next(iter_notes(self._row(note_id)))

    def _row(self, note_id: str) -> pa.RecordBatch:
        try:
            row = self._rows[note_id]
        except KeyError:
            raise DataError(
                f"note {note_id!r} is not among the {len(self)} notes of {self.path}: the table that names it must be "
                f"from the same run of {self.stage}"
            ) from None
        number = int(np.searchsorted(self._ends, row, side="right"))
        batch = self._batches[number]
        return batch.slice(row - (int(self._ends[number]) - batch.num_rows), 1)
