"""Searching one state of a live index: a trained main index, an exact delta, tombstones and filters.

A :class:`Snapshot` never changes, so any number of threads can search it without a lock while the next one is made.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from notellm2_ray.core.errors import DataError
from notellm2_ray.index.ann import AnnIndex
from notellm2_ray.index.vectors import UNIT_TOLERANCE
from notellm2_ray.live.columns import NO_TIME

EXACT_ROWS = 10_000  # up to so many notes that match a filter are compared one by one: about 2 ms at 64 dimensions
OVERFETCH = 512  # up to so many excluded notes are fetched in addition and dropped; more are masked out
RESCORED = 4  # an IVF-PQ returns so many times k results, which are scored again by their true vectors
KEPT_MASKS = 64


class Filter(NamedTuple):
    """Conditions on the notes to return; all that are set must hold."""

    topics: frozenset[str] = frozenset()  # at least one of them; empty: any
    created_from: int | None = None  # microseconds since 1970, inclusive; notes of unknown time match no range
    created_to: int | None = None  # exclusive
    all_topics: frozenset[str] = frozenset()  # every one of them


class Hits(NamedTuple):
    """Notes found, nearest first."""

    ids: list[str]
    scores: np.ndarray  # (len(ids),) float32 cosines


class OutdatedError(Exception):
    """A note was written after this snapshot: search the next one, which is published within microseconds."""


@dataclass(frozen=True, eq=False, slots=True)
class Snapshot:
    """One state of a live index. Rows below ``main_count`` are in ``main``; the others are the delta."""

    main: AnnIndex | None  # None: main_count is 0
    main_count: int
    ids: np.ndarray  # (N,) object
    vectors: np.ndarray  # (N, D) float32
    created_at: np.ndarray  # (N,) int64
    others: dict[str, np.ndarray]  # (N, D) float32 each
    topics: Mapping[str, list[int]]  # rows of each topic, possibly beyond N
    alive: np.ndarray  # (N,) bool: neither deleted nor replaced
    num_alive: int
    main_alive: int  # living rows of main
    main_selector: Any  # FAISS selector of the living rows of main; None: all are alive
    row_of: Mapping[str, int]  # last row of every note, dead or alive; possibly newer than this snapshot
    _masks: dict[Filter, np.ndarray] = field(default_factory=dict)

    def search(self, query: np.ndarray, k: int, excluded: np.ndarray, where: Filter | None) -> Hits:
        """The ``k`` nearest living notes that match the filter, without the ``excluded`` rows."""
        if where is not None or len(excluded) > OVERFETCH:
            return self._search_masked(query, k, self._mask(where, excluded))
        rows, scores = self._candidates(query, min(k + len(excluded), self.num_alive))
        if len(excluded):
            kept = ~np.isin(rows, excluded)
            rows, scores = rows[kept], scores[kept]
        return self._hits(rows, scores, k)

    def rows(self, note_ids: Collection[str]) -> np.ndarray:
        """The last row, dead or alive, of each note; ids that never were in the index are left out.

        Raises:
            OutdatedError: a note was written after this snapshot.
        """
        row_of = self.row_of
        found = [row for note_id in note_ids if (row := row_of.get(note_id)) is not None]
        if found and max(found) >= len(self.ids):
            raise OutdatedError
        return np.array(found, dtype=np.int64)

    def row(self, note_id: str) -> int | None:
        """The row of a living note; None for others.

        Raises:
            OutdatedError: the note was written after this snapshot.
        """
        row = self.row_of.get(note_id)
        if row is None:
            return None
        if row >= len(self.ids):
            raise OutdatedError
        return row if self.alive[row] else None

    def _candidates(self, query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The ``k`` best living rows and maybe some more, with their scores, unordered."""
        # Dead rows are skipped, so more cells are needed to find as many living rows as the probes were chosen for.
        wider = self.main_count / max(self.main_alive, 1)
        rows, scores = self._from_main(query, k, self.main_selector, self.main_alive, wider=wider)
        delta = self.vectors[self.main_count :] @ query
        better = self.alive[self.main_count :]
        if len(scores) >= k > 0:
            better = better & (delta > scores.min())
        fresh = np.flatnonzero(better)
        return np.concatenate([rows, fresh + self.main_count]), np.concatenate([scores, delta[fresh]])

    def _search_masked(self, query: np.ndarray, k: int, mask: np.ndarray) -> Hits:
        left = int(np.count_nonzero(mask))
        if left <= max(EXACT_ROWS, 2 * k):
            rows = np.flatnonzero(mask)
            return self._hits(rows, self.vectors[rows] @ query, k)
        in_main = int(np.count_nonzero(mask[: self.main_count]))
        selector = bitmap(mask[: self.main_count])
        rows, scores = self._from_main(query, k, selector, in_main, wider=self.main_count / max(in_main, 1))
        fresh = self.main_count + np.flatnonzero(mask[self.main_count :])
        return self._hits(np.concatenate([rows, fresh]), np.concatenate([scores, self.vectors[fresh] @ query]), k)

    def _from_main(
        self, query: np.ndarray, k: int, selector: Any, available: int, wider: float = 1.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """The ``min(k, available)`` best rows of the main index among those that the selector allows."""
        wanted = min(k, available)
        if self.main is None or wanted <= 0:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
        compressed = self.main.info["kind"] == "ivf_pq"
        asked = min(wanted * RESCORED, available) if compressed else wanted
        rows, scores = self.main.search_rows(query[None], asked, selector, wider=wider)
        if rows[0, wanted - 1] < 0:  # too few rows in the searched cells: search all cells
            rows, scores = self.main.search_rows(query[None], asked, selector, complete=True)
        found, cosines = rows[0], scores[0]
        if found[-1] < 0:
            found, cosines = found[found >= 0], cosines[found >= 0]
        return found, self.vectors[found] @ query if compressed else cosines

    def _hits(self, rows: np.ndarray, scores: np.ndarray, k: int) -> Hits:
        if len(rows) > 4 * k:
            best = np.argpartition(-scores, k - 1)[:k]
            rows, scores = rows[best], scores[best]
        order = np.argsort(-scores, kind="stable")[:k]
        return Hits(self.ids[rows[order]].tolist(), scores[order])

    def _mask(self, where: Filter | None, excluded: np.ndarray) -> np.ndarray:
        """(N,) bool, the living rows that may be returned."""
        mask = self.alive if where is None else self._masks.get(where)
        if mask is None:
            mask = self._filter(where)  # type: ignore[arg-type]
            if len(self._masks) < KEPT_MASKS:
                self._masks[where] = mask  # type: ignore[index]
        if len(excluded):
            mask = mask.copy()
            mask[excluded] = False
        return mask

    def _filter(self, where: Filter) -> np.ndarray:
        mask = self.alive.copy()
        if where.topics:
            mask &= np.logical_or.reduce([self._with_topic(topic) for topic in where.topics])
        for topic in where.all_topics:
            mask &= self._with_topic(topic)
        if where.created_from is not None:
            mask &= self.created_at >= where.created_from
        if where.created_to is not None:
            mask &= self.created_at < where.created_to
        if where.created_from is not None or where.created_to is not None:
            mask &= self.created_at != NO_TIME
        return mask

    def _with_topic(self, topic: str) -> np.ndarray:
        """(N,) bool, the rows with a topic."""
        mask = np.zeros(len(self.ids), dtype=bool)
        rows = np.array(self.topics.get(topic, ())[:], dtype=np.int64)
        mask[rows[rows < len(mask)]] = True
        return mask


def bitmap(mask: np.ndarray) -> Any:
    """FAISS selector of the rows at which (N,) ``mask`` is true, one bit per row."""
    import faiss

    selector: Any = faiss.IDSelectorBitmap  # the Python wrapper takes the array only
    return selector(np.packbits(mask, bitorder="little"))


def checked_query(query: np.ndarray, dim: int) -> np.ndarray:
    """The query as a contiguous (D,) float32 vector.

    Raises:
        DataError: it has another length, or is not a unit vector.
    """
    query = np.ascontiguousarray(query, dtype=np.float32).reshape(-1)
    if len(query) != dim:
        raise DataError(f"the query has {len(query)} dimensions, the index has {dim}: another model's vector?")
    length = float(query @ query) ** 0.5
    if not abs(length - 1) <= UNIT_TOLERANCE:  # also true for NaN
        raise DataError(f"the query vector has length {length:.4g}, 1 is needed: divide it by its length")
    return query
