"""Related notes by co-occurrence (NoteLLM-2, Eq. 2 and section 2.3), for logs of any length.

Three steps, each with numbered tasks that exchange their data through Arrow files in a scratch directory. Every node
must see that directory. The size of a part bounds the memory, however long the log is.

1. Read a unit of events (about a million) and pack it by user; the hash of a user's id decides the part.
2. For a part of the users, add up 1 / N_u per (query, target), and write the sums sorted by query.
3. For a range of query notes, add up the sums of all parts, drop scores out of bounds, keep the top t per query.

The ranges of step 3 hold equally many sums. Only the list of note ids grows with the platform: some 40 bytes for each
note in every process. With one part, the same three steps run in this process, without Ray.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.schema import PAIR_SCHEMA
from notellm2_ray.core.settings import PairSettings
from notellm2_ray.data import event_log
from notellm2_ray.data.keys import report_ties
from notellm2_ray.data.pairs.cooccurrence import (
    Rows,
    accumulate,
    add_up,
    clicked_by,
    fixed_point_scale,
    select,
)
from notellm2_ray.data.pairs.events import PACKED_SCHEMA, pack_unit, unpack
from notellm2_ray.data.tasks import read_arrow, run_here, run_on_ray, write_arrow

PARTITION_EVENTS = 1 << 21
MERGE_SUMS = 1 << 22  # sums added up at once: about 60 bytes each
DAY = 86_400_000_000  # microseconds

_SUMS_SCHEMA = pa.schema(
    [
        pa.field("query", pa.int32()),
        pa.field("targets", pa.list_(pa.int32())),
        pa.field("sums", pa.list_(pa.int64())),
    ]
)
_SELECTED = ("queries", "targets", "scores")
log = logging.getLogger("notellm2_ray")


class MinedPairs(NamedTuple):
    """Pairs of related notes, and counts of the mining.

    Attributes:
        pairs: PAIR_SCHEMA, sorted by query (in the order of the vocabulary) and descending score; scores are rounded to
            8 decimals.
        clicks: (number of notes,) int64, users who clicked each note of the vocabulary in the window.
        counts: events in the window, those on notes outside the vocabulary, parts, scored pairs dropped by the bounds,
            queries, and those of them whose top t ends between equal scores.
    """

    pairs: pa.Table
    clicks: np.ndarray
    counts: dict[str, int]

    @property
    def ties(self) -> dict[str, int]:
        """The queries, and those of them whose top t ends between equal scores."""
        return {name: self.counts[name] for name in ("queries", "tied_cuts")}


@dataclass(frozen=True)
class _Shared:
    """What all tasks share; small, because it is sent with each."""

    scratch: Path
    units: tuple[Sequence[event_log.RowGroup], ...]
    ranges: tuple[tuple[int, int], ...]  # of query codes, for step 3
    partitions: int
    scale: int
    start: int
    end: int
    settings: PairSettings


def mine_pairs(
    groups: Sequence[event_log.RowGroup],
    notes: pa.Array,
    keys: np.ndarray,
    settings: PairSettings,
    *,
    start: int,
    end: int,
    scratch: Path,
    pairable: np.ndarray | None = None,
    in_process: bool | None = None,
    what: str = "pairs",
) -> MinedPairs:
    """Eq. 2 over the events in [start, end), microseconds.

    N_u is the number of distinct notes of ``notes`` that the user clicked in that window. A user counts once for
    (A, B), however often they viewed A and clicked B. A click must be later than the view, and with
    ``settings.max_gap_hours`` at most so much later.

    Args:
        groups: see :func:`event_log.list_row_groups`.
        notes: distinct note ids. Events on other notes are ignored.
        keys: (len(notes),) uint64, the notes' keys, which decide between equal scores.
        pairable: (len(notes),) bool, the notes that may be a query or a target; None: all.
        scratch: an empty directory for intermediate files, seen by every node.
        in_process: run in this process, without Ray; None: if there is only one part.
        what: name of the pairs in log lines and errors.

    Raises:
        DataError: no event or no click in the window, or no pair within the bounds.
    """
    units = event_log.plan_units(groups, start, end)
    rows = sum(group.rows for unit in units for group in unit)
    partitions = settings.partitions or -(-rows // PARTITION_EVENTS) or 1
    shared = _Shared(scratch, tuple(units), (), partitions, fixed_point_scale(rows), start, end, settings)
    mask = np.ones(len(notes), bool) if pairable is None else pairable
    vocabulary = pa.table({"note_id": notes, "key": pa.array(keys), "pairable": pa.array(mask)})
    write_arrow(scratch / "notes.arrow", vocabulary.to_batches(), vocabulary.schema)
    run = run_here if (partitions == 1 if in_process is None else in_process) else run_on_ray
    log.info("%s: mining %d events in %d part(s)", what, rows, partitions)

    seen = list(run(_pack_unit, len(units), shared, what, "units of events read"))
    actions: dict[str, int] = {}
    for unit in seen:
        for name, count in json.loads(unit["actions"]).items():
            actions[name] = actions.get(name, 0) + count
    counts = {"events": sum(u["events"] for u in seen), "unknown_note_events": sum(u["unknown"] for u in seen)}
    _check_log(counts["events"], actions, settings, what)

    clicks, sums = np.zeros(len(notes), np.int64), 0
    for part in run(_sum_part, partitions, shared, what, "parts of the users summed"):
        clicks[part["clicked_notes"]] += np.asarray(part["clicks"], np.int64)
        sums += part["sums"]
    for path in scratch.glob("unit-*.arrow"):
        path.unlink()
    shared = _Shared(scratch, (), _cut_queries(shared, len(notes)), partitions, shared.scale, start, end, settings)
    merged = list(run(_merge_range, len(shared.ranges), shared, what, "ranges of query notes merged"))
    pairs = _as_pairs(merged, notes)
    below, above, queries, tied = (
        sum(m[name] for m in merged) for name in ("below", "above", "num_queries", "tied_cuts")
    )
    _check_pairs(pairs.num_rows, below, above, int(clicks.sum()), settings, what)
    log.info("%s: %d pairs; %d below and %d above the bounds", what, pairs.num_rows, below, above)
    report_ties(
        f"{what}: queries whose top {settings.top} end between equal scores, so that chance decides", tied, queries
    )
    counts |= {"partitions": partitions, "partial_sums": sums, "below": below, "above": above, "pairs": pairs.num_rows}
    counts |= {"queries": queries, "tied_cuts": tied}
    return MinedPairs(pairs, clicks, counts)


def _pack_unit(shared: _Shared, index: int) -> dict[str, Any]:
    batches, counts = pack_unit(
        shared.units[index],
        read_arrow(shared.scratch / "notes.arrow").read_all().column("note_id").combine_chunks(),
        start=shared.start,
        end=shared.end,
        view_actions=shared.settings.view_actions,
        click_actions=shared.settings.click_actions,
        partitions=shared.partitions,
    )
    write_arrow(shared.scratch / f"unit-{index}.arrow", batches, PACKED_SCHEMA)
    return {**counts._asdict(), "actions": json.dumps(counts.actions)}


def _sum_part(shared: _Shared, index: int) -> dict[str, Any]:
    events = unpack(read_arrow(path).get_batch(index) for path in sorted(shared.scratch.glob("unit-*.arrow")))
    pairable = read_arrow(shared.scratch / "notes.arrow").read_all().column("pairable").to_numpy()
    gap_hours = shared.settings.max_gap_hours
    gap = None if gap_hours is None else round(gap_hours * DAY / 24)
    written = 0

    def batches() -> Iterator[pa.RecordBatch]:
        nonlocal written
        for rows in accumulate(events, len(pairable), scale=shared.scale, gap=gap, pairable=pairable):
            written += len(rows.sums)
            offsets = pa.array(rows.offsets, pa.int32())
            lists = [pa.ListArray.from_arrays(offsets, pa.array(values)) for values in (rows.targets, rows.sums)]
            yield pa.record_batch([pa.array(rows.queries), *lists], schema=_SUMS_SCHEMA)

    write_arrow(shared.scratch / f"sums-{index}.arrow", batches(), _SUMS_SCHEMA)
    clicked, users = clicked_by(events, len(pairable))
    return {"sums": written, "clicked_notes": clicked, "clicks": users}


def _merge_range(shared: _Shared, index: int) -> dict[str, Any]:
    low, high = shared.ranges[index]
    keys = read_arrow(shared.scratch / "notes.arrow").read_all().column("key").to_numpy()
    pending: list[Rows] = []
    for piece in _pieces(shared, low, high):
        pending.append(piece)
        # A range holds few sums, but a single note may have many: add them up before they fill the memory.
        if sum(len(p.sums) for p in pending[1:]) > MERGE_SUMS:
            pending = [add_up(pending, len(keys))]
    settings = shared.settings
    sums = add_up(pending, len(keys))
    chosen = select(sums, keys, scale=shared.scale, lower=settings.lower, upper=settings.upper, top=settings.top)
    return chosen._asdict()


def _pieces(shared: _Shared, low: int, high: int) -> Iterator[Rows]:
    for part in range(shared.partitions):
        reader = read_arrow(shared.scratch / f"sums-{part}.arrow")
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            queries = batch.column(0).to_numpy()
            first, last = np.searchsorted(queries, [low, high])
            if first < last:
                offsets = batch.column(1).offsets.to_numpy()[first : last + 1].astype(np.int64)
                targets, sums = (batch.column(c).values.to_numpy()[offsets[0] : offsets[-1]] for c in (1, 2))
                yield Rows(queries[first:last], offsets - offsets[0], targets, sums)


def _cut_queries(shared: _Shared, num_notes: int) -> tuple[tuple[int, int], ...]:
    """Ranges of query codes with about MERGE_SUMS sums each over all parts."""
    held = np.zeros(num_notes, np.int64)
    for part in range(shared.partitions):
        reader = read_arrow(shared.scratch / f"sums-{part}.arrow")
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            held[batch.column(0).to_numpy()] += np.diff(batch.column(1).offsets.to_numpy())
    total = np.cumsum(held)
    ranges, done = [], 0
    while num_notes and done < total[-1]:
        first = int(np.searchsorted(total, done, side="right"))  # the next query that has any sum
        last = max(first + 1, int(np.searchsorted(total, done + MERGE_SUMS, side="right")))
        ranges.append((first, last))
        done = int(total[last - 1])
    return tuple(ranges)


def _as_pairs(merged: Sequence[dict[str, Any]], notes: pa.Array) -> pa.Table:
    columns = {name: np.concatenate([m[name] for m in merged]) if merged else np.zeros(0) for name in _SELECTED}
    order = np.argsort(columns["queries"], kind="stable")  # ranges come in any order, but each is sorted
    queries, targets, scores = (columns[name][order] for name in _SELECTED)
    ids = [notes.take(pa.array(codes, pa.int64())) for codes in (queries, targets)]
    return pa.table([*ids, pa.array(scores, pa.float64())], schema=PAIR_SCHEMA)


def _check_log(events: int, actions: dict[str, int], settings: PairSettings, what: str) -> None:
    present = ", ".join(f"{name} ({count})" for name, count in sorted(actions.items())) or "none"
    if not events:
        raise DataError(
            f"{what}: there is no event in the time that pairs are mined from; "
            "lengthen it with pairs.window_days (null: the whole log) or move the boundary with split.test_share"
        )
    for key, wanted in (("pairs.click_actions", settings.click_actions), ("pairs.view_actions", settings.view_actions)):
        if not any(name in actions for name in wanted):
            raise DataError(
                f"{what}: no event has an action of {key} ({', '.join(wanted) or 'empty'}); "
                f"the actions present are: {present}. Set {key} to those that should count"
            )


def _check_pairs(pairs: int, below: int, above: int, clicks: int, settings: PairSettings, what: str) -> None:
    if pairs:
        return
    if below or above:
        raise DataError(
            f"{what}: no pair is left: of {below + above} scored pairs {below} are below pairs.lower={settings.lower} "
            f"and {above} above pairs.upper={settings.upper}; change these bounds, or lengthen pairs.window_days"
        )
    raise DataError(
        f"{what}: no user viewed one of the notes and later clicked another ({clicks} clicks were read); "
        "lengthen pairs.window_days or pairs.max_gap_hours (null: no limit), or give a longer event log"
    )
