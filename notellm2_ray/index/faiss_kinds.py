"""FAISS indexes of every kind: building, tuning, search parameters, measuring."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from notellm2_ray.core.errors import ConfigError, OutputError
from notellm2_ray.core.run import stream_seed
from notellm2_ray.core.settings.retrieval import IndexSettings

log = logging.getLogger(__name__)

AUTO_EXACT_NOTES = 50_000
POINTS_PER_LIST = 39  # FAISS warns when a k-means cell has fewer training points
_TUNED_AT = 112  # the number of probes is tuned to find so many neighbours; see _tune_probes
PQ_CENTROIDS = 256  # one byte per sub-vector
TIE = 1e-6  # a smaller difference between two cosines is float32 rounding


def make(vectors: np.ndarray, settings: IndexSettings, seed: int) -> tuple[Any, dict[str, Any]]:
    """A trained, filled and tuned CPU index over (N, D) unit vectors, and the facts about it.

    Raises:
        ConfigError: the settings do not fit the number or the length of the vectors.
    """
    faiss = _faiss()
    count, dim = vectors.shape
    kind = settings.kind if settings.kind != "auto" else "exact" if count <= AUTO_EXACT_NOTES else "ivf"
    num_lists = _num_lists(count, settings) if kind in ("ivf", "ivf_pq") else 0
    index = faiss.index_factory(dim, _factory(kind, num_lists, count, dim, settings), faiss.METRIC_INNER_PRODUCT)
    _seed(index, kind, stream_seed(seed, "index", kind) % 2**31)
    started = time.perf_counter()
    index.train(vectors)
    index.add(vectors)
    info: dict[str, Any] = {"kind": kind, "notes": count, "dim": dim, "num_lists": num_lists, "num_probes": 0}
    info["build_seconds"] = round(time.perf_counter() - started, 3)
    if kind == "hnsw":
        info["hnsw_search"] = settings.hnsw_search
    if num_lists:
        info["num_probes"] = settings.num_probes or _tune_probes(index, vectors, num_lists, settings, seed)
    return index, info


def parameters(
    index: Any, info: dict[str, Any], k: int, excluded: np.ndarray, *, complete: bool, selector: Any = None
) -> tuple[Any, Any]:
    """The index to search and FAISS's parameters for one search.

    Args:
        index: the index.
        info: its facts (``kind``, ``num_probes``, ...).
        k: neighbours wanted.
        excluded: (E,) int64 rows that must not be returned.
        complete: compare with every vector: all cells of an IVF, the flat storage under an HNSW graph.
        selector: a FAISS selector of the rows that may be returned, instead of ``excluded``.
    """
    faiss = _faiss()
    if len(excluded):
        selector = faiss.IDSelectorNot(faiss.IDSelectorBatch(excluded))
    if info["kind"] in ("ivf", "ivf_pq"):
        probes = info["num_lists"] if complete else info["num_probes"]
        return index, faiss.SearchParametersIVF(sel=selector, nprobe=probes)
    if info["kind"] == "hnsw" and not complete:
        return index, faiss.SearchParametersHNSW(sel=selector, efSearch=max(info["hnsw_search"], k))
    flat = faiss.downcast_index(index.storage) if info["kind"] == "hnsw" else index
    return flat, faiss.SearchParameters(sel=selector)


def to_gpu(index: Any, num_probes: int) -> Any:
    """A copy of an index on the first GPU.

    Raises:
        ConfigError: this FAISS has no GPU support, or there is no GPU.
    """
    faiss = _faiss()
    if not hasattr(faiss, "StandardGpuResources"):
        raise ConfigError(
            "index.gpu=true, but this FAISS is built without GPU support: install faiss-gpu, or index.gpu=false"
        )
    if faiss.get_num_gpus() == 0:
        raise ConfigError("index.gpu=true, but FAISS sees no GPU on this machine: use index.gpu=false")
    copy = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
    if num_probes:
        copy.nprobe = num_probes
    return copy


def write(index: Any, path: Path) -> None:
    """Write an index to a local file."""
    faiss = _faiss()
    try:
        faiss.write_index(index, str(path))
    except RuntimeError as error:
        raise OutputError(f"cannot write {path} ({_last_line(error)}): is the disk full?") from error


def read(path: Path) -> Any:
    """Read an index; RuntimeError if the file is missing or is not a FAISS index."""
    faiss = _faiss()
    return faiss.read_index(str(path))


class RecallSample(NamedTuple):
    """A sample of the indexed notes with the cosines of their exact neighbours, for measuring recall."""

    rows: np.ndarray  # (Q,) int64
    queries: np.ndarray  # (Q, D)
    exact: np.ndarray  # (Q, K) float32 cosines, descending, without the note itself; narrower with fewer than K others
    exact_seconds: float

    @classmethod
    def draw(cls, vectors: np.ndarray, count: int, seed: int, k: int = 100) -> RecallSample:
        """``count`` random notes (or all, if there are fewer) and their ``k`` best cosines by exact search."""
        faiss = _faiss()
        rng = np.random.default_rng(stream_seed(seed, "index recall"))
        rows = np.sort(rng.choice(len(vectors), size=min(count, len(vectors)), replace=False))
        queries = vectors[rows]
        started = time.perf_counter()
        scores, found = faiss.knn(queries, vectors, min(k + 1, len(vectors)), metric=faiss.METRIC_INNER_PRODUCT)
        seconds = time.perf_counter() - started
        own = found == rows[:, None]
        own[~own.any(axis=1), -1] = True  # copies of the note were returned in its place: drop one of them
        return cls(rows, queries, scores[~own].reshape(len(rows), -1), seconds)

    def recalls(self, vectors: np.ndarray, found: np.ndarray, k: int) -> np.ndarray:
        """(Q,) recall@k of ``found`` (Q, K + 1) rows, each query's own row left out.

        A result counts by its true cosine, so that copies of a vector are interchangeable.
        """
        k = min(k, self.exact.shape[1])
        if not k:
            return np.ones(len(self.rows))
        # Move the query's own row to the end, then take the first k of the others, in the order of the search.
        order = np.argsort((found == self.rows[:, None]) | (found < 0), axis=1, kind="stable")[:, :k]
        kept = np.take_along_axis(found, order, 1)
        scores = np.einsum("qd,qkd->qk", self.queries, vectors[kept])
        valid = (kept >= 0) & (kept != self.rows[:, None])
        return (valid & (scores >= self.exact[:, k - 1 : k] - TIE)).mean(axis=1)

    def measure(self, vectors: np.ndarray, search: Callable[[np.ndarray, int], np.ndarray]) -> dict[str, float]:
        """Recall and speed of ``search(queries, k) -> (Q, k) rows``."""
        started = time.perf_counter()
        found = search(self.queries, min(101, len(vectors)))
        seconds = time.perf_counter() - started
        return {
            "recall_queries": len(self.rows),
            "recall_at_10": round(float(self.recalls(vectors, found, 10).mean()), 6),
            "recall_at_100": round(float(self.recalls(vectors, found, 100).mean()), 6),
            "exact_queries_per_second": round(len(self.rows) / max(self.exact_seconds, 1e-9), 1),
            "index_queries_per_second": round(len(self.rows) / max(seconds, 1e-9), 1),
        }


def _tune_probes(index: Any, vectors: np.ndarray, num_lists: int, settings: IndexSettings, seed: int) -> int:
    """The smallest number of cells whose recall reaches the target, measured on a sample of notes.

    The sample's mean less one standard error must reach the target: the plain mean would be above it by chance about
    every second time. Recall is measured at 112, not 100: a live index is rebuilt only after a tenth of its notes were
    deleted, and then the 100 best of the remaining notes are among the 112 best of all.
    """
    faiss = _faiss()
    sample = RecallSample.draw(vectors, settings.recall_queries, seed, _TUNED_AT)
    k = min(_TUNED_AT + 1, len(vectors))

    def recall(probes: int) -> float:
        parameters = faiss.SearchParametersIVF(nprobe=probes)
        found = sample.recalls(vectors, index.search(sample.queries, k, params=parameters)[1], _TUNED_AT)
        return float(found.mean() - found.std() / len(found) ** 0.5)

    # With compressed vectors recall has a ceiling that more cells do not raise.
    best = recall(num_lists)
    target = min(settings.recall_target, best * 0.99) if best < settings.recall_target else settings.recall_target
    if best < settings.recall_target:
        log.warning(
            "index.recall_target %.3f cannot be reached: with all %d cells recall is %.4f "
            "(a larger index.pq_bytes raises it); aiming at %.4f",
            settings.recall_target,
            num_lists,
            best,
            target,
        )
    too_few, enough = 0, 1
    while enough < num_lists and recall(enough) < target:
        too_few, enough = enough, min(2 * enough, num_lists)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if recall(middle) >= target else (middle, enough)
    return enough


def _num_lists(count: int, settings: IndexSettings) -> int:
    if settings.num_lists > count:
        raise ConfigError(f"index.num_lists is {settings.num_lists}, but there are only {count} notes: use fewer, or 0")
    lists = settings.num_lists or max(1, min(round(4 * count**0.5), count // POINTS_PER_LIST))
    if settings.num_probes > lists:
        raise ConfigError(f"index.num_probes is {settings.num_probes}, more than the {lists} cells: use fewer, or 0")
    return lists


def _factory(kind: str, num_lists: int, count: int, dim: int, settings: IndexSettings) -> str:
    if kind == "ivf_pq" and dim % settings.pq_bytes:
        raise ConfigError(
            f"index.pq_bytes is {settings.pq_bytes}, which does not divide the {dim} dimensions of a vector"
        )
    if kind == "ivf_pq" and count < PQ_CENTROIDS:
        raise ConfigError(
            f"index.kind=ivf_pq needs at least {PQ_CENTROIDS} notes, there are {count}: use index.kind=exact"
        )
    # "np": no polysemous training. It takes most of the time, and only a Hamming search, not used here, needs it.
    return {
        "exact": "Flat",
        "ivf": f"IVF{num_lists},Flat",
        "ivf_pq": f"IVF{num_lists},PQ{settings.pq_bytes}np",
        "hnsw": f"HNSW{settings.hnsw_neighbors},Flat",
    }[kind]


def _seed(index: Any, kind: str, seed: int) -> None:
    """Seed the k-means of an IVF and of its product quantizer (HNSW's levels are drawn from FAISS's fixed seed)."""
    if kind in ("ivf", "ivf_pq"):
        index.cp.seed = seed
    if kind == "ivf_pq":
        index.pq.cp.seed = seed
        index.pq.cp.min_points_per_centroid = 1  # 256 notes are enough to train it; FAISS would print warnings


def _faiss() -> Any:
    import faiss  # returned as Any: its type stubs are incomplete

    return faiss


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]
