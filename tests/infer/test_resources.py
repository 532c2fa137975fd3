"""Actors that can never be placed are an error at once, not an endless wait; and progress is told."""

from __future__ import annotations

import logging

import pytest

from notellm2_ray.core.errors import ConfigError
from notellm2_ray.infer import progress
from notellm2_ray.infer.progress import Progress
from notellm2_ray.infer.resources import require_fit


@pytest.mark.parametrize(
    ("nodes", "cpus", "gpus", "actors", "names"),
    [
        ([{"CPU": 4}], 2, 0, 3, r"CPU.*enough for 2.*embed\.actors or embed\.cpus_per_actor"),
        ([{"CPU": 4}], 8, 0, 1, r"embed\.cpus_per_actor"),
        ([{"CPU": 64}], 1, 1, 1, r"GPU.*embed\.gpus_per_actor"),
        ([{"CPU": 3}, {"CPU": 3}], 2, 0, 3, "enough for 2"),  # 6 CPUs, but an actor does not span nodes
        ([{"CPU": 64}, {"CPU": 1, "GPU": 4}], 2, 1, 1, "on one node"),
    ],
)
def test_what_does_not_fit_is_named(nodes: list, cpus: float, gpus: float, actors: int, names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        require_fit(nodes, {"CPU": cpus, "GPU": gpus}, actors)


def test_what_fits_passes() -> None:
    require_fit([{"CPU": 4}], {"CPU": 0.1, "GPU": 0}, 40)
    require_fit([{"CPU": 4, "GPU": 1}, {"CPU": 4, "GPU": 1}], {"CPU": 2, "GPU": 0.5}, 4)


def test_progress_tells_rate_and_time_left(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    counter = Progress(total=1000, before=200)
    assert "200 / 1000 notes, waiting" in counter.line()
    now[0] = 110.0
    counter.add(100)
    now[0] = 120.0
    counter.add(100)
    # 200 notes in 20 seconds; what an earlier run did is no part of the rate
    assert "400 / 1000 notes, 10 notes/s, 1 min 00 s left" in counter.line()
    assert counter.seconds() == {"startup_seconds": 10.0, "embed_seconds": 20.0}
    counter.pause()
    now[0] = 127.0
    counter.add(1)
    now[0] = 128.0
    counter.add(1)
    assert counter.seconds() == {"startup_seconds": 17.0, "embed_seconds": 28.0}


def test_progress_logs_by_itself(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    import time

    monkeypatch.setattr(progress, "LOG_SECONDS", 0.02)
    with caplog.at_level(logging.INFO, "notellm2_ray"), Progress(10) as counter:
        counter.add(4)
        time.sleep(0.2)
    lines = [record.message for record in caplog.records]
    assert 2 <= len(lines) <= 3 and "4 / 10 notes" in lines[0]  # said once while nothing changes, and at the end
