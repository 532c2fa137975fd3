"""Helpers for flat arrays."""

from __future__ import annotations

import numpy as np
import pyarrow as pa


def hash_strings(values: pa.Array, key: str) -> np.ndarray:
    """(N,) uint64 keyed hashes (SipHash), the same in every process; ``key`` must have 16 characters."""
    from pandas.util import hash_array

    return hash_array(np.asarray(values.to_pylist(), dtype=object), hash_key=key, categorize=False)


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """(N + 1,) int64, the starts and ends of runs of these lengths."""
    return np.append(0, np.cumsum(lengths)).astype(np.int64)
