"""An index that changes while it is searched: trained main index, exact delta of fresh notes, tombstones, rebuilds.

Used as::

    index = LiveIndex(batch, settings.index, model_fingerprint=fingerprint)
    hits = index.search(vector, k=100, exclude=seen, where=Filter(topics=frozenset({"food"})))
    index.apply(Batch(["n1"], vectors, topics=[["food"]]))
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
from notellm2_ray.live.columns import Batch, Rows, check_batch
from notellm2_ray.live.search import Filter, Hits, OutdatedError, Snapshot

log = logging.getLogger(__name__)


class LiveIndex:
    """Nearest notes by cosine over notes that come and go.

    Any number of threads may search while one at a time applies changes; searches take no lock and see each batch of
    changes whole or not at all. When the delta and the tombstones together pass a share of the main index, a thread
    builds a new main index from the living notes and swaps it in; changes made meanwhile are kept.

    Attributes:
        model_fingerprint: of the model whose vectors these are.
        dim: length of a vector (D).
        others: names of the further vector columns.
    """

    def __init__(
        self,
        notes: Batch,
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
            notes: what to start with; may be empty, with vectors of shape (0, D).
            settings: kind of the main index.
            model_fingerprint: of the model whose vectors these are.
            others: further vector columns to keep, for :meth:`similarity`.
            seed: of the main index.
            rebuild_share: fresh rows and tombstones, as a share of the main index, that a rebuild starts at ...
            rebuild_rows: ... but not before there are so many of them.
            rebuild_threads: threads of FAISS in a rebuild, which competes with searches.
            main: a saved index over exactly these notes in this order; used instead of building one.

        Raises:
            DataError: a vector is NaN, infinite, of another length or not of unit length.
            ConfigError: the settings do not fit the vectors.
        """
        self.settings, self.seed, self.model_fingerprint = settings, seed, model_fingerprint
        self.rebuild_share, self.rebuild_rows, self.rebuild_threads = rebuild_share, rebuild_rows, rebuild_threads
        self.dim, self.others = notes.vectors.shape[1], tuple(others)
        check_batch(notes, self.dim, "live index")
        self._lock = threading.Lock()  # of appliers and the swap; never taken by a search
        self._rebuilding: threading.Thread | None = None
        self._since: list[Batch] | None = None  # applied since the rebuild under way began
        self._not_before = 0  # rows out of place before which a rebuild that failed is not tried again
        self._rebuilds = {"rebuilds": 0, "rebuild_failures": 0, "rebuild_seconds": 0.0}
        living = _living(notes)
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
        """The ``k`` nearest notes; fewer only where no more are left.

        Args:
            query: (D,) unit vector, or a note's id, which is then left out of the answer itself.
            k: notes wanted.
            exclude: ids never to return; unknown ones are fine.
            where: conditions on topics and time; few matching notes are searched exactly.
            model_fingerprint: of the model that made the query vector, to be checked.

        Raises:
            DataError: an unknown note, ``k`` below 1, or a vector of another length or not of unit length.
            ModelError: another model's query vector.
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
        """(D,) copy of a note's vector; None for an unknown note or one without a vector in that column."""

        def look(now: Snapshot) -> np.ndarray | None:
            row = now.row(note_id)
            vector = None if row is None else _column(now, column)[row]
            return None if vector is None or np.isnan(vector[0]) else vector.copy()

        return self._read(look)

    def similarity(self, note_id: str, others: Sequence[str], column: str = "embedding") -> list[float | None]:
        """Cosines of one note to others in a vector column, as ``embedding_image``; None where a vector is missing.

        Raises:
            DataError: the index keeps no such column.
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

    def upsert(self, notes: Batch) -> None:
        """Write notes, new ones and new versions of old ones."""
        self.apply(notes)

    def delete(self, note_ids: Iterable[str]) -> None:
        """Remove notes; unknown ids are fine."""
        ids = list(note_ids)
        self.apply(Batch(ids, np.zeros((len(ids), self.dim), np.float32), np.ones(len(ids), dtype=bool)))

    def apply(self, changes: Batch) -> None:
        """Apply a batch of changes as one: searches see all of it or none.

        Raises:
            DataError: a vector is NaN, infinite, of another length or not of unit length; nothing is applied then.
        """
        check_batch(changes, self.dim, "live index")
        if not len(changes.ids):
            return
        with self._lock:
            self._snapshot = _applied(self._rows, self._snapshot, changes)
            if self._since is not None:
                self._since.append(changes)
            elif self._out_of_place() >= max(self.rebuild_rows, self._not_before, self._due()):
                self._start_rebuild()

    def rebuild(self) -> None:
        """Build a new main index from the living notes now, and wait for it."""
        with self._lock:
            thread = self._rebuilding if self._since is not None else self._start_rebuild()
        if thread is not None:
            thread.join()

    def wait(self) -> None:
        """Wait for a rebuild under way, if there is one."""
        thread = self._rebuilding
        if thread is not None:
            thread.join()

    def info(self) -> dict[str, Any]:
        """JSON values: notes, in_main, fresh, tombstones, the main index's own facts, rebuilds and their seconds."""
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
                time.sleep(0)  # the applier is about to publish the next snapshot

    def _due(self) -> int:
        return int(self.rebuild_share * self._snapshot.main_count)

    def _out_of_place(self) -> int:
        now = self._snapshot
        return len(now.ids) - now.main_count + now.main_count - now.main_alive

    def _generation(self, notes: Batch, main: AnnIndex | None = None) -> tuple[Rows, Snapshot]:
        """Columns of these notes and the snapshot of them, all in the main index."""
        rows = Rows.holding(notes, self.dim, self.others)
        if main is None and rows.count:
            main = AnnIndex.build(
                rows.ids[: rows.count],
                rows.vectors[: rows.count],
                self.settings,
                self.seed,
                model_fingerprint=self.model_fingerprint,
            )
        row_of = {note_id: row for row, note_id in enumerate(notes.ids)}
        alive = np.ones(rows.count, dtype=bool)
        return rows, _snapshot(rows, main, rows.count, alive, row_of)

    def _start_rebuild(self) -> threading.Thread:
        self._since = []
        # No daemon: the interpreter waits for it at its end, where a thread inside FAISS would be aborted.
        self._rebuilding = threading.Thread(target=self._rebuild, args=(self._snapshot, self._rows))
        self._rebuilding.start()
        return self._rebuilding

    def _rebuild(self, now: Snapshot, rows: Rows) -> None:
        started, rebuilt = time.perf_counter(), False
        try:
            import faiss

            faiss.omp_set_num_threads(self.rebuild_threads)  # of this thread alone
            fresh_rows, snapshot = self._generation(rows.read(np.flatnonzero(now.alive)))
            with self._lock:
                for changes in self._since or ():
                    snapshot = _applied(fresh_rows, snapshot, changes)
                self._rows, self._snapshot, self._since, self._not_before = fresh_rows, snapshot, None, 0
                self._rebuilds["rebuilds"] += 1
                self._rebuilds["rebuild_seconds"] = round(time.perf_counter() - started, 3)
            rebuilt = True
        finally:  # whatever stopped it goes on to the thread's own report
            if not rebuilt:
                log.error("the rebuild of the live index failed: it goes on with the old one and tries again later")
                with self._lock:
                    self._since, self._not_before = None, 2 * self._out_of_place()
                    self._rebuilds["rebuild_failures"] += 1


def _applied(rows: Rows, now: Snapshot, changes: Batch) -> Snapshot:
    """The snapshot after a batch of changes; ``rows`` grows by what it writes."""
    changes = changes.take(changes.last_of_each())
    replaced = [row for note_id in changes.ids if (row := now.row_of.get(note_id)) is not None]
    written = _living(changes)
    where = rows.append(written)
    alive = np.concatenate([now.alive, np.ones(len(written.ids), dtype=bool)])
    alive[replaced] = False
    row_of = now.row_of
    after = _snapshot(rows, now.main, now.main_count, alive, row_of)
    # Rows first and the snapshot next: who finds a row beyond its snapshot knows that a newer one is coming. Deleted
    # notes keep their dead row, so that a search that began before still finds whom to leave out.
    row_of.update(zip(written.ids, range(where.start, where.stop), strict=True))  # type: ignore[attr-defined]
    return after


def _snapshot(rows: Rows, main: AnnIndex | None, main_count: int, alive: np.ndarray, row_of: Any) -> Snapshot:
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
        main_selector=None if main_alive == main_count else live_search.bitmap(alive[:main_count]),
        row_of=row_of,
    )


def _living(batch: Batch) -> Batch:
    """What is written by a batch, without what is deleted by it."""
    if batch.deleted is None or not batch.deleted.any():
        return batch
    return batch.take(np.flatnonzero(~batch.deleted))._replace(deleted=None)


def _column(now: Snapshot, column: str) -> np.ndarray:
    if column == "embedding":
        return now.vectors
    if column not in now.others:
        raise DataError(
            f"the index keeps no column {column!r}, only embedding and {', '.join(now.others) or 'no other'}"
        )
    return now.others[column]
