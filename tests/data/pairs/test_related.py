"""Mined pairs equal a plain version of Eq. 2, however the log is cut."""

from __future__ import annotations

from collections import defaultdict
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.schema import EVENT_SCHEMA, PAIR_SCHEMA
from notellm2_ray.core.settings import PairSettings
from notellm2_ray.data import event_log
from notellm2_ray.data.arrays import mix
from notellm2_ray.data.pairs import cooccurrence
from notellm2_ray.data.pairs import related as pairs

HOUR = 3_600_000_000
KEYS = mix(np.arange(100, dtype=np.uint64) + np.uint64(5))  # of the notes, in the order of their ids
ALL = {"window_days": None, "lower": 0.0, "upper": 1e9, "top": 1000}
Event = tuple[str, str, int, str]  # user, note, hour, action


def brute_force(events: list[Event], knobs: PairSettings, start: int, end: int, pairable: set[str]) -> dict:
    """Eq. 2, the bounds and the top t, straight from the text of the paper; hours instead of microseconds."""
    all_notes = {note for _, note, _, _ in events}
    events = [event for event in events if start <= event[2] < end]
    views = [event for event in events if event[3] in knobs.view_actions]
    clicks = [event for event in events if event[3] in knobs.click_actions]
    clicked = {user: {note for who, note, _, _ in clicks if who == user} for user, *_ in clicks}
    gap = float("inf") if knobs.max_gap_hours is None else knobs.max_gap_hours
    users = defaultdict(set)
    for user, a, viewed_at, _ in views:
        for other, b, clicked_at, _ in clicks:
            if user == other and a != b and 0 < clicked_at - viewed_at <= gap and {a, b} <= pairable:
                users[a, b].add(user)
    scores = {pair: sum(Fraction(1, len(clicked[user])) for user in who) for pair, who in users.items()}
    kept = {pair: score for pair, score in scores.items() if knobs.lower <= score <= knobs.upper}
    related = defaultdict(list)
    for (a, b), score in kept.items():
        related[a].append((-score, b))
    place = {note: number for number, note in enumerate(sorted(all_notes))}
    return {
        (a, b): float(-score)
        for a, found in related.items()
        for score, b in sorted(found, key=lambda one: (one[0], tie_number(place[a], place[one[1]])))[: knobs.top]
    }


def tie_number(query: int, target: int) -> int:
    (number,) = cooccurrence.tie_order(KEYS[[query]], KEYS[[target]])
    return int(number)


def write_events(directory: Path, events: list[Event], files: int = 1) -> list[event_log.RowGroup]:
    paths = []
    for number in range(files):
        part = events[number::files]
        columns = list(zip(*part, strict=True)) if part else [(), (), (), ()]
        table = pa.table(
            {
                "user_id": pa.array(columns[0], pa.string()),
                "note_id": pa.array(columns[1], pa.string()),
                "timestamp": pa.array([hour * HOUR for hour in columns[2]], pa.int64()).cast(pa.timestamp("us", "UTC")),
                "action": pa.array(columns[3], pa.string()),
                "session_id": pa.nulls(len(part), pa.string()),
            },
            schema=EVENT_SCHEMA,
        )
        paths.append(directory / f"events-{number}.parquet")
        pq.write_table(table, paths[-1], row_group_size=7)
    return event_log.list_row_groups(paths)


def mine(events: list[Event], knobs: PairSettings, *, files=1, start=0, end=10**6, pairable=None, **more) -> dict:
    notes = sorted({note for _, note, _, _ in events})
    mask = None if pairable is None else np.array([note in pairable for note in notes])
    with TemporaryDirectory() as directory:
        (scratch := Path(directory, "scratch")).mkdir()
        mined = pairs.mine_pairs(
            write_events(Path(directory), events, files),
            pa.array(notes),
            KEYS[: len(notes)],
            knobs,
            start=start * HOUR,
            end=end * HOUR,
            scratch=scratch,
            pairable=mask,
            **more,
        )
    table = mined.pairs
    assert table.schema == PAIR_SCHEMA
    rows = table.to_pylist()
    order = [(row["query_id"], -row["score"]) for row in rows]
    assert order == sorted(order)
    return {(row["query_id"], row["target_id"]): row["score"] for row in rows}


@st.composite
def dense_logs(draw) -> list[Event]:
    """Logs in which few users meet few notes again and again: ties, repeats and clicks before views are frequent."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    count, users, notes = draw(st.integers(10, 80)), draw(st.integers(1, 5)), draw(st.integers(2, 8))
    hours = draw(st.integers(2, 16))
    actions = rng.choice(["view", "click", "share"], size=count, p=[0.55, 0.4, 0.05])
    who, what, when = (rng.integers(top, size=count) for top in (users, notes, hours))
    return [(f"用户{u}", f"n{n}", int(t), str(a)) for u, n, t, a in zip(who, what, when, actions, strict=True)]


knobs_of_any = st.builds(
    PairSettings,
    view_actions=st.sampled_from([("view", "click"), ("view",)]),
    window_days=st.none(),
    max_gap_hours=st.sampled_from([None, None, 1.0, 3.0]),
    lower=st.sampled_from([0.0, 0.0, 0.25, 0.5]),
    upper=st.sampled_from([0.75, 1.0, 30.0]),
    top=st.sampled_from([1, 2, 3, 9]),
    partitions=st.sampled_from([1, 3]),
)


@settings(max_examples=200, deadline=None)
@given(dense_logs(), knobs_of_any, st.integers(1, 3), st.integers(0, 3), st.integers(8, 16), st.booleans())
def test_equals_brute_force(events, knobs, files, start, end, some_only):
    notes = {note for _, note, _, _ in events}
    pairable = {note for note in notes if note != "n3"}
    more = {"files": files, "start": start, "end": end, "pairable": pairable if some_only else None}
    expected = brute_force(events, knobs, start, end, pairable if some_only else notes)
    with pytest.MonkeyPatch.context() as patch:  # so small that every loop over chunks, units and ranges is repeated
        patch.setattr(cooccurrence, "CHUNK_PAIRS", 5)
        patch.setattr(event_log, "UNIT_EVENTS", 9)
        patch.setattr(pairs, "MERGE_SUMS", 4)
        try:
            mined = mine(events, knobs, in_process=True, **more)
        except DataError:
            assert not expected
        else:
            assert mined == pytest.approx(expected, abs=1e-7)


def test_each_rule_of_eq_2_by_hand():
    events = [
        ("u", "a", 1, "view"),
        ("u", "b", 1, "click"),  # at the same time as the view of a, so not after it
        ("u", "c", 2, "click"),
        ("u", "c", 3, "click"),  # a second click of c is not counted
        ("u", "a", 4, "click"),  # a click on the viewed note itself is not a pair
        ("w", "a", 1, "view"),
        ("w", "c", 5, "click"),
    ]
    knobs = PairSettings(view_actions=("view",), **ALL)
    assert mine(events, knobs) == pytest.approx({("a", "c"): 1 / 3 + 1})  # N_u = {b, c, a}, N_w = {c}
    within = knobs.model_copy(update={"max_gap_hours": 3.0})
    assert mine(events, within) == pytest.approx({("a", "c"): 1 / 3})


def test_clicks_on_notes_outside_the_pool_count_in_n_u():
    events = [("u", "a", 1, "view"), ("u", "b", 2, "click"), ("u", "old", 3, "click")]
    assert mine(events, PairSettings(**ALL), pairable={"a", "b"}) == pytest.approx({("a", "b"): 0.5})


def test_no_note_gains_from_its_name_among_ties_and_they_are_counted(caplog):
    events = [
        (f"u{u}", note, hour, action)
        for u in range(60)
        for hour, note, action in ((0, f"q{u:02}", "view"), (1, "a", "click"), (2, "b", "click"), (3, "c", "click"))
    ]
    with caplog.at_level("WARNING", logger="notellm2_ray"):
        kept = mine(events, PairSettings(view_actions=("view",), window_days=None, top=1))
    counts = [sum(target == name for _, target in kept) for name in "abc"]
    assert sum(counts) == 60 and min(counts) > 10  # 20 each, by chance
    assert "queries whose top 1 end between equal scores, so that chance decides: 60 of 60 (100.0%)" in caplog.text


def test_ray_data_and_one_process_give_the_same_table(ray_cluster):
    events = random_log(3000, users=40, notes=60)
    knobs = PairSettings(window_days=None, top=3)
    assert mine(events, knobs.model_copy(update={"partitions": 3}), files=2) == mine(events, knobs)


def test_one_user_with_a_huge_history_is_expanded_in_pieces(monkeypatch):
    monkeypatch.setattr(cooccurrence, "CHUNK_PAIRS", 10_000)
    count = 3000
    notes = np.arange(count)
    log = cooccurrence.Log(np.zeros(count, np.int64), notes, notes, np.ones(count, bool), notes % 2 == 1)
    pieces = list(cooccurrence.accumulate(log, count, scale=1 << 40))
    assert max(len(piece.sums) for piece in pieces) <= 10_000
    assert sum(len(piece.sums) for piece in pieces) == sum(count // 2 - (i + 1) // 2 for i in range(count))


def test_sums_of_a_billion_events_cannot_overflow():
    for events in (1, 10**6, 10**9, 10**15):
        assert events * cooccurrence.fixed_point_scale(events) < 2**63


@pytest.mark.parametrize(
    ("events", "knobs", "words"),
    [
        ([("u", "a", 1, "seen")], {}, ["pairs.click_actions", "seen (1)"]),
        ([("u", "a", 1, "click")], {"view_actions": ("look",)}, ["pairs.view_actions", "click (1)"]),
        ([("u", "a", 1, "view"), ("u", "b", 2, "click")], {"lower": 2.0}, ["1 are below pairs.lower=2.0", "0 above"]),
        ([("u", "a", 3, "view"), ("u", "b", 2, "click")], {}, ["no user viewed", "1 clicks"]),
        ([("u", "a", 3_000_000, "view")], {}, ["pairs.window_days"]),
    ],
)
def test_an_error_names_the_setting(events, knobs, words):
    with pytest.raises(DataError) as error:
        mine(events, PairSettings(**{"window_days": None, **knobs}))
    assert all(word in str(error.value) for word in words), error.value


def random_log(count: int, users: int, notes: int) -> list[Event]:
    rng = np.random.default_rng(0)
    who, when = rng.integers(users, size=count), rng.integers(500, size=count)
    what = (notes * rng.random(count) ** 2).astype(int)
    action = np.where(rng.random(count) < 0.3, "click", "view")
    return [(f"u{u}", f"n{n}", int(t), str(a)) for u, n, t, a in zip(who, what, when, action, strict=True)]
