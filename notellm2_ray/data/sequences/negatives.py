"""Vectorised sampling of negatives without replacement; an example's negatives do not depend on other examples.

Draw number j of an example is a hash of (its key, j), so nothing depends on order, parts or machines. Draws are taken
in turn; a note that the user likes, or that was drawn before, is skipped. If that gives too few, the rest is drawn from
the remaining notes by exponential keys, which has the same distribution.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from notellm2_ray.data.arrays import GOLDEN, mix

_ROWS = 8192  # examples sampled at once: about 2 kB each with 20 negatives


class Pool(NamedTuple):
    """Candidate notes by birth, so that those born between two times are a range.

    Weights are integers, so that their sums are exact and the same on every machine.
    """

    codes: np.ndarray  # (M,) int64 note codes
    births: np.ndarray  # (M,) int64 microseconds, ascending
    totals: np.ndarray  # (M + 1,) int64, cumulative weights from 0
    positions: np.ndarray  # (number of notes,) int64, each code's position in ``codes``; M: not a candidate

    @staticmethod
    def build(births: np.ndarray, weights: np.ndarray, candidate: np.ndarray) -> Pool:
        """The pool of the notes where ``candidate``. All arrays are (number of notes,), and weights at least 1."""
        codes = np.flatnonzero(candidate)
        codes = codes[np.argsort(births[codes], kind="stable")]
        positions = np.full(len(births), len(codes), np.int64)
        positions[codes] = np.arange(len(codes))
        return Pool(codes, births[codes], np.append(0, np.cumsum(weights[codes])), positions)

    def ranges(self, times: np.ndarray, max_age: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Begin and end, (X,) int64 each, of the pool's notes that existed at each of ``times``.

        Args:
            max_age: only notes that were at most so many microseconds old; None: of any age.
        """
        ends = np.searchsorted(self.births, times, side="right")
        if max_age is None:
            return np.zeros_like(ends), ends
        return np.searchsorted(self.births, times - max_age, side="left"), ends


class Liked(NamedTuple):
    """The notes that each user likes: sorted keys user * (M + 1) + position, and at the end one larger than all."""

    keys: np.ndarray
    base: int

    @staticmethod
    def build(owners: np.ndarray, notes: np.ndarray, pool: Pool) -> Liked:
        """From (E,) users and note codes."""
        base = len(pool.codes) + 1
        keys = np.sort(
            owners * base + pool.positions[notes]
        )  # np.unique would hash the keys, which takes 20 times as long
        distinct = np.append(True, keys[1:] != keys[:-1])[: len(keys)]
        return Liked(np.append(keys[distinct], np.iinfo(np.int64).max), base)

    def holds(self, users: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Whether each user, broadcast against positions, liked the note there."""
        keys = users * self.base + positions
        return self.keys[np.searchsorted(self.keys, keys)] == keys

    def num_among(self, users: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """(X,) int64, the number of the pool's notes in ``begins:ends`` that each user liked."""
        first = users * self.base
        return np.searchsorted(self.keys, first + ends) - np.searchsorted(self.keys, first + begins)


def num_eligible(
    pool: Pool, liked: Liked, users: np.ndarray, times: np.ndarray, max_age: int | None = None
) -> np.ndarray:
    """(X,) int64, notes that existed at ``times``, were at most ``max_age`` old, and that the user does not like."""
    begins, ends = pool.ranges(times, max_age)
    return ends - begins - liked.num_among(users, begins, ends)


def sample(
    pool: Pool,
    liked: Liked,
    keys: np.ndarray,
    users: np.ndarray,
    times: np.ndarray,
    count: int,
    max_age: int | None = None,
) -> np.ndarray:
    """(X, count) note codes, drawn one after another by the pool's weights without replacement.

    They existed at the example's time, and its user does not like them. Every example must have ``count`` such notes
    (:func:`num_eligible`).

    Args:
        keys: (X,) uint64, a random number for each example.
        users: (X,) the users of ``liked``.
        times: (X,) microseconds.
        max_age: most microseconds from a note's birth to the example's time; None: any.
    """
    pieces = [
        _sample(pool, liked, keys[i : i + _ROWS], users[i : i + _ROWS], times[i : i + _ROWS], count, max_age)
        for i in range(0, len(keys), _ROWS)
    ]
    return pool.codes[np.concatenate(pieces)] if pieces else np.zeros((0, count), np.int64)


def shuffle_keys(keys: np.ndarray, width: int) -> np.ndarray:
    """(X, width) uint64 random numbers to order an example's candidates by, independent of those that draw them."""
    return mix(mix(~keys)[:, None] + GOLDEN * np.arange(width, dtype=np.uint64))


def _sample(pool, liked, keys, users, times, count, max_age) -> np.ndarray:
    begins, ends = pool.ranges(times, max_age)
    chosen = np.zeros((len(keys), count), np.int64)
    missing = np.arange(len(keys))
    for draws in (2 * count + 16, 8 * count + 64):
        positions = _draw(pool, keys[missing], begins[missing], ends[missing], draws)
        good = ~_repeats(positions) & ~liked.holds(users[missing][:, None], positions)
        nth = np.cumsum(good, axis=1)
        full = nth[:, -1] >= count
        taken = good & (nth <= count) & full[:, None]
        chosen[missing[full]] = positions[taken].reshape(-1, count)
        missing = missing[~full]
        if not len(missing):
            return chosen
    for row, drawn, fine in zip(missing, positions[~full], good[~full], strict=True):
        chosen[row] = _complete(pool, liked, keys[row], users[row], begins[row], ends[row], count, drawn[fine])
    return chosen


def _draw(pool: Pool, keys: np.ndarray, begins: np.ndarray, ends: np.ndarray, draws: int) -> np.ndarray:
    numbers = _unit(mix(keys[:, None] + GOLDEN * np.arange(1, draws + 1, dtype=np.uint64)))
    before = pool.totals[begins][:, None]
    values = before + (numbers * (pool.totals[ends][:, None] - before)).astype(np.int64)
    return np.searchsorted(pool.totals, values, side="right") - 1


def _complete(pool, liked, key: np.uint64, user: int, begin: int, end: int, count: int, drawn) -> np.ndarray:
    """``count`` positions, ``drawn`` first. The next note is one of weight w with probability w / remaining weight."""
    positions = np.setdiff1d(np.arange(begin, end), drawn)
    positions = positions[~liked.holds(np.full(len(positions), user), positions)]
    numbers = _unit(mix(mix(key + positions.astype(np.uint64) * GOLDEN)))
    waits = -np.log1p(-numbers) / np.diff(pool.totals)[positions]
    return np.append(drawn, positions[np.argsort(waits, kind="stable")])[:count]


def _repeats(positions: np.ndarray) -> np.ndarray:
    """(X, J) bool: whether the same position is earlier in the row."""
    order = np.argsort(positions, axis=1, kind="stable")
    ordered = np.take_along_axis(positions, order, axis=1)
    again = np.zeros(positions.shape, bool)
    np.put_along_axis(again, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    return again


def _unit(numbers: np.ndarray) -> np.ndarray:
    return (numbers >> np.uint64(11)) * 2.0**-53
