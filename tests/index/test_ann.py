"""Every kind of index compared with a plain search over all vectors; exclusions as a property."""

import json
import logging
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from notellm2_ray.core.config import build
from notellm2_ray.core.errors import ConfigError, DataError, OutputError
from notellm2_ray.core.settings.retrieval import IndexSettings
from notellm2_ray.index.ann import AnnIndex

KINDS = {
    "exact": IndexSettings(kind="exact", recall_queries=50),
    "ivf": IndexSettings(kind="ivf", num_lists=8, recall_queries=50),
    "ivf_pq": IndexSettings(kind="ivf_pq", num_lists=4, pq_bytes=8, recall_queries=50),
    "hnsw": IndexSettings(kind="hnsw", hnsw_neighbors=8, hnsw_search=16, recall_queries=50),
}


def clustered(rows: int, dim: int = 16, clusters: int = 30, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(clusters, dim))
    vectors = (centres[rng.integers(clusters, size=rows)] + 0.4 * rng.normal(size=(rows, dim))).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def names(rows: int) -> list[str]:
    return [f"n{row}" for row in range(rows)]


def twin(ids, vectors, query, k, excluded=()) -> list[str]:
    """Plain search: score all notes, sort them, drop the excluded ones."""
    order = np.argsort(-(vectors @ query), kind="stable")
    return [ids[row] for row in order if ids[row] not in excluded][:k]


VECTORS = clustered(400)
IDS = names(400)
BUILT = {}


def built(kind: str) -> AnnIndex:
    if kind not in BUILT:
        BUILT[kind] = AnnIndex.build(IDS, VECTORS, KINDS[kind], seed=1)
    return BUILT[kind]


def test_exact_equals_the_plain_search():
    found, scores = built("exact").search(VECTORS[:40], 15, exclude_ids=["n3", "n200"])
    for row in range(40):
        assert found[row].tolist() == twin(IDS, VECTORS, VECTORS[row], 15, {"n3", "n200"})
        np.testing.assert_allclose(scores[row], sorted(scores[row], reverse=True))
    assert scores[0, 0] == pytest.approx(1, abs=1e-5)


def test_ivf_reaches_its_target_on_clustered_notes_with_few_cells(caplog):
    vectors = clustered(6000, dim=32, clusters=200, seed=3)
    with caplog.at_level(logging.INFO, logger="notellm2_ray"):
        index = AnnIndex.build(names(6000), vectors, IndexSettings(kind="ivf", recall_queries=200), seed=5)
    exact = AnnIndex.build(names(6000), vectors, IndexSettings(kind="exact"), seed=5)
    found, truth = index.search(vectors[:200], 100)[0], exact.search(vectors[:200], 100)[0]
    recall = np.mean([len(set(a) & set(b)) for a, b in zip(found, truth, strict=True)]) / 100
    assert recall > 0.97
    assert index.info["recall_at_100"] >= 0.99
    assert index.info["num_probes"] < index.info["num_lists"]
    assert "recall@100" in caplog.text
    assert "queries/s" in caplog.text


def test_recall_is_measured_honestly_when_too_few_cells_are_searched():
    vectors = clustered(3000, dim=32, clusters=2000, seed=3)  # as good as unclustered
    starved = AnnIndex.build(names(3000), vectors, IndexSettings(kind="ivf", num_lists=8, num_probes=1), seed=5)
    own = starved.search(vectors[:100], 101)[0]
    truth = [set(twin(names(3000), vectors, vectors[row], 101)) - {f"n{row}"} for row in range(100)]
    recall = np.mean([len(set(found) & best) / 100 for found, best in zip(own, truth, strict=True)])
    assert starved.info["recall_at_100"] == pytest.approx(recall, abs=0.05)
    assert starved.info["recall_at_100"] < 0.9


def test_auto_is_exact_for_few_notes_and_copies_of_a_note_count_for_recall():
    vectors = np.repeat(clustered(3), 70, axis=0)
    index = AnnIndex.build(names(210), vectors, IndexSettings())
    assert index.info["kind"] == "exact"
    assert index.info["recall_at_10"] == index.info["recall_at_100"] == 1.0


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_excluded_notes_are_never_returned_and_k_others_are(kind, data):
    excluded = set(data.draw(st.lists(st.sampled_from([*IDS, "unknown"]), max_size=30)))
    if data.draw(st.booleans()):  # all but a few are excluded
        excluded = set(IDS) - set(data.draw(st.lists(st.sampled_from(IDS), min_size=1, max_size=9)))
    k = data.draw(st.integers(1, 420))
    query = data.draw(st.integers(0, len(IDS) - 1))
    found, scores = built(kind).search(VECTORS[query : query + 1], k, exclude_ids=sorted(excluded))
    returned = [note_id for note_id in found[0] if note_id]
    remaining = len(set(IDS) - excluded)
    assert found.shape == scores.shape == (1, min(k, len(IDS)))
    assert not excluded & set(returned)
    assert len(returned) == len(set(returned)) == min(k, remaining)
    assert np.isfinite(scores[0, : len(returned)]).all()
    assert (scores[0, len(returned) :] == -np.inf).all()


@pytest.mark.parametrize("kind", KINDS)
def test_exclusions_per_query(kind):
    own = [[note_id, "n7"] for note_id in IDS[:20]]
    found, _ = built(kind).search(VECTORS[:20], 30, exclude_ids=own)
    for row in range(20):
        assert not set(own[row]) & set(found[row])
        assert (found[row] != "").all()
        if kind == "exact":
            assert found[row].tolist() == twin(IDS, VECTORS, VECTORS[row], 30, set(own[row]))
    with pytest.raises(DataError, match="give one per query"):
        built(kind).search(VECTORS[:20], 30, exclude_ids=own[:3])


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_is_the_same_index(kind, tmp_path):
    index = built(kind)
    index.save(tmp_path)
    loaded = AnnIndex.load(tmp_path)
    for one, two in zip(index.search(VECTORS[:9], 20), loaded.search(VECTORS[:9], 20), strict=True):
        np.testing.assert_array_equal(one, two)
    assert (loaded.info, loaded.settings) == (index.info, index.settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ids.parquet", "index.faiss", "index.json"]


def test_the_same_seed_gives_the_same_cells():
    again = AnnIndex.build(IDS, VECTORS, KINDS["ivf_pq"], seed=1)
    for one, two in zip(built("ivf_pq").search(VECTORS, 10), again.search(VECTORS, 10), strict=True):
        np.testing.assert_array_equal(one, two)


def test_missing_and_damaged_index_files_are_named(tmp_path):
    with pytest.raises(OutputError, match=r"index\.json is missing"):
        AnnIndex.load(tmp_path)
    built("exact").save(tmp_path)
    (tmp_path / "index.faiss").write_bytes(b"not an index")
    with pytest.raises(OutputError, match="damaged"):
        AnnIndex.load(tmp_path)
    AnnIndex.build(IDS[:5], VECTORS[:5], KINDS["exact"]).save(tmp_path)
    (tmp_path / "ids.parquet").unlink()
    with pytest.raises(OutputError, match=r"ids\.parquet is missing"):
        AnnIndex.load(tmp_path)
    AnnIndex.build(IDS[:5], VECTORS[:5], KINDS["exact"]).save(tmp_path)
    (tmp_path / "index.json").write_text(json.dumps([1]))
    with pytest.raises(OutputError, match="damaged"):
        AnnIndex.load(tmp_path)
    built("exact").save(tmp_path)
    shutil.copy(tmp_path / "ids.parquet", tmp_path / "others")
    AnnIndex.build(IDS[:5], VECTORS[:5], KINDS["exact"]).save(tmp_path)
    (tmp_path / "others").rename(tmp_path / "ids.parquet")
    with pytest.raises(OutputError, match="400 ids for 5 vectors"):
        AnnIndex.load(tmp_path)


def test_bad_vectors_queries_and_pools_are_refused():
    exact = KINDS["exact"]
    with pytest.raises(DataError, match="pool is empty"):
        AnnIndex.build([], np.empty((0, 4), np.float32), exact)
    for value in (np.nan, np.inf, 0.0):
        bad = VECTORS[:10].copy()
        bad[4] = value
        with pytest.raises(DataError, match="'n4'"):
            AnnIndex.build(IDS[:10], bad, exact)
        with pytest.raises(DataError, match="query 4"):
            built("exact").search(bad, 3)
    with pytest.raises(DataError, match="'a' appears more than once"):
        AnnIndex.build(["a", "b", "a"], VECTORS[:3], exact)
    with pytest.raises(DataError, match="3 dimensions"):
        built("exact").search(np.eye(3), 3)
    with pytest.raises(DataError, match="pool is empty"):
        built("exact").search(VECTORS[:1], 3, exclude_ids=IDS)


def test_settings_that_do_not_fit_the_vectors_are_refused():
    for wrong, message in [
        ({"kind": "ivf", "num_lists": 500}, "only 400 notes"),
        ({"kind": "ivf", "num_lists": 4, "num_probes": 9}, "more than the 4 cells"),
        ({"kind": "ivf_pq", "pq_bytes": 5}, "does not divide the 16"),
        ({"gpu": True}, "GPU"),
    ]:
        with pytest.raises(ConfigError, match=message):
            AnnIndex.build(IDS, VECTORS, IndexSettings(**wrong))
    with pytest.raises(ConfigError, match="at least 256 notes"):
        AnnIndex.build(IDS[:99], VECTORS[:99], KINDS["ivf_pq"])
    for wrong, message in [
        ({"kind": "hnsw", "gpu": True}, "no GPU search"),
        ({"kind": "exact", "num_probes": 3}, "ignored"),
    ]:
        with pytest.raises(ConfigError, match=message):
            build(IndexSettings, wrong)


def test_one_note_and_two_notes_can_be_indexed():
    for count in (1, 2):
        found, _ = AnnIndex.build(IDS[:count], VECTORS[:count], IndexSettings()).search(VECTORS[:1], 5)
        assert found.tolist() == [IDS[:count]]
