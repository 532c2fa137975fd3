"""The comparison of rankers: strata, intervals, tests, missing scores."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.schema import SCORE_SCHEMA
from notellm2_ray.core.settings import RankEvaluateSettings
from notellm2_ray.evaluate.ranking.results import MethodScores, evaluate_protocol
from notellm2_ray.evaluate.ranking.task import RankingTask
from tests.support.ranking_task import clicks, noisy, tables

SETTINGS = RankEvaluateSettings(cutoffs=(1, 3))


@pytest.fixture(scope="module")
def task():
    return RankingTask.build("uniform", *tables(), clicks())


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
    results = evaluate_protocol(task, methods, SETTINGS, seed=42)
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
    second = max(set(by_name) - {"mllm_msr"}, key=lambda name: by_name[name]["all"]["auc"]["mean"])
    best = max(("random", "popularity"), key=lambda name: by_name[name]["all"]["auc"]["mean"])
    assert set(found) == {
        ("mllm_msr", second, "best other"),
        *((name, best, "best baseline") for name in ("mllm_msr", "direct", "mllm_msr, shuffled image")),
        *((name, other, "baseline") for name in ("mllm_msr", "direct") for other in ("random", "popularity")),
        ("mllm_msr", "direct", "ablation"),
        ("mllm_msr", "mllm_msr, shuffled image", "control"),
    }
    assert found["mllm_msr", "direct", "ablation"]["significant"]
    assert found["mllm_msr", "direct", "ablation"]["seeds_test"] == "Welch's t-test"
    assert evaluate_protocol(task, methods, SETTINGS, seed=42) == results
    first = found["mllm_msr", second, "best other"]
    assert first["p"] == max(first["p_seeds"], first["p_units"]) <= first["p_holm"]


def test_seeds_may_have_candidates_of_their_own(task):
    order = np.concatenate([start + np.roll(np.arange(6), 1) for start in range(0, len(task.groups), 6)])
    moved = replace(task, note_ids=task.note_ids[order], labels=task.labels[order])
    scores = noisy(task, 1.0, 1)
    both = [MethodScores("x", "ranker", {1: scores, 2: scores[order]})]
    (row,) = evaluate_protocol(task, both, SETTINGS, 1, drawn={2: moved})["rows"]
    first, second = row["figures"]["all"]["auc"]["seeds"].values()
    assert first == pytest.approx(second)
    fewer = RankingTask.build("uniform", *tables(59), clicks())
    with pytest.raises(DataError, match="seed 2 has candidates of other examples"):
        evaluate_protocol(task, both, SETTINGS, 1, drawn={2: fewer})


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
