"""The live table: no acknowledged write is ever lost, and followers have what the table has."""

import asyncio
import json
import os
import threading
import time
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from notellm2_ray.core.errors import DataError, ModelError, OutputError
from notellm2_ray.core.schema import NOTE_SCHEMA
from notellm2_ray.core.settings.retrieval import IndexSettings
from notellm2_ray.index.table import embedding_schema, write_table
from notellm2_ray.live import current
from notellm2_ray.live import durability as files
from notellm2_ray.live.creation import create_table
from notellm2_ray.live.follower import StoreFollower
from notellm2_ray.live.rows import LiveNote, live_schema
from notellm2_ray.live.seed import seed_from_bulk
from notellm2_ray.live.store import LiveStore
from notellm2_ray.live.table import LiveTable, newest_if_gone
from notellm2_ray.live.upkeep import Upkeep
from notellm2_ray.serve.http.note_routes import search_titles
from tests.support import writers
from tests.support.live_notes import DIM, MODEL, make_table, note, unit

EXACT = IndexSettings(kind="exact", recall_queries=5)
BUSY = {"small_files": 3, "idle_small_files": 1, "keep_versions": timedelta(0)}


@pytest.fixture
def path(tmp_path):
    make_table(tmp_path / "live.lance")
    return tmp_path / "live.lance"


def titles(path) -> dict[str, str]:
    """The table's notes, by a plain scan."""
    rows = LiveTable(path).dataset.to_table(columns=["note_id", "title", "deleted"]).to_pylist()
    assert len({row["note_id"] for row in rows}) == len(rows)
    return {row["note_id"]: row["title"] for row in rows if not row["deleted"]}


def test_written_notes_read_back_whole(tmp_path):
    path = tmp_path / "live.lance"
    make_table(path, columns=("embedding", "embedding_image"))
    created = datetime(2024, 5, 1, 12, 30, tzinfo=UTC)
    strange = 'it\'s "a" note \\ 笔记; -- %'
    with LiveStore.open(path) as store:
        seq = store.upsert(
            [
                LiveNote(strange, unit(1)[0], "title", ("a", "b"), "text", b"\xff\x00", created),
                note("n3", 7, others={"embedding_image": unit(1, seed=9)[0]}),
            ]
        )
        assert (seq, store.seq) == (1, 1)
        found = store.notes([strange, "nobody", "n3", "n4", strange])
    assert found[0] == (strange, "title", ("a", "b"), "text", b"\xff\x00", created, 1)
    assert found[1] is None
    cards = LiveTable(path).cards([strange, "n3", "n4", "nobody"])
    assert cards[strange] == (strange, "title", ("a", "b"), "text", True, created)
    assert {note_id: card.has_image for note_id, card in cards.items()} == {strange: True, "n3": False, "n4": True}
    assert (found[2].title, found[2].seq, found[3].seq) == ("7", 1, 0)
    assert found[4] == found[0]
    follower = StoreFollower(path, EXACT).start()
    assert follower.index.similarity("n3", [strange, "n3"], "embedding_image") == [None, pytest.approx(1.0)]
    follower.close()


def test_the_last_write_of_a_note_wins_within_and_between_groups(path):
    with LiveStore.open(path, gather_seconds=0.2) as store:
        futures = [store.submit_upsert([note("a", value), note(f"b{value}")]) for value in range(5)]
        futures += [store.submit_delete(["b1", "n0", "never there"]), store.submit_upsert([note("b2", 9)])]
        assert {future.result() for future in futures} == {1}
        assert store.delete(["b3"]) == 2
        assert store.upsert([note("b3", 4)]) == 3
        assert store.upsert([]) == 3
    held = titles(path)
    assert (held["a"], held["b2"], held["b3"]) == ("4", "9", "4")
    assert not {"b1", "n0", "never there"} & set(held)
    with LiveStore.open(path) as store:
        assert store.seq == 3


def test_coroutines_and_threads_share_groups(path):
    async def write(store):
        return await asyncio.gather(*(store.upsert_async([note(f"c{n}", n)]) for n in range(40)))

    with LiveStore.open(path, gather_seconds=0.05) as store:
        threads = [threading.Thread(target=store.upsert, args=([note(f"t{n}", n)],)) for n in range(20)]
        for thread in threads:
            thread.start()
        asyncio.run(write(store))
        for thread in threads:
            thread.join()
        assert store.info()["commits"] < 20
        assert store.info()["rows"] == 60
    assert len(titles(path)) == 80


def test_invalid_notes_are_refused_without_affecting_others(path):
    with LiveStore.open(path, gather_seconds=0.05) as store:
        good = store.submit_upsert([note("good")])
        for bad, message in [
            (note("x")._replace(embedding=np.ones(DIM)), "'x'.*unit length"),
            (note("x")._replace(embedding=unit(1, dim=4)[0]), "shape"),
            (note(""), "needs an id"),
            (note("x", created_at=datetime(2024, 1, 1)), "time zone"),
            (note("x", others={"embedding_text": unit(1)[0]}), "no column embedding_text"),
        ]:
            with pytest.raises(DataError, match=message):
                store.submit_upsert([note("y"), bad])
        with pytest.raises(ModelError, match="cannot be mixed"):
            store.upsert([note("x")], model_fingerprint="another")
        assert good.result() == 1
    assert set(titles(path)) - {f"n{row}" for row in range(20)} == {"good"}
    with pytest.raises(OutputError, match="closed"):
        store.upsert([note("late")])


def test_a_second_writer_is_refused_and_a_foreign_write_is_noticed(path):
    with LiveStore.open(path) as store:
        with pytest.raises(OutputError, match=f"process {os.getpid()} on "):
            LiveStore.open(path)
        store.upsert([note("a")])
        LiveTable(path).dataset.delete("note_id = 'n1'")  # a writer that does not take the lock
        with pytest.raises(OutputError, match="another writer"):
            store.upsert([note("b")])
        assert store.upsert([note("c")]) == 2  # it has read the new version and can continue
    LiveStore.open(path).close()
    assert "b" not in titles(path)


def test_a_failed_commit_reaches_its_callers_and_the_next_one_works(path, monkeypatch):
    with LiveStore.open(path) as store:
        with monkeypatch.context() as patch:
            patch.setattr(files, "sync_transaction", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left")))
            with pytest.raises(OutputError, match="no space left"):
                store.upsert([note("a")])
        assert store.upsert([note("b")]) == 1
    assert "a" not in titles(path)


def test_a_creation_is_complete_or_leaves_nothing(tmp_path):
    path = tmp_path / "live.lance"
    with pytest.raises(DataError, match="seed it first"):
        LiveStore.open(path)

    def broken():
        yield pa.RecordBatch.from_pydict({"note_id": pa.array(["a"])})

    with pytest.raises(KeyError):
        create_table(path, broken(), live_schema(DIM, model_fingerprint=MODEL))
    assert not path.exists()
    (path / "data").mkdir(parents=True)  # left by a killed creation
    make_table(path, 30)
    assert len(titles(path)) == 30
    with pytest.raises(OutputError, match="there already"):
        make_table(path)


@pytest.mark.slow
def test_compaction_purge_and_clean_up_keep_the_notes_and_followers(tmp_path):
    path = tmp_path / "live.lance"
    make_table(path, 200, fragment_rows=50)
    heard = []
    follower = StoreFollower(path, EXACT, poll_seconds=0.01, on_change=heard.append).start()
    late = StoreFollower(path, EXACT)
    late.state = late._load(path)
    expected = titles(path)
    upkeep = Upkeep(fragment_rows=50, tombstone_horizon=timedelta(seconds=0.3), **BUSY)
    with LiveStore.open(path, upkeep=upkeep, gather_seconds=0) as store:
        for step in range(60):
            ids = [f"n{(7 * step + n) % 230}" for n in range(5)]
            store.upsert([note(note_id, step) for note_id in ids])
            expected |= dict.fromkeys(ids, str(step))
            gone = f"n{(13 * step) % 230}"
            seq = store.delete([gone])
            expected.pop(gone, None)
            time.sleep(0.01)
        assert store.info()["compactions"] > 5
        assert store.info()["purged_tombstones"] > 0
        assert store.info()["fragments"] < 30
        assert follower.wait_for(seq)
        assert len(list((path / files.VERSIONS).glob("*.manifest"))) < 60
    follower.close()
    assert titles(path) == expected
    assert {note_id for change in heard for note_id in change.written} >= {"n1", "n228"}
    assert late.state.seq < LiveTable(path).purged_seq
    for _ in range(200):  # tombstones that it never saw were removed: it must load the table again
        late.poll()
        time.sleep(0.01)
        if late.freshness()["reloads"]:
            break
    for one in (follower, late):
        hits = one.index.search(unit(1)[0], 300)
        assert set(hits.ids) == set(expected)
        for note_id, title in expected.items():
            if title != "0":
                np.testing.assert_array_equal(one.index.vector(note_id), unit(1, seed=int(title))[0])
    with LiveStore.open(path) as store:
        assert store.upsert([note("x")]) == seq + 1


def test_updating_the_same_notes_over_and_over_keeps_a_small_table_small(path):
    images = np.random.default_rng(0)
    bytes_now, versions = [], []
    with LiveStore.open(path, upkeep=Upkeep(keep_crowded=timedelta(seconds=0.1)), gather_seconds=0) as store:
        store.upsert([note(f"n{row}", image=images.bytes(20_000)) for row in range(100)])
        fresh = sum(one.stat().st_size for one in files.listing(path))
        for step in range(200):
            store.upsert([note(f"n{step % 70}", step, image=images.bytes(20_000))])
            if step % 10 == 0:
                bytes_now.append(files.old_bytes(store.table.dataset, path) + files.newest_bytes(store.table.dataset))
                versions.append(len(files.manifests(path)))
    assert max(bytes_now) < 4 * fresh and max(versions) < 120  # without upkeep for small tables 11 times, 200 versions
    assert titles(path)["n59"] == "199" and len(titles(path)) == 100


def test_a_seq_is_never_reused_even_if_the_last_tombstone_was_removed(path):
    with LiveStore.open(path, upkeep=Upkeep(tombstone_horizon=timedelta(0), **BUSY)) as store:
        seq = store.delete(["n1"])
        store._committer.close()
        store._upkeep.run(store._table, store.seq)
    assert LiveTable(path).dataset.count_rows("deleted") == 0
    with LiveStore.open(path) as store:
        assert store.seq == seq
        assert store.upsert([note("n1")]) == seq + 1


def damage(path, part, how) -> None:
    """What a power failure may do to the newest file in a part of the table."""
    newest = max((path / part).iterdir(), key=lambda file: file.stat().st_mtime_ns)
    data = newest.read_bytes()
    if how == "gone":
        newest.unlink()
    else:
        newest.write_bytes({"cut short": data[:100], "zeroed": bytes(len(data)), "empty": b""}[how])


HARMS = ["empty manifest", "zeroed manifest", "data cut short", "data gone", "deletions empty", "deletions zeroed"]


@pytest.mark.parametrize("harm", [*HARMS, "deletions gone", "all"])
def test_a_power_failure_costs_only_unacknowledged_writes(path, harm):
    with LiveStore.open(path) as store:
        store.upsert([note("kept")])
        version = store.info()["version"]
        store.upsert([note("torn"), note("n1", 5)])
        torn = store.info()["version"]
    (path / files.VERSIONS / "latest_version_hint.json").write_bytes(b"")
    part, _, how = harm.partition(" ")
    if part in ("data", "deletions"):
        damage(path, {"deletions": "_deletions"}.get(part, part), how)
    elif harm == "all":
        for manifest in (path / files.VERSIONS).glob("*.manifest"):
            manifest.write_bytes(b"")
        with pytest.raises(DataError, match="restore it from a copy"):
            LiveStore.open(path)
        return
    else:
        files.manifest(path, torn).write_bytes(b"" if harm == "empty manifest" else bytes(700))
    with LiveStore.open(path) as store:
        assert (store.info()["version"], store.seq) == (version, 1)
        assert store.upsert([note("after")]) == 2
    assert {"kept", "after"} <= set(titles(path))
    assert "torn" not in titles(path) and titles(path)["n1"] == "0"


FAILING = [
    OSError("Input/output error"),
    OSError(5, "Input/output error"),
    PermissionError(13, "Permission denied"),
    OSError("LanceError(IO): Generic LocalFileSystem error: Stale file handle (os error 116), local.rs:1"),
    OSError("LanceError(Arrow): Io error: Input/output error (os error 5), deletion.rs:157"),
    ValueError("Dataset at path live.lance was not found: Permission denied (os error 13)"),
]


@pytest.mark.parametrize("error", FAILING, ids=str)
def test_a_temporary_disk_failure_costs_no_version(path, monkeypatch, error):
    import lance

    with LiveStore.open(path) as store:
        assert [store.upsert([note("a", value)]) for value in (1, 2, 3)] == [1, 2, 3]
    files.manifest(path, LiveTable(path).version + 1).write_bytes(b"")  # damaged, and the version before cannot be read
    before = files.listing(path)
    with monkeypatch.context() as patch:
        patch.setattr(lance, "dataset", lambda *_, **__: (_ for _ in ()).throw(error))
        with pytest.raises(OutputError, match="nothing in it was changed"):
            LiveStore.open(path)
    assert files.listing(path) == before
    with LiveStore.open(path) as store:
        assert store.seq == 3 and store.notes(["a"])[0].title == "3"
        assert store.upsert([note("b")]) == 4


def test_a_table_that_cannot_be_listed_is_not_mistaken_for_a_missing_one(path, monkeypatch):
    def denied(_):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", denied)
        with pytest.raises(PermissionError):
            make_table(path)
    assert len(titles(path)) == 20


def test_a_follower_returns_to_an_older_version_with_the_table(path):
    follower = StoreFollower(path, EXACT)
    with LiveStore.open(path) as store:
        store.upsert([note("kept")])
        store.upsert([note("torn", 1)])
    follower.state = follower._load(path)  # a version may be read before it is synced to the disk
    assert follower.state.seq == 2
    damage(path, "data", "cut short")
    with LiveStore.open(path) as store:
        follower.poll()
        follower._loading.join()
        assert follower.poll() and "torn" not in follower.index and "kept" in follower.index
        assert store.upsert([note("after")]) == 2
        assert follower.poll() and "after" in follower.index and follower.state.seq == 2


def test_followers_switch_to_a_new_models_table_in_one_step(tmp_path):
    make_table(tmp_path / "live.lance")
    follower = StoreFollower(tmp_path, EXACT, poll_seconds=0.01).start()
    old = follower.state
    make_table(tmp_path / "live-2.lance", 30, model="model-2", seed=5)
    with pytest.raises(DataError, match="not there"):
        current.set_current(tmp_path, "live-3.lance")
    current.set_current(tmp_path, "live-2.lance")
    deadline = time.monotonic() + 20
    while follower.state is old and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (follower.index.model_fingerprint, len(follower.index)) == ("model-2", 30)
    assert follower.index.search(unit(30, seed=5)[3], 1).ids == ["n3"]
    assert old.index.search(unit(20)[3], 1).ids == ["n3"]  # a request that began earlier finishes with the old index
    with LiveStore.open(tmp_path / "live-2.lance") as store:
        assert follower.wait_for(store.upsert([note("fresh", 3)]))
    assert follower.notes(["fresh"])[0].title == "3"
    assert follower.freshness()["delay_seconds"] < 5
    follower.close()
    (tmp_path / "CURRENT").write_text("{}")
    with pytest.raises(DataError, match="damaged"):
        StoreFollower(tmp_path, EXACT).start()
    (tmp_path / "CURRENT").write_text(json.dumps({"table": "../elsewhere"}))
    with pytest.raises(DataError, match="a table beside it"):
        StoreFollower(tmp_path, EXACT).start()


def test_a_table_that_changes_its_model_is_not_followed(path):
    follower = StoreFollower(path, EXACT)
    follower.state = follower._load(path)
    dataset = LiveTable(path).dataset
    key = "notellm2.model_fingerprint"
    dataset.replace_schema_metadata({key: "another", "notellm2.embedding_dim": str(DIM)})
    with pytest.raises(ModelError, match="cannot be mixed"):
        follower.poll()


CHANGES = st.lists(st.tuples(st.integers(0, 12), st.one_of(st.none(), st.integers(1, 99))), min_size=1, max_size=6)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(groups=st.lists(CHANGES, min_size=1, max_size=8), polls=st.integers(1, 3), restart=st.booleans())
def test_the_table_and_its_follower_equal_a_plain_dict(tmp_path_factory, groups, polls, restart):
    path = tmp_path_factory.mktemp("store") / "live.lance"
    make_table(path, 10)
    expected = dict.fromkeys((f"n{row}" for row in range(10)), 0)
    follower = StoreFollower(path, EXACT)
    follower.state = follower._load(path)
    store = LiveStore.open(path, upkeep=Upkeep(fragment_rows=8, **BUSY), gather_seconds=0)
    for step, group in enumerate(groups):
        for number, value in group:
            note_id = f"n{number}"
            future = store.submit_delete([note_id]) if value is None else store.submit_upsert([note(note_id, value)])
            expected.pop(note_id, None)
            if value is not None:
                expected[note_id] = value
        future.result()
        if step % polls == 0:
            follower.poll()
        if restart and step % 2:
            store.close()
            store = LiveStore.open(path, upkeep=Upkeep(fragment_rows=8, **BUSY), gather_seconds=0)
    store.close()
    follower.poll()
    assert titles(path) == {note_id: str(value) for note_id, value in expected.items()}
    assert len(follower.index) == len(expected)
    for note_id, value in expected.items():
        vector = unit(10)[int(note_id[1:])] if value == 0 else unit(1, seed=value)[0]
        np.testing.assert_array_equal(follower.index.vector(note_id), vector)


@pytest.mark.slow
def test_twenty_kills_lose_no_acknowledged_write(path, tmp_path):
    log, total = tmp_path / "acknowledged", 0
    follower = StoreFollower(path, EXACT, poll_seconds=0.02).start()
    rng = np.random.default_rng(0)
    for kill in range(20):
        process = writers.start_writer(writers.write_notes, path, log, kill * 100_000)
        time.sleep(rng.uniform(0.0, 0.6))
        process.kill()
        process.join()
        lines = [line.split() for line in log.read_text().splitlines() if line.endswith(("gone", "there"))]
        total = len(lines)
        last = {note_id: (int(value), int(seq), state) for note_id, value, seq, state in lines}
        rows = LiveTable(path).dataset.to_table(columns=["note_id", "title", "seq", "deleted"]).to_pylist()
        held = {row["note_id"]: row for row in rows}
        assert len(held) == len(rows)
        for note_id, (value, seq, state) in last.items():
            row = held[note_id]
            if row["seq"] == seq:
                assert row["deleted"] == (state == "gone")
                assert row["deleted"] or row["title"] == str(value)
            else:  # written but not acknowledged before the kill
                assert row["seq"] > seq
    with LiveStore.open(path) as store:
        assert store.seq >= max(seq for _, seq, _ in last.values())
        assert follower.wait_for(store.upsert([note("end")]))
    assert total > 200
    held = titles(path)
    assert set(follower.index.search(unit(1)[0], len(held) + 10).ids) == set(held)
    follower.close()


def test_seeding_joins_notes_and_vectors_and_counts_what_is_missing(tmp_path):
    vectors = unit(6)
    flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), DIM)
    ids = [f"n{row}" for row in (0, 1, 2, 4, 5, 99)]
    schema = embedding_schema(DIM, ("embedding", "embedding_image"), model_fingerprint=MODEL)
    batch = pa.RecordBatch.from_arrays([pa.array(ids), flat, flat], schema=schema)
    write_table(tmp_path / "e.lance", [batch], model_fingerprint=MODEL)
    rows = [
        {"note_id": f"n{row}", "title": f"t{row}", "topics": ["a"], "content": "", "image": b"i", "created_at": None}
        for row in range(6)
    ]
    (tmp_path / "notes").mkdir()
    pq.write_table(pa.Table.from_pylist(rows[:3], NOTE_SCHEMA), tmp_path / "notes" / "a.parquet")
    pq.write_table(pa.Table.from_pylist(rows[3:], NOTE_SCHEMA), tmp_path / "notes" / "b.parquet")
    seeded = seed_from_bulk(tmp_path / "notes", tmp_path / "e.lance", tmp_path / "serving" / "live.lance")
    assert seeded == (5, 1, 1, MODEL)
    follower = StoreFollower(tmp_path / "serving", EXACT).start()
    np.testing.assert_array_equal(follower.index.vector("n4", "embedding_image"), vectors[3])
    assert [found and found.title for found in follower.notes(["n4", "n3"])] == ["t4", None]
    follower.close()
    with pytest.raises(OutputError, match="there already"):
        seed_from_bulk(tmp_path / "notes", tmp_path / "e.lance", tmp_path / "serving" / "live.lance")


def test_reads_of_a_removed_version_use_the_newest(path):
    old = LiveTable(path)
    with LiveStore.open(path, upkeep=Upkeep(**BUSY)) as store:
        for value in range(1, 6):
            store.upsert([note(f"n{row}", value) for row in range(20)])
        store._committer.close()
        store._upkeep.run(store._table, store.seq)
        store._upkeep.wait()
        with pytest.raises((OSError, ValueError, RuntimeError)):
            old.notes(["n1"])
        assert newest_if_gone(old, lambda table: table.notes(["n1"]))[0].title == "5"
        assert newest_if_gone(old, lambda table: search_titles(table, "n1", 5)) == ["n1"]
        store._table = old
        assert store.notes(["n1"])[0].title == "5"
