"""Failures of parts: threads that panic, deployments that are not available or busy, a table replaced by another."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from types import SimpleNamespace

import numpy as np
import pytest

from notellm2_ray.core.errors import OutputError
from notellm2_ray.core.settings.retrieval import IndexSettings
from notellm2_ray.core.settings.serve import LimitSettings, ServeSettings
from notellm2_ray.index.ann import AnnIndex
from notellm2_ray.live import current, follower
from notellm2_ray.live import durability as files
from notellm2_ray.live.follower import StoreFollower
from notellm2_ray.live.group_commit import GroupCommitter
from notellm2_ray.live.store import LiveStore
from notellm2_ray.live.table import LiveTable
from notellm2_ray.serve.calls import Dependency, EngineCalls
from notellm2_ray.serve.deployments.encoder import Vectors
from notellm2_ray.serve.deployments.gateway import Gateway
from notellm2_ray.serve.deployments.ranker import Ranker
from notellm2_ray.serve.deployments.readiness import Readiness
from notellm2_ray.serve.deployments.workload import Workload
from notellm2_ray.serve.deployments.writer import Writer
from notellm2_ray.serve.errors import OverloadedError, UnavailableError
from notellm2_ray.serve.figures import Figures
from notellm2_ray.serve.http.checks import Images
from notellm2_ray.serve.http.schemas import QueryNote, SimilarRequest
from notellm2_ray.serve.http.similar import find_similar
from tests.support.live_notes import MODEL, make_table, note, unit

EXACT = IndexSettings(kind="exact", recall_queries=5)


class Panic(BaseException):
    """Like pyo3's PanicException: not an Exception."""


def panic(*_, **__):
    raise Panic("index out of bounds")


def soon(condition, seconds=10):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.fixture
def path(tmp_path):
    make_table(tmp_path / "live.lance")
    return tmp_path / "live.lance"


def test_a_panic_in_a_commit_reaches_its_callers_and_the_next_one_is_written(path, monkeypatch):
    with LiveStore.open(path) as store:
        with monkeypatch.context() as patch:
            patch.setattr(files, "sync_transaction", panic)
            with pytest.raises(OutputError, match="out of bounds"):
                store.upsert([note("a")])
        assert store.upsert([note("b")]) == 1 and store.alive
        assert store.existing(["a", "b", "n1"]) == {"b", "n1"}


def test_a_panic_in_upkeep_does_not_end_the_writer():
    tidied = []

    def upkeep(idle):
        tidied.append(idle)
        panic()

    committer = GroupCommitter("test", lambda items: items, upkeep=upkeep, idle_seconds=0.01)
    soon(lambda: len(tidied) > 2)
    assert committer.submit(7).result(5) == 7 and committer.alive
    committer.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_no_caller_waits_for_a_writer_whose_thread_has_ended():
    committer = GroupCommitter("test", lambda items: items, gather_seconds=0)
    committer._next_group = panic
    assert committer.submit(1).result(5) == 1  # the last that is committed
    soon(lambda: not committer.alive)
    with pytest.raises(OutputError):
        committer.submit(2)


def test_a_follower_survives_failures_and_reports_lasting_ones(path, monkeypatch):
    monkeypatch.setattr(follower, "_FAILING_SECONDS", 0.2)
    one = StoreFollower(path, EXACT, poll_seconds=0.01).start()
    with monkeypatch.context() as patch:
        patch.setattr(one, "poll", panic)
        soon(lambda: one.freshness()["errors"] > 2)
        assert one.alive
        soon(lambda: one.problem is not None)
        assert "out of bounds" in one.problem
    soon(lambda: one.problem is None)
    with LiveStore.open(path) as store:
        assert one.wait_for(store.upsert([note("a")]))
    one.close()


def test_a_loaded_table_is_not_loaded_again_before_it_is_used(path):
    one = StoreFollower(path, EXACT)
    one.state = one._load(path)
    one._load_beside(path)
    one._loading.join()
    loaded, one._load = one._loaded, panic
    one._load_beside(path)
    one._loading.join()
    assert one.poll() and one.state is loaded and not one.freshness()["errors"]


def test_a_load_that_keeps_failing_is_reported_while_it_is_needed(path, tmp_path, monkeypatch):
    monkeypatch.setattr(follower, "_FAILING_SECONDS", 0.2)
    one = StoreFollower(tmp_path, EXACT, poll_seconds=0.01).start()
    (tmp_path / "CURRENT").write_text(json.dumps({"table": "live-2.lance"}))
    soon(lambda: one.problem is not None)
    assert "live-2.lance" in one.problem and len(one.index) == 20
    (tmp_path / "CURRENT").unlink()
    soon(lambda: one.problem is None)
    make_table(tmp_path / "live-2.lance", 3)
    (tmp_path / "CURRENT").write_text(json.dumps({"table": "live-2.lance"}))
    soon(lambda: len(one.index) == 3)
    assert one.problem is None
    one.close()


def test_a_saved_index_is_used_once_and_a_damaged_one_never(path, tmp_path, monkeypatch, caplog):
    batch = StoreFollower(path, EXACT)._load(path).index._rows
    saved = AnnIndex.build(batch.ids[:20], batch.vectors[:20], EXACT, model_fingerprint=MODEL)
    (tmp_path / "index").mkdir()
    saved.save(tmp_path / "index")
    reads, load = [], AnnIndex.load

    def counted(directory):
        reads.append(directory)
        return load(directory)

    monkeypatch.setattr(AnnIndex, "load", counted)
    one = StoreFollower(path, EXACT, saved_index=tmp_path / "index")
    first, second = one._load(path), one._load(path)
    assert len(reads) == 1 and len(first.index) == len(second.index) == 20
    np.testing.assert_array_equal(first.index._snapshot.main.ids, saved.ids)
    (tmp_path / "index" / "index.faiss").write_bytes(b"")
    started = StoreFollower(path, EXACT, saved_index=tmp_path / "index").start()
    assert len(started.index) == 20 and "built anew" in caplog.text
    started.close()


def make_writer(directory) -> Writer:
    return Writer(SimpleNamespace(directory=directory, serve=ServeSettings()))


def test_the_writer_switches_to_the_current_table(path, tmp_path):
    async def run():
        writer = make_writer(tmp_path)
        assert await writer.upsert([note("a", 1)], MODEL) == (1, MODEL)
        make_table(tmp_path / "live-2.lance", model="model-2")
        current.set_current(tmp_path, "live-2.lance")
        assert await writer.upsert([note("b", 1)], MODEL) == (None, "model-2")
        assert await writer.upsert([note("c", 1)], "model-2") == (1, "model-2")
        done = await writer.delete(["n1", "a", "b"])
        assert (done.deleted, done.unknown) == (1, ["a", "b"])
        LiveStore.open(path).close()  # the old table is released
        (tmp_path / "CURRENT").write_text(json.dumps({"table": "live-3.lance"}))
        with pytest.raises(OutputError, match="live-3"):
            await writer.upsert([note("d", 1)], "model-2")
        writer.check_health()
        writer.store.close()
        with pytest.raises(RuntimeError, match="has ended"):
            writer.check_health()

    asyncio.run(run())
    assert LiveTable(tmp_path / "live-2.lance").existing(["a", "b", "c", "d", "n1", "n2"]) == {"c", "n2"}


class Handle:
    """A deployment's handle; ``answer`` is what its methods do."""

    def __init__(self, answer):
        self.answer = answer

    def __getattr__(self, name):
        return SimpleNamespace(remote=lambda *arguments: self.answer(name))


def answering(**answers):
    async def answer(name):
        return answers.get(name)

    return Handle(answer)


def failing(error):
    async def answer(name):
        raise error

    return Handle(answer)


def test_calls_to_an_unavailable_deployment_are_bounded():
    async def run():
        back = asyncio.Event()

        async def answer(name):
            await back.wait()
            return name

        users = Dependency(Handle(answer), "users", most=3)
        waiting = [asyncio.create_task(users.call("view", seconds=10)) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="users"):
            await asyncio.wait_for(users.call("view", seconds=10), 1)
        back.set()
        assert await asyncio.gather(*waiting) == ["view"] * 3
        assert await users.call("view", seconds=10) == "view" and users.in_hand == 0

    asyncio.run(run())


def test_more_than_ten_seconds_of_work_is_refused_for_any_number_of_requests():
    workload = Workload(10.0)
    with workload.room_for(10_000), workload.room_for(64):  # the time per item is not known yet
        pass
    for _ in range(30):
        workload.took("preprocess", 0.1, 10)
        workload.took("model", 6.4, 64)
    with workload.room_for(1000):  # nothing else is in hand
        with pytest.raises(OverloadedError, match="106 s"):
            workload.room_for(64).__enter__()
        assert workload.items == 1000
    with workload.room_for(64):
        with workload.room_for(36):
            pass
        with pytest.raises(OverloadedError):
            workload.room_for(37).__enter__()
    assert workload.items == 0


def test_a_refusal_by_another_deployment_is_passed_on_unchanged():
    from ray.exceptions import RayTaskError

    told = OverloadedError("106 s of work")
    sent = RayTaskError("encode", "a trace", told).as_instanceof_cause()
    encoder = Dependency(failing(sent), "encoder", 4)
    with pytest.raises(OverloadedError) as caught:
        asyncio.run(encoder.call("encode", seconds=1))
    assert caught.value is told and caught.value.message == "106 s of work"


def gateway_of(problem=None, **handles):
    """A gateway that can only ask the other deployments."""
    described = answering(describe={"models": [{"fingerprint": MODEL}]}, exchange={"other": {}})
    made = Gateway.__new__(Gateway)
    index = SimpleNamespace(model_fingerprint=MODEL)
    made.follower = SimpleNamespace(problem=problem, index=index, alive=True)
    for name in ("encoder", "writer", "users", "ranker"):
        setattr(made, name, Dependency(handles.get(name, described), name, 4))
    needed = made.encoder, made.writer, made.users
    made.readiness = Readiness("gateway-1", made.follower, *needed, [made.ranker], dict, Peers())
    made.readiness.problems = []
    return made


@pytest.mark.parametrize("name", ["encoder", "writer", "users"])
def test_an_unavailable_required_deployment_makes_a_replica_unready(name):
    problems = asyncio.run(gateway_of(**{name: failing(UnavailableError("away"))}).readiness.problems_now())
    assert [one.startswith(name) for one in problems] == [True] and "away" in problems[0]


def test_an_unavailable_ranker_does_not_make_a_replica_unready():
    gateway = gateway_of(ranker=failing(UnavailableError("away")))
    asyncio.run(gateway.readiness._ask_optional())
    assert asyncio.run(gateway.readiness.problems_now()) == [] and gateway.readiness.missing == ["ranker: away"]


def test_a_busy_deployment_is_available():
    gateway = gateway_of(writer=failing(OverloadedError("full")))
    gateway.readiness.reports = {"before": {}}
    assert asyncio.run(gateway.readiness.problems_now()) == []
    assert gateway.readiness.reports == {"before": {}}


def test_a_deployment_that_died_is_not_available_because_calls_queue_up_for_it():
    answers = [UnavailableError("away"), OverloadedError("full")]

    async def answer(name):
        raise answers.pop(0)

    gateway = gateway_of(encoder=Handle(answer))
    assert [asyncio.run(gateway.readiness._find_problems()) for _ in range(2)] == [["encoder: away"]] * 2


class Peers:
    """The handle of all gateways; ``answers`` are theirs."""

    def __init__(self, *answers):
        self.answers = answers

    def broadcast(self, method):
        assert method == "status"
        return self

    async def results_async(self, timeout_s):
        for one in self.answers:
            if isinstance(one, Exception):
                raise one
        return list(self.answers)


def test_the_service_is_ready_when_every_gateway_is():
    async def ready(*answers):
        gateway = gateway_of()
        gateway.readiness.peers = Peers(*answers)
        return await gateway.readiness.status_of_all()

    fine, away = ([], []), (["encoder: away"], ["ranker: away"])
    assert asyncio.run(ready(fine, fine)) == ([], [])
    assert asyncio.run(ready(fine, away, away)) == away
    assert "gateway" in asyncio.run(ready(fine, RuntimeError("died"))).problems[0]


def test_a_ranker_whose_engine_has_died_is_missing_and_its_cause_is_logged_once_with_a_count(monkeypatch):
    class Engine:
        dead, engine = True, SimpleNamespace()

        async def score(self, *arguments):
            if self.dead:
                raise RuntimeError("engine core died\nlong details")
            return [0.5]

        async def check_health(self):
            if self.dead:
                raise RuntimeError("engine core died")

    async def run():
        engine = Engine()
        engine.engine.check_health = engine.check_health
        replica = Ranker.__new__(Ranker)
        replica.engine, replica.figures = EngineCalls(engine, "ranker's engine"), Figures("ranker")
        gateway = gateway_of(ranker=Handle(lambda name: getattr(replica, name)(*arguments.get(name, ()))))
        for _ in range(20):
            with pytest.raises(UnavailableError):
                await gateway.ranker.call("score", seconds=1)
        status = await gateway.status()
        assert status.problems == [] and gateway.readiness.lacks("ranker") and not gateway.readiness.lacks("encoder")
        with pytest.raises(RuntimeError, match="died"):
            await replica.check_health()
        engine.dead = False
        assert await gateway.ranker.call("score", seconds=1) == [0.5]
        await gateway.readiness._ask_optional()
        assert not gateway.readiness.lacks("ranker") and gateway.ranker.in_hand == 0

    arguments = {"score": (None, [], [("a", None)])}
    lines, log = [], logging.getLogger("ray.serve.notellm2")
    monkeypatch.setattr(log, "handle", lambda record: lines.append(record.getMessage()))
    asyncio.run(run())
    assert [line.split(" (")[0] for line in lines[:2]] == ["the ranker's engine failed", "the ranker failed"]
    assert sum("RuntimeError: engine core died" in line and "failed (" in line for line in lines) == 2
    assert sum("the ranker answers again; 21 calls failed" in line for line in lines) == 1 and len(lines) == 4


def test_readiness_is_checked_again_and_once_for_simultaneous_requests(monkeypatch):
    asked = []

    async def find_problems():
        asked.append(len(asked))
        await asyncio.sleep(0.01)
        return ["encoder: away"] if len(asked) == 3 else []

    async def run():
        gateway = gateway_of()
        gateway.readiness._find_problems = find_problems
        assert (
            await asyncio.gather(*(gateway.readiness.problems_now() for _ in range(5))) == [[]] * 5 and len(asked) == 1
        )
        monkeypatch.setattr("notellm2_ray.serve.deployments.readiness._READY_SECONDS", 0.0)
        assert await gateway.readiness.problems_now() == [] and len(asked) == 2
        assert await gateway.readiness.problems_now() == ["encoder: away"] and len(asked) == 3
        assert await gateway.readiness.problems_now() == ["encoder: away"] and len(asked) == 3  # not asked again

    asyncio.run(run())


def test_an_index_that_is_not_updated_makes_a_replica_unready_and_a_dead_thread_restarts_it():
    gateway = gateway_of(problem="the table cannot be followed: gone")
    assert asyncio.run(gateway.readiness.problems_now()) == ["index: the table cannot be followed: gone"]
    gateway.check_health()
    gateway.follower.alive = False
    with pytest.raises(RuntimeError):
        gateway.check_health()


def searching_gateway(state, now, vectors=None):
    """A gateway as far as searching goes, whose follower goes over to the index ``now`` meanwhile."""
    made = Gateway.__new__(Gateway)
    made.limits, made.figures, made._search_seconds = LimitSettings(), Figures("test"), 0.0
    made.fetcher, made.images = None, Images(made.limits)
    made.follower = SimpleNamespace(state=state, index=now)

    async def encode(notes, columns):
        return vectors

    async def cards(note_ids):
        return {}

    made.encode, made.cards = encode, cards
    return made


def test_one_index_answers_a_request_though_another_takes_its_place(path, tmp_path):
    make_table(tmp_path / "live-2.lance", 3, model="model-2")
    one, two = StoreFollower(path, EXACT), StoreFollower(tmp_path / "live-2.lance", EXACT)
    state, now = one._load(path), two._load(tmp_path / "live-2.lance")
    body = SimilarRequest(note_id="n9", k=5, explain=True)
    answer = json.loads(asyncio.run(find_similar(searching_gateway(state, now.index), body)))
    assert len(answer["results"]) == 5 and answer["index"]["size"] == 20
    given = SimilarRequest(note=QueryNote(title="a"), k=2)
    vectors = Vectors({"embedding": unit(1, seed=3)}, {}, 1, "model-2")
    with pytest.raises(UnavailableError, match="model-2"):
        asyncio.run(find_similar(searching_gateway(state, state.index, vectors), given))
    answer = json.loads(asyncio.run(find_similar(searching_gateway(now, now.index, vectors), given)))
    assert len(answer["results"]) == 2
