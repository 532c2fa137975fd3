"""Co-occurrence scores (NoteLLM-2, Eq. 2) in numpy and SciPy, for the events of some users at a time.

    s(A -> B) = sum of 1 / N_u over the users u who viewed A and subsequently clicked B

Unless a gap is set, only a user's earliest view of A and latest click of B matter. The clicks that follow a view are
then one run of the user's clicks sorted by time. Adding up such runs per viewed note is a sparse matrix product, which
costs a few nanoseconds per (user, A, B) and does not sort them.

Until the end, scores are integers in units of 1 / ``scale``. Integer sums do not depend on the order of their terms, so
neither the number of parts nor their scheduling can change a result or which scores are tied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from notellm2_ray.data.arrays import mix, offsets_of

CHUNK_PAIRS = 1 << 22  # (user, A, B) expanded at once: about 40 bytes each
DECIMALS = 8  # of a pair's score; scores that are equal to so many decimals are tied
_TRIM_LIMIT = 8  # up to this t, t passes for maxima trim the rows before they are sorted


class Log(NamedTuple):
    """Events of some users, each with all of the user's events."""

    users: np.ndarray  # (E,) int64, 0 .. number of users - 1
    notes: np.ndarray  # (E,) int64 codes
    times: np.ndarray  # (E,) int64, microseconds
    views: np.ndarray  # (E,) bool: the action is a view
    clicks: np.ndarray  # (E,) bool: the action is a click (an action may be both)


class Rows(NamedTuple):
    """Sparse partial sums: the targets of ``queries[i]`` are ``targets[offsets[i]:offsets[i + 1]]``."""

    queries: np.ndarray  # (R,) int32, ascending
    offsets: np.ndarray  # (R + 1,) int64
    targets: np.ndarray  # (K,) int32, distinct within a row, unsorted
    sums: np.ndarray  # (K,) int64, in units of 1 / scale


class Selected(NamedTuple):
    """The related notes of some queries, sorted by query and descending score, equal scores by :func:`tie_order`."""

    queries: np.ndarray  # (P,) int32
    targets: np.ndarray  # (P,) int32
    scores: np.ndarray  # (P,) float64
    below: int  # pairs dropped for a score below the lower bound
    above: int  # ... above the upper bound
    num_queries: int  # queries with any pair within the bounds
    tied_cuts: int  # of these, the ones whose last target kept has the same score as the first one dropped


def fixed_point_scale(num_events: int) -> int:
    """The integer that stands for a score of 1: at most 2**40, and no sum over ``num_events`` events overflows."""
    return 1 << min(40, 62 - num_events.bit_length())


def accumulate(
    log: Log, num_notes: int, *, scale: int, gap: int | None = None, pairable: np.ndarray | None = None
) -> Iterator[Rows]:
    """Eq. 2's sums over the users of ``log``, in pieces in ascending order of query.

    A query may be cut between two pieces; it is then in both. As in the paper, a user's history has no limit: a user
    who viewed 100,000 notes is expanded piece by piece, ``CHUNK_PAIRS`` at a time.

    Args:
        num_notes: number of note codes.
        scale: see :func:`fixed_point_scale`.
        gap: longest time from view to click in microseconds; None: any later click.
        pairable: (num_notes,) bool, the notes that may be in a pair; None: all. Clicks on the others count in N_u.
    """
    clicks, weights = _clicks(log, num_notes, scale, keep_all=gap is not None, pairable=pairable)
    views = _views(log, keep_all=gap is not None, pairable=pairable)
    runs = _runs(views, clicks, len(weights), gap)
    for first, last in _chunks(runs, by_group=gap is not None):
        yield _sum_chunk(runs, first, last, clicks[1], weights, num_notes, deduplicate=gap is not None)


def add_up(pieces: Sequence[Rows], num_notes: int) -> Rows:
    """One piece with every query once, and the sums over all ``pieces``."""
    queries = np.concatenate([piece.queries for piece in pieces])
    lengths = np.concatenate([np.diff(piece.offsets) for piece in pieces])
    targets = np.concatenate([piece.targets for piece in pieces])
    sums = np.concatenate([piece.sums for piece in pieces])
    order = np.argsort(queries, kind="stable")
    return _sum_rows(
        queries[order], order, np.ones(len(order), np.int64), offsets_of(lengths), targets, sums, num_notes
    )


def clicked_by(log: Log, num_notes: int) -> tuple[np.ndarray, np.ndarray]:
    """(C,) codes of the notes that were clicked, distinct, and (C,) int64, the users who clicked each."""
    keys = np.sort(log.users[log.clicks] * num_notes + log.notes[log.clicks])
    return np.unique(keys[_starts(keys)] % num_notes, return_counts=True)


def tie_order(query_keys: np.ndarray, target_keys: np.ndarray) -> np.ndarray:
    """(K,) uint64: of targets with equal scores, those with the smallest number come first.

    The order is another one for each query, so that no note gains from it again and again, and it comes from the notes'
    keys (:mod:`notellm2_ray.data.keys`), so that no name decides.
    """
    return mix(target_keys ^ mix(query_keys))


def select(rows: Rows, keys: np.ndarray, *, scale: int, lower: float, upper: float, top: int) -> Selected:
    """The ``top`` targets of each query whose score is within [lower, upper].

    Scores are first rounded to ``DECIMALS`` decimals. A note is not a target of itself.

    Args:
        keys: (number of notes,) uint64, the notes' keys, which order equal scores.
    """
    queries = np.repeat(rows.queries, np.diff(rows.offsets))
    grid = np.rint(rows.sums * (10**DECIMALS / scale))
    other = queries != rows.targets
    low = other & (grid < np.rint(lower * 10**DECIMALS))
    high = other & (grid > np.rint(upper * 10**DECIMALS))
    kept = np.flatnonzero(other & ~low & ~high)
    if top <= _TRIM_LIMIT:
        kept = kept[_near_top(queries[kept], grid[kept], top)]
    queries, targets, grid = queries[kept], rows.targets[kept], grid[kept]
    order = np.lexsort((tie_order(keys[queries], keys[targets]), -grid, queries))
    queries, targets, grid = queries[order], targets[order], grid[order]
    starts = _starts(queries)
    lengths = np.diff(np.append(starts, len(queries)))
    best = np.arange(len(queries)) - np.repeat(starts, lengths) < top
    cut = starts[lengths > top] + top
    return Selected(
        queries[best].astype(np.int32),
        targets[best].astype(np.int32),
        grid[best] / 10**DECIMALS,
        int(low.sum()),
        int(high.sum()),
        len(starts),
        int((grid[cut] == grid[cut - 1]).sum()),
    )


class _Runs(NamedTuple):
    """Views, sorted by (note, user, time), and the clicks that follow each: ``first[i]:last[i]`` of the click order."""

    notes: np.ndarray
    users: np.ndarray
    first: np.ndarray
    last: np.ndarray


def _clicks(log: Log, num_notes: int, scale: int, *, keep_all: bool, pairable: np.ndarray | None):
    """((users, notes, times) of pairable clicks sorted by (user, time), weight round(scale / N_u) of each user)."""
    users, notes, times = log.users[log.clicks], log.notes[log.clicks], log.times[log.clicks]
    num_users = int(log.users.max()) + 1 if len(log.users) else 0
    keys, latest = _grouped(users * num_notes + notes, times, np.maximum)
    num_clicked = np.bincount(keys // num_notes, minlength=num_users)  # N_u
    weights = np.rint(scale / np.maximum(num_clicked, 1)).astype(np.int64)
    if not keep_all:
        users, notes, times = keys // num_notes, keys % num_notes, latest
    if pairable is not None:
        wanted = pairable[notes]
        users, notes, times = users[wanted], notes[wanted], times[wanted]
    order = np.lexsort((times, users))
    return (users[order], notes[order], times[order]), weights


def _views(log: Log, *, keep_all: bool, pairable: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(notes, users, times) of views sorted by (note, user, time); only the earliest unless ``keep_all``."""
    wanted = log.views if pairable is None else log.views & pairable[log.notes]
    users, notes, times = log.users[wanted], log.notes[wanted], log.times[wanted]
    num_users = int(log.users.max()) + 1 if len(log.users) else 1
    keys = notes * num_users + users
    if keep_all:
        order = np.lexsort((times, keys))
        keys, times = keys[order], times[order]
    else:
        keys, times = _grouped(keys, times, np.minimum)
    return keys // num_users, keys % num_users, times


def _runs(views, clicks, num_users: int, gap: int | None) -> _Runs:
    notes, users, times = views
    click_users, _, click_times = clicks
    # One sortable key per (user, time). Times are replaced by ranks among the clicks' times, so that no key overflows.
    distinct = np.unique(click_times)
    span = len(distinct) + 1
    keys = click_users * span + np.searchsorted(distinct, click_times)
    first = np.searchsorted(keys, users * span + np.searchsorted(distinct, times, side="right"))
    if gap is None:
        last = np.cumsum(np.bincount(click_users, minlength=num_users))[users]
    else:
        last = np.searchsorted(keys, users * span + np.searchsorted(distinct, times + gap, side="right"))
        # Views of one note by one user: clicks that an earlier view already reached are not counted again.
        again = np.flatnonzero((notes[1:] == notes[:-1]) & (users[1:] == users[:-1])) + 1
        first[again] = np.maximum(first[again], last[again - 1])
    some = last > first
    return _Runs(notes[some], users[some], first[some], last[some])


def _chunks(runs: _Runs, *, by_group: bool) -> Iterator[tuple[int, int]]:
    """Ranges of views whose runs hold about CHUNK_PAIRS clicks.

    ``by_group`` keeps a user's views of a note together.
    """
    total = np.cumsum(runs.last - runs.first)
    start = 0
    while start < len(total):
        done = total[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(total, done + CHUNK_PAIRS, side="right")))
        while by_group and stop < len(total) and _same_group(runs, stop):
            stop += 1
        yield start, stop
        start = stop


def _same_group(runs: _Runs, i: int) -> bool:
    return bool(runs.notes[i] == runs.notes[i - 1] and runs.users[i] == runs.users[i - 1])


def _sum_chunk(
    runs: _Runs,
    start: int,
    stop: int,
    click_notes: np.ndarray,
    weights: np.ndarray,
    num_notes: int,
    *,
    deduplicate: bool,
) -> Rows:
    notes, users, first, last = (column[start:stop] for column in runs)
    lengths = last - first
    offsets = offsets_of(lengths)
    targets = click_notes[np.arange(offsets[-1]) + np.repeat(first - offsets[:-1], lengths)]
    if deduplicate:  # with a gap, a user's views of A may reach several clicks of one B, which count once
        group = np.cumsum(np.append(0, (notes[1:] != notes[:-1]) | (users[1:] != users[:-1])))
        keys = np.unique(np.repeat(group, lengths) * num_notes + targets)
        heads = _starts(group)
        notes, users = notes[heads], users[heads]
        offsets = offsets_of(np.bincount(keys // num_notes, minlength=len(heads)))
        targets = keys % num_notes
    ones = np.ones(len(targets), np.int64)
    return _sum_rows(notes, np.arange(len(notes)), weights[users], offsets, targets, ones, num_notes)


def _sum_rows(queries, members, weights, offsets, targets, sums, num_notes: int) -> Rows:
    """For each distinct query, the weighted sum of its rows of (offsets, targets, sums), as a sparse product."""
    from scipy.sparse import csr_matrix

    starts = _starts(queries)
    left = csr_matrix((weights, members, np.append(starts, len(queries))), shape=(len(starts), len(offsets) - 1))
    right = csr_matrix((sums, targets, offsets), shape=(len(offsets) - 1, num_notes))
    product = left @ right
    return Rows(
        queries[starts].astype(np.int32, copy=False),
        product.indptr.astype(np.int64, copy=False),
        product.indices.astype(np.int32, copy=False),
        product.data,
    )


def _near_top(queries: np.ndarray, values: np.ndarray, top: int) -> np.ndarray:
    """Mask of the values that are at least their query's top-th largest; ``top`` passes are cheaper than a sort."""
    if not len(queries):
        return np.zeros(0, bool)
    starts = _starts(queries)
    lengths = np.diff(np.append(starts, len(queries)))
    remaining = values.copy()
    found = np.zeros(len(starts), np.int64)
    threshold = np.full(len(starts), np.inf)
    for _ in range(top):
        best = np.maximum.reduceat(remaining, starts)
        threshold = np.where(found < top, best, threshold)
        hit = remaining == np.repeat(best, lengths)
        found += np.add.reduceat(hit.astype(np.int64), starts)
        remaining[hit] = -np.inf
    return values >= np.repeat(threshold, lengths)


def _grouped(keys: np.ndarray, times: np.ndarray, reduce: np.ufunc) -> tuple[np.ndarray, np.ndarray]:
    """The distinct keys in ascending order, and the reduced time of each."""
    order = np.argsort(keys)
    keys = keys[order]
    starts = _starts(keys)
    if not len(starts):
        return keys, times
    return keys[starts], reduce.reduceat(times[order], starts)


def _starts(values: np.ndarray) -> np.ndarray:
    """The position where each run of equal values starts."""
    if not len(values):
        return np.zeros(0, np.int64)
    return np.append(0, np.flatnonzero(values[1:] != values[:-1]) + 1)
