"""Histories and blocks equal those of a plain version, however the log is cut and hashed."""

from __future__ import annotations

from collections import defaultdict
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from notellm2_ray.core.history_blocks import BlockRule
from notellm2_ray.core.schema import BLOCK_SCHEMA, EVENT_SCHEMA, SEQUENCE_SCHEMA
from notellm2_ray.core.settings import SequenceSettings
from notellm2_ray.data import event_log
from notellm2_ray.data.arrays import mix
from notellm2_ray.data.sequences.events import build_histories, group_events, log_direction, positive_events
from notellm2_ray.data.sequences.histories import Histories, k_core, within_core
from notellm2_ray.data.sequences.tables import block_table, sequence_table

MINUTE = 60_000_000
Event = tuple[str, str, int, str, str | None]  # user, note, minute, action, session
NOTES = pa.array([f"n{number}" for number in range(9)])
KEYS = mix(np.arange(1, 10, dtype=np.uint64))


def write_events(directory: Path, events: list[Event], files: int) -> list[event_log.RowGroup]:
    paths = []
    for number in range(files):
        rows = [
            dict(zip(EVENT_SCHEMA.names, (u, n, minute * MINUTE, a, s), strict=True))
            for u, n, minute, a, s in events[number::files]
        ]
        plain = pa.schema([pa.field(f.name, pa.int64()) if f.name == "timestamp" else f for f in EVENT_SCHEMA])
        paths.append(directory / f"{number}.parquet")
        pq.write_table(
            pa.Table.from_pylist(rows, schema=plain).cast(EVENT_SCHEMA),
            paths[-1],
            row_group_size=max(7, len(events) // 9),
        )
    return event_log.list_row_groups(paths)


def read(
    events: list[Event], actions=("click",), files=1, partitions=1, direction=1, keys=KEYS
) -> tuple[list[Histories], pa.Table]:
    with TemporaryDirectory() as directory:
        units = event_log.plan_units(write_events(Path(directory), events, files), -(1 << 62), 1 << 62)
        units_read = [positive_events(unit, NOTES, actions, partitions) for unit in units]
    grouped = [group_events((b[part] for b, _, _ in units_read), keys, partitions)[0] for part in range(partitions)]
    parts = [build_histories((batches[part] for batches in grouped), keys, direction) for part in range(partitions)]
    return parts, pa.concat_tables([bad for _, bad, _ in units_read])


def as_dict(parts: list[Histories]) -> dict[str, list[tuple[str, int, str | None]]]:
    found = {}
    for part in parts:
        for row in sequence_table(part, NOTES).to_pylist():
            minutes = [int(time.timestamp()) // 60 for time in row["timestamps"]]
            found[row["user_id"]] = list(zip(row["note_ids"], minutes, row["session_ids"], strict=True))
    return found


def twin(events: list[Event], actions: tuple[str, ...], direction: int) -> dict[str, list[tuple[str, int, str | None]]]:
    """First positive event of each note, in time's order, at one time in the order of rows; of equal events the first
    that names a session."""
    first: dict[str, dict[str, tuple]] = defaultdict(dict)
    for row, (user, note, minute, action, session) in enumerate(events):
        if action in actions and note in NOTES.to_pylist():
            new = (minute, session is None, row, session)
            first[user][note] = min(first[user].get(note, new), new)
    return {
        user: [
            (note, minute, session)
            for note, (minute, _, _, session) in sorted(
                notes.items(), key=lambda item: (item[1][0], item[1][2] * direction)
            )
        ]
        for user, notes in first.items()
    }


@st.composite
def logs(draw) -> list[Event]:
    """Few users, notes and times, so that repeats and ties are frequent; n9 is an unknown note."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    count, users, minutes = draw(st.integers(1, 60)), draw(st.integers(1, 6)), draw(st.integers(1, 300))
    sessions = [None, "s1", "s2", "会话"] if draw(st.booleans()) else [None]
    return [
        (
            f"用户{rng.integers(users)}",
            f"n{rng.integers(10)}",
            int(rng.integers(minutes)),
            str(rng.choice(["click", "like", "view"], p=[0.6, 0.2, 0.2])),
            sessions[rng.integers(len(sessions))],
        )
        for _ in range(count)
    ]


@settings(max_examples=50, deadline=None)
@given(
    logs(),
    st.integers(1, 3),
    st.sampled_from([1, 2, 5]),
    st.sampled_from([("click",), ("click", "like")]),
    st.sampled_from([1, -1]),
)
def test_equals_the_plain_twin(events, files, partitions, actions, direction):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(event_log, "UNIT_EVENTS", 11)
        parts, bad = read(events, actions, files, partitions, direction)
    in_files = [event for number in range(files) for event in events[number::files]]
    assert as_dict(parts) == twin(in_files, actions, direction)
    unknown = [(user, note) for user, note, _, action, _ in events if action in actions and note == "n9"]
    assert sorted(bad["key"].to_pylist()) == sorted(user for user, _ in unknown)
    assert all(reason.startswith("unknown note: 'n9'") for reason in bad["reason"].to_pylist())


@settings(max_examples=25, deadline=None)
@given(logs(), st.randoms(use_true_random=False))
def test_neither_parts_nor_the_order_of_events_nor_names_change_anything(events, random):
    events = [(*event[:4], None) for event in events]
    (whole,), _ = read(events, direction=0)
    names = dict(zip(NOTES.to_pylist(), NOTES.to_pylist()[::-1], strict=True)) | {"n9": "n9"}
    other = [("another " + user, names[note], *more) for user, note, *more in events]
    random.shuffle(other)
    parts, _ = read(other + other[::3], files=2, partitions=4, direction=0, keys=KEYS[::-1])
    found = {user: [(names[note], *more) for note, *more in rows] for user, rows in as_dict(parts).items()}
    assert found == {"another " + user: rows for user, rows in as_dict([whole]).items()}
    keys = np.concatenate([part.keys for part in parts])
    assert keys.tolist() == whole.keys.tolist()


def test_the_order_of_rows_counts_where_it_is_that_of_time():
    events = [(f"u{number // 9}", f"n{number % 9}", number, "click", None) for number in range(27)]
    late = [*events[:5], events[20], *events[5:]]
    for rows, expected in ((events, 1), (events[::-1], -1), (events[::2] + events[1::2], 0), (late, 0)):
        with TemporaryDirectory() as directory:
            units = event_log.plan_units(write_events(Path(directory), rows, 1), -(1 << 62), 1 << 62)
            batches = [positive_events(unit, NOTES, ("click",), 1)[0][0] for unit in units]
        assert log_direction(group_events(batches, KEYS, 1)[1]) == expected


def test_a_user_keeps_the_key_while_the_log_grows():
    events = [("u", f"n{number}", number, "click", None) for number in range(9)]
    keys = [read(events[:count])[0][0].keys[0] for count in (4, 5, 9)]
    assert keys[0] != keys[1] == keys[2]


def twin_blocks(rows, knobs: SequenceSettings) -> list[list[str]]:
    """Blocks of all rows except the last, built one event at a time."""
    blocks: list[list[str]] = []
    for number, (note, minute, session) in enumerate(rows[:-1]):
        full = blocks and len(blocks[-1]) == knobs.block_size
        cut = False
        if knobs.blocks_by == "session" and number:
            _, before, last = rows[number - 1]
            both = session is not None and last is not None
            cut = session != last if both else minute - before > knobs.session_gap_minutes
        if not blocks or full or cut:
            blocks.append([])
        blocks[-1].append(note)
    return blocks


@settings(max_examples=50, deadline=None)
@given(logs(), st.sampled_from(["size", "session"]), st.integers(1, 4), st.sampled_from([0.5, 10.0, 60.0]))
def test_blocks_equal_the_plain_twin(events, blocks_by, size, gap):
    knobs = SequenceSettings(blocks_by=blocks_by, block_size=size, session_gap_minutes=gap)
    (histories,), _ = read(events)
    table = block_table(histories, histories.block_numbers(BlockRule.from_settings(knobs)), NOTES)
    assert table.schema == BLOCK_SCHEMA
    rows = table.to_pylist()
    found = {user: [row["note_ids"] for row in group] for user, group in groupby(rows, lambda row: row["user_id"])}
    expected = {user: twin_blocks(rows, knobs) for user, rows in as_dict([histories]).items()}
    assert found == {user: blocks for user, blocks in expected.items() if blocks}
    for _, group in groupby(rows, lambda row: row["user_id"]):
        numbers = [row["block"] for row in group]
        assert numbers == list(range(len(numbers)))


def test_one_event_and_thousands():
    events = [("busy", f"n{i % 9}", i, "click", None) for i in range(5000)] + [("new", "n3", 7, "click", None)]
    (histories,), _ = read(events)
    assert {user: len(rows) for user, rows in as_dict([histories]).items()} == {"busy": 9, "new": 1}
    assert as_dict([histories.last(2)])["busy"] == [("n7", 7, None), ("n8", 8, None)]
    blocks = block_table(histories, histories.block_numbers(BlockRule()), NOTES)
    assert set(blocks["user_id"].to_pylist()) == {"busy"}


def test_no_positive_event_makes_empty_tables():
    (histories,), _ = read([("u", "n1", 1, "view", None)])
    assert sequence_table(histories, NOTES).equals(SEQUENCE_SCHEMA.empty_table())
    assert not block_table(histories, histories.block_numbers(BlockRule()), NOTES).num_rows


@settings(max_examples=40, deadline=None)
@given(logs(), st.integers(1, 4), st.integers(1, 3), st.sampled_from([1, 3]))
def test_k_core_equals_filtering_again_and_again(events, min_user, min_note, partitions):
    parts, _ = read(events, partitions=partitions)
    alive = k_core(lambda: parts, len(NOTES), min_user, min_note)
    pairs = {(user, row[0]) for user, rows in as_dict(parts).items() for row in rows}
    while True:
        users = [user for user, _ in pairs]
        left = {(u, n) for u, n in pairs if users.count(u) >= min_user}
        notes = [note for _, note in left]
        left = {(u, n) for u, n in left if notes.count(n) >= min_note}
        if left == pairs:
            break
        pairs = left
    inside = as_dict([within_core(part, alive, min_user) for part in parts])
    assert {(user, row[0]) for user, rows in inside.items() for row in rows} == pairs
