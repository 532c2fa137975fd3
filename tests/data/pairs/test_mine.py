"""Mining on a small prepared log: the files it writes, no leaks between the sides, and its errors."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.note_store import NoteStore
from notellm2_ray.core.schema import EVENT_SCHEMA, NOTE_SCHEMA, PAIR_SCHEMA
from notellm2_ray.core.settings import PairSettings, SplitSettings
from notellm2_ray.data.pairs.mine import mine
from notellm2_ray.data.pairs.statistics import count_words, describe_notes, format_statistics

START = datetime(2024, 3, 1, tzinfo=UTC)
DAYS, NUM_NOTES, NUM_USERS = 21, 150, 60
BOUNDARY = START + timedelta(days=14)
BY_TIME = SplitSettings(test_share=1 / 3)


def make_events() -> list[dict]:
    """Users see notes of their own taste (the note's number modulo 5) that exist by then, and click half of them."""
    rng = np.random.default_rng(5)
    events = []
    for user in range(NUM_USERS):
        for hour in sorted(rng.uniform(0, DAYS * 24, size=60)):
            born = int(hour / 24 / DAYS * (NUM_NOTES - 6)) + 1
            note = (int(rng.integers(born)) // 5 * 5 + user) % (born + 5)
            event = {"user_id": f"u{user}", "note_id": f"n{note:03}", "timestamp": START + timedelta(hours=hour)}
            events.append({**event, "action": "click" if rng.random() < 0.5 else "view", "session_id": None})
    # The first and the last event alone decide the span of the log, and so the boundary.
    events[0]["timestamp"], events[-1]["timestamp"] = START, START + timedelta(days=DAYS)
    return events


def make_notes() -> list[dict]:
    return [
        {
            "note_id": f"n{number:03}",
            "title": "two words",
            "topics": ["one", "two of them"],
            "content": f"three words {number}",
            "image": bytes([number]),
            "created_at": START + timedelta(days=DAYS * (number - 6) / (NUM_NOTES - 6)),
        }
        for number in range(NUM_NOTES)
    ]


def prepare(directory: Path, events: list[dict], notes: list[dict]) -> Path:
    for name, rows, schema in (("events", events, EVENT_SCHEMA), ("notes", notes, NOTE_SCHEMA)):
        (directory / name).mkdir(parents=True)
        for part in range(2):
            table = pa.Table.from_pylist(rows[part::2], schema=schema)
            pq.write_table(table, directory / name / f"{part}.parquet", row_group_size=500)
    return directory


def run(directory: Path, events=None, notes=None, *, knobs=None, split=BY_TIME, seed=7) -> tuple[dict, Path]:
    events = make_events() if events is None else events
    prepared = prepare(directory / "prepared", events, make_notes() if notes is None else notes)
    (output := directory / "pairs").mkdir()
    return mine(prepared, output, knobs or PairSettings(), split, seed), output


def read(output: Path, *names: str) -> list[dict]:
    return [row for name in names for row in pq.read_table(output / f"{name}.parquet").to_pylist()]


def ids(pairs: list[dict]) -> set[str]:
    return {pair[end] for pair in pairs for end in ("query_id", "target_id")}


def test_by_time_writes_everything_that_later_steps_read(tmp_path):
    counts, output = run(tmp_path)
    train, valid, test = (pq.read_table(output / f"{name}.parquet") for name in ("train", "valid", "test"))
    assert train.schema == valid.schema == test.schema == PAIR_SCHEMA
    assert valid.num_rows == round(0.1 * (train.num_rows + valid.num_rows)) > 0
    assert counts["train_pairs"] == train.num_rows
    assert counts["test_pairs"] == test.num_rows > 0
    assert counts["boundary"] == "2024-03-15T00:00:00.000000"

    created = {note["note_id"]: note["created_at"] for note in make_notes()}
    trained, pool = ids(read(output, "train", "valid")), {row["note_id"] for row in read(output, "test_pool")}
    assert pool == {note for note, when in created.items() if when >= BOUNDARY}
    assert ids(read(output, "test")) <= pool
    assert not trained & pool

    store = NoteStore(output / "train_notes.arrow")
    assert set(store.ids) == trained
    assert store.get(["n010"])[0].image == bytes([10])
    clicks = {row["note_id"]: row for row in read(output, "popularity")}
    late = [e for e in make_events() if e["timestamp"] >= BOUNDARY and e["action"] == "click"]
    users = {e["user_id"] for e in late if e["note_id"] == "n140"}
    assert clicks["n140"] == {"note_id": "n140", "clicks": len(users), "optimistic": True, "train_clicks": 0}
    assert len(clicks) == NUM_NOTES
    assert not clicks["n010"]["optimistic"]
    statistics = json.loads((output / "statistics.json").read_text())
    assert statistics["training"]["num_pairs"] == train.num_rows + valid.num_rows
    assert statistics["testing"]["num_notes"] == len(pool)
    assert not list(output.glob(".*"))


def test_with_older_notes_in_the_pool_training_still_knows_nothing_of_the_test_log(tmp_path):
    everything = SplitSettings(test_share=1 / 3, test_notes="all")
    _, output = run(tmp_path / "all", split=everything)
    _, new = run(tmp_path / "new")
    assert len(read(output, "test_pool")) == NUM_NOTES
    assert read(output, "train", "valid") == read(new, "train", "valid")
    assert {pair["query_id"] for pair in read(output, "test")} - {row["note_id"] for row in read(new, "test_pool")}
    window = json.loads((output / "train_log.json").read_text())
    assert window["end"] == int(BOUNDARY.timestamp() * 1e6)
    early = [e for e in make_events() if e["timestamp"] < BOUNDARY and e["action"] == "click"]
    users = {e["user_id"] for e in early if e["note_id"] == "n010"}
    counted = {row["note_id"]: row for row in read(output, "popularity")}
    assert counted["n010"]["train_clicks"] == len(users) > 0
    assert counted["n140"]["train_clicks"] == 0
    with pytest.raises(ValueError, match=r"test_notes=all needs split\.by=time"):
        SplitSettings(by="notes", test_notes="all")


def test_nothing_after_the_boundary_reaches_a_training_score(tmp_path):
    events = make_events()
    _, whole = run(tmp_path / "whole", events)
    # Every event of the test period is another now, except the last, which decides the span.
    other = [
        {**e, "user_id": f"u{i % 7}", "action": "click"} if BOUNDARY <= e["timestamp"] < events[-1]["timestamp"] else e
        for i, e in enumerate(events)
    ]
    _, changed = run(tmp_path / "changed", other)
    assert read(changed, "train", "valid") == read(whole, "train", "valid")
    assert read(changed, "test") != read(whole, "test")


def test_by_notes_no_event_on_a_held_out_note_reaches_a_training_score(tmp_path):
    knobs, split = PairSettings(window_days=None), SplitSettings(by="notes", test_share=0.4)
    notes = [{**note, "created_at": None} for note in make_notes()]
    _, output = run(tmp_path / "whole", notes=notes, knobs=knobs, split=split)
    pool = {row["note_id"] for row in read(output, "test_pool")}
    assert ids(read(output, "test")) <= pool
    assert not ids(read(output, "train", "valid")) & pool
    events = make_events()
    without = [e for e in events if e["note_id"] not in pool or e["user_id"] in ("u0", "u1", "u2")]
    _, reduced = run(tmp_path / "reduced", without, notes, knobs=knobs, split=split)
    assert read(reduced, "train", "valid") == read(output, "train", "valid")


def test_the_seed_decides(tmp_path):
    results = [read(run(tmp_path / str(i), seed=seed)[1], "valid") for i, seed in enumerate((1, 1, 2))]
    assert results[0] == results[1] != results[2]


def test_files_of_a_killed_run_are_removed(tmp_path):
    stale = tmp_path / "pairs" / ".mine-abc" / "train"
    prepared = prepare(tmp_path / "prepared", make_events(), make_notes())
    stale.mkdir(parents=True)
    (stale / "unit-0.arrow").write_bytes(b"half of it")
    mine(prepared, tmp_path / "pairs", PairSettings(), BY_TIME, 7)
    assert not list((tmp_path / "pairs").glob(".*"))


def test_few_test_pairs_give_a_warning_and_none_an_error(tmp_path, caplog):
    events = [e for e in make_events() if e["timestamp"] < BOUNDARY or e["user_id"] in ("u0", "u59")]
    with caplog.at_level(logging.WARNING, logger="notellm2_ray"):
        counts, _ = run(tmp_path / "few", events)
    assert f"only {counts['test_pairs']} test pairs" in caplog.text
    events = [e for e in make_events() if e["timestamp"] < BOUNDARY] + make_events()[-1:]
    events[-1]["action"] = "click"
    with pytest.raises(DataError, match="test pairs: no user viewed"):
        run(tmp_path / "none", events)


def test_empty_inputs_say_what_to_give(tmp_path):
    with pytest.raises(DataError, match="events table is empty"):
        run(tmp_path / "events", [])
    with pytest.raises(DataError, match="notes table is empty"):
        run(tmp_path / "notes", notes=[])
    with pytest.raises(DataError, match="holds no Parquet file: run prepare first"):
        mine(tmp_path, tmp_path, PairSettings(), BY_TIME, 1)


def test_table_1_by_hand():
    rows = [
        {"title": "a red chair", "topics": ["home", "deep red"], "content": ""},
        {"title": "红色的椅子", "topics": ["家居"], "content": "很 好 看 OK"},
    ]
    column = describe_notes([pa.RecordBatch.from_pylist(rows)], num_pairs=1234)
    assert column == {
        "num_notes": 2,
        "num_pairs": 1234,
        "words_per_title": 4.0,
        "topics_per_note": 1.5,
        "words_per_topic": pytest.approx(5 / 3),
        "words_per_content": 2.5,
    }
    lines = format_statistics({"training": column, "testing": describe_notes([], 0)}).splitlines()
    assert lines[2].split() == ["#", "note", "pairs", "1,234", "0"]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [("", 0), ("naïve café", 2), ("我爱 café", 2), ("我爱北京啊 café", 9), ("ひらがな", 4), ("한국어 말", 2)],
)
def test_words_are_characters_where_the_text_is_mostly_chinese_or_japanese(text, words):
    assert count_words(text) == words
