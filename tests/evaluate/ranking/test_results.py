"""The comparison of rankers: strata, intervals, tests, missing scores."""

import json

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.schema import CANDIDATE_SCHEMA, EXAMPLE_SCHEMA, SCORE_SCHEMA
from notellm2_ray.core.settings import RankEvaluateSettings
from notellm2_ray.evaluate.ranking.results import MethodScores, evaluate_protocol
from notellm2_ray.evaluate.ranking.task import RankingTask
from notellm2_ray.evaluate.user_tests import bootstrap_p, interval, permutation_tests, resampled_weights

NUM_USERS, SIZE = 60, 6
SETTINGS = RankEvaluateSettings(cutoffs=(1, 3))


def tables(num_users=NUM_USERS, size=SIZE):
    """Candidates and examples: user u's target is t{u}, negatives n{u}-{i}."""
    candidates, examples = [], []
    for user in range(num_users):
        name = f"u{user}/3"
        examples.append(
            {"example_id": name, "user_id": f"u{user}", "block": 0, "history_ids": ["h"], "target_id": f"t{user}",
             "timestamp": 0}
        )  # fmt: skip
        notes = [f"t{user}", *(f"n{user}-{i}" for i in range(size - 1))]
        candidates += [{"example_id": name, "note_id": note, "label": int(note[0] == "t")} for note in notes]
    return pa.Table.from_pylist(candidates, CANDIDATE_SCHEMA), pa.Table.from_pylist(examples, EXAMPLE_SCHEMA)


def clicks(num_users=NUM_USERS):
    """The targets of the first ten users are cold."""
    return {f"t{user}": 1 + user % 3 for user in range(10, num_users)} | {"n0-0": 5}


@pytest.fixture(scope="module")
def task():
    return RankingTask.build("uniform", *tables(), clicks())


def noisy(task, strength, seed):
    return np.random.default_rng(seed).normal(size=len(task.groups)) + strength * task.labels


def scored(task, scores):
    columns = {"example_id": task.example_ids[task.groups], "note_id": task.note_ids}
    return pa.table({**columns, "label": task.labels.astype(np.int8), "score": scores.astype(np.float32)}, SCORE_SCHEMA)


def test_strata_and_figures(task):
    good = {seed: noisy(task, 2.0, seed) for seed in (1, 2, 3)}
    methods = [
        MethodScores("random", "baseline", {seed: task.random_scores(seed) for seed in (1, 2, 3)}),
        MethodScores("popularity", "baseline", {None: task.scores_by_note(clicks())}),
        MethodScores("mllm_msr", "ranker", good),
        MethodScores("direct", "ranker", {seed: noisy(task, 0.5, seed + 9) for seed in (1, 2, 3)}),
        MethodScores("mllm_msr, shuffled image", "control", {1: noisy(task, 0.0, 5)}),
    ]
    compared = {"references": ("popularity",), "untested": ("random",)}
    results = evaluate_protocol(task, methods, SETTINGS, seed=42, **compared)
    assert json.loads(json.dumps(results)) == results
    assert results["examples"] == {"all": 60, "warm": 50, "cold": 10}
    by_name = {row["method"]: row["figures"] for row in results["rows"]}
    main = by_name["mllm_msr"]
    assert main["all"]["auc"]["low"] < main["all"]["auc"]["mean"] < main["all"]["auc"]["high"]
    assert set(main["all"]["hr@1"]["seeds"]) == {"1", "2", "3"}
    weighted = (50 * main["warm"]["ndcg@3"]["mean"] + 10 * main["cold"]["ndcg@3"]["mean"]) / 60
    assert main["all"]["ndcg@3"]["mean"] == pytest.approx(weighted)
    assert by_name["popularity"]["cold"]["user_auc"]["mean"] <= 0.5  # nothing is below no clicks
    assert by_name["popularity"]["all"]["auc"]["deviation"] is None
    found = {
        (t["method"], t["against"], t["role"]): t
        for t in results["tests"]
        if (t["stratum"], t["figure"]) == ("all", "auc")
    }
    assert set(found) == {
        ("mllm_msr", "popularity", "reference"),
        ("direct", "popularity", "reference"),
        ("mllm_msr, shuffled image", "popularity", "reference"),
        ("mllm_msr", "direct", "ablation"),
        ("mllm_msr", "mllm_msr, shuffled image", "control"),
    }
    assert found["mllm_msr", "direct", "ablation"]["significant"]
    assert found["mllm_msr", "direct", "ablation"]["seeds_test"] == "Welch's t-test"
    assert evaluate_protocol(task, methods, SETTINGS, seed=42, **compared) == results


def test_no_cold_targets_leave_the_stratum_empty():
    candidates, examples = tables(4)
    task = RankingTask.build("popular", candidates, examples, {f"t{user}": 1 for user in range(4)})
    results = evaluate_protocol(task, [MethodScores("x", "ranker", {1: noisy(task, 1, 1)})], SETTINGS, 1)
    assert results["rows"][0]["figures"]["cold"] is None
    assert results["tests"] == []


def test_scores_in_any_order_are_laid_over_the_candidates(task):
    values = noisy(task, 1.0, 3)
    table = scored(task, values)
    shuffled = table.take(np.random.default_rng(0).permutation(table.num_rows))
    assert task.align(shuffled, "x") == pytest.approx(values)


def test_a_candidate_without_a_score_counts_against_the_method(task):
    table = scored(task, noisy(task, 9.0, 3)).slice(2)  # without user 0's target and one negative
    values = task.align(table, "x")
    assert values[0] == -np.inf
    assert values[1] == np.inf
    figures = evaluate_protocol(task, [MethodScores("x", "ranker", {1: values})], SETTINGS, 1)["rows"][0]["figures"]
    assert figures["all"]["hr@1"]["mean"] == pytest.approx(59 / 60)


def test_scores_of_something_else_are_refused(task):
    table = scored(task, noisy(task, 1.0, 3))
    with pytest.raises(DataError, match="have no score"):
        task.align(table.slice(0, 20), "scores of x")
    with pytest.raises(DataError, match="scored twice"):
        task.align(pa.concat_tables([table, table.slice(0, 1)]), "x")
    with pytest.raises(DataError, match="labels differ"):
        task.align(scored_with_labels(table), "x")
    with pytest.raises(DataError, match="NaN"):
        task.align(scored(task, np.full(len(task.groups), np.nan)), "x")
    with pytest.raises(DataError, match="twice"):
        evaluate_protocol(task, [MethodScores("x", "ranker", {1: task.random_scores(1)})] * 2, SETTINGS, 1)
    with pytest.raises(DataError, match="scores for"):
        evaluate_protocol(task, [MethodScores("x", "ranker", {1: np.zeros(3)})], SETTINGS, 1)


def scored_with_labels(table):
    return table.set_column(2, "label", pa.array([0] * table.num_rows, pa.int8()))


def test_candidates_of_unknown_examples_are_refused():
    candidates, examples = tables(3)
    with pytest.raises(DataError, match="not in its examples file"):
        RankingTask.build("uniform", candidates, examples.slice(1), {})
    with pytest.raises(DataError, match="no test candidates"):
        RankingTask.build("uniform", candidates.slice(0, 0), examples, {})


def test_users_are_resampled_as_a_whole():
    users = np.array([0, 0, 1, 2, 2, 2])
    weights = resampled_weights(users, seed=3, num_resamples=200)
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, 3] == weights[:, 5]).all()
    drawn = weights[:, 0] + weights[:, 2] + weights[:, 3]
    assert (drawn == 3).all()
    assert weights.mean(axis=0) == pytest.approx(np.ones(6), abs=0.2)


def test_the_interval_of_a_mean_is_about_the_normal_one():
    values = np.random.default_rng(1).normal(size=400)
    weights = resampled_weights(np.arange(400), seed=1)
    low, high = interval(weights @ values / weights.sum(axis=1), 0.95)
    half = 1.96 * values.std(ddof=1) / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)
    assert interval(np.array([np.nan]), 0.95) is None


def test_permutations_agree_with_the_t_test_and_count_users_once():
    gains = np.random.default_rng(4).normal(0.15, 1.0, size=200)
    (p,) = permutation_tests(gains[:, None], np.arange(200), seed=1)
    assert p == pytest.approx(stats.ttest_1samp(gains, 0).pvalue, abs=0.02)
    # ten wins of one user are one observation: half of the swaps are as extreme on each side
    same, many = (
        permutation_tests(np.ones((10, 2)), np.zeros(10, dtype=int), 1),
        permutation_tests(np.ones((10, 1)), np.arange(10), 1),
    )
    assert same.tolist() == [1.0, 1.0]
    assert many[0] == pytest.approx(2 / 1024, abs=0.002)
    assert permutation_tests(np.zeros((5, 1)), np.arange(5), 1)[0] == 1.0


def test_the_bootstrap_p_is_never_nothing():
    assert bootstrap_p(np.ones(999)) == pytest.approx(2 / 1000)
    assert bootstrap_p(np.zeros(10)) == 1.0
    assert bootstrap_p(np.array([])) is None
