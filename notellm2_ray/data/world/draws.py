"""Counter-based random numbers: named streams whose n-th number can be computed without those before it."""

from __future__ import annotations

import numpy as np

from notellm2_ray.core.run import stream_seed

_STEP = np.uint64(0x9E3779B97F4A7C15)


def uniforms(seed: int, name: str, index: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1) at the positions ``index`` of the world's stream ``name``.

    The positions go through SplitMix64's finaliser, so that neighbouring numbers are independent.

    Args:
        index: non-negative integers of any shape.

    Returns:
        float64, of the shape of ``index``.
    """
    with np.errstate(over="ignore"):
        bits = np.asarray(index).astype(np.uint64) * _STEP + np.uint64(stream_seed(seed, "world", name))
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    bits ^= bits >> np.uint64(31)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def choices(seed: int, name: str, index: np.ndarray, num: int) -> np.ndarray:
    """Uniform int64 in [0, num) at the positions ``index`` of the stream ``name``."""
    return (uniforms(seed, name, index) * num).astype(np.int64)
