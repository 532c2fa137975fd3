"""The summary at the end of `prepare`."""

from __future__ import annotations

from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq

from notellm2_ray.core.schema import EVENT_SCHEMA, NOTE_SCHEMA
from notellm2_ray.core.settings.model import ModelSettings
from notellm2_ray.data.summary import describe, read_texts
from tests.support.tiny_models import picture

COUNTS = {"notes": 4, "events": 2, "users": 1, "notes_with_image": 1, "quarantined_notes": 1, "quarantined_events": 0,
          "reasons": {"unusable image": 1}}  # fmt: skip


def test_a_person_can_check_what_was_read(tmp_path):
    times = [datetime(2024, 6, day, tzinfo=UTC) for day in (1, 3)]
    blank = {"topics": [], "content": "", "image": None, "created_at": None}
    notes = [
        {**blank, "note_id": "a", "title": "red cats", "topics": ["x" * 40, "pets"], "image": picture(0)},
        {**blank, "note_id": "b", "title": "แมวสีแดง", "created_at": times[0]},
        {
            **blank,
            "note_id": "c",
            "title": "\u202enot\x1b[31m shown",
            "content": "one two three",
            "created_at": times[1],
        },
        {**blank, "note_id": "d", "title": "word " * 50},
    ]
    events = [
        {"user_id": "u", "note_id": "a", "timestamp": time, "action": "view", "session_id": None} for time in times
    ]
    for name, rows, schema in (("notes", notes, NOTE_SCHEMA), ("events", events, EVENT_SCHEMA)):
        (tmp_path / name).mkdir()
        pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / name / "part-0.parquet", row_group_size=3)
    model = ModelSettings(max_topic_length=16, max_title_words=3)
    text = describe(tmp_path, COUNTS, read_texts(tmp_path / "notes", model), model)
    assert "4 notes, 2 events of 1 users, 1 rows in quarantine (1 x unusable image)" in text
    assert "notes without: title 0.0%, topics 75.0%, content 75.0%, image 75.0%, created_at 50.0%" in text
    assert "languages by script: Latin 75.0%, Thai 25.0%" in text
    assert text.count("2024-06-01 00:00 to 2024-06-03 00:00 UTC (2.0 days)") == 2
    assert "1 topics of 1 notes have more than model.max_topic_length=16 characters" in text
    assert "1. a: image " in text and " (image/png)" in text and "topics: pets" in text
    assert "\\u202enot\\u001b[31m shown" in text and "\x1b" not in text
    assert text.rstrip().endswith("content:") and "title: word word word\n" in text
