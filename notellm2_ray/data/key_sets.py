"""Sets of ids that are too many for a Python set, as 64-bit hashes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class KeySet:
    """A growing set of 64-bit hashes: 8 bytes each, and more for the newest, which are in a Python set."""

    _RECENT = 1 << 20

    def __init__(self) -> None:
        self._old = np.empty(0, np.uint64)
        self._recent: set[int] = set()

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """Add ``(N,)`` hashes; returns ``(N,)`` bool, whether each was new (of equal ones, the first is)."""
        place = np.minimum(np.searchsorted(self._old, hashes), max(0, len(self._old) - 1))
        new = self._old[place] != hashes if len(self._old) else np.ones(len(hashes), dtype=bool)
        for row in np.flatnonzero(new):
            value = int(hashes[row])
            new[row] = value not in self._recent
            self._recent.add(value)
        if len(self._recent) > self._RECENT:
            self._old, self._recent = self.ascending(), set()
        return new

    def ascending(self) -> np.ndarray:
        """``(N,)`` uint64, all hashes in ascending order."""
        return np.union1d(self._old, np.fromiter(self._recent, np.uint64, len(self._recent)))

    def __len__(self) -> int:
        return len(self._old) + len(self._recent)


class NoteIds(NamedTuple):
    """Hashes of the ids of notes."""

    kept: KeySet
    rejected: KeySet
    alike: KeySet  # of the kept ones, without their form (:func:`notellm2_ray.data.validate.without_form`)
