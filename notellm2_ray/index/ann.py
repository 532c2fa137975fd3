"""Nearest notes by cosine: a FAISS index with note ids, exclusions and measured recall.

Used as::

    index = AnnIndex.build(ids, vectors, settings.index, seed=42)
    found, scores = index.search(queries, k=100, exclude_ids=already_seen)
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from notellm2_ray.core.config import build as build_settings
from notellm2_ray.core.config import to_plain
from notellm2_ray.core.errors import DataError, OutputError
from notellm2_ray.core.run import write_atomically
from notellm2_ray.core.settings.retrieval import IndexSettings
from notellm2_ray.index import faiss_kinds
from notellm2_ray.index.vectors import check_ids, check_unit

log = logging.getLogger(__name__)

GPU_MAX_K = 2048  # the most neighbours that FAISS's GPU indexes return
FORMAT = 1


class AnnIndex:
    """A searchable set of notes.

    Attributes:
        ids: (N,) object array of note ids, in the order of the rows of FAISS.
        info: facts and measurements of the build (JSON values): kind, notes, dim, num_lists, num_probes, build_seconds,
            recall_at_10, recall_at_100, exact_queries_per_second, index_queries_per_second, ...
        model_fingerprint: of the model whose vectors these are; empty if unknown.
    """

    def __init__(
        self, index: Any, ids: np.ndarray, settings: IndexSettings, info: dict[str, Any], model_fingerprint: str = ""
    ):
        self._index = index
        self._gpu = faiss_kinds.to_gpu(index, info["num_probes"]) if settings.gpu else None
        self._row_of: dict[str, int] | None = None
        self.ids, self.settings, self.info, self.model_fingerprint = ids, settings, info, model_fingerprint

    @classmethod
    def build(
        cls,
        ids: Sequence[str] | np.ndarray,
        vectors: np.ndarray,
        settings: IndexSettings,
        seed: int = 42,
        *,
        model_fingerprint: str = "",
    ) -> AnnIndex:
        """Train, fill and measure an index; logs queries per second, and recall@10 and @100 against exact search.

        Args:
            ids: (N,) note ids, all different.
            vectors: (N, D) float32, unit length.
            settings: which index; with ``num_probes=0`` the number is chosen here so that ``recall_target`` is met.
            seed: of the clustering and of the sample of query notes.

        Raises:
            DataError: no notes, repeated ids, or a vector that is NaN, infinite or not of unit length.
            ConfigError: the settings do not fit the vectors, or ask for a GPU that FAISS does not have.
        """
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        if len(ids) == 0:
            raise DataError("no notes to index: the pool is empty")
        check_ids(ids, vectors, "index")
        check_unit(vectors, ids, "index")
        index, info = faiss_kinds.make(vectors, settings, seed)
        built = cls(index, np.array(ids, dtype=object), settings, info, model_fingerprint)
        built.recall_against_exact(vectors, seed=seed)
        return built

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def dim(self) -> int:
        """Length of a vector (D)."""
        return self._index.d

    def search(
        self, queries: np.ndarray, k: int, exclude_ids: Sequence[str] | Sequence[Sequence[str]] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The nearest notes of each query.

        Args:
            queries: (Q, D) float32, unit length.
            k: notes wanted per query.
            exclude_ids: note ids never to return: one list for all queries, or Q lists, one per query. Unknown ids
                are ignored.

        Returns:
            ids: (Q, min(k, N)) object array, nearest first.
            scores: (Q, min(k, N)) float32 cosines. If exclusions leave fewer notes than that, a row is filled up with
            ``""`` and the score ``-inf``; otherwise it never is.

        Raises:
            DataError: queries of another length or not of unit length, or everything is excluded.
        """
        queries = np.ascontiguousarray(np.atleast_2d(queries), dtype=np.float32)
        if queries.shape[1] != self.dim:
            raise DataError(
                f"queries have {queries.shape[1]} dimensions, the index has {self.dim}: another model's vectors?"
            )
        if k < 1:
            raise DataError(f"k is {k}: ask for at least one note")
        check_unit(queries, [f"query {row}" for row in range(len(queries))], "search")
        k = min(k, len(self))
        excluded: Any = () if exclude_ids is None else exclude_ids
        if len(excluded) and not isinstance(excluded[0], str):
            rows, scores = self._search_each(queries, k, [self._rows(some) for some in excluded])
        else:
            rows, scores = self._search_all(queries, k, self._rows(excluded))
        return np.where(rows >= 0, self.ids[rows], ""), np.where(rows >= 0, scores, -np.inf).astype(np.float32)

    def search_rows(
        self, queries: np.ndarray, k: int, selector: Any = None, *, complete: bool = False, wider: float = 1.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Search on the CPU for rows instead of ids, without checks; for :class:`~notellm2_ray.live.index.LiveIndex`.

        Args:
            queries: (Q, D) float32, contiguous.
            k: rows wanted.
            selector: FAISS selector of the rows that may be returned.
            complete: compare with every vector, even if the index is approximate.
            wider: multiplies the number of IVF cells searched.

        Returns:
            rows: (Q, k) int64, best first, -1 where the search found no more.
            scores: (Q, k) float32 cosines (approximate for an IVF-PQ).
        """
        info = self.info
        if wider > 1 and info["num_lists"]:
            info = {**info, "num_probes": min(info["num_lists"], math.ceil(info["num_probes"] * wider))}
        nothing = np.empty(0, dtype=np.int64)
        index, given = faiss_kinds.parameters(self._index, info, k, nothing, complete=complete, selector=selector)
        scores, rows = index.search(queries, k, params=given)
        return rows, scores

    def save(self, directory: str | Path) -> None:
        """Write ``index.faiss``, ``ids.parquet`` and ``index.json`` (last) into an existing directory."""
        directory = Path(directory)
        faiss_kinds.write(self._index, directory / "index.faiss")
        pq.write_table(pa.table({"note_id": pa.array(self.ids, pa.string())}), directory / "ids.parquet")
        description = {
            "format": FORMAT,
            "settings": to_plain(self.settings),
            "info": self.info,
            "model_fingerprint": self.model_fingerprint,
        }
        write_atomically(directory / "index.json", json.dumps(description, indent=2))

    @classmethod
    def load(cls, directory: str | Path) -> AnnIndex:
        """Read what :meth:`save` wrote.

        Raises:
            OutputError: a file is missing or damaged, or does not match the others.
            ConfigError: the index was built for a GPU, and FAISS sees none here.
        """
        directory = Path(directory)
        for name in ("index.json", "ids.parquet", "index.faiss"):
            if not (directory / name).is_file():
                raise OutputError(f"{directory} holds no index ({name} is missing): run build-index first")
        try:
            description = json.loads((directory / "index.json").read_text(encoding="utf-8"))
            settings, info, model = (description[key] for key in ("settings", "info", "model_fingerprint"))
            ids = pq.read_table(directory / "ids.parquet").column("note_id").to_pylist()
            index = faiss_kinds.read(directory / "index.faiss")
        except (ValueError, KeyError, TypeError, RuntimeError, pa.ArrowException) as error:
            raise OutputError(f"the index in {directory} is damaged ({error}): run build-index again") from error
        if len(ids) != index.ntotal:
            raise OutputError(f"{directory}: {len(ids)} ids for {index.ntotal} vectors; run build-index again")
        return cls(index, np.array(ids, dtype=object), build_settings(IndexSettings, settings), info, model)

    def recall_against_exact(self, vectors: np.ndarray, seed: int = 42) -> dict[str, float]:
        """Measure recall@10, recall@100 and queries per second on a sample of the index's own notes.

        A note does not count as its own neighbour. A result that scores as high as the last exact one counts as found,
        because copies of a vector are interchangeable.

        Args:
            vectors: (N, D) float32, the indexed vectors in the order of :attr:`ids`.
            seed: of the sample of ``settings.recall_queries`` notes.

        Returns:
            The measured part of :attr:`info`, which is updated as well.
        """
        sample = faiss_kinds.RecallSample.draw(vectors, self.settings.recall_queries, seed)
        measured = sample.measure(vectors, lambda queries, k: self._search_all(queries, k, np.empty(0, np.int64))[0])
        self.info.update(measured)
        log.info(
            "%s index of %s notes: recall@10 %.4f, recall@100 %.4f against exact search, "
            "queries/s %.0f exact and %.0f approximate",
            self.info["kind"],
            f"{len(self):,}",
            measured["recall_at_10"],
            measured["recall_at_100"],
            measured["exact_queries_per_second"],
            measured["index_queries_per_second"],
        )
        return measured

    def _rows(self, note_ids: Sequence[str]) -> np.ndarray:
        if not len(note_ids):
            return np.empty(0, dtype=np.int64)
        if self._row_of is None:  # built when first needed: most searches exclude nothing
            self._row_of = {note_id: row for row, note_id in enumerate(self.ids)}
        rows = {self._row_of[note_id] for note_id in note_ids if note_id in self._row_of}
        return np.fromiter(rows, dtype=np.int64, count=len(rows))

    def _search_all(self, queries: np.ndarray, k: int, excluded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(Q, k) rows and scores with the same exclusions for all queries; -1 only if no more notes are left."""
        remaining = len(self) - len(excluded)
        if remaining <= 0:
            raise DataError(f"all {len(self)} notes of the index are excluded: the pool is empty")
        if self._gpu is not None and not len(excluded) and k <= GPU_MAX_K:
            scores, rows = self._gpu.search(queries, k)
        else:
            # If most notes are excluded, an approximate search visits too few of the others.
            scores, rows = self._on_cpu(queries, k, excluded, complete=remaining < len(excluded))
        short = np.flatnonzero((rows >= 0).sum(axis=1) < min(k, remaining))
        if len(short):
            scores[short], rows[short] = self._on_cpu(queries[short], k, excluded, complete=True)
        return rows, scores

    def _on_cpu(
        self, queries: np.ndarray, k: int, excluded: np.ndarray, complete: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        index, parameters = faiss_kinds.parameters(self._index, self.info, k, excluded, complete=complete)
        return index.search(queries, k, params=parameters)

    def _search_each(self, queries: np.ndarray, k: int, excluded: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Every query with its own exclusions: search for as many more results, then drop the excluded ones."""
        if len(excluded) != len(queries):
            raise DataError(f"{len(excluded)} lists of excluded ids for {len(queries)} queries: give one per query")
        wider = min(k + max(map(len, excluded)), len(self))
        rows, scores = self._search_all(queries, wider, np.empty(0, dtype=np.int64))
        for own_rows, own_excluded in zip(rows, excluded, strict=True):
            own_rows[np.isin(own_rows, own_excluded)] = -1
        order = np.argsort(rows < 0, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1)
