"""Collaborative filtering against plain loops over the equations, and what it may know of the log."""

import json
from collections import defaultdict
from datetime import UTC, datetime, timedelta
from itertools import combinations

import numpy as np
import pyarrow as pa
import pytest

from notellm2_ray.baselines.recall.baseline import RecallData
from notellm2_ray.baselines.recall.item_cf import cosines
from notellm2_ray.baselines.recall.swing import swings
from notellm2_ray.baselines.recall.table import RECALL_BASELINES
from notellm2_ray.baselines.recall.train_clicks import TrainClicks
from notellm2_ray.core.schema import EVENT_SCHEMA, PAIR_SCHEMA, Note
from notellm2_ray.core.settings import Settings
from notellm2_ray.core.settings.retrieval import EvaluateSettings
from notellm2_ray.core.workspace import Workspace
from notellm2_ray.evaluate.recall.task import RetrievalTask
from tests.support.ranking_workspace import save

USERS, NOTES = 40, 15


@pytest.fixture(scope="module")
def clicked():
    """Note to its users; user and note numbers of the clicks, some of them twice."""
    rng = np.random.default_rng(3)
    users, notes = rng.integers(USERS, size=260), (rng.random(260) ** 2 * NOTES).astype(int)
    notes[:NOTES] = np.arange(NOTES)  # each note has a user
    of = defaultdict(set)
    for user, note in zip(users, notes, strict=True):
        of[int(note)].add(int(user))
    return of, TrainClicks.build(users, notes, rng.permutation(260), [str(at) for at in range(NOTES)])


def test_item_cf_is_the_cosine_of_the_sets_of_users(clicked):
    of, clicks = clicked
    for query in range(NOTES):
        expected = [len(of[query] & of[note]) / (len(of[query]) * len(of[note])) ** 0.5 for note in range(NOTES)]
        assert cosines(clicks, query) == pytest.approx(expected)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 5.0])
def test_swing_is_the_sum_over_pairs_of_users(clicked, alpha):
    of, clicks = clicked
    notes_of = {user: {note for note in of if user in of[note]} for user in range(USERS)}

    def plain(one, other):
        pairs = combinations(sorted(of[one] & of[other]), 2)
        return sum(
            2 / (len(notes_of[u]) * len(notes_of[v])) ** 0.5 / (alpha + len(notes_of[u] & notes_of[v]))
            for u, v in pairs
        )

    for query in range(NOTES):
        found = swings(clicks, query, alpha)
        others = [note for note in range(NOTES) if note != query]
        assert found[others] == pytest.approx([plain(query, note) for note in others], abs=1e-9)


def test_of_a_note_with_many_users_swing_reads_the_latest(clicked, monkeypatch):
    of, clicks = clicked
    monkeypatch.setattr("notellm2_ray.baselines.recall.swing.MAX_USERS", 3)
    latest = set(clicks.users(0)[-3:].tolist())
    found = swings(clicks, 0, 1.0)
    assert found.any()
    assert {note for note in of if found[note]} == {note for note in of if len(latest & of[note]) > 1}


START = datetime(2024, 1, 1, tzinfo=UTC)


@pytest.fixture
def data(tmp_path):
    """Users of two kinds click notes a to d in training; in the test log all of them click e after a."""
    clicks = [("u1", "a"), ("u1", "b"), ("u2", "a"), ("u2", "b"), ("u3", "a"), ("u3", "c"), ("u4", "c"), ("u4", "d")]
    events = [(user, note, START) for user, note in clicks]
    events += [(user, note, START + timedelta(days=3)) for user in ("u1", "u2", "u3", "u4") for note in ("a", "e", "d")]
    rows = [
        {"user_id": user, "note_id": note, "timestamp": at, "action": "click", "session_id": None}
        for user, note, at in events
    ]
    save(tmp_path / "prepared" / "events" / "part.parquet", rows, EVENT_SCHEMA)
    counted = pa.schema([("note_id", pa.string()), ("train_clicks", pa.int64())])
    save(
        tmp_path / "pairs" / "popularity.parquet",
        [{"note_id": note, "train_clicks": int(note != "e")} for note in "abcde"],
        counted,
    )
    window = {"start": int(START.timestamp() * 1e6), "end": int((START + timedelta(days=1)).timestamp() * 1e6)}
    (tmp_path / "pairs" / "train_log.json").write_text(json.dumps(window))
    pairs = [("a", "b"), ("a", "c"), ("a", "d"), ("a", "e"), ("e", "a")]
    table = [{"query_id": query, "target_id": target, "score": 1.0} for query, target in pairs]
    task = RetrievalTask.build(
        pa.Table.from_pylist(table, PAIR_SCHEMA), list("abcde"), dict.fromkeys("abcde", 1), EvaluateSettings()
    )
    return RecallData(task, {note: Note(note) for note in "abcde"}, Workspace(tmp_path), Settings())


@pytest.mark.parametrize(("name", "expected"), [("item_cf", [1, 2, 4, 4, 4]), ("swing", [1, 4, 4, 4, 4])])
def test_clicks_of_the_test_log_are_not_known(data, name, expected):
    (ranks,) = RECALL_BASELINES.get(name).ranks(data).values()
    assert ranks.tolist() == expected
