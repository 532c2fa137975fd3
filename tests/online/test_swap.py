"""Switching to another model: its table is brought up to date with the served one and replaces it; nothing is lost."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import threading
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import pytest

from notellm2_ray.core.errors import DataError, ModelError, OutputError
from notellm2_ray.core.run import files_fingerprint
from notellm2_ray.core.settings.retrieval import IndexSettings
from notellm2_ray.core.settings.serve import ServeSettings
from notellm2_ray.live import current
from notellm2_ray.live.follower import StoreFollower
from notellm2_ray.live.store import LiveStore
from notellm2_ray.live.table import LiveTable
from notellm2_ray.live.upkeep import Upkeep
from notellm2_ray.online import swap as online_swap
from notellm2_ray.online import wiring as online
from notellm2_ray.presets import load_settings
from notellm2_ray.serve.deployments import encoder
from notellm2_ray.serve.deployments.encoder import Encoder
from notellm2_ray.serve.deployments.loaded_model import Vectors
from notellm2_ray.serve.deployments.writer import Writer
from tests.support.live_notes import MODEL, make_table, note, unit
from tests.support.serving import wait_for

NEW = "model-2"


class Method:
    def __init__(self, answer):
        self.answer = answer

    async def remote(self, *arguments):
        return await self.answer(*arguments)


class NewModel:
    """A handle of an encoder whose vectors depend on the title; the title 'bad' has no vector."""

    def __init__(self, directory):
        self.directory = directory
        self.loaded, self.before = NEW, None
        self.describe, self.encode = Method(self._describe), Method(self._encode)

    async def _describe(self, needed):
        assert needed == MODEL
        old = {"path": "somewhere", "fingerprint": MODEL, "files": ""}
        return {"models": [old, {**old, "path": str(self.directory / "models" / "m2"), "fingerprint": self.loaded}]}

    async def _encode(self, notes, columns, fingerprint):
        if self.before is not None:
            await self.before()
        assert fingerprint == NEW
        vectors = np.array([vector_of(one.title) for one in notes])
        problems = {row: "it is bad" for row, one in enumerate(notes) if one.title == "bad"}
        return Vectors(dict.fromkeys(columns, vectors), problems, 1, fingerprint)


def vector_of(title):
    return unit(1, seed=1000 + int(title) if title.isdigit() else 7)[0]


@pytest.fixture
def filled(tmp_path):
    """A serving directory whose next table was filled from the first version of the served table."""
    make_table(tmp_path / "live.lance")
    make_table(tmp_path / "live-2.lance", model=NEW, seed=5)
    (tmp_path / "models" / "m2").mkdir(parents=True)
    return tmp_path


def make_writer(directory, handle):
    return Writer(SimpleNamespace(directory=directory, model=directory / "trained", serve=ServeSettings()), handle)


async def taken_over(writer):
    """Run the next step and wait for it."""
    await writer.exchange("gateway-1", {})
    await writer.takeover.task


def contents(path):
    """Title and vector of living notes, by id."""
    rows = LiveTable(path).dataset.to_table(columns=["note_id", "title", "embedding"], filter="NOT deleted")
    return {row["note_id"]: (row["title"], np.array(row["embedding"], np.float32)) for row in rows.to_pylist()}


def test_changes_after_the_copy_are_written_to_the_next_table(filled):
    async def run():
        writer = make_writer(filled, NewModel(filled))
        await writer.upsert([note("a", 1), note("n3", 2), note("gone", 3)], MODEL)
        await writer.upsert([note("a", 4)], MODEL)
        seq = (await writer.upsert([note("worse", 5)._replace(title="bad")], MODEL)).seq
        await writer.delete(["n1", "gone"])
        current.set_upcoming(filled, "live-2.lance", "m2", "live.lance", 0)
        await taken_over(writer)
        assert writer.takeover.waits is None and current.upcoming(filled) is None
        assert current.current(filled) == (filled / "live-2.lance", filled / "models" / "m2", "", 0)
        assert await writer.upsert([note("late", 6)], MODEL) == (None, NEW)
        done = await writer.upsert([note("late", 6)], NEW)
        assert done.seq > seq and done.model_fingerprint == NEW  # seqs continue across the switch
        writer.check_health()
        writer.store.close()

    asyncio.run(run())
    found, old = contents(filled / "live-2.lance"), unit(20, seed=5)
    assert set(found) == {"a", "late", *(f"n{row}" for row in range(20) if row != 1)}
    assert found["a"][0] == "4" and found["n3"][0] == "2"
    np.testing.assert_allclose(found["a"][1], vector_of("4"), atol=1e-6)
    np.testing.assert_allclose(found["n3"][1], vector_of("2"), atol=1e-6)
    np.testing.assert_allclose(found["n7"][1], old[7], atol=1e-6)
    LiveStore.open(filled / "live.lance").close()  # the old table is released


def test_no_acknowledged_write_is_lost_during_the_switch(filled):
    """Writers never stop and the encoder is slow: all acknowledged writes are in the new table."""
    expected, asked = {f"n{row}": "0" for row in range(20)}, itertools.count(1)

    async def write(writer, stop, mine):
        model, draw = MODEL, random.Random(mine)
        while not stop.is_set():
            note_id, value = f"w{mine}-{draw.randrange(12)}", next(asked)
            if draw.random() < 0.3:
                await writer.delete([note_id])
                expected.pop(note_id, None)
            else:
                done = await writer.upsert([note(note_id, value)._replace(embedding=vector_of(str(value)))], model)
                if done.seq is None:
                    model = done.model_fingerprint
                else:
                    expected[note_id] = str(value)
            await asyncio.sleep(0)

    async def run():
        handle, stop = NewModel(filled), asyncio.Event()

        async def slow():
            await asyncio.sleep(0.05)

        handle.before = slow
        writer = make_writer(filled, handle)
        current.set_upcoming(filled, "live-2.lance", "m2", "live.lance", 0)
        async with asyncio.TaskGroup() as tasks:
            for mine in range(4):
                tasks.create_task(write(writer, stop, mine))
            await asyncio.sleep(0.2)
            await asyncio.wait_for(taken_over(writer), 60)
            await asyncio.sleep(0.2)
            stop.set()
        assert writer.takeover.waits is None and writer.store.path.name == "live-2.lance"
        writer.store.close()

    asyncio.run(run())
    found = contents(filled / "live-2.lance")
    assert {note_id: title for note_id, (title, _) in found.items()} == expected
    for note_id, (title, vector) in found.items():
        if note_id.startswith("w"):
            np.testing.assert_allclose(vector, vector_of(title), atol=1e-6)


def test_deletions_whose_tombstones_were_removed_reach_the_next_table(filled):
    keep_nothing = Upkeep(small_files=1, idle_small_files=1, tombstone_horizon=timedelta(0))
    with LiveStore.open(filled / "live.lance", upkeep=keep_nothing) as store:
        store.delete(["n1", "n2"])
        store.upsert([note("n2", 9)])
        wait_for(lambda: LiveTable(filled / "live.lance").purged_seq > 0)

    async def run():
        writer = make_writer(filled, NewModel(filled))
        current.set_upcoming(filled, "live-2.lance", "m2", "live.lance", 0)
        await taken_over(writer)
        writer.store.close()

    asyncio.run(run())
    found = contents(filled / "live-2.lance")
    assert "n1" not in found and found["n2"][0] == "9" and len(found) == 19


def test_the_old_model_is_served_until_the_new_one_works(filled):
    async def run():
        handle = NewModel(filled)
        handle.loaded = "of another precision"
        writer = make_writer(filled, handle)
        await writer.upsert([note("a", 1)], MODEL)
        current.set_upcoming(filled, "live-2.lance", "m2", "live.lance", 0)
        await taken_over(writer)
        assert "embed.precision" in writer.takeover.waits and current.waiting_reason(filled) == writer.takeover.waits
        handle.loaded = NEW
        calls = itertools.count()

        async def fails_the_second_time():
            if next(calls):
                raise ModelError("out of memory")
            await writer.upsert([note("b", 2)], MODEL)  # leaves a change for the last round

        handle.before = fails_the_second_time
        await taken_over(writer)
        assert "out of memory" in writer.takeover.waits and current.current_table(filled).name == "live.lance"
        report = (await writer.exchange("gateway-1", {}))["writer"]["state"]
        assert report["waits"] == writer.takeover.waits
        await writer.takeover.task
        assert (await writer.upsert([note("c", 3)], MODEL)).seq == 3
        handle.before = None
        await taken_over(writer)
        assert writer.takeover.waits is None and writer.store.path.name == "live-2.lance"
        writer.store.close()

    asyncio.run(run())
    assert {"a", "b", "c"} <= set(contents(filled / "live-2.lance"))


def test_a_writer_cleans_up_after_one_that_died_after_the_switch(filled):
    current.set_upcoming(filled, "live-2.lance", "m2", "live.lance", 0)
    current.set_current(filled, "live-2.lance", "m2")

    async def run():
        writer = make_writer(filled, NewModel(filled))
        await taken_over(writer)
        assert current.upcoming(filled) is None and writer.store.path.name == "live-2.lance"
        writer.store.close()

    asyncio.run(run())


def test_the_service_keeps_a_copy_of_its_first_model(filled):
    trained = filled / "trained"
    trained.mkdir()
    (trained / "weights").write_text("first")
    handle = NewModel(filled)
    described = {"path": str(trained), "fingerprint": MODEL, "files": files_fingerprint(str(trained))}

    async def describe(needed):
        return {"models": [described]}

    handle.describe = Method(describe)

    async def run():
        writer = make_writer(filled, handle)
        (trained / "weights").write_text("trained anew before it was copied")
        await taken_over(writer)
        assert current.current(filled).model is None and not (filled / "models" / MODEL).exists()
        described["files"] = files_fingerprint(str(trained))
        await taken_over(writer)
        (trained / "weights").write_text("trained anew")
        assert current.current(filled).model == filled / "models" / MODEL
        assert (filled / "models" / MODEL / "weights").read_text() == "trained anew before it was copied"
        writer.store.close()

    asyncio.run(run())


def test_a_model_that_cannot_be_copied_is_served_from_its_own_directory(filled, monkeypatch, caplog):
    (filled / "trained").mkdir()
    handle, tries = NewModel(filled), []
    described = {
        "path": str(filled / "trained"),
        "fingerprint": MODEL,
        "files": files_fingerprint(str(filled / "trained")),
    }

    async def describe(needed):
        return {"models": [described]}

    def full(*_):
        tries.append(1)
        raise OSError(28, "No space left on device")

    handle.describe = Method(describe)
    monkeypatch.setattr("notellm2_ray.serve.deployments.takeover.keep_model", full)

    async def run():
        writer = make_writer(filled, handle)
        for _ in range(3):
            await taken_over(writer)
        assert writer.takeover.waits is None and len(tries) == 1 and "could not be copied" in caplog.text
        writer.store.close()

    asyncio.run(run())


def test_a_table_filled_from_one_that_is_no_longer_served_is_not_used(filled):
    async def run():
        writer = make_writer(filled, NewModel(filled))
        current.set_upcoming(filled, "live-2.lance", "m2", "live-0.lance", 0)
        await taken_over(writer)
        assert "filled from live-0.lance" in writer.takeover.waits
        current.set_upcoming(filled, "live-2.lance", "m2", "live.lance", 0)
        handle = writer.takeover.encoder.handle

        async def give_up():
            current.forget_upcoming(filled)

        handle.before = give_up
        await writer.upsert([note("a", 1)], MODEL)
        await taken_over(writer)
        assert writer.takeover.waits == "the swap was given up" and writer.store.path.name == "live.lance"
        await taken_over(writer)
        assert writer.takeover.waits is None
        LiveStore.open(filled / "live-2.lance").close()  # released
        writer.store.close()

    asyncio.run(run())


def test_the_next_table_is_served_when_every_replica_has_loaded_it(filled):
    def report(ahead):
        return {"state": {"freshness": {"ahead": ahead}}}

    async def run():
        writer = make_writer(filled, NewModel(filled))
        current.set_upcoming(filled, "live-2.lance", "m2", "live.lance", 0)
        await writer.exchange("gateway-1", report("live-2.lance"))
        await writer.exchange("gateway-2", report(None))
        await writer.takeover.task
        assert writer.takeover.waits == "gateway-2: still loading live-2.lance"
        await writer.exchange("gateway-2", report("live-2.lance"))
        await writer.takeover.task
        assert writer.takeover.waits is None and writer.store.path.name == "live-2.lance"
        writer.store.close()

    asyncio.run(run())


def test_a_model_without_vectors_for_many_notes_is_not_served(filled):
    async def run():
        writer = make_writer(filled, NewModel(filled))
        await writer.upsert([note(f"b{row}", 5)._replace(title="bad") for row in range(3)], MODEL)
        current.set_upcoming(filled, "live-2.lance", "m2", "live.lance", 0)
        await taken_over(writer)
        assert "3 of 3 notes have no vector" in writer.takeover.waits and writer.store.path.name == "live.lance"
        writer.store.close()

    asyncio.run(run())


def test_followers_load_the_next_table_before_it_is_served(filled):
    follower = StoreFollower(filled, IndexSettings(kind="exact", recall_queries=5))
    follower.state = follower._load(filled / "live.lance")
    current.set_upcoming(filled, "live-2.lance", "m2", "live.lance", 0)
    assert not follower.poll()
    follower._loading.join()
    follower.poll()
    assert follower.freshness()["ahead"] == "live-2.lance" and follower.index.model_fingerprint == MODEL
    with LiveStore.open(filled / "live-2.lance") as store:
        store.upsert([note("late", 3)], NEW)
        follower.poll()
        current.set_current(filled, "live-2.lance", "m2")
        current.forget_upcoming(filled)
        assert [one.title for one in follower.notes(["late"])] == ["3"]  # read from the served table, loaded or not
        assert follower.poll() and follower.index.model_fingerprint == NEW and "late" in follower.index
        store.upsert([note("later", 4)], NEW)
        assert follower.poll() and "later" in follower.index and follower.freshness()["ahead"] is None


def test_a_next_table_that_cannot_be_loaded_does_not_affect_the_served_one(filled, monkeypatch, caplog):
    monkeypatch.setattr("notellm2_ray.live.follower._FAILING_SECONDS", 0.0)
    (filled / "live-3.lance" / "_versions").mkdir(parents=True)
    current.set_upcoming(filled, "live-3.lance", "m2", "live.lance", 0)
    follower = StoreFollower(filled, IndexSettings(kind="exact", recall_queries=5))
    follower.state = follower._load(filled / "live.lance")
    (filled / "NEXT").write_text("{}")
    assert not follower.poll() and follower.freshness()["ahead"] is None
    current.set_upcoming(filled, "live-3.lance", "m2", "live.lance", 0)
    follower._stop.set()  # skips the wait before the next attempt
    for _ in range(3):
        follower.poll()
        follower._loading.join()
    assert "live-3.lance" in caplog.text and follower.problem is None and follower.freshness()["ahead"] is None


def test_a_next_table_that_is_made_current_by_hand_is_written(filled):
    async def run():
        handle = NewModel(filled)
        handle.loaded = "of another precision"
        writer = make_writer(filled, handle)
        current.set_upcoming(filled, "live-2.lance", "m2", "live.lance", 0)
        await taken_over(writer)
        current.set_current(filled, "live-2.lance", "m2")
        assert (await writer.upsert([note("a", 1)], NEW)).seq is not None
        writer.store.close()

    asyncio.run(run())


def test_the_next_table_and_model_must_exist(filled):
    with pytest.raises(DataError, match=r"live-3\.lance is not there"):
        current.set_upcoming(filled, "live-3.lance", "m2", "live.lance", 0)
    with pytest.raises(DataError, match="m3 is not there"):
        current.set_upcoming(filled, "live-2.lance", "m3", "live.lance", 0)
    (filled / "NEXT").write_text('{"table": "live-2.lance", "model": "../m2"}')
    with pytest.raises(DataError, match="a table beside it and a model"):
        current.upcoming(filled)
    (filled / "NEXT").write_text('["live-2.lance"]')
    with pytest.raises(DataError, match="damaged"):
        current.upcoming(filled)


@pytest.fixture(scope="module")
def other_model(world):
    """Another embedder, with longer vectors."""
    from notellm2_ray.models.embedder.build import build_encoder
    from notellm2_ray.models.embedder.encoder import NoteEncoder
    from tests.support import tiny_models

    paths = {"llm_path": str(world.base / "llm"), "vision_path": str(world.base / "clip")}
    build_encoder(tiny_models.settings(embedding_dim=24), 1, **paths).save_pretrained(world.base / "other")
    return NoteEncoder.from_pretrained(world.base / "other")


def test_an_encoder_holds_both_models_while_one_takes_over(world, other_model, tmp_path, monkeypatch):
    directory = world.base / "both"
    make_table(directory / "live.lance")
    make_table(directory / "live-2.lance")
    (directory / "models").mkdir()
    (directory / "models" / "other").symlink_to(world.base / "other")
    monkeypatch.setattr(encoder, "_replica", lambda: "1")
    old, new = world.encoder.fingerprint, other_model.fingerprint

    def loaded(one, needed=""):
        with one._looking:
            one._look()
        return [model["fingerprint"] for model in one.describe(needed)["models"]]

    async def run():
        one = Encoder(world.spec("both"))
        assert loaded(one) == [old]
        with pytest.raises(ModelError, match=old):
            await one.encode(world.notes[:2], ("embedding",), new)
        current.set_upcoming(directory, "live-2.lance", "other", "live.lance", 0)
        assert loaded(one) == [old, new]
        for fingerprint, model in ((old, world.encoder), (new, other_model)):
            vectors = await one.encode(world.notes[:5], ("embedding", "embedding_image"), fingerprint)
            assert vectors.fingerprint == fingerprint
            np.testing.assert_allclose(vectors.columns["embedding"], model.encode(world.notes[:5]), atol=1e-5)
        current.set_current(directory, "live-2.lance", "other")
        current.forget_upcoming(directory)
        assert loaded(one) == [old, new]  # replicas that are still loading the new table need the old model
        monkeypatch.setattr(encoder, "_KEPT_SECONDS", 0.0)
        assert loaded(one) == [new]
        monkeypatch.undo()
        monkeypatch.setattr(encoder, "_replica", lambda: "1")
        assert [model.fingerprint for model in Encoder(world.spec("both")).models] == [new]

    asyncio.run(run())


def swap_settings(workspace, *more):
    return load_settings(None, "demo", [f"workspace={workspace}", "embed.actors=1", *more])


@pytest.fixture
def workspace(world, other_model):
    """A workspace whose embedder was trained again since it was first served."""
    workspace = world.base / "workspace"
    model = workspace / "embedders" / swap_settings(workspace).embedder_name / "model"
    if not model.exists():
        trained(other_model, model)
    return workspace


def trained(encoder, path):
    """An embedder as train-embedder writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    encoder.save_pretrained(path)
    (path.parent / "manifest.json").write_text(json.dumps({"fingerprint": encoder.fingerprint}))


@pytest.mark.slow
@pytest.mark.late(3)
def test_a_running_service_switches_without_a_failed_request(world, other_model, workspace, service):
    spec = service.spec
    stop, statuses, wanted = threading.Event(), [], {}

    def search(which):
        with service.client(service.key) as http:
            body = {"note_id": "n5", "k": 5} if which else {"note": {"note_id": "x", "title": "a red cat"}, "k": 5}
            while not stop.is_set():
                statuses.append(http.post("/v1/similar", json=body).status_code)

    def write():
        with service.client(service.key) as http:
            for number in itertools.count():
                if stop.is_set():
                    return
                body = {"note_id": f"live-{number}", "title": f"green house {number}"}
                answer = http.put("/v1/notes", json={"notes": [body]})
                statuses.append(answer.status_code)
                if answer.status_code == 200:
                    wanted[body["note_id"]] = body["title"]
                if number % 5 == 4:
                    gone = f"live-{number - 2}"
                    answer = http.post("/v1/notes/delete", json={"note_ids": [gone]})
                    statuses.append(answer.status_code)
                    if answer.status_code == 200:
                        wanted.pop(gone, None)

    threads = [threading.Thread(target=search, args=(which,)) for which in (0, 1)] + [threading.Thread(target=write)]
    for thread in threads:
        thread.start()
    try:
        told = online_swap.swap_embedder(swap_settings(workspace))
        wait_for(lambda: all(_model(service) == other_model.fingerprint for _ in range(12)), 60)
        threads[2].join(2)  # and some more
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert f"live-{other_model.fingerprint}" in told
    assert set(statuses) == {200} and len(wanted) > 10
    assert service.http.get("/v1/ready").json()["ready"]
    found = contents(current.current_table(spec.directory))
    assert {note_id: title for note_id, (title, _) in found.items() if note_id.startswith("live-")} == wanted
    bulk = other_model.encode(world.notes)
    for row, one in enumerate(world.notes):
        np.testing.assert_allclose(found[one.note_id][1], bulk[row], atol=1e-4)
    best = np.argsort(-(bulk @ bulk[5]))[1:4]
    where = {"exclude": sorted(set(found) - {one.note_id for one in world.notes})}
    answer = service.http.post("/v1/similar", json={"note_id": "n5", "k": 3, "filter": where}).json()
    assert [one["note_id"] for one in answer["results"]] == [f"n{row}" for row in best]
    settings = swap_settings(workspace)
    assert "served already" in online_swap.swap_embedder(settings)
    # After a restart the same model is served, even if the workspace's embedder has changed.
    assert online.service_spec(settings).model == spec.directory / "models" / other_model.fingerprint


def _model(service):
    return service.http.post("/v1/embeddings", json={"input": "a text"}).json()["model"]


@pytest.mark.slow
def test_without_a_running_service_the_command_does_the_switch(world, other_model, tmp_path):
    settings = swap_settings(tmp_path)
    directory, model = tmp_path / "serving", tmp_path / "embedders" / settings.embedder_name / "model"
    with pytest.raises(OutputError, match="no finished output"):
        online_swap.swap_embedder(settings)
    trained(other_model, model)
    with pytest.raises(OutputError, match="nothing is served"):
        online_swap.swap_embedder(settings)
    from notellm2_ray.live.seed import seed_from_bulk

    seed_from_bulk(world.base / "notes", world.base / "bulk.lance", directory / "live.lance")
    with LiveStore.open(directory / "live.lance") as store:
        store.delete(["n2"])
    assert f"live-{other_model.fingerprint}" in online_swap.swap_embedder(settings)
    found = contents(current.current_table(directory))
    assert len(found) == len(world.notes) - 1
    np.testing.assert_allclose(found["n8"][1], other_model.encode(world.notes[8:9])[0], atol=1e-4)
    assert not list(directory.glob("next-*")) and current.upcoming(directory) is None
    # The served copy outlives the workspace's embedder; swapping back makes the first model's table again.
    trained(world.encoder, model)
    online_swap.swap_embedder(settings)
    assert current.current(directory).model == directory / "models" / world.encoder.fingerprint
    assert {one.name for one in directory.glob("live*.lance")} == {
        f"live-{one.fingerprint}.lance" for one in (world.encoder, other_model)
    }
