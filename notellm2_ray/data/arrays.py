"""Helpers for flat arrays."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def hash_strings(values: pa.Array, key: str) -> np.ndarray:
    """(N,) uint64 keyed hashes (SipHash), the same in every process; ``key`` must have 16 characters."""
    from pandas.util import hash_array

    return hash_array(np.asarray(values.to_pylist(), dtype=object), hash_key=key, categorize=False)


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """(N + 1,) int64, the starts and ends of runs of these lengths."""
    return np.append(0, np.cumsum(lengths)).astype(np.int64)


def mix(numbers: np.ndarray) -> np.ndarray:
    """uint64 numbers hashed one by one: SplitMix64's finaliser (Steele, Lea and Flood 2014); products wrap."""
    with np.errstate(over="ignore"):
        numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return numbers ^ (numbers >> np.uint64(31))
