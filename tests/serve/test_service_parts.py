"""Keys, ranker, preferences and an experiment; then the service's replicas killed one after the other."""

from __future__ import annotations

import signal
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import httpx
import pytest

from tests.support import engines
from tests.support.serving import user_in, wait_for

pytestmark = pytest.mark.slow

START_SECONDS = 200  # beside two busy processes on two cores, an encoder's replica took 103 s to start


def click(service, user, *notes, request_id=None):
    events = [
        {"user_id": user, "note_id": note, "action": "click", "request_id": request_id,
         "timestamp": f"2026-02-01T00:00:{row:02d}Z"}
        for row, note in enumerate(notes)
    ]  # fmt: skip
    answer = service.http.post("/v1/events", json={"events": events})
    assert answer.status_code == 200, answer.text
    return answer.json()


def recommend(service, user, **body):
    answer = service.http.post("/v1/recommend", json={"user_id": user, "k": 5, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_keys_and_scopes(service):
    read = {"authorization": f"Bearer {service.reading}"}
    assert service.http.get("/v1/stats", headers={"authorization": ""}).status_code == 401
    assert service.http.post("/v1/similar", json={"note_id": "n1"}, headers=read).status_code == 200
    refused = service.http.put("/v1/notes", json={"notes": [{"note_id": "x"}]}, headers=read)
    assert refused.status_code == 403 and refused.json()["error"]["type"] == "forbidden"
    assert service.http.get("/v1/health", headers={"authorization": ""}).status_code == 200
    assert service.reading not in service.log()


def test_preferences_are_written_block_by_block(service):
    user = user_in("ranked", "ann")
    click(service, user, *(f"n{row}" for row in range(1, 8)))

    def words():
        blocks = service.http.get(f"/v1/users/{user}").json()["blocks"]
        return blocks if len(blocks) == 2 and all(block["preference"] for block in blocks) else None

    first, second = (block["preference"] for block in wait_for(words))
    assert first == f"{user}|red cat 1,red cat 2,red cat 3"
    assert second == f"{first}|red cat 4,red cat 5,red cat 6"
    answer = recommend(service, user)
    assert answer["preference"] == second and answer["arm"] == "ranked"


def test_the_ranker_ranks_and_the_other_arm_does_not_use_it(service):
    user, other = user_in("ranked", "ann"), user_in("recalled", "bob")
    answer = recommend(service, user)
    assert answer["ranked_by"] == "ranker" and answer["fallback"] is None
    p_yes = [one["p_yes"] for one in answer["results"]]
    assert p_yes == sorted(p_yes, reverse=True) and None not in p_yes
    click(service, other, "n1", "n2")
    answer = recommend(service, other)
    assert (answer["ranked_by"], answer["fallback"], answer["arm"]) == ("recall", "arm", "recalled")
    scores = [one["score"] for one in answer["results"]]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize(("name", "fallback"), [("slow", "budget"), ("broken", "failed")])
def test_a_ranker_that_is_late_or_fails_leaves_recalls_order(service, name, fallback):
    user = user_in("ranked", name)
    click(service, user, "n1", "n2", "n3")
    wait_for(lambda: recommend(service, user, budget_ms=200)["preference"])
    started = time.perf_counter()
    answer = recommend(service, user, budget_ms=300)
    assert answer["ranked_by"] == "recall" and answer["fallback"] == fallback
    assert len(answer["results"]) == 5 and time.perf_counter() - started < 3
    assert recommend(service, user, budget_ms=0.01)["fallback"] == "budget"


def test_exposures_and_clicks_are_stored_by_arm(service):
    user = user_in("ranked", "carol")
    click(service, user, "n1")
    answer = recommend(service, user)
    shown = [one["note_id"] for one in answer["results"]]
    click(service, user, shown[0], request_id=answer["request_id"])
    database = sqlite3.connect(service.spec.directory / "users.sqlite")

    def kept():
        rows = database.execute(
            "SELECT note_id, position, arm FROM exposures WHERE request_id = ? ORDER BY position",
            (answer["request_id"],),
        ).fetchall()
        return rows if len(rows) == 5 else None

    assert wait_for(kept) == [(note_id, row, "ranked") for row, note_id in enumerate(shown)]


@pytest.mark.late(1)
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGUSR1], ids=["killed", "memory filled"])
def test_a_dead_engine_costs_the_order_but_no_answer_and_is_replaced(service, end):
    user = user_in("ranked", "dora")
    click(service, user, "n1", "n2")
    wait_for(lambda: recommend(service, user)["ranked_by"] == "ranker")
    before, stop, answers = service.log(), threading.Event(), []

    def keep_asking():  # 20 times a second
        with ThreadPoolExecutor(40) as pool:
            while not stop.wait(0.05):
                answers.append(pool.submit(recommend, service, user))

    asking = threading.Thread(target=keep_asking)
    asking.start()
    try:
        (core,) = service.processes(engines.CORE)
        core.send_signal(end)
        wait_for(lambda: not service.http.get("/v1/ready").json()["parts"]["ranker"], 3)
        assert service.http.get("/v1/ready").json()["ready"]
        assert recommend(service, user)["fallback"] == "failed"
        wait_for(lambda: service.http.get("/v1/ready").json()["parts"]["ranker"], START_SECONDS)
        wait_for(lambda: [recommend(service, user)["ranked_by"] for _ in range(6)] == ["ranker"] * 6)
    finally:
        stop.set()
        asking.join()
    given = [one.result() for one in answers]
    assert {(one["ranked_by"], one["fallback"]) for one in given} <= {
        ("ranker", None), ("recall", "failed"), ("recall", "budget")
    }  # fmt: skip
    assert all(len(one["results"]) == 5 for one in given)

    def lines(words):
        return service.log().count(words) - before.count(words)

    wait_for(lambda: lines("the ranker answers again; "))
    assert 1 <= lines("the ranker failed (RuntimeError: EngineCore encountered an issue)") <= 2, "one line a gateway"
    assert lines("the ranker's engine failed (") == 1


CUT_OFF = 0


class Asked(NamedTuple):
    """One of the requests that are sent all the time."""

    began: float
    status: int
    kind: str
    failure: str = ""  # the answer's body if it failed


def kill(service, deployment):
    """Kill one replica of a deployment with SIGKILL; wait until another process has replaced it."""
    before = {one.pid for one in service.replicas(deployment)}
    victim = service.replicas(deployment)[0]
    victim.kill()
    wait_for(lambda: {one.pid for one in service.replicas(deployment)} - before, START_SECONDS)


@pytest.mark.late(2)
@pytest.mark.parametrize(
    ("deployment", "request_of"),
    [
        ("Gateway", ("POST", "/v1/similar", {"note_id": "n1", "k": 3})),
        ("Encoder", ("POST", "/v1/embeddings", {"input": "a text"})),
        ("Writer", ("PUT", "/v1/notes", {"notes": [{"note_id": "again", "title": "red cat"}]})),
        (
            "Users",
            (
                "POST",
                "/v1/events",
                {"events": [{"event_id": "z1", "user_id": "z", "note_id": "n1", "action": "click"}]},
            ),
        ),
        ("Ranker", ("POST", "/v1/recommend", {"user_id": "ann0", "k": 3})),
    ],
)
def test_a_killed_replica_comes_back_and_nothing_acknowledged_is_lost(service, deployment, request_of):
    method, path, body = request_of
    written = {"notes": [{"note_id": f"before-{deployment}", "title": "kept"}]}
    assert service.http.put("/v1/notes", json=written).status_code == 200
    asked, stop = [], threading.Event()

    def keep_asking():
        while not stop.wait(0.05):
            began = time.monotonic()
            try:
                answer = service.http.request(method, path, json=body)
            except httpx.TransportError:  # the request was at the killed gateway
                asked.append(Asked(began, CUT_OFF, ""))
                continue
            kind = answer.headers["content-type"].partition(";")[0]
            asked.append(Asked(began, answer.status_code, kind, "" if answer.is_success else answer.text))

    asking = threading.Thread(target=keep_asking)
    asking.start()
    try:
        wait_for(lambda: len(asked) > 3)
        kill(service, deployment)
        wait_for(lambda: service.http.get("/v1/ready").status_code == 200, START_SECONDS)
        ready = time.monotonic()
        wait_for(lambda: sum(one.began > ready for one in asked) > 10, 60)
    finally:
        stop.set()
        asking.join()
    assert [one for one in asked if one.began > ready and one.status != 200] == []
    # Meanwhile requests are refused with a Retry-After, and every failure has a type.
    assert {one.status for one in asked} <= {200, 429, 503} | ({CUT_OFF} if deployment == "Gateway" else set())
    assert {one.kind for one in asked if one.status != CUT_OFF} == {"application/json"}
    failed = sum(one.status != 200 for one in asked)
    assert failed <= len(asked) // 2 + 60
    if deployment in ("Gateway", "Ranker"):
        assert failed <= 2
    assert service.http.get(f"/v1/notes/before-{deployment}").json()["title"] == "kept"
    found = service.http.post("/v1/similar", json={"note_id": f"before-{deployment}", "k": 1})
    assert wait_for(lambda: found.status_code == 200)


@pytest.mark.late(4)
def test_it_finishes_requests_before_it_stops(service):
    started = time.monotonic()
    assert service.stop() == 0
    assert time.monotonic() - started < 40
