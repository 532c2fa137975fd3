"""The users' database: no acknowledged write is lost or doubled, and closed blocks stay closed."""

import asyncio
import itertools
import os
import sqlite3
import threading
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from notellm2_ray.core.errors import DataError, OutputError
from notellm2_ray.core.history_blocks import MINUTE, BlockRule
from notellm2_ray.core.schema import BLOCK_SCHEMA, PREFERENCE_SCHEMA, SEQUENCE_SCHEMA
from notellm2_ray.users import blocks as user_blocks
from notellm2_ray.users.exposures import Exposure, clicks_by_arm
from notellm2_ray.users.rows import PendingBlock, UserEvent, micros, moment
from notellm2_ray.users.seed import seed_events, seed_users
from notellm2_ray.users.store import UserStore
from tests.support import writers

START = datetime(2024, 5, 1, tzinfo=UTC)


def event(note: str, minute: float, user: str = "u", **fields) -> UserEvent:
    return UserEvent(user, note, START + timedelta(minutes=minute), fields.pop("action", "click"), **fields)


@pytest.fixture
def users(tmp_path):
    with UserStore(tmp_path / "users.sqlite") as store:
        yield store


def pending_of(store: UserStore, user: str = "u") -> PendingBlock | None:
    return next((block for block in store.pending() if block.user_id == user), None)


def summarise(store: UserStore, user: str = "u", text: str = "") -> str:
    pending = pending_of(store, user)
    return store.save_preference(user, pending.block, pending.fingerprint, text or f"taste {pending.block}")


def test_an_event_is_kept_once(users):
    assert users.add_events([event("a", 0), event("a", 0), event("b", 1, action="view")]) == [
        "added",
        "duplicate",
        "added",
    ]
    assert users.add_events([event("a", 0)]) == ["duplicate"]
    assert users.add_events([event("a", 5)]) == ["added"]  # a new event, but the note was liked before
    assert users.add_events([event("c", 5, event_id="x"), event("d", 6, event_id="x")]) == ["added", "duplicate"]
    assert users.history("u").waiting == ["a", "c"]
    assert users.liked("u") == ["c", "a"]
    assert users.seen("u") == ["a", "c", "b"] or set(users.seen("u")) == {"a", "b", "c"}
    assert users.info() == {"events": 4, "preferences": 0, "waiting": 1, "users": 1}


def test_blocks_follow_time_then_arrival_and_need_the_preference_before(users):
    users.add_events([event("c", 3), event("a", 1)])
    assert users.pending() == []
    users.add_events([event("b1", 2), event("b2", 2), event("d", 9), event("e", 8)])
    first = pending_of(users)
    assert (first.block, first.note_ids, first.previous) == (0, ["a", "b1", "b2"], None)
    assert users.pending() == [first]
    assert users.save_preference("u", 0, first.fingerprint, "one") == "saved"
    assert users.save_preference("u", 0, first.fingerprint, "again") == "duplicate"
    second = pending_of(users)
    assert (second.block, second.note_ids, second.previous) == (1, ["c", "e", "d"], "one")
    assert users.save_preference("u", 0, second.fingerprint, "x") == "stale"
    assert users.save_preference("u", 2, second.fingerprint, "x") == "stale"
    assert users.save_preference("u", 1, first.fingerprint, "x") == "stale"
    assert users.save_preference("nobody", 0, first.fingerprint, "x") == "stale"
    assert summarise(users, text="two") == "saved"
    assert users.preference("u") == (1, "two")
    assert users.pending() == []
    history = users.history("u")
    assert [(block.block, block.note_ids, block.preference) for block in history.blocks] == [
        (0, ["a", "b1", "b2"], "one"),
        (1, ["c", "e", "d"], "two"),
    ]


def test_an_empty_preference_does_not_stop_the_chain(users):
    users.add_events([event(note, minute) for minute, note in enumerate("abcdef")])
    first = pending_of(users)
    assert users.save_preference("u", 0, first.fingerprint, "") == "saved"
    assert users.preference("u") == (0, "")
    second = pending_of(users)
    assert (second.block, second.note_ids, second.previous) == (1, ["d", "e", "f"], "")
    assert summarise(users, text="two") == "saved" and users.pending() == []


@pytest.mark.parametrize(
    ("before", "after", "due"),
    [
        (BlockRule(5), BlockRule(2), ["a", "b"]),
        (BlockRule(2), BlockRule(5), None),
        (BlockRule(5), BlockRule(5, 60 * MINUTE), ["a", "b", "c"]),
    ],
)
def test_a_new_rule_applies_to_waiting_notes(tmp_path, before, after, due):
    with UserStore(tmp_path / "u.sqlite", rule=before) as users:
        users.add_events([event(note, minute) for note, minute in zip("abcd", (0, 1, 2, 100), strict=True)])
    now = START + timedelta(minutes=101)
    for _ in range(2):
        with UserStore(tmp_path / "u.sqlite", rule=after) as users:
            assert [block.note_ids for block in users.pending(at=now)] == ([due] if due else [])
    with UserStore(tmp_path / "u.sqlite", rule=before) as users:
        assert bool(users.pending(at=now)) == (before.size == 2)


def test_waiting_users_are_judged_again_only_after_the_rule_changed(tmp_path, monkeypatch):
    judged = []
    with UserStore(tmp_path / "u.sqlite") as users:
        users.add_events([event("a", 0)])
    monkeypatch.setattr(user_blocks, "note_waiting", lambda *values: judged.append(values))
    UserStore(tmp_path / "u.sqlite").close()
    assert not judged
    UserStore(tmp_path / "u.sqlite", rule=BlockRule(2)).close()
    assert len(judged) == 1


def test_a_late_event_goes_to_the_next_block_and_a_changed_block_is_stale(users):
    users.add_events([event(note, minute) for minute, note in enumerate("abc")])
    summarise(users)
    assert users.add_events([event("late", 0.5), event("new", 7)]) == ["late", "added"]
    assert users.add_events([event("a", -5)]) == ["late"]  # the note's block is closed and does not change
    users.add_events([event("d", 8)])
    before = pending_of(users)
    assert before.note_ids == ["late", "new", "d"]
    users.add_events([event("later", 6)])
    assert users.save_preference("u", 1, before.fingerprint, "of other notes") == "stale"
    assert pending_of(users).note_ids == ["late", "later", "new"]
    assert summarise(users) == "saved"
    assert [block.note_ids for block in users.history("u").blocks] == [["a", "b", "c"], ["late", "later", "new"]]
    assert users.history("u").waiting == ["d"]


def test_a_pause_ends_a_block_too(tmp_path):
    with UserStore(tmp_path / "u.sqlite", rule=BlockRule(session_gap=60 * MINUTE)) as users:
        users.add_events([event("a", 0), event("b", 50)])
        assert users.pending(at=START + timedelta(minutes=100)) == []
        due = users.pending(at=START + timedelta(minutes=111))
        assert [block.note_ids for block in due] == [["a", "b"]]
        users.add_events([event("c", 300), event("d", 310, session_id="s1"), event("e", 311, session_id="s2")])
        assert users.pending(at=START + timedelta(minutes=312)) == due
        assert summarise(users) == "saved"
        assert users.pending(at=START + timedelta(minutes=312))[0].note_ids == ["c", "d"]
        assert summarise(users) == "saved"
        assert users.pending(at=START + timedelta(minutes=312)) == []
        assert users.pending(at=START + timedelta(minutes=400))[0].note_ids == ["e"]


def test_bad_events_are_refused_and_change_nothing(users):
    for bad, message in [
        (event("", 0), "note_id"),
        (event("a", 0, user=""), "user_id"),
        (event("a", 0, action=""), "action"),
        (event("a", 0, event_id=""), "event_id"),
        (UserEvent("u", "a", datetime(2024, 1, 1), "click"), "time zone"),
    ]:
        with pytest.raises(DataError, match=message):
            users.add_events([event("fine", 0), bad])
    assert users.info()["events"] == 0


def test_one_failed_write_does_not_fail_its_group(tmp_path):
    with UserStore(tmp_path / "u.sqlite", gather_seconds=0.2) as users:
        good = users.submit_events([event("a", 0)])
        bad = users.submit(lambda db: db.execute("INSERT INTO events (event_id) VALUES ('half')") and 1 / 0)
        also = users.submit_events([event("b", 0)])
        assert (good.result(), also.result()) == (["added"], ["added"])
        with pytest.raises(sqlite3.IntegrityError):
            bad.result()
        assert users.info()["events"] == 2
    with pytest.raises(OutputError, match="closed"):
        users.add_events([event("c", 0)])


def test_threads_coroutines_and_a_second_process_write_together(tmp_path):
    async def write(store):
        futures = [asyncio.wrap_future(store.submit_events([event(f"c{n}", n)])) for n in range(50)]
        return await asyncio.gather(*futures)

    with UserStore(tmp_path / "u.sqlite") as one, UserStore(tmp_path / "u.sqlite") as two:
        threads = [threading.Thread(target=two.add_events, args=([event(f"t{n}", n)],)) for n in range(30)]
        for thread in threads:
            thread.start()
        asyncio.run(write(one))
        for thread in threads:
            thread.join()
        assert one.info()["events"] == two.info()["events"] == 80


def test_files_of_another_kind_are_refused(tmp_path):
    (tmp_path / "u.sqlite").write_text("this is not a database, and it is long enough to be looked at" * 9)
    with pytest.raises(OutputError, match="cannot be used"):
        UserStore(tmp_path / "u.sqlite")
    with pytest.raises(OutputError, match="cannot be used"):
        UserStore(tmp_path / "no" / "folder.sqlite")


@settings(max_examples=20, deadline=None)
@given(
    steps=st.lists(
        st.one_of(
            st.lists(st.tuples(st.integers(0, 9), st.integers(0, 30)), min_size=1, max_size=5),
            st.just("summarise"),
        ),
        max_size=12,
    )
)
def test_blocks_equal_a_plain_replay(tmp_path_factory, steps):
    closed: list[list[str]] = []
    liked: dict[str, tuple[int, int]] = {}
    known, arrivals = set(), itertools.count()
    with UserStore(tmp_path_factory.mktemp("users") / "u.sqlite", rule=BlockRule(2), gather_seconds=0) as users:
        for step in steps:
            waiting = sorted((at, note) for note, at in liked.items() if not any(note in block for block in closed))
            if step == "summarise":
                if len(waiting) >= 2:
                    assert summarise(users) == "saved"
                    closed.append([note for _, note in waiting[:2]])
                else:
                    assert pending_of(users) is None
                continue
            users.add_events([event(f"n{note}", minute) for note, minute in step])
            for note, minute in step:
                if (note, minute) in known:
                    continue
                known.add((note, minute))
                at, name = (minute, next(arrivals)), f"n{note}"
                if name not in liked or (at[0] < liked[name][0] and not any(name in block for block in closed)):
                    liked[name] = at
        history = users.history("u")
        waiting = sorted((at, note) for note, at in liked.items() if not any(note in block for block in closed))
        assert [block.note_ids for block in history.blocks] == closed
        assert history.waiting == [note for _, note in waiting]
        assert [block.user_id for block in users.pending()] == (["u"] if len(waiting) >= 2 else [])


def test_clicks_count_by_arm_in_any_order_of_click_and_exposure(users):
    rng = np.random.default_rng(0)
    clicks = {"a": 0, "b": 0}
    for user in range(300):
        arm = "ab"[user % 2]
        shown = [Exposure(f"r{user}", f"u{user}", f"n{n}", n, "ranking", arm, START) for n in range(10)]
        clicked = [n for n in range(10) if rng.random() < (0.1 if arm == "a" else 0.2)]
        events = [event(f"n{n}", user, f"u{user}", request_id=f"r{user}") for n in clicked]
        events += [event("n11", user, f"u{user}", request_id=f"r{user}")]  # was not shown
        events += [event("n5", user + 0.5, f"u{user}", action="view", request_id=f"r{user}")]
        clicks[arm] += len(clicked)
        if user % 3:
            users.submit_events(events)
            assert users.add_exposures(shown) == 10
        else:
            users.add_exposures(shown)
            users.submit_events(events)
        users.submit_exposures(shown)
    assert users.add_exposures(shown) == 0
    users.add_events([event(f"n{n}", 0, "somebody else", request_id=f"r{n}") for n in range(10)])
    with closing(sqlite3.connect(users.path)) as db:
        one, two = clicks_by_arm(db, "ranking", ["click"])
        assert (one.arm, one.requests, one.clicked.sum(), two.clicked.sum()) == ("a", 150, clicks["a"], clicks["b"])
        assert one.shown.tolist() == [10] * 150 and (one.clicked <= 10).all()
        assert clicks_by_arm(db, "another", ["click"]) == []
        assert clicks_by_arm(db, "ranking", ["click"], since=micros(START) + 1) == []
    assert users.popular(1)[0] == "n11"


def test_notes_seen_long_ago_are_still_known(users):
    users.add_events([event(f"n{n}", n, action="view") for n in range(1200)])
    assert "n3" not in users.seen("u", 1000) and users.more_events("u", 1000) and not users.more_events("u", 1200)
    assert users.seen_among("u", ["n3", "n1199", "never"]) == {"n3", "n1199"}
    assert users.seen_among("v", ["n3"]) == set() == users.seen_among("u", [])


def test_skipped_users_do_not_use_up_the_limit(users):
    for number in range(6):
        users.add_events([event(note, number, f"u{number}") for note in "abc"])
    assert [block.user_id for block in users.pending(2, without={"u0", "u1", "u4", "gone"})] == ["u2", "u3"]


def test_an_interrupted_seeding_leaves_no_database_and_can_be_repeated(tmp_path, monkeypatch):
    (tmp_path / "events").mkdir()
    for name in "ab":
        rows = [
            {"user_id": "u", "note_id": f"{name}{n}", "timestamp": START, "action": "click", "session_id": None}
            for n in range(5)
        ]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "events" / f"{name}.parquet")
    path, add, calls = tmp_path / "serving" / "users.sqlite", UserStore.add_events, []

    def cut_short(store, events):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return add(store, events)

    with monkeypatch.context() as patch:
        patch.setattr(UserStore, "add_events", cut_short)
        with pytest.raises(KeyboardInterrupt):
            seed_events(path, tmp_path / "events")
    assert len(calls) == 2 and not path.exists()
    (path.parent / f".{path.name}.seeding").write_bytes(b"what a kill leaves")
    assert seed_events(path, tmp_path / "events") == 10
    assert os.listdir(path.parent) == [path.name]
    with UserStore(path) as users:
        assert len(users.liked("u")) == 10


def write_bulk(folder: Path, sequences, blocks, preferences) -> tuple[Path, Path, Path]:
    tables = {"sequences": (sequences, SEQUENCE_SCHEMA), "blocks": (blocks, BLOCK_SCHEMA)}
    tables["preferences"] = (preferences, PREFERENCE_SCHEMA)
    for name, (rows, schema) in tables.items():
        pq.write_table(pa.Table.from_pylist(rows, schema), folder / f"{name}.parquet")
    return folder / "sequences.parquet", folder / "blocks.parquet", folder / "preferences.parquet"


def test_seeding_closes_the_blocks_that_have_preferences(tmp_path):
    notes = [f"n{n}" for n in range(8)]
    sequences = [
        {
            "user_id": user,
            "note_ids": notes,
            "timestamps": [START + timedelta(minutes=n) for n in range(8)],
            "session_ids": [None] * 8,
        }
        for user in ("u", "v", "w")
    ]
    blocks = [
        {"user_id": user, "block": b, "note_ids": notes[3 * b : min(3 * b + 3, 7)]} for user in "uvw" for b in range(3)
    ]
    tokens = {"prompt_tokens": 1, "generated_tokens": 1}
    there = [("u", 0), ("u", 1), ("u", 2), ("v", 0), ("v", 2)]
    preferences = [{"user_id": user, "block": b, "preference": f"{user}{b}", **tokens} for user, b in there]
    paths = write_bulk(tmp_path, sequences, blocks, preferences)
    path = tmp_path / "serving" / "users.sqlite"
    assert seed_users(path, *paths) == (3, 24, 4)
    assert os.listdir(path.parent) == ["users.sqlite"]
    with pytest.raises(OutputError, match="there already"):
        seed_users(path, *paths)
    with UserStore(path) as users:
        assert [block.preference for block in users.history("u").blocks] == ["u0", "u1", "u2"]
        assert users.history("u").blocks[2].note_ids == ["n6"]
        assert users.history("u").waiting == ["n7"]
        assert users.history("w").blocks == []
        pending = {block.user_id: block for block in users.pending()}
        assert (pending["v"].block, pending["v"].note_ids, pending["v"].previous) == (1, ["n3", "n4", "n5"], "v0")
        assert (pending["w"].block, pending["w"].note_ids) == (0, ["n0", "n1", "n2"])
        assert users.add_events([event("n3", 3)]) == ["duplicate"]
        assert users.add_events([event("x", 9), event("y", 10)]) == ["added", "added"]
        assert pending_of(users).note_ids == ["n7", "x", "y"]
    blocks[0]["note_ids"] = ["other"]
    (tmp_path / "two").mkdir()
    wrong = write_bulk(tmp_path / "two", sequences, blocks, preferences)
    with pytest.raises(DataError, match="'other'"):
        seed_users(tmp_path / "two" / "users.sqlite", *wrong)
    assert not (tmp_path / "two" / "users.sqlite").exists()


@pytest.mark.slow
def test_twenty_kills_lose_and_double_nothing(tmp_path):
    path, log = tmp_path / "users.sqlite", tmp_path / "acknowledged"
    rng = np.random.default_rng(0)
    for kill in range(20):
        process = writers.start_writer(writers.write_events, path, log, kill * 1_000_000)
        time.sleep(rng.uniform(0.0, 0.3))
        process.kill()
        process.join()
        lines = log.read_text().splitlines()
        assert "wrong" not in lines
        with UserStore(path) as users:
            for user in ("u0", "u1", "u2", "u3"):
                numbers = {int(line.split()[2]) for line in lines if line.startswith(f"event {user} ")}
                kept = {f"n{number}" for number in numbers}
                history = users.history(user)
                held = [note for block in history.blocks for note in block.note_ids] + history.waiting
                assert kept <= set(held)
                assert len(held) == len(set(held))
                assert [block.block for block in history.blocks] == list(range(len(history.blocks)))
                assert all(block.preference == " ".join(block.note_ids) for block in history.blocks)
                assert sum(line.startswith(f"block {user} ") for line in lines) <= len(history.blocks)
    assert len(lines) > 1000


def test_times_survive_the_round_trip():
    for when in (START, datetime(1960, 1, 1, microsecond=7, tzinfo=UTC)):
        assert moment(micros(when)) == when
