"""Candidates with the texts of their prompts: examples, candidates and preferences, joined by id."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.note_store import NoteStore
from notellm2_ray.core.schema import (
    CANDIDATE_SCHEMA,
    EXAMPLE_SCHEMA,
    NOTE_SCHEMA,
    PREFERENCE_SCHEMA,
    require_columns,
)


class CandidateRow(NamedTuple):
    """One candidate of one example."""

    example_id: str
    note_id: str
    label: int
    preference: str | None  # None: the user has no history, or prompts have no preference
    history_ids: tuple[str, ...]  # oldest first


class CandidateRows:
    """The candidates of a split, in the order of the candidates' file.

    Attributes:
        num_examples: examples that have candidates.
        without_preference: examples with a history but no preference; they are shown as users without history.
    """

    def __init__(self, examples: Path, candidates: Path, preferences: Path | None) -> None:
        """Read and join the three tables.

        Args:
            examples: EXAMPLE_SCHEMA. candidates: CANDIDATE_SCHEMA.
            preferences: PREFERENCE_SCHEMA; None: prompts have no preference.

        Raises:
            DataError: a table is missing, damaged or lacks a column, or a candidate's example is unknown.
        """
        self._examples = _read(examples, EXAMPLE_SCHEMA, ["example_id", "user_id", "block", "history_ids"])
        self._candidates = _read(candidates, CANDIDATE_SCHEMA)
        found = pc.index_in(self._candidates["example_id"], self._examples["example_id"].combine_chunks())
        if found.null_count:
            unknown = self._candidates["example_id"].filter(pc.is_null(found))[0].as_py()
            raise DataError(
                f"{candidates}: {found.null_count} candidates belong to examples that are not in {examples}, such as "
                f"{unknown!r}: run make-sequences again"
            )
        self._example_of = found.to_numpy()
        self._preferences = None if preferences is None else _Preferences(preferences, self._examples)
        used = np.unique(self._example_of)
        self.num_examples = len(used)
        blocks = self._examples["block"].to_numpy()
        missing = [] if self._preferences is None else used[(blocks[used] >= 0) & (self._preferences.rows[used] < 0)]
        self.without_preference = len(missing)

    def __len__(self) -> int:
        return len(self._candidates)

    def rows(self, positions: Iterable[int]) -> list[CandidateRow]:
        """The candidates at these positions."""
        return [self._row(int(position)) for position in positions]

    @property
    def labels(self) -> np.ndarray:
        """(R,) int8: 1 for a target, 0 for a negative."""
        return self._candidates["label"].to_numpy()

    @property
    def note_ids(self) -> list[str]:
        """The note of every candidate."""
        return self._candidates["note_id"].to_pylist()

    @property
    def example_of(self) -> np.ndarray:
        """(R,) int: the example of every candidate, by its position in the examples' file."""
        return self._example_of

    @property
    def user_ids(self) -> list[str]:
        """The user of every example, in the order of the examples' file."""
        return self._examples["user_id"].to_pylist()

    @property
    def examples_with_preference(self) -> np.ndarray:
        """Positions, in the examples' file, of the examples that have a preference."""
        return np.empty(0, np.int64) if self._preferences is None else np.flatnonzero(self._preferences.rows >= 0)

    def history_ids(self, last: int) -> set[str]:
        """All notes that are among the ``last`` notes of an example's history."""
        histories = self._examples["history_ids"].take(np.unique(self._example_of)).to_pylist()
        return {note_id for history in histories for note_id in history[-last:]}

    def preference(self, example: int) -> str | None:
        """The preference of the example at this position in the examples' file."""
        return None if self._preferences is None else self._preferences[example]

    def _row(self, position: int) -> CandidateRow:
        example = int(self._example_of[position])
        note_id, label = (self._candidates[name][position].as_py() for name in ("note_id", "label"))
        history = tuple(self._examples["history_ids"][example].as_py())
        example_id = self._examples["example_id"][example].as_py()
        return CandidateRow(example_id, note_id, label, self.preference(example), history)


class _Preferences:
    """Preferences by example; ``rows`` (E,) is the row of each, -1 where it is missing."""

    def __init__(self, path: Path, examples: pa.Table) -> None:
        table = _read(path, PREFERENCE_SCHEMA, ["user_id", "block", "preference"])
        wanted = examples.select(["user_id", "block"]).append_column("example", pa.array(np.arange(len(examples))))
        table = table.append_column("row", pa.array(np.arange(len(table))))
        joined = wanted.join(table.select(["user_id", "block", "row"]), ["user_id", "block"], join_type="inner")
        self.rows = np.full(len(examples), -1)
        self.rows[joined["example"].to_numpy()] = joined["row"].to_numpy()
        self._texts = table["preference"]

    def __getitem__(self, example: int) -> str | None:
        row = self.rows[example]
        return None if row < 0 else self._texts[int(row)].as_py()


def store_notes(notes: Path, ids: Iterable[str], path: Path) -> None:
    """Write a :class:`NoteStore` of the notes with these ids, from the Parquet files in ``notes``.

    Unknown ids are left out.

    Raises:
        DataError: there are no notes, or they lack a column.
    """
    try:
        table = pads.dataset(str(notes), format="parquet")
    except FileNotFoundError:
        raise DataError(f"{notes} does not exist: run prepare first") from None
    require_columns(table.schema, NOTE_SCHEMA, str(notes))
    chosen = pa.array(sorted(set(ids)), pa.string())
    scanner = table.scanner(columns=NOTE_SCHEMA.names, filter=pads.field("note_id").isin(chosen), batch_size=1024)
    NoteStore.write(path, (batch for batch in scanner.to_batches() if batch.num_rows))


def _read(path: Path, schema: pa.Schema, columns: Sequence[str] | None = None) -> pa.Table:
    try:
        require_columns(pq.read_schema(path), schema, str(path))
        return pq.read_table(path, columns=list(columns or schema.names))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: run the stage that makes it first") from None
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} is damaged ({error}): run the stage that makes it again") from error
