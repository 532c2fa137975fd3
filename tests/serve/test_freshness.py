"""How soon every replica finds a written note, and no longer finds a deleted one, while others search."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

pytestmark = pytest.mark.slow

REQUESTS, NOTES = 24, 8  # together nearly 200 notes
ALL_REPLICAS = 12  # answers in a row: two replicas take turns


@pytest.fixture(scope="module")
def clients(service):
    """Four clients that search all the time; the statuses of their answers."""
    stop, statuses = threading.Event(), []

    def search() -> None:
        with service.client(service.key) as http:
            while not stop.is_set():
                statuses.append(http.post("/v1/similar", json={"note_id": "n5", "k": 10}).status_code)

    threads = [threading.Thread(target=search) for _ in range(4)]
    for thread in threads:
        thread.start()
    yield statuses
    stop.set()
    for thread in threads:
        thread.join()


def seconds_until(service, note_id: str, status: int, begun: float) -> float:
    """From ``begun`` to the first of the answers with ``status`` that no other answer follows."""
    first, right = begun, 0
    while right < ALL_REPLICAS:
        answer = service.http.post("/v1/similar", json={"note_id": note_id, "k": 1})
        if answer.status_code == status:
            first, right = (time.perf_counter() if not right else first), right + 1
        else:
            right = 0
        assert time.perf_counter() - begun < 30, f"{note_id} is not everywhere after 30 s"
    return first - begun


def test_notes_come_and_go_within_a_second(service, clients):
    came, went = [], []
    for number in range(REQUESTS):
        ids = [f"new-{number}-{one}" for one in range(NOTES)]
        notes = [{"note_id": one, "title": f"green house {one}"} for one in ids]
        assert service.http.put("/v1/notes", json={"notes": notes}).json()["upserted"] == NOTES
        came.append(seconds_until(service, ids[-1], 200, time.perf_counter()))
    for number in range(REQUESTS):
        ids = [f"new-{number}-{one}" for one in range(NOTES)]
        assert service.http.post("/v1/notes/delete", json={"note_ids": ids}).json()["deleted"] == NOTES
        went.append(seconds_until(service, ids[-1], 404, time.perf_counter()))
    for name, seconds in (("upsert", came), ("delete", went)):
        median, late = np.quantile(seconds, [0.5, 0.99])
        print(f"{name} to seen on both replicas: median {median * 1000:.0f} ms, 99th percentile {late * 1000:.0f} ms")
        assert median < 1 and late < 2
    assert set(clients) == {200} and len(clients) > 100
