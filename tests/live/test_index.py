"""The live index compared with a dict and a search over all vectors, through every kind of change."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from notellm2_ray.core.errors import DataError, ModelError
from notellm2_ray.core.settings.retrieval import IndexSettings
from notellm2_ray.index.ann import AnnIndex
from notellm2_ray.live.columns import NO_TIME, NoteBatch
from notellm2_ray.live.index import LiveIndex
from notellm2_ray.live.search import Filter

DIM = 8
EXACT = IndexSettings(kind="exact", recall_queries=5)
TOPICS = ("food", "travel", "art", "cats")


def unit(rows: int, dim: int = DIM, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(rows, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def names(rows: int) -> list[str]:
    return [f"n{row}" for row in range(rows)]


def live(ids: list[str], vectors: np.ndarray, kind: IndexSettings = EXACT, **arguments) -> LiveIndex:
    batch = {name: arguments.pop(name) for name in ("topics", "created_at") if name in arguments}
    others = arguments.pop("columns", {})
    notes = NoteBatch(ids, vectors, others=others, **batch)
    return LiveIndex(notes, kind, model_fingerprint="m", others=tuple(others), **arguments)


class Twin:
    """What the index should hold: note to (vector, topics, time)."""

    def __init__(self):
        self.notes: dict[str, tuple[np.ndarray, tuple[str, ...], int]] = {}

    def search(self, query, k, exclude=(), where=None):
        scored = []
        for note_id, (vector, topics, created_at) in self.notes.items():
            if note_id in exclude or (where is not None and not self.fits(where, topics, created_at)):
                continue
            scored.append((float(vector @ query), note_id))
        return sorted(scored, reverse=True)[:k]

    @staticmethod
    def fits(where: Filter, topics, created_at) -> bool:
        if where.topics and not where.topics & set(topics):
            return False
        if not where.all_topics <= set(topics):
            return False
        ranged = where.created_from is not None or where.created_to is not None
        if ranged and created_at == NO_TIME:
            return False
        if where.created_from is not None and created_at < where.created_from:
            return False
        return where.created_to is None or created_at < where.created_to


def agree(hits, expected) -> None:
    """The same notes in the same order, except for notes whose cosines are equal up to float32 rounding."""
    assert len(hits.ids) == len(expected) == len(set(hits.ids))
    np.testing.assert_allclose(hits.scores, [score for score, _ in expected], atol=2e-6)
    for note_id, score in zip(hits.ids, hits.scores, strict=True):
        near = {other for value, other in expected if abs(value - score) < 1e-5}
        assert note_id in near or (expected and abs(expected[-1][0] - score) < 1e-5)


POOL = unit(64, seed=9)
IDS = st.sampled_from(names(24))
FILTERS = st.one_of(
    st.none(),
    st.fixed_dictionaries(
        {
            "topics": st.frozensets(st.sampled_from([*TOPICS, "none of these"]), max_size=2),
            "all_topics": st.frozensets(st.sampled_from(TOPICS), max_size=2),
            "created_from": st.one_of(st.none(), st.integers(0, 50)),
            "created_to": st.one_of(st.none(), st.integers(0, 50)),
        }
    ).map(lambda fields: Filter(**fields)),
)


class Life(RuleBasedStateMachine):
    """Upserts, deletes, batches, rebuilds and searches in any order."""

    def __init__(self):
        super().__init__()
        self.twin = Twin()
        self.index = live([], np.empty((0, DIM), np.float32), rebuild_rows=6, rebuild_share=0.0)

    @rule(data=st.data(), changes=st.lists(st.tuples(IDS, st.booleans()), min_size=1, max_size=7))
    def apply(self, data, changes):
        vectors = POOL[[data.draw(st.integers(0, len(POOL) - 1)) for _ in changes]]
        topics = [data.draw(st.lists(st.sampled_from(TOPICS), max_size=3)) for _ in changes]
        times = np.array([data.draw(st.one_of(st.just(NO_TIME), st.integers(0, 50))) for _ in changes])
        deleted = np.array([gone for _, gone in changes])
        self.index.apply(NoteBatch([note_id for note_id, _ in changes], vectors, deleted, topics, times))
        for row, (note_id, gone) in enumerate(changes):
            self.twin.notes.pop(note_id, None)
            if not gone:
                self.twin.notes[note_id] = (vectors[row], tuple(topics[row]), int(times[row]))

    @rule(ids=st.lists(IDS, max_size=4))
    def delete(self, ids):
        self.index.delete(ids)
        for note_id in ids:
            self.twin.notes.pop(note_id, None)

    @rule()
    def rebuild(self):
        self.index.rebuild()

    @rule(query=st.integers(0, len(POOL) - 1), k=st.integers(1, 30), exclude=st.lists(IDS, max_size=6), where=FILTERS)
    def search(self, query, k, exclude, where):
        hits = self.index.search(POOL[query], k, exclude=exclude, where=where)
        agree(hits, self.twin.search(POOL[query], k, set(exclude), where))

    @rule(note=IDS, k=st.integers(1, 30), where=FILTERS)
    def search_by_id(self, note, k, where):
        if note not in self.twin.notes:
            with pytest.raises(DataError, match="not in the index"):
                self.index.search(note, k, where=where)
            return
        hits = self.index.search(note, k, where=where)
        agree(hits, self.twin.search(self.twin.notes[note][0], k, {note}, where))

    @invariant()
    def holds_the_same_notes(self):
        assert len(self.index) == len(self.twin.notes)
        assert all((note_id in self.index) == (note_id in self.twin.notes) for note_id in names(24))

    def teardown(self):
        self.index.wait()


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def clustered(rows: int, dim: int, clusters: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(clusters, dim))
    vectors = (centres[rng.integers(clusters, size=rows)] + 0.5 * rng.normal(size=(rows, dim))).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("kind", ["ivf", "hnsw", "ivf_pq"])
def test_recall_with_fresh_and_deleted_notes(kind):
    count = 6000
    vectors = clustered(int(count * 1.05), 32, 100, seed=1)
    settings_of = IndexSettings(kind=kind, recall_queries=200, recall_target=0.995)
    index = live(names(count), vectors[:count], settings_of, rebuild_rows=10**9)
    ids = names(len(vectors))
    gone = set(np.random.default_rng(2).choice(count, count // 20, replace=False).tolist())
    index.upsert(NoteBatch(ids[count:], vectors[count:]))
    index.delete([f"n{row}" for row in gone])
    left = np.array([row for row in range(len(vectors)) if row not in gone])
    found, wanted = 0, 0
    for query in left[::60]:
        hits = index.search(f"n{query}", 100)
        cosines = vectors[left] @ vectors[query]
        cosines[left == query] = -2
        exact = {f"n{left[row]}" for row in np.argsort(-cosines)[:100]}
        assert len(hits.ids) == 100
        assert not {f"n{row}" for row in gone} & set(hits.ids)
        found += len(exact & set(hits.ids))
        wanted += 100
    assert found / wanted >= (0.99 if kind == "ivf" else 0.9 if kind == "hnsw" else 0.75)


@pytest.mark.parametrize("kind", ["exact", "ivf", "hnsw", "ivf_pq"])
def test_k_notes_are_found_even_if_every_near_one_was_replaced(kind):
    vectors = clustered(3000, 16, 10, seed=4)
    index = live(names(3000), vectors, IndexSettings(kind=kind, pq_bytes=8, recall_queries=50), rebuild_rows=10**9)
    order = np.argsort(-(vectors @ vectors[0]))
    index.delete([f"n{row}" for row in order[:2600]])
    hits = index.search(vectors[0], 100)
    assert len(hits.ids) == 100
    assert set(hits.ids) <= {f"n{row}" for row in order[2600:]}
    assert len(index.search(vectors[0], 1000).ids) == 400
    assert len(index.search(vectors[0], 100, exclude=[f"n{row}" for row in order[2600:2980]]).ids) == 20


def test_a_wide_filter_is_searched_through_the_main_index(monkeypatch):
    monkeypatch.setattr("notellm2_ray.live.search.EXACT_ROWS", 100)
    count = 4000
    vectors = clustered(count, 16, 40, seed=5)
    topics = [[TOPICS[row % 4]] for row in range(count)]
    index = live(names(count), vectors, IndexSettings(kind="ivf", recall_queries=100), topics=topics)
    fresh = clustered(200, 16, 40, seed=6)
    index.upsert(NoteBatch([f"f{row}" for row in range(200)], fresh, topics=[["food"]] * 200))
    index.delete([f"n{row}" for row in range(0, 400, 8)])
    twin = {f"n{row}": vectors[row] for row in range(0, count, 4) if row >= 400 or row % 8}
    twin |= {f"f{row}": fresh[row] for row in range(200)}
    matrix, ids = np.array(list(twin.values())), list(twin)
    overlaps = []
    for query in vectors[::200]:
        hits = index.search(query, 50, where=Filter(topics=frozenset({"food"})))
        exact = {ids[row] for row in np.argsort(-(matrix @ query))[:50]}
        assert len(hits.ids) == 50
        assert set(hits.ids) <= set(twin)
        overlaps.append(len(exact & set(hits.ids)) / 50)
    assert np.mean(overlaps) > 0.97


def test_similarity_by_modality_and_missing_vectors():
    image, text = unit(4, seed=1), unit(4, seed=2)
    text[2] = np.nan
    index = live(names(4), unit(4), columns={"embedding_image": image, "embedding_text": text})
    expected = [float(image[0] @ image[1]), None]
    assert index.similarity("n0", ["n1", "gone"], "embedding_image") == [pytest.approx(expected[0], abs=1e-6), None]
    assert index.similarity("n0", ["n2"], "embedding_text") == [None]
    assert index.similarity("gone", ["n2"]) == [None]
    fresh = unit(1, seed=5)
    index.upsert(NoteBatch(["n1"], fresh, others={"embedding_image": fresh}))
    index.rebuild()
    assert index.similarity("n0", ["n1"], "embedding_image") == [pytest.approx(float(image[0] @ fresh[0]), abs=1e-6)]
    assert index.similarity("n0", ["n1"], "embedding_text") == [None]
    np.testing.assert_array_equal(index.vector("n1"), fresh[0])
    assert index.vector("n1", "embedding_text") is None
    with pytest.raises(DataError, match="no column 'other'"):
        index.similarity("n0", ["n1"], "other")


def test_a_saved_index_of_the_same_notes_is_used():
    vectors = unit(50)
    saved = AnnIndex.build(names(50), vectors, EXACT)
    assert live(names(50), vectors, main=saved)._snapshot.main is saved
    assert live(names(49), vectors[:49], main=saved)._snapshot.main is not saved


def test_bad_vectors_queries_and_models_are_refused_and_change_nothing():
    index = live(names(5), unit(5))
    bad = unit(2)
    bad[1, 0] = np.nan
    with pytest.raises(DataError, match="'b'"):
        index.upsert(NoteBatch(["a", "b"], bad))
    with pytest.raises(DataError, match="shape"):
        index.upsert(NoteBatch(["a"], unit(1, dim=4)))
    assert "a" not in index
    with pytest.raises(DataError, match="4 dimensions"):
        index.search(unit(1, dim=4)[0], 3)
    with pytest.raises(DataError, match="divide it by its length"):
        index.search(np.zeros(DIM), 3)
    with pytest.raises(DataError, match="at least one"):
        index.search("n0", 0)
    with pytest.raises(ModelError, match="two models"):
        index.search("n0", 3, model_fingerprint="another")


def test_a_failed_rebuild_keeps_the_old_index(monkeypatch, caplog):
    index = live(names(5), unit(5))
    with monkeypatch.context() as patch:
        patch.setattr(AnnIndex, "build", lambda *args, **kwargs: 1 / 0)
        index.upsert(NoteBatch(["new"], unit(1, seed=3)))
        index.rebuild()
    assert index.info()["rebuild_failures"] == 1
    assert "rebuilding the live index failed" in caplog.text
    assert index.search(unit(1, seed=3)[0], 1).ids == ["new"]
    index.rebuild()
    assert index.info()["fresh"] == 0


def test_searches_during_changes_and_rebuilds_see_every_note_once_and_no_excluded_one():
    """One thread rewrites pairs of notes as one batch; searchers must always see both in the same version."""
    count = 400
    vectors = unit(count)
    index = live(names(count), vectors, IndexSettings(kind="ivf", num_lists=4, recall_queries=20), rebuild_rows=150)
    versions = unit(2000, seed=11)
    stop, wrong = threading.Event(), []

    def change():
        for step in range(1500):
            first = 2 * (step % (count // 2))
            index.upsert(NoteBatch([f"n{first}", f"n{first + 1}"], versions[[step, step]]))
        stop.set()

    def look():
        rng = np.random.default_rng()
        while not stop.is_set():
            hits = index.search(versions[rng.integers(2000)], count, exclude=["n6", "n7"])
            scores = dict(zip(hits.ids, hits.scores, strict=True))
            if len(hits.ids) != count - 2 or len(scores) != count - 2 or "n6" in scores or "n7" in scores:
                wrong.append(len(scores))
            torn = [
                row for row in range(0, count, 2) if row != 6 and abs(scores[f"n{row}"] - scores[f"n{row + 1}"]) > 1e-5
            ]
            if started.is_set() and torn:
                wrong.append(torn)
            index.search("n6", 5)

    started = threading.Event()
    for first in range(0, count, 2):
        index.upsert(NoteBatch([f"n{first}", f"n{first + 1}"], versions[[first, first]]))
    started.set()
    threads = [threading.Thread(target=look) for _ in range(3)] + [threading.Thread(target=change)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    index.wait()
    assert wrong == []
    assert index.info()["rebuilds"] > 0
    assert len(index) == count


def test_changes_made_during_a_rebuild_are_kept(monkeypatch):
    index = live(names(50), unit(50), rebuild_rows=10**9)
    build, begun, go_on = AnnIndex.build, threading.Event(), threading.Event()

    def slow(*args, **kwargs):
        begun.set()
        go_on.wait(10)
        return build(*args, **kwargs)

    monkeypatch.setattr(AnnIndex, "build", slow)
    thread = threading.Thread(target=index.rebuild)
    thread.start()
    begun.wait(10)
    fresh = unit(2, seed=8)
    index.upsert(NoteBatch(["n3", "new"], fresh))
    index.delete(["n4"])
    assert index.search(fresh[0], 1).ids == ["n3"]
    go_on.set()
    thread.join()
    deadline = time.monotonic() + 10
    while index.info()["rebuilding"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert index.info()["in_main"] == 50
    assert index.search(fresh[0], 1).ids == ["n3"]
    assert index.search(fresh[1], 1).ids == ["new"]
    assert "n4" not in index
    assert len(index) == 50


def test_a_process_that_ends_during_a_rebuild_exits_cleanly():
    script = """
import numpy as np
from notellm2_ray.core.settings.retrieval import IndexSettings
from notellm2_ray.live.index import LiveIndex
from notellm2_ray.live.columns import NoteBatch
vectors = np.random.default_rng(0).normal(size=(20000, 16)).astype(np.float32)
vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
kind = IndexSettings(kind="ivf", num_lists=64, recall_queries=10)
index = LiveIndex(NoteBatch([str(n) for n in range(20000)], vectors), kind, model_fingerprint="m", rebuild_rows=1,
                  rebuild_share=0.0)
index.delete(["1"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
