"""The split: which notes train or test, which part of the log each side is mined from, and which pairs validate.

By time, as in the paper: the last part of the log is for testing. Notes created before the boundary train, with events
before it; notes created after it test, with events after it. Neither side knows anything of the other. With
``split.test_notes=all``, test pairs may also join older notes: what is to be predicted is still only later events.

By notes, for catalogues whose notes all exist from the start: a random part of the notes is held out. No pair joins the
two sides, and clicks on held-out notes do not count in the training side's N_u. One leak remains: both sides are mined
from the same users over the same time, so the tastes and fashions tested are those seen in training. Such figures hold
for new items under known tastes; they do not forecast a later week.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.run import stream_seed
from notellm2_ray.core.settings import SplitSettings
from notellm2_ray.data.arrays import mix

DAY = 86_400_000_000  # microseconds


class Split(NamedTuple):
    """Notes and times of the two sides; times in microseconds since 1970, ends exclusive."""

    notes: pa.Array  # (N,) note ids, in the order given
    keys: np.ndarray  # (N,) uint64, the notes' keys
    is_test: np.ndarray  # (N,) bool; all other notes are training notes
    in_pool: np.ndarray  # (N,) bool; the notes that test pairs join and are searched in
    boundary: int | None  # None in a split by notes
    train_window: tuple[int, int]
    test_window: tuple[int, int]


def split_notes(
    notes: pa.Table, span: tuple[int, int], settings: SplitSettings, *, window_days: float | None, seed: int
) -> Split:
    """The two sides.

    Args:
        notes: all prepared notes, as :func:`notellm2_ray.data.keys.read_notes` gives them.
        span: times of the first and the last event.
        window_days: length of the mined log before the boundary (by notes: before the end); None: all of it.

    Raises:
        DataError: there are no notes, a split by time meets a note without creation time, or a side has no note.
    """
    if not notes.num_rows:
        raise DataError("the prepared notes table is empty: run prepare on a source that has notes")
    ids, keys = notes.column("note_id").combine_chunks(), notes.column("key").to_numpy()
    first, end = span[0], span[1] + 1
    if settings.by == "time":
        boundary = first + round((span[1] - first) * (1 - settings.test_share))
        is_test = _created(notes) >= boundary
        in_pool = np.ones(len(ids), bool) if settings.test_notes == "all" else is_test
        window = (_back(boundary, window_days, first), boundary)
        split = Split(ids, keys, is_test, in_pool, boundary, window, (boundary, end))
    else:
        is_test = mix(keys ^ np.uint64(stream_seed(seed, "split", "notes"))) / 2.0**64 < settings.test_share
        window = (_back(end, window_days, first), end)
        split = Split(ids, keys, is_test, is_test, None, window, window)
    if split.is_test.all() or not split.is_test.any():
        side = "training" if split.is_test.all() else "test"
        raise DataError(
            f"split.by={settings.by} with split.test_share={settings.test_share} leaves no {side} note among "
            f"{len(ids)}: change split.test_share" + (" or use split.by=notes" if settings.by == "time" else "")
        )
    return split


def split_pairs(pairs: pa.Table, share: float, seed: int) -> tuple[pa.Table, pa.Table]:
    """(training, validation): a random ``share`` of the pairs validates, but at least one; their order is kept.

    As in the paper, validation pairs are drawn from the training pairs, so their notes may be in training pairs too.

    Raises:
        DataError: no pair would be left for training.
    """
    num_valid = min(max(1, round(share * pairs.num_rows)), pairs.num_rows) if share else 0
    if num_valid == pairs.num_rows:
        raise DataError(
            f"split.valid_share={share} leaves none of {pairs.num_rows} pairs to train on: lower it, or mine more pairs"
        )
    order = np.random.default_rng(stream_seed(seed, "split", "validation")).permutation(pairs.num_rows)
    validates = np.zeros(pairs.num_rows, bool)
    validates[order[:num_valid]] = True
    return pairs.filter(pa.array(~validates)), pairs.filter(pa.array(validates))


def _created(notes: pa.Table) -> np.ndarray:
    created = notes.column("created_at")
    if created.null_count:
        example = pc.filter(notes.column("note_id"), created.is_null())[0].as_py()
        raise DataError(
            f"{created.null_count} of {len(created)} notes have no created_at (note {example!r} is one), "
            "and split.by=time needs it: map the column, or set split.by=notes"
        )
    return created.cast(pa.timestamp("us", tz="UTC")).cast(pa.int64()).to_numpy()


def _back(end: int, window_days: float | None, first: int) -> int:
    return first if window_days is None else max(first, end - round(window_days * DAY))
