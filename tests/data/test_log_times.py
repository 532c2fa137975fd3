"""What is said of a log's times, and the logs that are refused for them."""

from __future__ import annotations

import logging

import pyarrow as pa
import pytest

from notellm2_ray.core.errors import DataError
from notellm2_ray.data.log_times import LogTimes
from notellm2_ray.data.rows import raw_events, raw_notes

DAY = 86_400


def facts(created: list, times: list, zone: str | None = None) -> dict:
    notes = {"note_id": [f"n{number}" for number in range(len(created))], "created_at": created}
    events = {"user_id": ["u"] * len(times), "note_id": [f"n{n % len(created)}" for n in range(len(times))]}
    found = LogTimes()
    found.add_notes(raw_notes(pa.table(notes), zone=zone))
    for start in range(0, len(times), 2):
        table = pa.table({**events, "timestamp": times}).slice(start, 2)
        found.add_events(raw_events(table, zone=zone))
    return found.finish()


def test_first_last_days_and_events_before_their_note(caplog):
    start = 1_717_200_000  # 2024-06-01
    with caplog.at_level(logging.INFO, logger="notellm2_ray"):
        found = facts([start + 1, None], [start, start, start + 3 * DAY, start + 3 * DAY + 1])
    assert found == {
        "first_event": "2024-06-01 00:00:00",
        "last_event": "2024-06-04 00:00:01",
        "days_with_events": 2,
        "events_before_note": 1,
        "times_without_zone": 0,
    }
    assert "3.0 days, some on 2 of them; 1 (25.0%) before their note existed" in caplog.text


def test_a_log_within_a_minute_is_refused_with_the_setting():
    with pytest.raises(DataError, match=r"all 3 events lie within a minute of 2024-06-01 .*source\.time_unit"):
        facts([None], [1_717_200_000, 1_717_200_013, 1_717_200_005])


def test_tables_that_differ_in_their_zones_are_a_warning(caplog):
    created, times = ["2024-06-01T00:00:00+00:00"] * 2, ["2024-06-01T08:00:00", "2024-06-02T08:00:00"]
    assert facts(created, times)["times_without_zone"] == 2
    assert (
        "(2 of the events) are read as UTC beside times with one (2 of the notes): set source.time_zone" in caplog.text
    )
    caplog.clear()
    assert facts(created, times, zone="Asia/Shanghai")["events_before_note"] == 0
    assert facts([None, None], times)["times_without_zone"] == 2
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
