"""Semantic ids: a vector as a few small numbers, such that similar notes share the first ones.

Residual k-means: the first code is the nearest of K centroids, the second the nearest centroid of what the first
leaves, and so on. Generative recommenders predict such codes instead of arbitrary ids; TIGER (arXiv:2305.05065) learns
them with an RQ-VAE, OneRec (arXiv:2502.18965) clusters residuals as here.

>>> ids = SemanticIds.load("runs/world/semantic_ids/notellm2-seed42")
>>> ids.encode(vectors)  # (N, L) codes of new notes
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from notellm2_ray.core.errors import DataError, OutputError
from notellm2_ray.core.run import stream_seed, write_atomically

FORMAT = 1
_VALUES_AT_ONCE = 1 << 22  # of the matrices that are computed batch by batch: 16 MiB of float32
_CODEBOOKS, _DESCRIPTION = "codebooks.npy", "codebooks.json"


class SemanticIds:
    """Codebooks, and the codes that they give to vectors.

    Attributes:
        codebooks: (L, K, D) float32, the centroids of each level.
        model_fingerprint: of the model whose vectors these are for; empty if unknown.
    """

    def __init__(self, codebooks: np.ndarray, model_fingerprint: str = "") -> None:
        self.codebooks, self.model_fingerprint = codebooks, model_fingerprint

    @classmethod
    def fit(
        cls,
        vectors: np.ndarray,
        levels: int,
        codebook_size: int,
        *,
        iterations: int = 25,
        seed: int = 42,
        model_fingerprint: str = "",
    ) -> SemanticIds:
        """Learn codebooks, level by level.

        Args:
            vectors: (N, D) float32. Their order matters: the first centroids are drawn from it.
            levels: L.
            codebook_size: K.
            iterations: of k-means, on each level.

        Raises:
            DataError: there are fewer vectors than centroids.
        """
        import faiss

        if len(vectors) < codebook_size:
            raise DataError(
                f"{len(vectors)} notes are too few for codebooks of {codebook_size}: lower ids.codebook_size"
            )
        residuals = np.array(vectors, np.float32, order="C")
        codebooks = np.empty((levels, codebook_size, residuals.shape[1]), np.float32)
        for level in range(levels):
            clustering = faiss.Kmeans(
                residuals.shape[1],
                codebook_size,
                niter=iterations,
                seed=stream_seed(seed, "semantic ids", level) % 2**31,
                init_method=faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS,
                min_points_per_centroid=1,  # no warning
                max_points_per_centroid=len(residuals),  # no sample: the caller has drawn one
            )
            clustering.train(residuals)
            codebooks[level] = clustering.centroids
            for rows in _batches(len(residuals), codebook_size):
                residuals[rows] -= codebooks[level][_nearest(residuals[rows], codebooks[level])]
        return cls(codebooks, model_fingerprint)

    @property
    def levels(self) -> int:
        """L, the number of codes of a note."""
        return self.codebooks.shape[0]

    @property
    def codebook_size(self) -> int:
        """K, the number of values of a code."""
        return self.codebooks.shape[1]

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """Codes of vectors: (N, D) float32 to (N, L) int32.

        Raises:
            DataError: the vectors are of another length.
        """
        return self.encode_with_errors(vectors)[0]

    def encode_with_errors(self, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`encode`, and (N, L) float32: the squared distance to the vector that the codes so far stand for."""
        if vectors.ndim != 2 or vectors.shape[1] != self.codebooks.shape[2]:
            raise DataError(
                f"vectors of shape {vectors.shape} have no codes here: these codebooks are for length "
                f"{self.codebooks.shape[2]}"
            )
        codes = np.empty((len(vectors), self.levels), np.int32)
        errors = np.empty((len(vectors), self.levels), np.float32)
        for rows in _batches(len(vectors), self.codebook_size):
            residuals = np.array(vectors[rows], np.float32)
            for level, codebook in enumerate(self.codebooks):
                codes[rows, level] = _nearest(residuals, codebook)
                residuals -= codebook[codes[rows, level]]
                errors[rows, level] = np.einsum("nd,nd->n", residuals, residuals)
        return codes, errors

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """The vectors that codes of the first M levels stand for: (N, M) to (N, D) float32, not of unit length."""
        vectors = np.zeros((len(codes), self.codebooks.shape[2]), np.float32)
        for codebook, chosen in zip(self.codebooks, codes.T, strict=False):
            vectors += codebook[chosen]
        return vectors

    def save(self, directory: str | Path) -> None:
        """Write the codebooks, and their description last, into an existing directory."""
        directory = Path(directory)
        np.save(directory / _CODEBOOKS, self.codebooks)
        described = {
            "format": FORMAT,
            "levels": self.levels,
            "codebook_size": self.codebook_size,
            "model_fingerprint": self.model_fingerprint,
        }
        write_atomically(directory / _DESCRIPTION, json.dumps(described, indent=2))

    @classmethod
    def load(cls, directory: str | Path) -> SemanticIds:
        """Read what :meth:`save` wrote.

        Raises:
            OutputError: a file is missing or damaged.
        """
        directory = Path(directory)
        try:
            described = json.loads((directory / _DESCRIPTION).read_text(encoding="utf-8"))
            codebooks = np.load(directory / _CODEBOOKS)
            return cls(codebooks, described["model_fingerprint"])
        except (OSError, ValueError, KeyError) as error:
            raise OutputError(f"{directory} holds no codebooks ({error}): run export-ids first") from error


def tell_apart(codes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """A last digit for each note: 0, 1, ... among the notes of equal codes, in the order of their keys.

    Args:
        codes: (N, L) int32.
        keys: (N,) any order of the notes; equal ones stand as given.

    Returns:
        (N,) int32.
    """
    _, groups = np.unique(codes, axis=0, return_inverse=True)
    order = np.lexsort((keys, groups))
    sizes = np.bincount(groups)
    begins = np.repeat(np.cumsum(sizes) - sizes, sizes)
    digits = np.empty(len(codes), np.int32)
    digits[order] = np.arange(len(codes)) - begins
    return digits


def content_keys(vectors: np.ndarray) -> np.ndarray:
    """(N,) uint64, a hash of each vector: an order in which neither the names of notes nor their rows count."""
    bits = np.ascontiguousarray(vectors, np.float32).view(np.uint32)
    factors = np.random.default_rng(0).integers(0, 2**64, bits.shape[1], np.uint64) | np.uint64(1)
    keys = [(bits[rows] * factors).sum(axis=1, dtype=np.uint64) for rows in _batches(*bits.shape)]
    return np.concatenate(keys) if keys else np.empty(0, np.uint64)


def _batches(count: int, width: int) -> list[slice]:
    """Batches of ``count`` rows, for matrices of ``width`` columns."""
    rows = max(1, _VALUES_AT_ONCE // width)
    return [slice(begin, begin + rows) for begin in range(0, count, rows)]


def _nearest(vectors: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """(N,) the row of the nearest centroid; the first of equally near ones."""
    # |v - c|^2 without |v|^2, which is the same for all centroids
    return np.argmin(np.einsum("kd,kd->k", centroids, centroids) - 2 * vectors @ centroids.T, axis=1)
