"""Each rule of mining hard negatives by a small example: notes on a circle, so that a note's number is its rank."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from notellm2_ray.core.config import build
from notellm2_ray.core.errors import ConfigError, DataError
from notellm2_ray.core.note_store import NoteStore
from notellm2_ray.core.schema import EVENT_SCHEMA, NOTE_SCHEMA, PAIR_SCHEMA
from notellm2_ray.core.settings import IndexSettings, NegativeSettings
from notellm2_ray.index.mine_negatives import mine_negatives
from notellm2_ray.index.table import write_table

START = datetime(2024, 3, 1, tzinfo=UTC)
NUM = 20  # note i stands i * 4 degrees away from note 0
ALL = {"min_rank": 1, "max_rank": NUM, "relative_margin": None}


def mine(
    home: Path, pairs, *, valid=(), texts=None, images=None, without_vector=(), index=None, clicks=(), **settings
) -> tuple[list[list[str]], dict]:
    """The negatives of each pair, and the counts; notes are given by number, clicks as (user, note, day)."""
    home.mkdir(exist_ok=True)
    events = [
        {"user_id": user, "note_id": f"n{note}", "timestamp": START + timedelta(days=day), "action": action,
         "session_id": None}
        for user, note, day, *rest in clicks for action in (rest or ["click"])
    ]  # fmt: skip
    (home / "events").mkdir()
    pq.write_table(pa.Table.from_pylist(events, schema=EVENT_SCHEMA), home / "events" / "part.parquet")
    log = {"start": int(START.timestamp() * 1e6), "end": int((START + timedelta(days=7)).timestamp() * 1e6)}
    (home / "train_log.json").write_text(json.dumps(log))
    notes = [
        {"note_id": f"n{at}", "title": (texts or {}).get(at, f"note {at}"), "topics": [], "content": "",
         "image": (images or {}).get(at), "created_at": None}
        for at in range(NUM)
    ]  # fmt: skip
    NoteStore.write(home / "train_notes.arrow", [pa.RecordBatch.from_pylist(notes, schema=NOTE_SCHEMA)])
    for name, ends in (("train", pairs), ("valid", valid)):
        rows = [{"query_id": f"n{query}", "target_id": f"n{target}", "score": 1.0} for query, target in ends]
        pq.write_table(pa.Table.from_pylist(rows, schema=PAIR_SCHEMA), home / f"{name}.parquet")
    kept = [at for at in range(NUM) if at not in without_vector]
    angles = np.radians([4.0 * at for at in kept])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 2)
    batch = pa.record_batch([pa.array([f"n{at}" for at in kept]), column], names=["note_id", "embedding"])
    write_table(home / "vectors.lance", [batch], model_fingerprint="m")
    chosen = NegativeSettings(**{**ALL, **settings})
    counts = mine_negatives(
        home,
        home / "vectors.lance",
        home,
        chosen,
        index or IndexSettings(recall_queries=1),
        1,
        events=home / "events",
        click_actions=("click",),
    )
    table = pq.read_table(home / "negatives.parquet")
    assert table.select(PAIR_SCHEMA.names).equals(pq.read_table(home / "train.parquet"))
    return table["negatives"].to_pylist(), counts


def names(*numbers: int) -> list[str]:
    return [f"n{number}" for number in numbers]


def test_ranks_count_the_other_notes_from_the_nearest(tmp_path):
    (mined,), _ = mine(tmp_path, [(0, 19)], min_rank=3, max_rank=6)
    assert mined == names(3, 4, 5, 6)
    (fewer,), _ = mine(tmp_path / "few", [(0, 19)], min_rank=3, max_rank=6, per_pair=2)
    assert fewer == names(3, 4)


def test_related_notes_are_never_negatives_in_either_direction(tmp_path):
    pairs = [(0, 5), (0, 1), (3, 0)]
    mined, counts = mine(tmp_path, pairs, valid=[(0, 7), (8, 0)], max_rank=9)
    assert mined[0] == mined[1] == names(2, 4, 6, 9)
    assert "n0" not in mined[2] and "n3" not in mined[2]
    assert counts["related"] >= 10


def test_copies_of_the_query_of_the_target_or_of_another_related_note_are_never_negatives(tmp_path):
    texts = {0: "Harbour at dawn", 2: "harbour  at DAWN", 4: "target", 6: "Target", 9: "other", 10: "other"}
    images = {0: b"one", 3: b"one", 4: b"two", 7: b"two", 5: b"three", 11: b"three"}
    mined, _ = mine(tmp_path, [(0, 4), (0, 9)], texts=texts, images=images, max_rank=12)
    assert mined[0] == mined[1] == names(1, 5, 8, 11, 12)


def test_notes_that_users_clicked_together_are_no_negatives(tmp_path):
    clicks = [
        *((user, note, 1) for user in ("ann", "bob") for note in (0, 2)),
        ("ann", 3, 2),
        ("ann", 3, 3),  # counts once
        ("ann", 4, 1, "view"),
        ("ann", 5, 8),  # after the training log
        ("eve", 6, 1),
    ]
    (mined,), counts = mine(tmp_path / "none", [(0, 19)], clicks=clicks, max_rank=6)
    assert mined == names(1, 4, 5, 6)
    assert counts["clicked_together"] == 2
    (one,), _ = mine(tmp_path / "one", [(0, 19)], clicks=clicks, max_rank=6, max_common_users=1)
    assert one == names(1, 3, 4, 5, 6)
    (all_of_them,), _ = mine(tmp_path / "any", [(0, 19)], clicks=clicks, max_rank=6, max_common_users=None)
    assert all_of_them == names(1, 2, 3, 4, 5, 6)


def test_notes_without_text_or_image_are_no_copies_of_each_other(tmp_path):
    (mined,), _ = mine(tmp_path, [(0, 4)], texts={at: " " for at in range(NUM)}, max_rank=5)
    assert mined == names(1, 2, 3, 5)


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({"relative_margin": 0.05}, 0.95 * math.cos(math.radians(20))),
        ({"absolute_margin": 0.2}, math.cos(math.radians(20)) - 0.2),
        ({"relative_margin": 0.05, "absolute_margin": 0.2}, math.cos(math.radians(20)) - 0.2),
    ],
)
def test_a_negative_is_less_similar_than_the_target_by_the_margin(tmp_path, settings, most):
    mined, counts = mine(tmp_path, [(0, 5), (0, 10)], **settings)
    expected = [at for at in range(1, NUM) if math.cos(math.radians(4 * at)) <= most and at != 10]
    assert mined[0] == names(*expected)
    assert len(mined[1]) < len(mined[0])  # its target is less similar, so its negatives are too
    assert counts["too_similar"] > 0


def test_a_pair_with_a_note_without_a_vector_has_no_negatives(tmp_path):
    mined, counts = mine(tmp_path, [(9, 1), (0, 5), (2, 9)], without_vector=(9,), max_rank=3)
    assert mined[0] == mined[2] == []
    assert mined[1] == names(1, 2, 3)
    assert counts["pairs_without"] == 2 and counts["pairs"] == 3


def test_an_approximate_index_gives_notes_by_the_same_rules(tmp_path):
    ivf = IndexSettings(kind="ivf", num_lists=2, num_probes=2, recall_queries=1)
    mined, _ = mine(tmp_path, [(0, 5), (4, 1)], index=ivf, max_rank=6)
    assert mined[0] == names(1, 2, 3, 4, 6)
    assert not set(mined[1]) & set(names(4, 1))


def test_no_negative_at_all_says_which_setting_to_change(tmp_path):
    with pytest.raises(DataError, match=r"1 of 1 pairs have no negative: .*lower negatives.min_rank"):
        mine(tmp_path, [(0, 1)], absolute_margin=2.0)
    with pytest.raises(ConfigError, match=r"negatives.min_rank \(9\) is above negatives.max_rank \(8\)"):
        build(NegativeSettings, {"min_rank": 9, "max_rank": 8})
