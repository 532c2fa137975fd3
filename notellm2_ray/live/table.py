"""Reading the live table: one version of it, notes by id, and the changes since another version."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from notellm2_ray.core.errors import DataError
from notellm2_ray.index.table import DIM_KEY, MODEL_KEY, embedding_columns
from notellm2_ray.live.rows import FOLLOWED, StoredCard, StoredNote, to_cards, to_notes

T = TypeVar("T")

PURGED_KEY = "notellm2.purged_seq"  # tombstones up to this seq may be removed: an index behind it must load anew
_CACHE_BYTES = 128 * 2**20  # Lance's defaults are gigabytes for every replica
_NOTE_COLUMNS = ["note_id", "title", "topics", "content", "image", "created_at", "seq", "deleted"]
_CARD_COLUMNS = {name: name for name in ("note_id", "title", "topics", "content", "created_at", "deleted")}
_CARD_COLUMNS |= {"has_image": "image IS NOT NULL"}


class LiveTable:
    """One version of a live table, read-only; many threads may use it.

    Attributes:
        path: of the table.
        version: Lance's number of this version.
        model_fingerprint: of the model whose vectors the table holds.
        dim: length of a vector.
        columns: the vector columns, ``embedding`` first.
        dataset: the Lance dataset.
    """

    def __init__(self, path: Path, dataset: Any = None):
        """Open the newest version.

        Raises:
            DataError: there is no table, or it is of another kind.
        """
        self.path = Path(path)
        self.dataset = dataset if dataset is not None else _open(self.path)
        metadata = self.dataset.schema.metadata or {}
        if MODEL_KEY not in metadata or "seq" not in self.dataset.schema.names:
            raise DataError(f"{path} is a Lance table of another kind, not one of live notes")
        self.version: int = self.dataset.version
        self.model_fingerprint: str = metadata[MODEL_KEY].decode()
        self.dim = int(metadata[DIM_KEY])
        self.columns = embedding_columns(self.dataset.schema)

    @property
    def newest_version(self) -> int:
        """Number of the newest version; takes about 0.1 ms."""
        return self.dataset.latest_version

    def at(self, version: int) -> LiveTable:
        """Another version, which shares this one's caches."""
        return LiveTable(self.path, self.dataset.checkout_version(version))

    @property
    def purged_seq(self) -> int:
        """Tombstones up to this seq may have been removed."""
        return int(self.dataset.config().get(PURGED_KEY, -1))

    def fragment_ids(self) -> set[int]:
        """Lance's fragments (files of rows) in this version."""
        return {fragment.fragment_id for fragment in self.dataset.get_fragments()}

    def last_seq(self) -> int:
        """The largest seq in the table, removed tombstones included; -1 for an empty table."""
        import pyarrow.compute as pc

        largest = pc.max(self.dataset.to_table(columns=["seq"])["seq"]).as_py()
        return max(self.purged_seq, -1 if largest is None else largest)

    def scan(self) -> Iterator[pa.RecordBatch]:
        """The columns that an index needs, of every row and tombstone."""
        return self.dataset.scanner(columns=[*FOLLOWED, *self.columns]).to_batches()

    def changes(self, after_seq: int, known_fragments: set[int]) -> pa.Table:
        """The columns that an index needs, of the rows written after a commit group, in order of seq.

        Args:
            after_seq: the commit group.
            known_fragments: fragments of the version that was read before. They hold no later rows, because rows are
                only ever added in new fragments.
        """
        fresh = [part for part in self.dataset.get_fragments() if part.fragment_id not in known_fragments]
        columns = [*FOLLOWED, *self.columns]
        if not fresh:
            return self.dataset.schema.empty_table().select(columns)
        scanner = self.dataset.scanner(columns=columns, filter=f"seq > {after_seq}", fragments=fresh)
        return scanner.to_table().sort_by("seq")

    def notes(self, note_ids: Sequence[str]) -> list[StoredNote | None]:
        """Notes by id, in the order asked for; None for an unknown note."""
        found = to_notes(self._rows(note_ids, _NOTE_COLUMNS))
        return [found.get(note_id) for note_id in note_ids]

    def cards(self, note_ids: Sequence[str]) -> dict[str, StoredCard]:
        """Cards by note id; unknown notes are left out. Images, which may have megabytes, are not read."""
        return to_cards(self._rows(note_ids, _CARD_COLUMNS)) if note_ids else {}

    def existing(self, note_ids: Sequence[str]) -> set[str]:
        """The ids among these that are notes."""
        rows = self._rows(note_ids, ["note_id", "deleted"])
        gone = rows["deleted"].to_pylist()
        return {note_id for note_id, dead in zip(rows["note_id"].to_pylist(), gone, strict=True) if not dead}

    def _rows(self, note_ids: Sequence[str], columns: list[str] | dict[str, str]) -> pa.Table:
        """Columns (or named expressions) of the ids' rows and tombstones, read through the index of note ids."""
        if not note_ids:
            return self.dataset.schema.empty_table().select(list(columns))
        quoted = ", ".join("'" + note_id.replace("'", "''") + "'" for note_id in set(note_ids))
        return self.dataset.to_table(columns=columns, filter=f"note_id IN ({quoted})")


def newest_if_gone(table: LiveTable, read: Callable[[LiveTable], T]) -> T:
    """``read`` of a version, or of the newest version if a clean-up has removed this one's files."""
    try:
        return read(table)
    except Exception:  # which error Lance raises for a missing file depends on the call; a second failure is raised
        return read(LiveTable(table.path))


def _open(path: Path) -> Any:
    import lance

    try:
        return lance.dataset(str(path), index_cache_size_bytes=_CACHE_BYTES, metadata_cache_size_bytes=_CACHE_BYTES)
    except (ValueError, OSError) as error:
        raise DataError(f"{path} holds no live notes: seed it first ({str(error).splitlines()[0]})") from error
