"""Sides, examples, candidates and popularity: what is written, and what may know what."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.schema import BLOCK_SCHEMA, CANDIDATE_SCHEMA, EXAMPLE_SCHEMA, SEQUENCE_SCHEMA
from notellm2_ray.data import event_log
from notellm2_ray.data.sequences.statistics import format_statistics
from tests.support.sequences import ALL, START, likes, make, make_log, of_examples, prepare, read


def test_every_file_has_its_schema_and_nothing_else_is_left(written):
    schemas = {"sequences": SEQUENCE_SCHEMA, "blocks": BLOCK_SCHEMA, "published_blocks": BLOCK_SCHEMA}
    schemas |= dict.fromkeys(("train", "valid", "test", "published"), EXAMPLE_SCHEMA)
    schemas |= {f"candidates/{name}": CANDIDATE_SCHEMA for name in ("train", "valid", *ALL)}
    for name, schema in schemas.items():
        table = pq.read_table(written / f"{name}.parquet")
        assert table.schema == schema and table.num_rows, name
    more = {"popularity", "published_popularity", "note_ids", "statistics", "candidates", "quarantine"}
    assert {path.stem for path in written.iterdir()} == more | {name for name in schemas if "/" not in name}


def test_targets_are_the_last_event_and_in_training_also_the_first_after_a_block(written):
    known = likes(make_log())
    sequences = {row["user_id"]: row["note_ids"] for row in read(written, "sequences")}
    assert sequences == {user: [note for _, note in rows] for user, rows in known.items()}
    sides = {name: read(written, name) for name in ("train", "valid", "test")}
    users = {name: {row["user_id"] for row in rows} for name, rows in sides.items()}
    assert not users["train"] & users["valid"] and not (users["train"] | users["valid"]) & users["test"]
    with_target = {user for user, notes in sequences.items() if len(notes) > 1}
    assert set().union(*users.values()) == with_target
    assert (len(users["valid"]), len(users["test"])) == (round(0.1 * len(with_target)), round(0.2 * len(with_target)))
    blocks = {(row["user_id"], row["block"]): row["note_ids"] for row in read(written, "blocks")}
    for name, rows in sides.items():
        found: dict[str, list[int]] = {}
        for row in rows:
            user, number = row["user_id"], int(row["example_id"].rpartition("/")[2])
            assert row["example_id"] == f"{user}/{number}"
            assert (row["history_ids"], row["target_id"]) == (sequences[user][:number], sequences[user][number])
            assert row["timestamp"] == START + timedelta(hours=known[user][number][0])
            before = [note for b in range(row["block"] + 1) for note in blocks[user, b]]
            assert before == row["history_ids"]
            found.setdefault(user, []).append(number)
        for user, numbers in found.items():
            last = len(sequences[user]) - 1
            every = [*range(3, last, 3), last] if name == "train" else [last]
            assert numbers == every


def test_candidates_are_the_target_and_notes_that_the_user_never_liked(written):
    liked = {user: {note for _, note in rows} for user, rows in likes(make_log()).items()}
    pool = {row["note_id"] for row in read(written, "note_ids")}
    files = {"train": "train", "valid": "valid", "uniform": "test", "popular": "test", "published": "published"}
    for file, examples in files.items():
        shown = of_examples(read(written, f"candidates/{file}"))
        rows = read(written, examples)
        assert list(shown) == [row["example_id"] for row in rows]  # in the order of the examples
        for row in rows:
            negatives = {note for note, label in shown[row["example_id"]].items() if not label}
            assert len(negatives) == (2 if file == "train" else 5)
            assert negatives <= pool - liked[row["user_id"]]
            assert shown[row["example_id"]].keys() - negatives == {row["target_id"]}
    firsts = [next(iter(labels.values())) for labels in shown.values()]
    assert 0 < sum(firsts) < len(firsts)  # the target's position says nothing


def test_popularity_counts_no_held_out_target(written):
    counts: dict[str, int] = {}
    for rows in likes(make_log()).values():
        for _, note in rows:
            counts[note] = counts.get(note, 0) + 1
    for name, examples in (("popularity", ("valid", "test")), ("published_popularity", ("published",))):
        left = dict(counts)
        for row in (row for example in examples for row in read(written, example)):
            left[row["target_id"]] -= 1
        assert {row["note_id"]: row["clicks"] for row in read(written, name)} == left


def same_files(one: Path, other: Path) -> bool:
    names = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_sides(written, tmp_path):
    more = {"train_targets": "every_block", "num_train_negatives": 2}
    assert same_files(written, make(tmp_path / "again", make_log(), **more))
    assert not same_files(written, make(tmp_path / "other", make_log(), seed=8, **more))


@pytest.mark.slow
def test_parts_on_ray_give_the_same_bytes(written, tmp_path, ray_cluster, monkeypatch):
    monkeypatch.setattr(event_log, "UNIT_EVENTS", 150)
    more = {"train_targets": "every_block", "num_train_negatives": 2, "partitions": 3}
    output = make(tmp_path, make_log(), **more)
    assert same_files(written, output)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.booleans())
def test_by_time_training_knows_nothing_of_later(tmp_path_factory, seed, every_block, dated):
    base = tmp_path_factory.mktemp("time")
    rows = make_log(seed=seed)
    born = {f"n{n:03}": -1.0 for n in range(120)} | {f"n{n:03}": n * 3.0 for n in range(60, 120)} if dated else {}
    more = {"split_by": "time", "train_targets": "every_block" if every_block else "last", "seed": seed}
    output = make(base / "whole", rows, prepared=prepare(base / "a", rows, born=born), **more)
    statistics = json.loads((output / "statistics.json").read_text())
    bounds = [datetime.fromisoformat(statistics[key] + "+00:00") for key in ("validation_from", "test_from")]
    times = {name: [row["timestamp"] for row in read(output, name)] for name in ("train", "valid", "test")}
    assert max(times["train"]) < bounds[0] <= min(times["valid"])
    assert max(times["valid"]) < bounds[1] <= min(times["test"])
    before = [row for row in rows if START + timedelta(hours=row[2]) < bounds[0]]
    counts: dict[str, int] = {}
    for _, note in (pair for notes in likes(before).values() for pair in notes):
        counts[note] = counts.get(note, 0) + 1
    assert {row["note_id"]: row["clicks"] for row in read(output, "popularity") if row["clicks"]} == counts
    when = {row["example_id"]: row["timestamp"] for name in times for row in read(output, name)}
    for file in ("train", "valid", "uniform", "popular"):
        for row in read(output, f"candidates/{file}"):
            if dated and not row["label"]:
                assert START + timedelta(hours=born[row["note_id"]]) <= when[row["example_id"]]
            elif file == "train":
                assert row["note_id"] in counts  # without dates: a user liked it in the training period


def test_what_happens_after_the_bound_changes_nothing_in_training(tmp_path):
    rows = make_log()
    first = make(tmp_path / "one", rows, prepared=prepare(tmp_path / "a", rows), split_by="time")
    statistics = json.loads((first / "statistics.json").read_text())
    bound = (datetime.fromisoformat(statistics["test_from"] + "+00:00") - START) / timedelta(hours=1)
    ids = sorted({note for _, note, _ in rows})
    liked = likes(rows)
    # A user whose last event is the last like, on a note new to them, likes another new note then.
    last = {user: max(hour for u, _, hour in rows if u == user) for user in liked}
    moved = {
        (user, *notes[-1][::-1])
        for user, notes in liked.items()
        if notes[-1][0] == last[user] > bound and "n007" not in {note for _, note in notes}
    }
    other = [(u, "n007" if (u, n, h) in moved else n, h) for u, n, h in rows]
    second = make(tmp_path / "two", other, prepared=prepare(tmp_path / "b", other, ids), split_by="time")
    changed = json.loads((second / "statistics.json").read_text())
    assert all(changed[name] == statistics[name] for name in ("validation_from", "test_from"))
    for name in ("train", "candidates/train", "popularity"):
        assert read(first, name) == read(second, name)
    assert read(first, "test") != read(second, "test")


def test_only_notes_that_existed_are_negatives_unless_told_otherwise(tmp_path):
    rows = make_log()
    ids = sorted({note for _, note, _ in rows}) + [f"later{i}" for i in range(200)]
    prepared = prepare(tmp_path / "a", rows, ids, {f"later{i}": 10_000.0 for i in range(200)})
    strict = make(tmp_path / "strict", rows, prepared=prepared)
    loose = make(tmp_path / "loose", rows, prepared=prepared, existing_notes_only=False)
    for file in ("train", "valid", "uniform", "popular"):
        assert not any(row["note_id"].startswith("later") for row in read(strict, f"candidates/{file}"))
    assert any(row["note_id"].startswith("later") for row in read(loose, "candidates/uniform"))
    assert any(row["note_id"].startswith("later") for row in read(strict, "candidates/published"))  # as published


def test_negatives_are_not_older_than_wanted(tmp_path):
    rows = make_log()
    ids = sorted({note for _, note, _ in rows})
    born = {note: -24.0 * (number % 6) for number, note in enumerate(ids)}
    prepared = prepare(tmp_path / "a", rows, ids, born)
    free = make(tmp_path / "any", rows, prepared=prepared)
    when = {row["example_id"]: row["timestamp"] for row in read(free, "test")}

    def ages(directory: Path) -> list[timedelta]:
        negatives = [row for row in read(directory, "candidates/uniform") if not row["label"]]
        return [when[row["example_id"]] - START - timedelta(hours=born[row["note_id"]]) for row in negatives]

    oldest = max(ages(free))
    limited = make(tmp_path / "limited", rows, prepared=prepared, max_negative_age_days=oldest.days - 2)
    assert len(ages(limited)) == len(ages(free))
    assert max(ages(limited)) <= timedelta(days=oldest.days - 2) < oldest
    with pytest.raises(DataError, match="raise candidates.max_negative_age_days"):
        make(tmp_path / "none", rows, prepared=prepared, max_negative_age_days=0.001)


def test_limits_on_users_and_events(tmp_path):
    rows = [*make_log(), *(("busy", f"n{i % 120:03}", float(i)) for i in range(4000)), ("new", "n001", 3.0)]
    rows.append(("stranger", "unheard of", 3.0))
    prepared = prepare(tmp_path / "a", rows, [f"n{n:03}" for n in range(240)])
    output = make(tmp_path, rows, prepared=prepared, knobs={"max_events": 10, "min_events": 4}, max_test_users=3)
    sequences = {row["user_id"]: row["note_ids"] for row in read(output, "sequences")}
    assert max(map(len, sequences.values())) == 10
    assert sequences["busy"] == [f"n{n:03}" for n in range(110, 120)]
    assert (sequences["new"], "stranger" in sequences) == (["n001"], False)
    assert len(read(output, "test")) == len(read(output, "published")) == 3
    long = {user for user, rows_ in likes(rows).items() if len(rows_) >= 4}
    examples = [row for name in ("train", "valid", "test") for row in read(output, name)]
    assert {row["user_id"] for row in examples} < long
    assert {row["user_id"] for row in read(output, "blocks")} == {row["user_id"] for row in examples}
    shown = of_examples([row for f in ("train", "valid", "uniform") for row in read(output, f"candidates/{f}")])
    for row in examples:
        if row["user_id"] == "busy":  # liked them all, most of them before the events that are kept
            negatives = {note for note, label in shown[row["example_id"]].items() if not label}
            assert min(negatives) >= "n120"
    statistics = json.loads((output / "statistics.json").read_text())
    tested = round(0.2 * len(long))
    assert statistics["untested_users"] == tested - 3
    told = format_statistics(statistics)
    assert f"{statistics['cold_users']} without a target; {tested - 3} beyond candidates.max_test_users" in told
    assert (statistics["truncated_events"] >= 110, statistics["unknown_note_events"]) == (True, 1)
    assert statistics["cold_users"] == len(sequences) - len(long)
    assert pq.read_table(output / "quarantine").to_pylist()[0]["key"] == "stranger"


def test_a_target_s_own_click_is_not_another_s(tmp_path):
    rows = [(f"u{user}", note, float(hour)) for user in range(30) for hour, note in enumerate(("shared", f"n{user}"))]
    output = make(tmp_path, rows, protocols=("uniform",))
    statistics = json.loads((output / "statistics.json").read_text())
    for side in ("train", "valid", "test"):
        assert statistics[f"{side}_targets_never_clicked"] == statistics[f"{side}_examples"] > 0


def test_one_event_is_enough_where_min_events_says_so(tmp_path):
    rows = [(f"u{i}", f"n{i % 30:03}", float(i)) for i in range(40)]
    output = make(tmp_path, rows, knobs={"min_events": 1}, protocols=("uniform",))
    assert {(row["block"], len(row["history_ids"])) for row in read(output, "test")} == {(-1, 0)}
    assert not read(output, "blocks")


def test_events_of_one_time_follow_a_log_and_else_no_name(tmp_path, caplog):
    users, notes = [f"u{u:02}" for u in range(90)], ("c", "a", "b")
    rows = [(user, f"{'0z'[u % 2]}{u % 30}", 1.0 + u) for u, user in enumerate(users)]
    rows += [(user, note, 500.0) for user in users for note in notes]
    ids = sorted({note for _, note, _ in rows})

    def targets(name: str, rows: list) -> list[str]:
        output = make(
            tmp_path / name, rows, prepared=prepare(tmp_path / f"{name}-in", rows, ids, files=1), num_negatives=1
        )
        statistics = json.loads((output / "statistics.json").read_text())
        assert (statistics["tied_events"], statistics["tied_targets"]) == (270, 90)
        return [row["note_ids"][-1] for row in read(output, "sequences")]

    assert set(targets("log", rows)) == {"b"}
    assert set(targets("newest first", rows[::-1])) == {"b"}
    with caplog.at_level("WARNING", logger="notellm2_ray"):
        unordered = targets("by name", sorted(rows))
    assert "ordered by a hash" in caplog.text and "90 of 90 (100.0%)" in caplog.text
    counts = [unordered.count(note) for note in notes]
    assert min(counts) > 15  # 30 each, by chance
    assert targets("shuffled", sorted(rows, key=lambda row: row[0][::-1] + row[1])) == unordered


@pytest.mark.parametrize(
    ("rows", "knobs", "candidates", "words"),
    [
        ([("u", "a", 1.0)], {"positive_actions": ("like",)}, {}, ["sequences.positive_actions (like)", "click (1)"]),
        ([("u", "a", 1.0)], {}, {}, ["only 0 users have a target"]),
        ([(f"u{i}", n, 1.0) for i in range(20) for n in "ab"], {}, {"split_by": "time"}, ["at the same time"]),
        (make_log(), {}, {"k_core": (50, 50)}, ["candidates.k_core=[50, 50] leaves no note"]),
    ],
)
def test_an_error_names_the_setting(tmp_path, rows, knobs, candidates, words):
    with pytest.raises(DataError) as error:
        make(tmp_path, rows, knobs=knobs, **candidates)
    assert all(word in str(error.value) for word in words), error.value
