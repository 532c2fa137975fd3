"""Strata, the published filter, missing vectors, and the results that the tables print."""

import json

import numpy as np
import pyarrow as pa
import pytest

from notellm2_ray.core.errors import ConfigError, DataError
from notellm2_ray.core.schema import PAIR_SCHEMA
from notellm2_ray.core.settings.retrieval import EvaluateSettings
from notellm2_ray.evaluate.recall import tables
from notellm2_ray.evaluate.recall.results import MethodRanks, evaluate
from notellm2_ray.evaluate.recall.task import RetrievalTask, one_pair_per_note


def pair_table(pairs: list[tuple[str, str]]) -> pa.Table:
    queries, targets = zip(*pairs, strict=True) if pairs else ((), ())
    return pa.table({"query_id": queries, "target_id": targets, "score": [1.0] * len(pairs)}, schema=PAIR_SCHEMA)


def small_task(pairs, pool, counts=None, **settings) -> RetrievalTask:
    counts = counts or dict.fromkeys([*pool, *(note for pair in pairs for note in pair)], 80)
    return RetrievalTask.build(pair_table(pairs), pool, counts, EvaluateSettings(**settings))


def test_short_and_long_are_strictly_below_and_above_their_bounds_and_cold_notes_have_no_training_click():
    counts = {"a": 49, "b": 50, "c": 165, "d": 166}
    pairs = pair_table([("a", "b"), ("b", "a"), ("c", "d"), ("d", "c")])
    task = RetrievalTask.build(pairs, list("abcd"), counts, EvaluateSettings(), clicked={"a"})
    masks = {name: mask.tolist() for name, mask in task.strata.items()}
    assert masks == {
        "all": [True] * 4,
        "short_query": [True, False, False, False],
        "short_target": [False, True, False, False],
        "long_query": [False, False, False, True],
        "long_target": [False, False, True, False],
        "warm_query": [True, False, False, False],
        "cold_query": [False, True, True, True],
        "warm_target": [False, True, False, False],
        "cold_target": [True, False, True, True],
    }


def test_the_published_filter_takes_each_note_once_and_drops_kept_queries_from_the_pool():
    queries, targets, pool = one_pair_per_note(list("abcae"), list("bcdef"), list("abcdef"))
    assert (queries, targets) == (["a", "c", "e"], ["b", "d", "f"])
    assert pool == ["b", "d", "f"]
    task = small_task([("a", "b"), ("b", "a"), ("c", "d")], list("abcd"), one_pair_per_note=True)
    assert (task.query_rows == -1).all()
    assert task.target_ids.tolist() == ["b", "d"]


def test_embedding_ranks_do_not_depend_on_the_order_of_the_table():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(6, 4)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    ids = np.array(list("abcdeX"), dtype=object)
    task = small_task([("a", "b"), ("X", "c")], list("abcde"))  # X is outside the pool
    shuffle = rng.permutation(6)
    ranks = task.embedding_ranks(ids, vectors)
    assert ranks.tolist() == task.embedding_ranks(ids[shuffle], vectors[shuffle]).tolist()
    scores = vectors @ vectors.T
    assert ranks[0] == sum(scores[0, row] >= scores[0, 1] for row in (1, 2, 3, 4))
    assert ranks[1] == sum(scores[5, row] >= scores[5, 2] for row in range(5))


def test_notes_without_a_vector_count_against_the_method():
    vectors = np.eye(4, dtype=np.float32)
    vectors[1] = vectors[0]
    task = small_task([("a", "b"), ("a", "e"), ("e", "a"), ("f", "b")], list("abcdef"))
    with_gaps = task.embedding_ranks(np.array(list("abcd"), dtype=object), vectors)
    # b is nearest to a, but e and f are unknown and stand above it; the others have the worst rank of 5
    assert with_gaps.tolist() == [3, 5, 5, 5]
    with pytest.raises(DataError, match="4 of the pool's 6 notes have no vector"):
        task.embedding_ranks(np.array(list("ab"), dtype=object), vectors[:2])


def test_bad_tasks_are_refused_by_name():
    with pytest.raises(DataError, match="0 test pairs"):
        small_task([], ["a"])
    with pytest.raises(DataError, match="'z' is not in the test pool"):
        small_task([("a", "z")], ["a", "b"])
    with pytest.raises(DataError, match="token count for note 'b'"):
        small_task([("a", "b")], ["a", "b"], {"a": 3})
    for wrong, message in [({"cutoffs": (100, 10)}, "increasing"), ({"seeds": (1, 1)}, "duplicate")]:
        with pytest.raises((ConfigError, ValueError), match=message):
            EvaluateSettings(**wrong)


@pytest.fixture(scope="module")
def results():
    rng = np.random.default_rng(0)
    notes = [f"n{row}" for row in range(300)]
    pairs = [(notes[row], notes[row + 100]) for row in range(150)]
    counts = {note: 20 if row < 40 else 100 for row, note in enumerate(notes)}
    settings = EvaluateSettings(cutoffs=(10, 100, 1000))
    task = RetrievalTask.build(pair_table(pairs), notes, counts, settings, clicked=notes[:60])

    def ranks(scale):
        return np.minimum(1 + rng.exponential(scale, size=150).astype(int), 299)

    rankings = [
        MethodRanks("bm25", "text", {None: ranks(200)}, "baseline", "it reads words."),
        MethodRanks("random", "-", {seed: task.random_ranks(seed) for seed in (42, 43, 44)}, "baseline"),
        MethodRanks("basic", "multimodal", {seed: ranks(60) for seed in (42, 43, 44)}, "trained_baseline"),
        MethodRanks("basic", "image", {seed: ranks(600) for seed in (42, 43, 44)}),
        MethodRanks("notellm2", "multimodal", {42: ranks(20)}),
    ]
    return evaluate(task, rankings, reference="basic")


def test_results_are_json_and_hold_each_seed(results):
    assert json.loads(json.dumps(results)) == results
    cell = results["rows"][2]["recall"]["all"]["10"]
    assert list(cell["seeds"]) == ["42", "43", "44"]
    assert cell["mean"] == pytest.approx(np.mean(list(cell["seeds"].values())))
    assert results["rows"][0]["seeds"] == []
    assert {name: count for name, count in results["pairs"].items() if count} == {
        "all": 150,
        "short_query": 40,
        "warm_query": 60,
        "cold_query": 90,
        "cold_target": 150,
    }
    assert results["rows"][0]["recall"]["short_target"]["10"] is None
    assert results["rows"][0]["curve"]["all"]["recall"][-1] == 1.0


def test_saturated_cutoffs_are_marked_and_not_tested(results):
    assert results["saturated"] == [1000]
    assert all(test["cutoff"] != 1000 for test in results["tests"])
    text = str(tables.recall_table(results))
    assert "R@1k: 100 for any method" in text
    assert "R@1k" not in text.splitlines()[1]
    assert "k covers the whole pool" in text


def test_a_cutoff_is_saturated_from_the_number_of_other_notes_on():
    pairs = [("a", "b"), ("b", "c")]
    assert small_task(pairs, list("abcd"), cutoffs=(2, 3, 4)).saturated == (3, 4)
    assert small_task([*pairs, ("X", "a")], list("abcd"), cutoffs=(2, 3, 4)).saturated == (4,)


def test_the_table_has_the_papers_layout(results):
    lines = str(tables.recall_table(results)).splitlines()
    assert "All Pair (150)" in lines[0]
    assert "Short Query Pair (40)" in lines[0]
    assert lines[1].split()[:5] == ["Method", "Input", "R@10", "R@100", "R@10"]
    rows = {line.split()[0]: line for line in lines[3:7]}
    assert list(rows) == ["bm25", "random", "basic", "notellm2"]
    assert "±" in rows["basic"]
    assert "±" not in rows["bm25"]
    assert "†*" in rows["notellm2"]
    assert "*" not in rows["basic"]
    assert "bm25: it reads words." in lines
    assert "over query notes alone, as there are too few seeds" in lines[-1]  # notellm2 has one
    assert len({len(line) for line in (lines[1].rstrip(), lines[2])}) <= 2
    by_input = str(tables.recall_table(results, inputs=True)).splitlines()
    assert [line.split()[:2] for line in by_input[3:5]] == [["basic", "multimodal"], ["basic", "image"]]
    assert "n/a" in "\n".join(by_input)


def test_warm_and_cold_notes_have_a_table_of_their_own(results):
    lines = str(tables.warmth_table(results)).splitlines()
    assert all(name in lines[0] for name in ("Warm Query Pair (60)", "Cold Query Pair (90)", "Cold Target Pair (150)"))
    assert "Warm Target" not in lines[0]
    cold = {**results, "pairs": {**results["pairs"], "warm_query": 0}}
    assert tables.warmth_table(cold) is None
    assert "All queries and targets are cold" in str(tables.recall_table(cold))
    assert "are cold" not in str(tables.recall_table(results))


def test_marks_are_above_the_best_other_row_and_the_star_above_the_best_baseline(results):
    tests = [test for test in results["tests"] if test["stratum"] == "all" and test["cutoff"] == 10]
    roles = ("best other", "best baseline", "reference")
    by_role = {role: [test for test in tests if test["role"] == role] for role in roles}
    (top,) = by_role["best other"]
    assert (top["method"], top["against"]) == ("notellm2", "basic")  # basic is a trained baseline
    assert [(test["method"], test["against"]) for test in by_role["best baseline"]] == [("notellm2", "basic")]
    assert {test["method"] for test in by_role["reference"]} == {"bm25", "random", "notellm2"}
    assert (top["p_seeds"], top["p"]) == (None, top["p_units"])  # one seed
    assert top["p_holm"] >= top["p"]
    assert {test["against_inputs"] for test in results["tests"] if test["against"] == "basic"} == {"multimodal"}
    text = str(tables.significance_table(results, "reference"))
    assert "one-sample t-test" in text or "Welch's t-test" in text


def test_a_method_given_twice_or_with_too_few_ranks_is_refused():
    task = small_task([("a", "b")], ["a", "b", "c"])
    ranks = MethodRanks("x", "text", {1: np.array([1])})
    with pytest.raises(DataError, match="twice"):
        evaluate(task, [ranks, ranks])
    with pytest.raises(DataError, match="2 ranks for 1 pairs"):
        evaluate(task, [MethodRanks("x", "text", {1: np.array([1, 2])})])
    with pytest.raises(DataError, match="reference 'y'"):
        evaluate(task, [ranks], reference="y")
