"""Negatives without replacement, vectorised, the same for an example whatever else is sampled beside it.

Example i's draw number j is a hash of (its key, j), so nothing depends on order, parts or machines. Draws are taken in
turn; one that hits a note of the user or an earlier draw is skipped. Where that finds too few, what is missing is
drawn from the notes left by exponential keys, which is the same distribution.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROWS = 8192  # examples sampled at once: about 2 kB each at 20 negatives


class Pool(NamedTuple):
    """Candidate notes in the order of their birth, so that what came into being between two moments is a range.

    Weights are integers: their sums are exact, the same on every machine.
    """

    codes: np.ndarray  # (M,) int64 note codes
    births: np.ndarray  # (M,) int64 microseconds, ascending
    totals: np.ndarray  # (M + 1,) int64, weights cumulated from 0
    places: np.ndarray  # (number of notes,) int64, each code's place in ``codes``; M: no candidate

    @staticmethod
    def build(births: np.ndarray, weights: np.ndarray, candidate: np.ndarray) -> Pool:
        """The pool of the notes where ``candidate``; all arrays are (number of notes,), weights at least 1."""
        codes = np.flatnonzero(candidate)
        codes = codes[np.argsort(births[codes], kind="stable")]
        places = np.full(len(births), len(codes), np.int64)
        places[codes] = np.arange(len(codes))
        return Pool(codes, births[codes], np.append(0, np.cumsum(weights[codes])), places)

    def ranges(self, times: np.ndarray, max_age: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Begin and end, (X,) int64 each, of the places of the notes that existed at each of ``times``, and were not
        older than ``max_age`` microseconds by then; None: of any age."""
        ends = np.searchsorted(self.births, times, side="right")
        if max_age is None:
            return np.zeros_like(ends), ends
        return np.searchsorted(self.births, times - max_age, side="left"), ends


class Liked(NamedTuple):
    """The notes of each user, to be kept out: sorted keys user * (M + 1) + place, and one that is larger than all."""

    keys: np.ndarray
    base: int

    @staticmethod
    def build(owners: np.ndarray, notes: np.ndarray, pool: Pool) -> Liked:
        """From (E,) users and note codes."""
        base = len(pool.codes) + 1
        keys = np.sort(owners * base + pool.places[notes])  # np.unique hashes such keys, which takes 20 times as long
        distinct = np.append(True, keys[1:] != keys[:-1])[: len(keys)]
        return Liked(np.append(keys[distinct], np.iinfo(np.int64).max), base)

    def holds(self, users: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Whether each user, broadcast against places, liked the note there."""
        keys = users * self.base + places
        return self.keys[np.searchsorted(self.keys, keys)] == keys

    def num_among(self, users: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """(X,) int64, how many of the pool's notes from ``begins`` to before ``ends`` each user liked."""
        first = users * self.base
        return np.searchsorted(self.keys, first + ends) - np.searchsorted(self.keys, first + begins)


def num_eligible(
    pool: Pool, liked: Liked, users: np.ndarray, times: np.ndarray, max_age: int | None = None
) -> np.ndarray:
    """(X,) int64, notes that existed at ``times``, not older than ``max_age``, and that the user did not like."""
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
    """(X, count) note codes: distinct notes that existed, none of the user's, drawn by the pool's weights one after
    another without replacement. Every example must have ``count`` eligible notes.

    Args:
        keys: (X,) uint64, a random number of each example.
        users: (X,) the users of ``liked``.
        times: (X,) microseconds.
        max_age: microseconds at most from a note's birth to the example's time; None: any.
    """
    pieces = [
        _sample(pool, liked, keys[i : i + _ROWS], users[i : i + _ROWS], times[i : i + _ROWS], count, max_age)
        for i in range(0, len(keys), _ROWS)
    ]
    return pool.codes[np.concatenate(pieces)] if pieces else np.zeros((0, count), np.int64)


def shuffle_keys(keys: np.ndarray, width: int) -> np.ndarray:
    """(X, width) uint64 random numbers to order an example's candidates by; not those that draw its negatives."""
    return _mix(_mix(~keys)[:, None] + _GOLDEN * np.arange(width, dtype=np.uint64))


def _sample(pool, liked, keys, users, times, count, max_age) -> np.ndarray:
    begins, ends = pool.ranges(times, max_age)
    chosen = np.zeros((len(keys), count), np.int64)
    missing = np.arange(len(keys))
    for draws in (2 * count + 16, 8 * count + 64):
        places = _draw(pool, keys[missing], begins[missing], ends[missing], draws)
        good = ~_repeats(places) & ~liked.holds(users[missing][:, None], places)
        nth = np.cumsum(good, axis=1)
        full = nth[:, -1] >= count
        taken = good & (nth <= count) & full[:, None]
        chosen[missing[full]] = places[taken].reshape(-1, count)
        missing = missing[~full]
        if not len(missing):
            return chosen
    for row, drawn, fine in zip(missing, places[~full], good[~full], strict=True):
        chosen[row] = _complete(pool, liked, keys[row], users[row], begins[row], ends[row], count, drawn[fine])
    return chosen


def _draw(pool: Pool, keys: np.ndarray, begins: np.ndarray, ends: np.ndarray, draws: int) -> np.ndarray:
    numbers = _unit(_mix(keys[:, None] + _GOLDEN * np.arange(1, draws + 1, dtype=np.uint64)))
    before = pool.totals[begins][:, None]
    values = before + (numbers * (pool.totals[ends][:, None] - before)).astype(np.int64)
    return np.searchsorted(pool.totals, values, side="right") - 1


def _complete(pool, liked, key: np.uint64, user: int, begin: int, end: int, count: int, drawn) -> np.ndarray:
    """``count`` places, ``drawn`` first: a note of weight w comes next with probability w / the weights left."""
    places = np.setdiff1d(np.arange(begin, end), drawn)
    places = places[~liked.holds(np.full(len(places), user), places)]
    numbers = _unit(_mix(_mix(key + places.astype(np.uint64) * _GOLDEN)))
    waits = -np.log1p(-numbers) / np.diff(pool.totals)[places]
    return np.append(drawn, places[np.argsort(waits, kind="stable")])[:count]


def _repeats(places: np.ndarray) -> np.ndarray:
    """(X, J) bool: the same place stands earlier in the row."""
    order = np.argsort(places, axis=1, kind="stable")
    ordered = np.take_along_axis(places, order, axis=1)
    again = np.zeros(places.shape, bool)
    np.put_along_axis(again, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    return again


def _unit(numbers: np.ndarray) -> np.ndarray:
    return (numbers >> np.uint64(11)) * 2.0**-53


def _mix(numbers):
    """SplitMix64's finaliser (Steele, Lea and Flood 2014); products wrap."""
    with np.errstate(over="ignore"):
        numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return numbers ^ (numbers >> np.uint64(31))
