"""An index that can be changed while it is searched: a trained main index, an exact delta, tombstones and rebuilds.

Used as::

    index = LiveIndex(batch, settings.index, model_fingerprint=fingerprint)
    hits = index.search(vector, k=100, exclude=seen, where=Filter(topics=frozenset({"food"})))
    index.apply(NoteBatch(["n1"], vectors, topics=[["food"]]))
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import numpy as np

from notellm2_ray.core.errors import DataError, ModelError
from notellm2_ray.core.settings.retrieval import IndexSettings
from notellm2_ray.index.ann import AnnIndex
from notellm2_ray.live import search as live_search
from notellm2_ray.live.columns import NoteBatch, NoteColumns, check_batch
from notellm2_ray.live.search import Filter, Hits, OutdatedError, Snapshot
from notellm2_ray.live.snapshots import changed_snapshot, first_snapshot, without_deletions

log = logging.getLogger(__name__)


class LiveIndex:
    """Nearest notes by cosine, over a set of notes that changes.

    Any number of threads may search while one thread applies changes. Searches take no lock, and see each batch of
    changes as a whole or not at all. New notes go into a delta that is searched exactly; deleted and replaced notes
    leave tombstones. When both together exceed a share of the main index, a thread builds a new main index of the
    living notes and swaps it in; changes made meanwhile are kept.

    Attributes:
        model_fingerprint: of the model whose vectors these are.
        dim: length of a vector (D).
        others: names of the further vector columns.
    """

    def __init__(
        self,
        notes: NoteBatch,
        settings: IndexSettings,
        *,
        model_fingerprint: str,
        others: Sequence[str] = (),
        seed: int = 42,
        rebuild_share: float = 0.1,
        rebuild_rows: int = 2000,
        rebuild_threads: int = 1,
        main: AnnIndex | None = None,
    ):
        """Build the index.

        Args:
            notes: the first notes; may be empty, with vectors of shape (0, D).
            settings: kind of the main index.
            model_fingerprint: of the model whose vectors these are.
            others: further vector columns to keep, for :meth:`similarity`.
            seed: of the main index.
            rebuild_share: a rebuild starts when fresh rows and tombstones reach this share of the main index ...
            rebuild_rows: ... and there are at least so many of them.
            rebuild_threads: FAISS threads of a rebuild, which competes with searches.
            main: a saved index; used instead of building one if it is of exactly these notes in this order.

        Raises:
            DataError: a vector is NaN, infinite, of another length or not of unit length.
            ConfigError: the settings do not fit the vectors.
        """
        self.settings, self.seed, self.model_fingerprint = settings, seed, model_fingerprint
        self.rebuild_share, self.rebuild_rows, self.rebuild_threads = rebuild_share, rebuild_rows, rebuild_threads
        self.dim, self.others = notes.vectors.shape[1], tuple(others)
        check_batch(notes, self.dim, "live index")
        self._lock = threading.Lock()  # taken to apply changes and to swap the main index, never to search
        self._rebuilding: threading.Thread | None = None
        self._since: list[NoteBatch] | None = None  # changes since the running rebuild began
        self._retry_rows = 0  # after a failed rebuild: outdated rows at which it is tried again
        self._rebuilds = {"rebuilds": 0, "rebuild_failures": 0, "rebuild_seconds": 0.0}
        living = without_deletions(notes)
        same = main is not None and np.array_equal(main.ids, np.array(living.ids, dtype=object))
        self._rows, self._snapshot = self._generation(living, main if same else None)

    def __len__(self) -> int:
        return self._snapshot.num_alive

    def __contains__(self, note_id: str) -> bool:
        return self._read(lambda now: now.row(note_id)) is not None

    def search(
        self,
        query: np.ndarray | str,
        k: int,
        *,
        exclude: Collection[str] = (),
        where: Filter | None = None,
        model_fingerprint: str | None = None,
    ) -> Hits:
        """The ``k`` nearest notes; fewer only if no more match.

        Args:
            query: (D,) unit vector, or the id of a note, which is then not returned itself.
            k: notes wanted.
            exclude: ids never to return; unknown ones are ignored.
            where: conditions on topics and time; if few notes match, they are searched exactly.
            model_fingerprint: of the model that made the query vector, to be checked.

        Raises:
            DataError: an unknown note, ``k`` below 1, or a vector of another length or not of unit length.
            ModelError: the query vector was made by another model.
        """
        if k < 1:
            raise DataError(f"k is {k}: ask for at least one note")
        if model_fingerprint is not None and model_fingerprint != self.model_fingerprint:
            raise ModelError(
                f"the query vector was made by the model {model_fingerprint}, the index by {self.model_fingerprint}: "
                "vectors of two models cannot be compared"
            )
        vector = None if isinstance(query, str) else live_search.checked_query(query, self.dim)

        def look(now: Snapshot) -> Hits:
            excluded = now.rows(exclude)
            if vector is not None:
                return now.search(vector, k, excluded, where)
            own = now.row(query)  # type: ignore[arg-type]
            if own is None:
                raise DataError(f"note {query!r} is not in the index")
            return now.search(now.vectors[own], k, np.append(excluded, own), where)

        return self._read(look)

    def vector(self, note_id: str, column: str = "embedding") -> np.ndarray | None:
        """A copy (D,) of a note's vector; None if the note is unknown or has no vector in that column."""

        def look(now: Snapshot) -> np.ndarray | None:
            row = now.row(note_id)
            vector = None if row is None else _column(now, column)[row]
            return None if vector is None or np.isnan(vector[0]) else vector.copy()

        return self._read(look)

    def similarity(self, note_id: str, others: Sequence[str], column: str = "embedding") -> list[float | None]:
        """Cosines of one note with others in a vector column like ``embedding_image``; None where a vector is missing.

        Raises:
            DataError: the index has no such column.
        """

        def look(now: Snapshot) -> list[float | None]:
            matrix = _column(now, column)
            own = now.row(note_id)
            rows = [now.row(other) for other in others]
            if own is None:
                return [None] * len(rows)
            cosines = [None if row is None else float(matrix[row] @ matrix[own]) for row in rows]
            return [None if cosine is None or np.isnan(cosine) else cosine for cosine in cosines]

        return self._read(look)

    def upsert(self, notes: NoteBatch) -> None:
        """Add notes, or replace them by new versions."""
        self.apply(notes)

    def delete(self, note_ids: Iterable[str]) -> None:
        """Remove notes; unknown ids are ignored."""
        ids = list(note_ids)
        self.apply(NoteBatch(ids, np.zeros((len(ids), self.dim), np.float32), np.ones(len(ids), dtype=bool)))

    def apply(self, changes: NoteBatch) -> None:
        """Apply a batch of changes in one step: a search sees all of them or none.

        Raises:
            DataError: a vector is NaN, infinite, of another length or not of unit length; nothing was applied then.
        """
        check_batch(changes, self.dim, "live index")
        if not len(changes.ids):
            return
        with self._lock:
            self._snapshot = changed_snapshot(self._rows, self._snapshot, changes)
            if self._since is not None:
                self._since.append(changes)
            elif self._num_outdated() >= max(self.rebuild_rows, self._retry_rows, self._rebuild_share_rows()):
                self._start_rebuild()

    def rebuild(self) -> None:
        """Build a new main index from the living notes now, and wait for it."""
        with self._lock:
            thread = self._rebuilding if self._since is not None else self._start_rebuild()
        if thread is not None:
            thread.join()

    def wait(self) -> None:
        """Wait for the running rebuild, if there is one."""
        thread = self._rebuilding
        if thread is not None:
            thread.join()

    def info(self) -> dict[str, Any]:
        """JSON values: notes, in_main, fresh, tombstones, facts of the main index, rebuilds, seconds of the last."""
        now = self._snapshot
        return {
            "notes": now.num_alive,
            "in_main": now.main_count,
            "fresh": now.num_alive - now.main_alive,
            "tombstones": len(now.ids) - now.num_alive,
            "rebuilding": self._since is not None,
            "model_fingerprint": self.model_fingerprint,
            "main": dict(now.main.info) if now.main is not None else {},
            **self._rebuilds,
        }

    def _read(self, look: Callable[[Snapshot], Any]) -> Any:
        while True:
            try:
                return look(self._snapshot)
            except OutdatedError:
                time.sleep(0)  # the thread that applies changes is about to publish the next snapshot

    def _rebuild_share_rows(self) -> int:
        return int(self.rebuild_share * self._snapshot.main_count)

    def _num_outdated(self) -> int:
        """Rows of the delta, and dead rows of the main index."""
        return len(self._snapshot.ids) - self._snapshot.main_alive

    def _generation(self, notes: NoteBatch, main: AnnIndex | None = None) -> tuple[NoteColumns, Snapshot]:
        """Columns filled with notes, and the snapshot that has all of them in the main index."""
        rows = NoteColumns.holding(notes, self.dim, self.others)
        if main is None and rows.count:
            main = AnnIndex.build(
                rows.ids[: rows.count],
                rows.vectors[: rows.count],
                self.settings,
                self.seed,
                model_fingerprint=self.model_fingerprint,
            )
        return rows, first_snapshot(rows, main)

    def _start_rebuild(self) -> threading.Thread:
        self._since = []
        # Not a daemon: the interpreter then waits for it when it exits; it would abort a daemon thread inside FAISS.
        self._rebuilding = threading.Thread(target=self._rebuild, args=(self._snapshot, self._rows))
        self._rebuilding.start()
        return self._rebuilding

    def _rebuild(self, now: Snapshot, rows: NoteColumns) -> None:
        started, rebuilt = time.perf_counter(), False
        try:
            import faiss

            faiss.omp_set_num_threads(self.rebuild_threads)  # for this thread only
            fresh_rows, snapshot = self._generation(rows.read(np.flatnonzero(now.alive)))
            with self._lock:
                for changes in self._since or ():
                    snapshot = changed_snapshot(fresh_rows, snapshot, changes)
                self._rows, self._snapshot, self._since, self._retry_rows = fresh_rows, snapshot, None, 0
                self._rebuilds["rebuilds"] += 1
                self._rebuilds["rebuild_seconds"] = round(time.perf_counter() - started, 3)
            rebuilt = True
        finally:  # an exception goes on to the thread's hook, which reports it
            if not rebuilt:
                log.error("rebuilding the live index failed: the old one stays in use, and it is tried again later")
                with self._lock:
                    self._since, self._retry_rows = None, 2 * self._num_outdated()
                    self._rebuilds["rebuild_failures"] += 1


def _column(now: Snapshot, column: str) -> np.ndarray:
    if column == "embedding":
        return now.vectors
    if column not in now.others:
        raise DataError(f"the index has no column {column!r}, only {', '.join(['embedding', *now.others])}")
    return now.others[column]
