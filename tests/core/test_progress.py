"""Lines of progress: what is done, the rate, the time left, and what else a loop has to say."""

from __future__ import annotations

import logging
import time

import pytest

from notellm2_ray.core import progress
from notellm2_ray.core.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_tells_rate_and_time_left(clock: list[float]) -> None:
    counter = Progress("embed-notes", "notes", 1200, before=200, waits_for="the first block")
    clock[0] = 103.0
    assert counter.line() == "embed-notes: 200 / 1,200 notes, waiting for the first block (3 s)"
    clock[0] = 110.0
    counter.add(100, tokens=4000)
    clock[0] = 120.0
    counter.add(100, "loss 0.5", tokens=2000)
    # 200 notes in 20 seconds; the 200 of an earlier run are not part of the rate
    expected = "embed-notes: 400 / 1,200 notes, 10 notes/s, 300 tokens/s, loss 0.5, 1 min 20 s left"
    assert counter.line() == expected
    assert (counter.startup_seconds, counter.seconds) == (10.0, 20.0)


def test_add_logs_when_a_line_is_due_and_at_the_end(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "notellm2_ray"):
        counter = Progress("tiny LLM", "steps", 4)
        for _ in range(4):
            clock[0] += 3.0
            counter.add(text="loss 1.000")
    assert caplog.messages == [
        "tiny LLM: 2 / 4 steps, 0.333 steps/s, loss 1.000, 6 s left",
        "tiny LLM: 4 / 4 steps, 0.333 steps/s, loss 1.000, 0 s left",
    ]


def test_without_a_total_there_is_no_time_left(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "notellm2_ray"):
        counter = Progress("prepare", "notes")
        clock[0] += 6.0
        counter.add(60_000, "3 quarantined")
        counter.finish()
    assert caplog.messages == [
        "prepare: 60,000 notes so far, 10,000 notes/s, 3 quarantined",
        "prepare: 60,000 notes in all, 10,000 notes/s, 3 quarantined",
    ]


def test_a_thread_logs_while_nothing_arrives(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.02)
    with caplog.at_level(logging.INFO, "notellm2_ray"), Progress("embed-notes", "notes", 10, before=1) as counter:
        counter.add(4)
        time.sleep(0.2)
    assert caplog.messages[0] == "embed-notes: 1 of 10 notes are done already"
    # one line while nothing changes, and the last
    assert 3 <= len(caplog.messages) <= 4 and "5 / 10 notes" in caplog.messages[1]
